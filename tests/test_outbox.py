"""What a peer does not read is bounded by policy, replies are never lost, and frames stay whole."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from served import FRAMING, Raw, serving
from trio.testing import wait_all_tasks_blocked

from stagetrio.limiter import Overloaded
from stagetrio.outbox import Outbox, WhenFull
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits


def test_what_is_written_leaves_in_order_and_the_rest_stays() -> None:
    """However many bytes the socket takes, the next write begins where it ended."""
    outbox = Outbox()
    for frame in (b"one", b"two", b"three"):
        outbox.put(frame)
    outbox.written(4)
    assert (outbox.joined(), outbox.size) == (b"wothree", 7)
    outbox.written(2)
    assert outbox.joined() == b"three"
    outbox.written(5)
    assert (outbox.joined(), outbox.size) == (b"", 0)


def test_the_oldest_pushed_frames_make_room() -> None:
    """Replies stay, and so does the frame of which a part has been written."""
    outbox = Outbox()
    outbox.push(b"begun")
    outbox.put(b"reply")
    outbox.push(b"old")
    outbox.push(b"new")
    outbox.written(2)
    assert outbox.drop_oldest(13)
    assert (outbox.joined(), outbox.size, outbox.dropped) == (b"gunreplynew", 11, 1)
    assert not outbox.drop_oldest(8)
    assert (outbox.joined(), outbox.dropped) == (b"gunreply", 2)


def test_the_latest_news_of_a_key_takes_the_place_of_older_ones() -> None:
    """Only where nothing has been written of them, and nothing else moves."""
    outbox = Outbox()
    outbox.push(b"a1", "a")
    outbox.push(b"b1", "b")
    assert outbox.replace("a", b"a-two")
    assert not outbox.replace("c", b"c1")
    assert (outbox.joined(), outbox.size, outbox.coalesced) == (b"a-twob1", 7, 1)
    outbox.written(1)
    assert not outbox.replace("a", b"a3")
    assert outbox.replace("b", b"b2")
    assert outbox.joined() == b"-twob2"
    outbox.written(6)
    assert not outbox.replace("b", b"b3")
    outbox.push(b"b4", "b")
    assert outbox.drop_oldest(1)
    assert not outbox.replace("b", b"b5")


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.binary(min_size=1, max_size=9)),
            st.tuples(st.just("push"), st.binary(min_size=1, max_size=9), st.sampled_from([None, "a", "b"])),
            st.tuples(st.just("written"), st.floats(0, 1)),
            st.tuples(st.just("drop"), st.integers(1, 30)),
        )
    )
)
def test_the_outbox_is_its_model(steps: list[tuple[Any, ...]]) -> None:
    """Against a plain list of frames with flags, under any order of what can happen."""
    outbox = Outbox()
    model: list[list[Any]] = []  # [frame, may be dropped, key], the first maybe begun
    begun: list[Any] | None = None
    for name, *rest in steps:
        if name == "put":
            outbox.put(rest[0])
            model.append([rest[0], False, None])
        elif name == "push":
            frame, key = rest
            latest = [entry for entry in model if key is not None and entry[2] == key][-1:]
            if latest and latest[0] is not begun:
                assert outbox.replace(key, frame)
                latest[0][0] = frame
            else:
                assert key is None or not outbox.replace(key, frame)
                outbox.push(frame, key)
                model.append([frame, True, key])
        elif name == "written":
            size = int(rest[0] * outbox.size)
            outbox.written(size)
            while model and size >= len(model[0][0]):
                size -= len(model.pop(0)[0])
            if size:
                begun = model[0]
                begun[0] = begun[0][size:]
        else:
            outbox.drop_oldest(rest[0])
            for entry in list(model):
                if sum(len(other[0]) for other in model) >= rest[0] and entry[1] and entry is not begun:
                    model.remove(entry)
        assert outbox.joined() == b"".join(entry[0] for entry in model)
        assert outbox.size == len(outbox.joined())


def test_what_is_remembered_of_frames_that_are_gone_is_bounded() -> None:
    """A reader that never quite catches up, and ever new keys: nothing grows."""
    import tracemalloc

    outbox = Outbox()
    outbox.put(b"x")
    tracemalloc.start()
    for i in range(50_000):
        outbox.push(b"%06d" % i, i)
        outbox.written(6)
        if i == 1000:
            before, _ = tracemalloc.get_traced_memory()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 20_000


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


FRAME = bytes(990)
ENOUGH = 20_000  # frames: more than all buffers between two sockets of one machine hold


async def flooded(kind: str, policy: WhenFull, handler: Any) -> tuple[list[int], Any]:
    """Push numbered frames to a client that reads only afterwards; return the numbers it read, and the statistics."""
    limits = PeerLimits(max_outbox_bytes=10_000, when_outbox_full=policy)
    async with serving(kind, handler, limits=limits) as running:
        client: Raw = await running.connect()
        await client.send(b"push")
        # The connection may have come, been cut off and gone between two looks.
        while not running.server.statistics().accepted or any(
            not peer.statistics().frames_received for peer in running.server.peers
        ):
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked(0.01)
        numbers = []
        peer = running.server.peers[0] if running.server.peers else None
        if peer is not None:
            assert peer.statistics().outbox_bytes <= 11_000
        try:
            while (frame := await client.receive()) not in (None, b"end"):
                assert frame is not None
                assert frame[6:] == FRAME
                numbers.append(int(frame[:6]))
        except trio.BrokenResourceError:
            pass
        return numbers, running.server.statistics()


async def push_all(peer: Peer[bytes], message: bytes) -> bytes:
    for i in range(ENOUGH):
        peer.send_nowait(b"%06d" % i + FRAME)
        if i % 10 == 0:
            await trio.lowlevel.checkpoint()
    return b"end"


async def test_the_newest_are_dropped_and_counted(kind: str) -> None:
    """The reader gets what came first, whole, the reply too; what is missing is in the statistics."""
    numbers, statistics = await flooded(kind, WhenFull.DROP_NEWEST, push_all)
    assert numbers == sorted(set(numbers))
    assert len(numbers) + statistics.dropped == ENOUGH
    assert statistics.dropped > 0
    assert numbers[-1] < ENOUGH - 1


async def test_the_oldest_are_dropped_and_counted(kind: str) -> None:
    """The reader gets the latest, whole and in order, the reply too; what is missing is in the statistics."""
    numbers, statistics = await flooded(kind, WhenFull.DROP_OLDEST, push_all)
    assert numbers == sorted(set(numbers))
    assert len(numbers) + statistics.dropped == ENOUGH
    assert statistics.dropped > 0
    assert numbers[-1] == ENOUGH - 1


async def test_a_peer_that_does_not_read_is_disconnected(kind: str) -> None:
    """The sender hears of it as of any closed peer, and what was pending is given back."""
    closed = trio.Event()

    async def push_until_closed(peer: Peer[bytes], message: bytes) -> None:
        try:
            await push_all(peer, message)
        except trio.ClosedResourceError:
            closed.set()

    numbers, statistics = await flooded(kind, WhenFull.DISCONNECT, push_until_closed)
    assert closed.is_set()
    assert numbers == list(range(len(numbers)))
    assert statistics.closed == {CloseReason.OUTBOX_FULL: 1}
    assert statistics.connections == 0


async def test_news_with_a_key_take_no_more_room_than_one(kind: str) -> None:
    """Twenty thousand pieces of news of two things wait as two frames, and the last of each arrives."""

    async def push_news(peer: Peer[bytes], message: bytes) -> bytes:
        for i in range(ENOUGH):
            peer.send_nowait(b"%06d" % i + FRAME, key=i % 2)
            if i % 10 == 0:
                await trio.lowlevel.checkpoint()
        return b"end"

    numbers, statistics = await flooded(kind, WhenFull.REFUSE, push_news)
    assert sorted(numbers[-2:]) == [ENOUGH - 2, ENOUGH - 1]
    assert len(numbers) + statistics.coalesced == ENOUGH
    assert statistics.coalesced > 0
    assert statistics.dropped == 0


async def test_a_broadcast_misses_those_who_are_full() -> None:
    """By default a full outbox refuses, and the sender learns whom it missed."""
    limits = PeerLimits(max_outbox_bytes=1)
    async with serving("tcp", limits=limits) as running:
        for _ in range(2):
            await running.connect()
        while len(running.server.peers) < 2:
            await trio.lowlevel.checkpoint()
        full, other = running.server.peers
        full.send_nowait(b"fills it")
        with pytest.raises(Overloaded):
            full.send_nowait(b"more")
        assert running.server.broadcast(b"all", key="news") == [full]
        assert running.server.broadcast(b"all again", key="news") == [full]
        assert other.statistics().coalesced == 1
        assert other.statistics().outbox_bytes == len(FRAMING.encode(b"all again"))


async def test_a_handler_that_sends_to_a_peer_that_is_gone_ends_quietly(kind: str) -> None:
    """A stranger who leaves at the wrong moment cannot end the server, though nobody handles errors."""
    begun, proceed = trio.Event(), trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        if message == b"late":
            begun.set()
            await proceed.wait()
            peer.send_nowait(b"too late")
        return message

    async with serving(kind, handler) as running:
        client, other = await running.connect(), await running.connect()
        await client.send(b"late")
        await begun.wait()
        for peer in running.server.peers:
            if peer.statistics().backlog:
                peer.close()
        proceed.set()
        await other.send(b"hello")
        assert await other.receive() == b"hello"
        await wait_all_tasks_blocked(0.01)
        assert running.server.statistics().undeliverable == 1
        assert running.server.statistics().failed == 0
