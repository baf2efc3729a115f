"""How output leaves: in pieces, so that what is held is bounded and a slow reader is seen to read."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf

import trio
from served import serving
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked

from stagetrio.framing import LengthPrefixed
from stagetrio.outbox import PIECE, Outbox
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.server import StageServer, serve_stage
from stagetrio.transport import IN_HAND, SLICE, StreamTransport

SIZE = 400_000


class OneStream(trio.abc.Listener[trio.abc.Stream]):
    """A listener of one connection, whose stream takes bytes only as they are read."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._streams = [stream]

    async def accept(self) -> trio.abc.Stream:
        if not self._streams:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return self._streams.pop()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def answering(limits: PeerLimits) -> AsyncIterator[tuple[StageServer[bytes], trio.abc.Stream]]:
    """A server whose answer is far more than one reads at once, and the other end of its stream."""
    framing = LengthPrefixed(SIZE)
    ours, theirs = lockstep_stream_pair()

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        return bytes(SIZE)

    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[StageServer[bytes]]) -> None:
            await serve_stage(handler, [OneStream(theirs)], framing=framing, limits=limits, task_status=task_status)

        server = await nursery.start(serve)
        await ours.send_all(framing.encode(b"more"))
        yield server, ours
        nursery.cancel_scope.cancel()


async def test_a_slow_but_honest_reader_of_a_large_answer_stays(autojump_clock: MockClock) -> None:
    """It reads at twice the least rate, and would need minutes for what is under way."""
    async with answering(PeerLimits(send_grace=5, min_send_rate=240, idle_within=inf)) as (server, stream):
        for _ in range(120):
            await trio.sleep(1)
            assert await stream.receive_some(512)
        assert server.statistics().closed == {}


async def test_control_who_reads_slower_than_the_least_rate_is_cut_off(autojump_clock: MockClock) -> None:
    """However many bytes it reads in all."""
    async with answering(PeerLimits(send_grace=5, min_send_rate=240, idle_within=inf)) as (server, stream):
        for _ in range(30):
            await trio.sleep(1)
            if server.statistics().closed:
                break
            await stream.receive_some(20)
        assert server.statistics().closed == {CloseReason.SLOW_READER: 1}


async def test_a_stream_has_no_more_in_hand_than_a_piece() -> None:
    """And tells of it as it goes, so that the bound of an outbox is not doubled behind its back."""
    ours, theirs = lockstep_stream_pair()
    transport = StreamTransport(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transport.run)
        transport.start(lambda data: None, lambda error: None, lambda: None)
        assert transport.write(bytes(SIZE)) == IN_HAND
        assert transport.write(b"more") == 0
        for read in range(SLICE, IN_HAND, SLICE):
            assert len(await ours.receive_some(SLICE)) == SLICE
            await wait_all_tasks_blocked()
            assert transport.unacknowledged() == IN_HAND - read
        assert transport.busy
        assert len(await ours.receive_some(SLICE)) == SLICE
        await wait_all_tasks_blocked()
        assert not transport.busy
        assert transport.write(b"more") == 4
        transport.close()


def test_much_output_is_not_joined_again_for_each_little_that_is_taken() -> None:
    """What is copied for one write is bounded, and nothing is lost or turned round by that."""
    outbox = Outbox()
    frames = [bytes([number]) * 100_000 for number in range(50)]
    for frame in frames:
        outbox.put(frame)
    written = b""
    while outbox.size:
        piece = outbox.joined()
        assert len(piece) < PIECE + 100_000
        written += piece[:70_001]
        outbox.written(min(70_001, len(piece)))
    assert written == b"".join(frames)


async def test_much_output_leaves_piece_by_piece_without_waiting_for_a_sign() -> None:
    """What the kernel takes whole is followed by the next piece at once, as nothing would ask for it."""
    framing = LengthPrefixed(PIECE)

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        for _ in range(20):
            peer.send_nowait(bytes(PIECE // 4))

    limits = PeerLimits(max_outbox_bytes=20 * PIECE)
    async with serving("tcp", handler, framing=framing, limits=limits) as running:
        client = await running.connect()
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100 * PIECE)
        await client.send(b"go")
        left = 20 * (PIECE // 4 + 4)
        with trio.fail_after(60):
            while left:
                left -= len(await client.stream.receive_some())
