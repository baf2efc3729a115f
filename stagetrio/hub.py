"""All plain sockets of a server, waited for at once, by whoever is about to serve what they bring.

Theory of operation. A task per connection costs Trio a wake-up per segment: an entry in its epoll set, a reschedule,
a task switch. The hub keeps an epoll set of its own, and one task waits, through Trio, for the one descriptor of that
set. When anything is ready it asks the set once and calls back every ready socket in the same pass: the cost of waking
up is shared by all that became ready meanwhile, so it falls as load rises.

The task that waits is the leader of the stage that serves the messages (`stagetrio.stage`), so that between a segment
and the handler of its messages there is no task switch. It may have to look at something else, which `wake` tells: a
descriptor of the set that is readable when there is news (a bell).

The set is level-triggered: a callback reads once and leaves the rest for the next pass, which is what keeps a loud
socket from reading forever while others wait. Callbacks are synchronous and must not block; whoever registers a socket
is its owner and closes it, after `forget`.

What is rejected: edge triggering (every reader would have to drain its socket, the loud ones first), one task per
socket waiting in Trio (the cost above), and a task of the hub's own, which would wake the leader in another pass of
Trio's loop (a tenth of a lone round trip).

Platforms without epoll have no hub (`Hub.available`); servers then use a reader task per connection.

Source: Schmidt et al., "Leader/Followers" (POSA 2), whose leader waits on the set of handles.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from functools import partial

import trio

_READABLE, _WRITABLE = 1, 4  # EPOLLIN and EPOLLOUT
_MAX_EVENTS = 1024  # ready sockets looked at in one pass; the others come first in the next, as epoll rotates


class Hub:
    """Calls back when sockets become readable or writable.

    Cost: an idle socket costs its entry in a dict and in the kernel's set, and no time.
    """

    available = hasattr(select, "epoll")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._descriptor = self._epoll.fileno()
        self._poll = self._epoll.poll
        # {descriptor: (events, on_readable, on_writable)}
        self._watched: dict[int, tuple[int, Callable[[], object], Callable[[], object]]] = {}
        self._waiting = False
        self._woken = False  # there is news since the last `poll`
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watched[self._bell] = (select.EPOLLIN, partial(os.eventfd_read, self._bell), int)
        self._epoll.register(self._bell, select.EPOLLIN)

    async def wait(self) -> None:
        """Wait until `poll` has something to call back, or `wake` has been called since the last one.

        Checkpoints: always.
        """
        if self._woken:
            await trio.lowlevel.checkpoint()
            return
        self._waiting = True
        try:
            await trio.lowlevel.wait_readable(self._descriptor)
        finally:
            self._waiting = False

    def wake(self) -> None:
        """Let the task in `wait` go on, or, if there is none, the next one.

        Cost: one system call if a task waits.
        """
        self._woken = True
        if self._waiting:
            self._waiting = False
            os.eventfd_write(self._bell, 1)

    def poll(self) -> None:
        """Call back every socket that is ready, without waiting.

        What a callback raises comes out of here; the sockets behind it are called back next time.

        Cost: one system call, however many are ready.
        """
        watched = self._watched
        for fd, events in self._poll(0, _MAX_EVENTS):
            entry = watched.get(fd)
            if entry is None:
                continue
            if events & ~_WRITABLE and entry[0] & _READABLE:  # or an error or a hang-up, which reading reveals
                entry[1]()
            if events & ~_READABLE:  # or an error, which writing reveals
                entry = watched.get(fd)
                if entry is not None and entry[0] & _WRITABLE:
                    entry[2]()
        self._woken = False

    def watch(self, sock: socket.socket, on_readable: Callable[[], object], on_writable: Callable[[], object]) -> None:
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
        """Give the descriptors back; sockets still watched stay open."""
        self._watched.clear()
        os.close(self._bell)
        trio.lowlevel.notify_closing(self._descriptor)
        self._epoll.close()
