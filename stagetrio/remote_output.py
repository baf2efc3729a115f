"""The output of one connection: what is said within one scheduler pass leaves in one write.

Theory of operation. Frames are collected in a list. On a real socket, `flush` joins them and hands them to the kernel
at once, without blocking; what the kernel does not take, and everything on other streams, is left to the writer task
(`run`), which is woken once and then sends whatever has come together by its turn. Only one of the two ever writes:
while the writer task is in the middle of a send, `flush` does nothing, because the writer looks again when it is
through.

Nothing here waits but `room` and the writer, so whoever has something to say can say it from any place, and a
cancelled caller never leaves half a frame on the wire. The bound is kept by those who produce: they wait for `room`
before they say more, so the list holds ``max_bytes`` and one frame of each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import trio

_REAL_SOCKETS = "trio._socket"  # where the class of trio's own sockets lives; a simulated one comes from elsewhere


class Output:
    """Frames on their way to the other side.

    Args:
        stream: Where they go; nobody else may send on it.
        max_bytes: How much may be collected before `room` makes producers wait.
        on_broken: Called once, when the other side turns out to take nothing any more; it must not raise.
    """

    def __init__(self, stream: trio.abc.Stream, max_bytes: int, on_broken: Callable[[], object]) -> None:
        self._stream = stream
        self._on_broken = on_broken
        self._max_bytes = max_bytes
        self._frames: list[bytes] = []
        self._size = 0
        self._sending = False
        self._sleeper: trio.lowlevel.Task | None = None  # the writer task, when it waits for frames
        self._waiting_for_room = trio.lowlevel.ParkingLot()
        self._socket = _real_socket(stream)
        self.broken = False

    @property
    def full(self) -> bool:
        """Whether producers have to wait."""
        return self._size >= self._max_bytes and not self.broken

    def add(self, frame: bytes) -> None:
        """Take a frame; it leaves with the next flush. Dropped when the other side is known to be gone."""
        if not self.broken:
            self._frames.append(frame)
            self._size += len(frame)

    def flush_soon(self) -> None:
        """Send what has been collected after this scheduler pass, with all that this pass still brings."""
        if self._sleeper is not None:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None

    def flush(self) -> None:
        """Send what has been collected: now if the kernel takes it, else by the writer task."""
        if not self._frames or self._sending:
            return
        if self._socket is None:
            self.flush_soon()
            return
        data = self._take()
        try:
            sent = os.write(self._socket.fileno(), data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._break()
            return
        if sent < len(data):
            self._frames.append(data[sent:])
            self._size = len(data) - sent
            self.flush_soon()
        elif self._waiting_for_room:
            self._waiting_for_room.unpark_all()

    async def room(self) -> None:
        """Wait until no more than ``max_bytes`` are waiting to be sent, or the other side is gone.

        Checkpoints: only where it has to wait.
        """
        while self.full:
            await self._waiting_for_room.park()

    async def run(self) -> NoReturn:
        """Be the writer task, until cancelled."""
        while True:
            if not self._frames:
                await self._sleep()
                continue
            data = self._take()
            self._sending = True
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._break()
            finally:
                self._sending = False
            self._waiting_for_room.unpark_all()

    def lift_bound(self) -> None:
        """Make nobody wait any longer: the connection is ending, and its producers with it."""
        self._max_bytes = sys.maxsize
        self._waiting_for_room.unpark_all()

    async def drained(self) -> None:
        """Wait until everything has been handed to the stream, or the other side is gone.

        Checkpoints: at least once.
        """
        await trio.lowlevel.checkpoint()
        while (self._frames or self._sending) and not self.broken:
            self.flush_soon()
            await self._waiting_for_room.park()

    def _take(self) -> bytes:
        data = self._frames[0] if len(self._frames) == 1 else b"".join(self._frames)
        self._frames.clear()
        self._size = 0
        return data

    async def _sleep(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _break(self) -> None:
        self.broken = True
        self._frames.clear()
        self._size = 0
        self._waiting_for_room.unpark_all()
        self._on_broken()


def _real_socket(stream: trio.abc.Stream) -> trio.socket.SocketType | None:
    """Return the socket under a stream where the kernel stands right behind it."""
    if os.name == "posix" and isinstance(stream, trio.SocketStream) and type(stream.socket).__module__ == _REAL_SOCKETS:
        return stream.socket
    return None
