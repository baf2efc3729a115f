"""Scenario 8: a thousand sockets that drip a byte a second take every place, and lose it at their deadline."""

from __future__ import annotations

import socket
from contextlib import suppress
from functools import partial
from typing import Any

import trio
from served import FRAMING, Raw, serving
from trio.testing import MockClock, open_stream_to_socket_listener

from stagetrio.framing import LengthPrefixed
from stagetrio.rules import CloseReason, PeerLimits

DRIPPERS = 1000
GOOD = 50
WIRE = FRAMING.encode(bytes(900))


class Drips:
    """Sockets which each send one byte of a frame per second, for as long as they are let."""

    def __init__(self, streams: list[trio.SocketStream]) -> None:
        self.open = {stream.socket.fileno(): stream for stream in streams}
        self.closed_at: list[float] = []  # seconds after the first byte

    async def run(self) -> None:
        start = trio.current_time()
        for second in range(len(WIRE)):
            for fd, stream in list(self.open.items()):
                if not await self._drip(stream, WIRE[second : second + 1]):
                    del self.open[fd]
                    await trio.aclose_forcefully(stream)
                    self.closed_at.append(trio.current_time() - start)
            await trio.sleep(1)

    async def _drip(self, stream: trio.SocketStream, byte: bytes) -> bool:
        """Whether the connection is still there."""
        with suppress(trio.BrokenResourceError), socket.socket(fileno=stream.socket.fileno()) as sock:
            try:
                data = sock.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                data = b"open"
            except OSError:
                data = b""
            finally:
                sock.detach()
            if data:
                await stream.send_all(byte)
                return True
        return False


async def be_served(connect: Any, served: list[float]) -> None:
    """Ask ten times on one connection, and knock again, a second later, when there is none to be had."""
    begun = trio.current_time()
    answers = 0
    while answers < 10:
        try:
            client = Raw(await connect())
            async with client.stream:
                while answers < 10:
                    await client.send(b"hello")
                    if await client.receive() is None:
                        break
                    answers += 1
                    await trio.sleep(0.1)
        except (OSError, trio.BrokenResourceError):
            pass
        await trio.sleep(1)
    served.append(trio.current_time() - begun)


async def upload(connect: Any, finished: list[int]) -> None:
    """Send one frame of 12,000 bytes at 300 bytes a second: slow, but above the minimum rate."""
    wire = LengthPrefixed(100_000).encode(bytes(12_000))
    async with await connect() as stream:
        for at in range(0, len(wire), 300):
            await stream.send_all(wire[at : at + 300])
            await trio.sleep(1)
        received = 0
        while received < len(wire):
            received += len(await stream.receive_some())
        finished.append(received)


async def test_drips_are_cut_off_at_the_deadline_and_the_good_get_their_places(autojump_clock: MockClock) -> None:
    """All drippers are closed 10 s after their first byte, the honest slow upload is not, everyone else is served."""
    limits = PeerLimits(frame_within=10, min_receive_rate=240, linger=1)
    served: list[float] = []
    finished: list[int] = []
    async with serving("tcp", limits=limits, framing=LengthPrefixed(100_000), max_connections=DRIPPERS + 1) as running:

        async def connect() -> trio.abc.HalfCloseableStream:
            return (await running.connect()).stream

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload, connect, finished)
            await trio.sleep(0.5)
            drips = Drips([(await running.connect()).stream for _ in range(DRIPPERS)])
            async with trio.open_nursery() as visits:
                visits.cancel_scope.deadline = trio.current_time() + 40
                visits.start_soon(drips.run)
                for _ in range(GOOD):
                    visits.start_soon(be_served, connect, served)
        assert len(drips.closed_at) == DRIPPERS
        assert 10 <= min(drips.closed_at) <= max(drips.closed_at) <= 11
        assert finished == [12_004]
        assert len(served) == GOOD
        assert running.server.statistics().closed[CloseReason.SLOW_FRAME] == DRIPPERS


async def test_control_a_timeout_for_each_read_lets_drips_stay_forever(autojump_clock: MockClock) -> None:
    """A plain server that allows 5 s of silence and as many connections serves nobody in 60 s."""
    places = trio.CapacityLimiter(DRIPPERS)

    async def echo(stream: trio.SocketStream) -> None:
        decoder = FRAMING.decoder()
        with suppress(trio.WouldBlock, trio.TooSlowError, trio.BrokenResourceError):
            places.acquire_nowait()
            try:
                while True:
                    with trio.fail_after(5):
                        data = await stream.receive_some()
                    for frame in decoder.receive_data(bytes(data)):
                        await stream.send_all(FRAMING.encode(frame))
                    if not data:
                        break
            finally:
                places.release()
        await stream.aclose()

    served: list[float] = []
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    connect = partial(open_stream_to_socket_listener, listener)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, echo, [listener])
        drips = Drips([await connect() for _ in range(DRIPPERS)])
        while places.borrowed_tokens < DRIPPERS:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(drips.run)
        for _ in range(GOOD):
            nursery.start_soon(be_served, connect, served)
        await trio.sleep(60)
        assert len(drips.open) == DRIPPERS
        assert served == []
        nursery.cancel_scope.cancel()
    for stream in drips.open.values():
        await trio.aclose_forcefully(stream)
