"""A batch is one system call, a broadcast is encoded once, and the last reply arrives whatever was left unread."""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import trio
from served import CODEC, FRAMING, Raw, Say, serving, shout
from trio.testing import wait_all_tasks_blocked

from stagetrio.codec import Codec
from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason

MESSAGES = 50


@contextmanager
def calls_counted(counts: Callable[[FrameType, str, Any], str | None]) -> Iterator[Counter[str]]:
    """Count calls of this thread under the names that ``counts`` gives them, as the interpreter sees them."""
    counted: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and (name := counts(frame, event, argument)) is not None:
            counted[name] += 1

    sys.setprofile(profile)
    try:
        yield counted
    finally:
        sys.setprofile(None)


def socket_calls(port: int) -> Callable[[FrameType, str, Any], str | None]:
    """What counts the system calls that send and receive on the sockets of one port."""

    def name_of(frame: FrameType, event: str, argument: Any) -> str | None:
        sock = getattr(argument, "__self__", None) if event == "c_call" else None
        if isinstance(sock, socket.socket) and argument.__name__ in ("send", "recv") and sock.getsockname()[1] == port:
            return str(argument.__name__)
        return None

    return name_of


async def exchange(client: Raw) -> None:
    await client.send(*[b"%d" % i for i in range(MESSAGES)])
    assert [await client.receive() for _ in range(MESSAGES)] == [b"%d" % i for i in range(MESSAGES)]


async def test_a_batch_is_read_by_one_system_call_and_written_by_one() -> None:
    """Fifty messages that came together are answered together."""
    async with serving("tcp", cost=lambda payload: 1.0) as running:
        client = await running.connect()
        await exchange(client)
        with calls_counted(socket_calls(running.address.port)) as counted:
            await exchange(client)
        assert counted == {"recv": 1, "send": 1}


async def test_control_a_plain_server_makes_a_call_for_each() -> None:
    """The same counting finds what `send_all` after each message costs."""

    async def plain(stream: trio.SocketStream) -> None:
        decoder = FRAMING.decoder()
        while data := await stream.receive_some():
            for payload in decoder.receive_data(bytes(data)):
                await stream.send_all(FRAMING.encode(payload))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, plain, 0)
        port = listeners[0].socket.getsockname()[1]
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            client = Raw(stream)
            await exchange(client)
            with calls_counted(socket_calls(port)) as counted:
                await exchange(client)
        assert counted["send"] == MESSAGES
        nursery.cancel_scope.cancel()


async def test_a_broadcast_is_encoded_once() -> None:
    """However many get it: one call of the codec, one of the framing."""
    codes = {Codec.encode.__code__: "codec", LengthPrefixed.encode.__code__: "framing"}
    async with serving("tcp", shout, codec=CODEC) as running:
        clients = [await running.connect() for _ in range(20)]
        while len(running.server.peers) < len(clients):
            await trio.lowlevel.checkpoint()
        with calls_counted(lambda frame, event, _: codes.get(frame.f_code) if event == "call" else None) as counted:
            running.server.broadcast(Say("news"))
            await wait_all_tasks_blocked(0.01)
        assert counted == {"codec": 1, "framing": 1}
        assert [await client.message() for client in clients] == [Say("news")] * len(clients)


LAST = bytes(1_000_000)  # more than the other side's kernel takes before it reads
WIDE = LengthPrefixed(5_000_000)


async def last_reply(port: int) -> tuple[int, bool]:
    """Ask for the last reply, and send on while it is read; return how much of it came, and whether in peace."""
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    await sock.connect(("127.0.0.1", port))
    async with trio.SocketStream(sock) as stream:
        await stream.send_all(WIDE.encode(b"bye") + WIDE.encode(bytes(1000)))
        await wait_all_tasks_blocked(0.01)
        received = 0
        with suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(WIDE.encode(bytes(1000)))  # nobody is going to ask for it
                data = await stream.receive_some(16384)
                if not data:
                    return received, True
                received += len(data)
        return received, False


async def test_the_last_reply_arrives_though_the_other_side_sent_on() -> None:
    """What comes after the end is read and thrown away, for unread input would make the kernel reset the connection."""

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        await peer.send(LAST)
        peer.close()

    async with serving("tcp", handler, framing=WIDE) as running:
        assert await last_reply(running.address.port) == (len(LAST) + 4, True)
        while running.server.peers:
            await trio.lowlevel.checkpoint()
        assert running.server.statistics().closed == {CloseReason.CLOSED: 1}


async def test_control_closing_with_unread_input_resets_the_connection() -> None:
    """The plain way writes the reply and closes: a reset follows it, and takes with it whatever is still on its way."""

    async def plain(stream: trio.SocketStream) -> None:
        await stream.receive_some(7)
        with suppress(trio.BrokenResourceError):
            await stream.send_all(LAST)
            stream.socket.close()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, plain, 0)
        received, in_peace = await last_reply(listeners[0].socket.getsockname()[1])
        assert not in_peace
        assert received <= len(LAST)
        nursery.cancel_scope.cancel()
