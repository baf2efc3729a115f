"""The two ways in which bytes reach a peer: a plain socket watched by the hub, or a stream with tasks of its own.

Both are the same to their owner, and synchronous: bytes are handed over as they come, and written as far as there is
room. `HubTransport` is the fast one and serves TCP and Unix sockets; `StreamTransport` serves everything else that is
a `trio.abc.Stream`: TLS, memory streams in tests, platforms without epoll.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from struct import Struct
from typing import Protocol

import trio

from stagetrio.hub import Hub

if sys.platform != "win32":
    import fcntl
    import termios

_INT = Struct("i")
READ_SIZE = 65536  # bytes; more makes the allocator map memory for each read, which costs more than the read

IN_HAND = 65536  # bytes of output that a stream is given at once, beside what waits in the outbox
# How a stream gets on can be seen only between two calls of `send_all`. So a call has no more bytes than a reader just
# fast enough reads while it is judged: 240 a second for 5 s by default.
SLICE = 1024

OnData = Callable[[bytes], None]
OnEnd = Callable[[OSError | None], None]
OnWritable = Callable[[], None]


class HandshakeFailed(ConnectionError):
    """A connection ended before both sides had agreed on how to speak."""


class Transport(Protocol):
    """Bytes to and from one peer."""

    def start(self, on_data: OnData, on_end: OnEnd, on_writable: OnWritable) -> None:
        """Begin to read.

        Args:
            on_data: Called with bytes that came, never empty ones.
            on_end: Called when no more will come: with None after an orderly end, else with the error; an error may
                follow an orderly end, if output is lost.
            on_writable: Called when `write` has room again after it did not take everything.
        """

    def write(self, data: bytes) -> int:
        """Return how many bytes were taken; ``on_writable`` follows when there were fewer than given.

        Raises:
            OSError: The connection is gone.
        """

    @property
    def busy(self) -> bool:
        """Whether bytes taken by `write` are still here; ``on_writable`` follows when they are gone."""

    def unacknowledged(self) -> int:
        """Return how many of the bytes taken by `write` the other side's kernel has not, as far as can be told."""

    def pause(self) -> None:
        """Leave further input to the kernel."""

    def resume(self) -> None:
        """Read again."""

    def end_output(self) -> None:
        """Tell the other side that no more will come; what was taken by `write` still arrives."""

    def close(self) -> None:
        """Give everything back at once."""


class HubTransport:
    """A plain socket in the hub's set."""

    __slots__ = ("_hub", "_on_data", "_on_end", "_on_writable", "_reading", "_recv", "_send", "_sock", "_writing")

    def __init__(self, sock: socket.socket, hub: Hub) -> None:
        self._sock = sock
        self._hub = hub
        self._recv = sock.recv
        self._send = sock.send
        self._reading = True
        self._writing = False

    def start(self, on_data: OnData, on_end: OnEnd, on_writable: OnWritable) -> None:
        self._on_data, self._on_end, self._on_writable = on_data, on_end, on_writable
        self._hub.watch(self._sock, self._readable, self._writable)

    def _readable(self) -> None:
        try:
            data = self._recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.pause()
            self._on_end(error)
            return
        if data:
            self._on_data(data)
        else:
            self.pause()
            self._on_end(None)

    def _writable(self) -> None:
        self._writing = False
        self._watch()
        self._on_writable()

    def write(self, data: bytes) -> int:
        try:
            sent = self._send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        if sent < len(data):
            self._writing = True
            self._watch()
        return sent

    @property
    def busy(self) -> bool:
        return False

    def unacknowledged(self) -> int:
        if sys.platform == "win32":
            return 0
        (pending,) = _INT.unpack(fcntl.ioctl(self._sock, termios.TIOCOUTQ, _INT.pack(0)))
        return int(pending)

    def pause(self) -> None:
        self._reading = False
        self._watch()

    def resume(self) -> None:
        self._reading = True
        self._watch()

    def _watch(self) -> None:
        self._hub.want(self._sock, read=self._reading, write=self._writing)

    def end_output(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._hub.forget(self._sock)
        self._sock.close()
        self._on_data = self._on_end = self._on_writable = _nobody  # so that nothing is left for the garbage collector


def _nobody(*_: object) -> None:
    """The owner has closed and hears no more."""


class StreamTransport:
    """A stream, read and written by two tasks in `run`."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._may_read = trio.Event()
        self._output = b""  # what the writer has in hand
        self._sent = 0  # bytes of it which the stream has taken
        self._ending = False
        self._has_output = trio.Event()
        self._scope = trio.CancelScope()

    def start(self, on_data: OnData, on_end: OnEnd, on_writable: OnWritable) -> None:
        self._on_data, self._on_end, self._on_writable = on_data, on_end, on_writable
        self._may_read.set()

    async def run(self) -> None:
        """Carry bytes until `close`, and then close the stream; run it in the connection's nursery.

        Checkpoints: throughout. A cancellation closes the stream without ceremony.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._read)
        finally:
            await trio.aclose_forcefully(self._stream)

    async def _read(self) -> None:
        error: OSError | None = None
        await self._may_read.wait()
        try:
            while data := await self._stream.receive_some(READ_SIZE):
                self._on_data(bytes(data))
                await self._may_read.wait()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            error = ConnectionResetError("the stream broke")
        self._on_end(error)

    async def _write(self) -> None:
        while True:
            await self._has_output.wait()
            self._has_output = trio.Event()
            try:
                if self._output:
                    await self._send()
                elif self._ending:
                    if isinstance(self._stream, trio.abc.HalfCloseableStream):
                        await self._stream.send_eof()
                    return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self._on_end(ConnectionResetError("the stream broke"))  # the reader may have seen an orderly end before
                return
            self._output = b""
            if self._ending:
                self._has_output.set()
            self._on_writable()

    async def _send(self) -> None:
        while self._sent < len(self._output):
            part = self._output[self._sent : self._sent + SLICE]
            await self._stream.send_all(part)
            self._sent += len(part)

    def write(self, data: bytes) -> int:
        if self._output:
            return 0
        self._output = data[:IN_HAND]
        self._sent = 0
        self._has_output.set()
        return len(self._output)

    @property
    def busy(self) -> bool:
        return bool(self._output)

    def unacknowledged(self) -> int:
        return len(self._output) - self._sent

    def pause(self) -> None:
        if self._may_read.is_set():
            self._may_read = trio.Event()

    def resume(self) -> None:
        self._may_read.set()

    def end_output(self) -> None:
        self._ending = True
        self._has_output.set()

    def close(self) -> None:
        self._scope.cancel()
