"""A server under test over real sockets or streams, and clients that speak in any bytes they like."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import attrs
import trio

from stagetrio.codec import Codec
from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason
from stagetrio.server import StageServer, serve_stage
from stagetrio.sockets import address_of, connect, open_listeners

FRAMING = LengthPrefixed(1000)


@attrs.frozen
class Say:
    text: str


CODEC: Codec[Any] = Codec([Say])


class Raw:
    """A client that speaks in frames, or in any bytes it likes."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._decoder = FRAMING.decoder()
        self._frames: list[bytes] = []

    async def send(self, *payloads: bytes) -> None:
        await self.stream.send_all(b"".join(FRAMING.encode(payload) for payload in payloads))

    async def receive(self) -> bytes | None:
        """Return the next frame, or None at the end of the connection."""
        while not self._frames:
            data = await self.stream.receive_some()
            if not data:
                return None
            self._frames = self._decoder.receive_data(bytes(data))
        return self._frames.pop(0)

    async def receive_all(self) -> list[bytes]:
        frames = []
        while (frame := await self.receive()) is not None:
            frames.append(frame)
        return frames

    async def message(self) -> Any:
        frame = await self.receive()
        return None if frame is None else CODEC.decode(frame)[0]


class StreamListener(trio.abc.Listener[trio.abc.Stream]):
    """Connections which the server cannot know to be sockets, so that they go the way of streams."""

    def __init__(self) -> None:
        self._connect, self._accept = trio.open_memory_channel[trio.abc.Stream](10)

    async def accept(self) -> trio.abc.Stream:
        return await self._accept.receive()

    async def aclose(self) -> None:
        await self._accept.aclose()

    async def connect(self) -> trio.SocketStream:
        ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in socket.socketpair())
        try:
            await self._connect.send(trio.StapledStream(theirs, theirs))
        except trio.BrokenResourceError:
            ours.socket.close()
            theirs.socket.close()
            raise
        return ours


@attrs.frozen
class Running:
    """A server under test and the ways to it."""

    server: StageServer[Any]
    connect: Callable[[], Any]
    address: Any


async def echo(peer: Peer[bytes], message: bytes) -> bytes:
    return message


async def shout(peer: Peer[Any], message: Any) -> Any:
    return Say(message.text.upper())


@asynccontextmanager
async def serving(
    kind: str,
    handler: Any = echo,
    *,
    address: str = "tcp://127.0.0.1:0",
    backlog: int = 1024,
    keep: bool = True,
    wrap: Callable[[trio.abc.Listener[Any]], trio.abc.Listener[Any]] | None = None,
    **options: Any,
) -> AsyncIterator[Running]:
    """Run a server over TCP sockets in the hub, or over streams with tasks of their own; ``wrap`` its listener.

    What was dialled is closed at the end; without ``keep`` that is its user's task.
    """
    options = {"framing": FRAMING, **options}
    dialled: list[trio.SocketStream] = []
    async with trio.open_nursery() as nursery:
        if kind == "tcp":
            listeners: Any = await open_listeners(address, backlog=backlog)
            where: Any = address_of(listeners[0].socket)
            connection = partial(connect, where)
        else:
            listeners, where = [StreamListener()], None
            connection = listeners[0].connect
        if wrap is not None:
            listeners = [wrap(listeners[0])]
        server = await nursery.start(partial(serve_stage, handler, listeners, **options))

        async def dial() -> Raw:
            stream = await connection()
            if keep:
                dialled.append(stream)
            return Raw(stream)

        try:
            yield Running(server, dial, where)
        finally:
            for stream in dialled:
                await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


async def closed_by(running: Running, reason: CloseReason) -> None:
    """Wait until the server has closed every connection, and check why it closed the last."""
    while running.server.peers:
        await trio.lowlevel.checkpoint()
    assert running.server.statistics().closed.get(reason, 0) >= 1
