"""The other end of a server's connection: ask and be answered, send, and listen.

Synopsis::

    async with open_client("tcp://127.0.0.1:8800", app.codec) as client:
        welcome = await client.ask(Login("ada"))
        await client.send(Say("hello"))
        async for message in client:
            print(message)
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import trio

from stagetrio.amounts import check_amount
from stagetrio.backstage import open_backstage
from stagetrio.codec import Closed, Codec, Failed, Refused
from stagetrio.framing import Framing, LengthPrefixed, ProtocolError
from stagetrio.limiter import Overloaded
from stagetrio.sockets import Address, connect_stream

READ_SIZE = 65536  # bytes


class RequestFailed(Exception):
    """The server's handler did not come to a reply; the message is what the server says about it."""


class _Call:
    """A message that waits for its reply."""

    __slots__ = ("answered", "reply")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.reply: Any = None


class Client:
    """One connection to a server; made by `open_client`. Iterating over it gives what the server sends unasked."""

    def __init__(self, stream: trio.abc.Stream, codec: Codec[Any], framing: Framing, max_pushed: float) -> None:
        self._stream = stream
        self._codec = codec
        self._framing = framing
        self._sending = trio.Lock()
        self._ids = count(1)
        self._calls: dict[int, _Call] = {}
        self._push, self._pushed = trio.open_memory_channel[Any](max_pushed)
        self._close_reason: str | None = None

    @property
    def close_reason(self) -> str | None:
        """Why the connection ended, in the server's words where it had some; None while it is open."""
        return self._close_reason

    async def ask(self, message: Any) -> Any:
        """Send a message and return the reply to it. Many tasks may ask at once.

        Raises:
            Overloaded: The server refused the message.
            RequestFailed: The server's handler failed.
            trio.BrokenResourceError: The connection ended; whether the message was handled is not known.

        Checkpoints: always. A cancelled call may have been handled; its reply is thrown away.
        """
        id = next(self._ids)
        call = self._calls[id] = _Call()
        try:
            await self._send(self._framing.encode(self._codec.encode(message, id)))
            await call.answered.wait()
        finally:
            self._calls.pop(id, None)
        if call.reply is None:
            raise trio.BrokenResourceError(self._close_reason)
        if isinstance(call.reply, Refused):
            raise Overloaded(call.reply.reason, call.reply.retry_after)
        if isinstance(call.reply, Failed):
            raise RequestFailed(call.reply.error)
        return call.reply

    async def send(self, message: Any) -> None:
        """Send a message to which no reply is wanted.

        Raises:
            trio.BrokenResourceError: The connection has ended.

        Checkpoints: always. A cancellation may have sent a part of the message, and then the connection ends.
        """
        await self._send(self._framing.encode(self._codec.encode(message)))

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._pushed.__aiter__()

    async def receive(self) -> Any:
        """Return the next message that the server sent unasked.

        Raises:
            trio.EndOfChannel: The connection has ended.

        Checkpoints: always; cancelled, no message is lost.
        """
        return await self._pushed.receive()

    async def _send(self, frame: bytes) -> None:
        async with self._sending:
            if self._close_reason is not None:
                raise trio.BrokenResourceError(self._close_reason)
            whole = False
            try:
                await self._stream.send_all(frame)
                whole = True
            finally:
                if not whole and self._close_reason is None:
                    self._close_reason = "a send was interrupted"
                    await trio.aclose_forcefully(self._stream)

    async def run(self) -> None:
        """Read until the connection ends."""
        reason = "the server closed the connection"
        decoder = self._framing.decoder()
        try:
            while data := await self._stream.receive_some(READ_SIZE):
                for payload in decoder.receive_data(bytes(data)):
                    message, id = self._codec.decode(payload)
                    if isinstance(message, Closed):
                        reason = message.reason
                    elif id is None:
                        await self._push.send(message)
                    elif (call := self._calls.pop(id, None)) is not None:
                        call.reply = message
                        call.answered.set()
            decoder.receive_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            reason = "the connection was lost"
        except ProtocolError as error:
            reason = error.reason
        finally:
            self._close_reason = self._close_reason or reason
            self._push.close()
            for call in self._calls.values():
                call.answered.set()
            await trio.aclose_forcefully(self._stream)


@asynccontextmanager
async def open_client(
    address: str | Address | trio.abc.Stream,
    codec: Codec[Any],
    *,
    framing: Framing | None = None,
    ssl_context: ssl.SSLContext | None = None,
    max_pushed: float = 1000,
) -> AsyncIterator[Client]:
    """Connect to a server.

    Args:
        address: Where it listens, or a stream that leads there.
        codec: The messages both sides know.
        framing: How they lie on the wire; by default `LengthPrefixed` with up to 1 MiB.
        ssl_context: Speak TLS with it; ``ssl.create_default_context()`` checks the host's name. For addresses only.
        max_pushed: Messages sent unasked that may wait to be received; with more, nothing is read, replies included.

    Raises:
        ValueError, TypeError: An argument makes no sense; it is named.
        OSError: Nobody listens there.
        trio.BrokenResourceError: They could not agree on how to speak TLS; its cause says why.

    Checkpoints: on entry. Leaving the block closes the connection.
    """
    if not isinstance(codec, Codec):
        raise TypeError(f"codec must be a Codec, not {codec!r}")
    check_amount("max_pushed", max_pushed)
    if not isinstance(address, trio.abc.Stream):
        stream = await connect_stream(address, ssl_context)
    elif ssl_context is None:
        stream = address
    else:
        raise ValueError(f"ssl_context must be None for a stream, such as {address!r}: wrap it in a trio.SSLStream")
    if isinstance(stream, trio.SSLStream):
        await _shake_hands(stream)
    client = Client(stream, codec, LengthPrefixed(1 << 20) if framing is None else framing, max_pushed)
    async with open_backstage() as nursery:
        nursery.start_soon(client.run)
        yield client


async def _shake_hands(stream: trio.SSLStream[Any]) -> None:
    """Have the handshake before two tasks want it: if it fails, Trio tells the one that made it and not the other."""
    try:
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
