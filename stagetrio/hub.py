"""One task that waits for all plain sockets at once.

Theory of operation. A task per connection costs Trio a wake-up per segment: an entry in its epoll set, a reschedule,
a task switch. The hub keeps an epoll set of its own and waits, through Trio, for the one descriptor of that set. When
anything is ready it asks the set once and calls back every ready socket in the same pass: the cost of waking up is
shared by all that became ready meanwhile, so it falls as load rises.

The set is level-triggered: a callback reads once and leaves the rest for the next pass, which is what keeps a loud
socket from reading forever while others wait. Callbacks are synchronous, must not block and must not raise; whoever
registers a socket is its owner and closes it, after `forget`.

What is rejected: edge triggering (every reader would have to drain its socket, the loud ones first), and one task per
socket waiting in Trio (the cost above). The idea is the reactor of the leader/followers pattern.

Platforms without epoll have no hub (`Hub.available`); servers then use a reader task per connection.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

import trio

_MAX_EVENTS = 1024  # ready sockets looked at in one pass; the others come first in the next, as epoll rotates


class Hub:
    """Calls back when sockets become readable or writable.

    Cost: an idle socket costs its entry in a dict and in the kernel's set, and no time.
    """

    available = hasattr(select, "epoll")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        # {descriptor: (events, on_readable, on_writable)}
        self._watched: dict[int, tuple[int, Callable[[], None], Callable[[], None]]] = {}

    async def run(self) -> None:
        """Call back until cancelled; run it in a nursery of the owner's.

        Checkpoints: in every pass.
        """
        descriptor = self._epoll.fileno()
        poll, watched = self._epoll.poll, self._watched
        readable, writable = select.EPOLLIN, select.EPOLLOUT
        other = ~writable
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            for fd, events in poll(0, _MAX_EVENTS):
                if events & other:  # readable, or an error or a hang-up, which reading reveals
                    entry = watched.get(fd)
                    if entry is not None and entry[0] & readable:
                        entry[1]()
                if events & ~readable:  # writable, or an error, which writing reveals
                    entry = watched.get(fd)
                    if entry is not None and entry[0] & writable:
                        entry[2]()

    def watch(self, sock: socket.socket, on_readable: Callable[[], None], on_writable: Callable[[], None]) -> None:
        """Begin to watch a non-blocking socket for input."""
        self._watched[sock.fileno()] = (select.EPOLLIN, on_readable, on_writable)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def want(self, sock: socket.socket, *, read: bool, write: bool) -> None:
        """Change what a watched socket is watched for.

        A socket watched for neither leaves the kernel's set: it would go on reporting a hang-up in every pass.

        Cost: one system call if something changes.
        """
        fd = sock.fileno()
        old, on_readable, on_writable = self._watched[fd]
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        if events == old:
            return
        self._watched[fd] = (events, on_readable, on_writable)
        if not old:
            self._epoll.register(fd, events)
        elif not events:
            self._epoll.unregister(fd)
        else:
            self._epoll.modify(fd, events)

    def forget(self, sock: socket.socket) -> None:
        """Stop watching a socket; call it before the socket is closed."""
        entry = self._watched.pop(sock.fileno(), None)
        if entry is not None and entry[0]:
            self._epoll.unregister(sock.fileno())

    def close(self) -> None:
        """Give the descriptor back; sockets still watched stay open."""
        self._watched.clear()
        trio.lowlevel.notify_closing(self._epoll.fileno())
        self._epoll.close()
