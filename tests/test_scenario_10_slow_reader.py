"""Scenario 10: one client reads a kilobyte a second, 99 keep up; the news go to all of them."""

from __future__ import annotations

import socket
from contextlib import suppress

import trio
from served import serving
from trio.testing import MockClock

from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.server import StageServer
from stagetrio.sockets import TcpAddress

FAST = 99
NEWS = 300  # ten a second
BODY = bytes(10_000)
BOUND = 50_000  # bytes
FRAMING = LengthPrefixed(20_000)


async def read_all(stream: trio.SocketStream, numbers: list[int]) -> None:
    decoder = FRAMING.decoder()
    with suppress(trio.BrokenResourceError):
        while data := await stream.receive_some():
            numbers.extend(int.from_bytes(frame[:4], "big") for frame in decoder.receive_data(bytes(data)))


async def read_slowly(stream: trio.SocketStream, cut_off: list[float]) -> None:
    start = trio.current_time()
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(1000):  # noqa: ASYNC110 - this is what makes it slow
            await trio.sleep(1)
    cut_off.append(trio.current_time() - start)


async def connect_slow(address: TcpAddress) -> trio.SocketStream:
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read stays with the server
    await sock.connect((address.host, address.port))
    return trio.SocketStream(sock)


async def test_a_slow_reader_is_cut_off_and_nobody_notices(autojump_clock: MockClock) -> None:
    """What is held for it stays within the bound, the others get all news in order, it is closed for its rate."""
    limits = PeerLimits(max_outbox_bytes=BOUND, min_send_rate=5000, send_grace=5, first_frame_within=1000)
    cut_off: list[float] = []
    received: list[list[int]] = [[] for _ in range(FAST)]
    most = 0

    def watch(server: StageServer[bytes]) -> None:
        nonlocal most
        most = max([most, *(peer.statistics().outbox_bytes for peer in server.peers)])

    async with serving("tcp", framing=FRAMING, limits=limits, wrap=_with_small_buffers) as running:
        async with trio.open_nursery() as nursery:
            slow = await connect_slow(running.address)
            nursery.start_soon(read_slowly, slow, cut_off)
            for numbers in received:
                nursery.start_soon(read_all, (await running.connect()).stream, numbers)
            while len(running.server.peers) < FAST + 1:
                await trio.lowlevel.checkpoint()
            for i in range(NEWS):
                running.server.broadcast(i.to_bytes(4, "big") + BODY)
                watch(running.server)
                await trio.sleep(0.1)
            peers = running.server.peers
            assert len(peers) == FAST
            for peer in peers:
                peer.close()
        assert received == [list(range(NEWS))] * FAST
        assert BOUND / 2 < most <= BOUND + len(BODY) + 8
        assert running.server.statistics().closed[CloseReason.SLOW_READER] == 1
        await slow.aclose()


def _with_small_buffers(listener: trio.SocketListener) -> trio.SocketListener:
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    return listener


async def test_control_sending_to_one_after_the_other_lets_one_stop_all(autojump_clock: MockClock) -> None:
    """The plain way waits for the slow one: in the same time the others get a small part of the news."""
    received: list[list[int]] = [[] for _ in range(FAST)]
    streams: list[trio.SocketStream] = []

    async def keep(stream: trio.SocketStream) -> None:
        streams.append(stream)
        await trio.sleep_forever()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    _with_small_buffers(listener)
    address = TcpAddress("127.0.0.1", listener.socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, keep, [listener])
        slow = await connect_slow(address)
        clients = [slow]
        nursery.start_soon(read_slowly, slow, [])
        for numbers in received:
            client = await trio.open_tcp_stream(address.host, address.port)
            clients.append(client)
            nursery.start_soon(read_all, client, numbers)
        while len(streams) < FAST + 1:
            await trio.lowlevel.checkpoint()
        with trio.move_on_after(NEWS * 0.1):
            for i in range(NEWS):
                for stream in streams:
                    await stream.send_all(FRAMING.encode(i.to_bytes(4, "big") + BODY))
                await trio.sleep(0.1)
        assert max(len(numbers) for numbers in received) < NEWS / 3
        nursery.cancel_scope.cancel()
    for stream in (*clients, *streams):
        await trio.aclose_forcefully(stream)


async def test_the_news_of_a_slow_reader_are_the_latest(autojump_clock: MockClock) -> None:
    """With a key it is told less often instead of later and later, and is not cut off while it reads enough."""
    limits = PeerLimits(max_outbox_bytes=BOUND, min_send_rate=100, send_grace=5, first_frame_within=1000)
    numbers: list[int] = []
    peers: list[Peer[bytes]] = []

    async def on_connect(peer: Peer[bytes]) -> None:
        peers.append(peer)

    async with serving(
        "tcp", framing=FRAMING, limits=limits, wrap=_with_small_buffers, on_connect=on_connect
    ) as running:
        slow = await connect_slow(running.address)
        while not peers:
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            for i in range(NEWS):
                peers[0].send_nowait(i.to_bytes(4, "big") + BODY, key="news")
                await trio.lowlevel.checkpoint()
            assert peers[0].statistics().outbox_bytes <= 2 * (len(BODY) + 8)
            nursery.start_soon(read_all, slow, numbers)
            await trio.sleep(1)
            peers[0].close()
        await slow.aclose()
        assert numbers == sorted(numbers)
        assert numbers[-1] == NEWS - 1
        assert len(numbers) + running.server.statistics().coalesced == NEWS
