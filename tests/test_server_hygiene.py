"""Connections that keep the rules stay, those that do not are told why and closed, and what is held is bounded."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
import trio
from served import CODEC, FRAMING, Say, closed_by, echo, serving, shout
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.codec import Closed
from stagetrio.framing import LengthPrefixed
from stagetrio.limiter import Overloaded
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.server import serve_stage
from stagetrio.transport import READ_SIZE


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_a_silent_connection_is_closed(kind: str, autojump_clock: MockClock) -> None:
    """Whoever says nothing is told so and closed at the deadline; whoever spoke stays."""
    limits = PeerLimits(first_frame_within=5, linger=1)
    async with serving(kind, shout, codec=CODEC, limits=limits) as running:
        talker, silent = await running.connect(), await running.connect()
        await talker.send(CODEC.encode(Say("hello"), 1))
        start = trio.current_time()
        assert await silent.message() == Closed("no message came within 5 s")
        assert 5 <= trio.current_time() - start <= 5.5
        await trio.sleep(60)
        assert len(running.server.peers) == 1
        assert running.server.statistics().closed == {CloseReason.SILENT: 1}


async def test_an_idle_connection_is_closed(kind: str, autojump_clock: MockClock) -> None:
    """The time without a message counts, not the time since the connection began."""
    limits = PeerLimits(idle_within=5)
    async with serving(kind, shout, codec=CODEC, limits=limits) as running:
        client = await running.connect()
        for _ in range(5):
            await trio.sleep(4)
            await client.send(CODEC.encode(Say("hello"), 1))
            assert await client.message() == Say("HELLO")
        start = trio.current_time()
        assert await client.message() == Closed("no message came for 5 s")
        assert 4.9 <= trio.current_time() - start <= 5.6


async def test_a_silent_peer_is_pinged_and_closed_if_nothing_comes_back(kind: str, autojump_clock: MockClock) -> None:
    """Whoever answers with anything stays however long; whoever does not is told, closed and counted."""
    limits = PeerLimits(ping_after=10, pong_within=3, linger=1)
    async with serving(kind, shout, codec=CODEC, limits=limits, ping=lambda peer: Say("there?")) as running:
        alive, dead = await running.connect(), await running.connect()
        for client in (alive, dead):
            await client.send(CODEC.encode(Say("hello"), 1))
            assert await client.message() == Say("HELLO")
        start = trio.current_time()

        async def answer() -> None:
            while await alive.message() == Say("there?"):
                await alive.stream.send_all(b"\0")  # not even a whole frame
                await alive.stream.send_all(FRAMING.encode(CODEC.encode(Say("yes"), 1))[1:])
                assert await alive.message() == Say("YES")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            assert await dead.message() == Say("there?")
            assert 10 <= trio.current_time() - start <= 21
            pinged = trio.current_time()
            assert await dead.message() == Closed("nothing came within 3 s after a ping")
            assert 3 <= trio.current_time() - pinged <= 3.6
            await trio.sleep(300)
            assert len(running.server.peers) == 1
            assert running.server.statistics().closed == {CloseReason.VANISHED: 1}
            nursery.cancel_scope.cancel()


async def test_who_pings_says_with_what() -> None:
    """A time after which to ping without a word to say, or the reverse, is a mistake of the owner's."""
    with pytest.raises(ValueError, match=r"ping is never sent where limits\.ping_after is inf"):
        await serve_stage(echo, [], ping=lambda peer: b"?")
    with pytest.raises(ValueError, match="ping must say"):
        await serve_stage(echo, [], limits=PeerLimits(ping_after=1))


async def test_a_frame_that_drips_is_cut_off_at_its_deadline(kind: str, autojump_clock: MockClock) -> None:
    """A byte a second keeps no connection alive: the deadline of a frame is absolute."""
    limits = PeerLimits(frame_within=10, min_receive_rate=240)
    async with serving(kind, shout, codec=CODEC, limits=limits) as running:
        client = await running.connect()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                for byte in FRAMING.encode(CODEC.encode(Say("x" * 500), 1)):
                    await client.stream.send_all(bytes([byte]))
                    await trio.sleep(1)

            nursery.start_soon(drip)
            assert await client.message() == Closed("a frame took longer than 10 s")
            assert 10 <= trio.current_time() - start <= 10.6
            nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(client.stream)
        await closed_by(running, CloseReason.SLOW_FRAME)


async def test_a_slow_but_honest_upload_survives(kind: str, autojump_clock: MockClock) -> None:
    """A frame may take longer than its deadline while it comes faster than the minimum rate."""
    framing = LengthPrefixed(100_000)
    limits = PeerLimits(frame_within=10, min_receive_rate=240)
    async with serving(kind, framing=framing, limits=limits) as running:
        client = await running.connect()
        wire = framing.encode(b"x" * 20_000)
        for at in range(0, len(wire), 300):
            await client.stream.send_all(wire[at : at + 300])
            await trio.sleep(1)
        received = b""
        while len(received) < len(wire):
            received += await client.stream.receive_some()
        assert received == wire


async def test_the_server_is_full(kind: str) -> None:
    """One connection too many is told so and closed; when one leaves, there is room again."""
    async with serving(kind, shout, codec=CODEC, max_connections=2) as running:
        one, two = await running.connect(), await running.connect()
        for client in (one, two):
            await client.send(CODEC.encode(Say("in"), 1))
            assert await client.message() == Say("IN")
        three = await running.connect()
        farewell = await three.message()
        assert farewell.reason == "the server has as many connections as it may"
        assert 0 < farewell.retry_after <= 10
        await three.stream.aclose()
        await one.stream.aclose()
        while len(running.server.peers) > 1:
            await trio.lowlevel.checkpoint()
        four = await running.connect()
        await four.send(CODEC.encode(Say("in"), 1))
        assert await four.message() == Say("IN")
        assert running.server.statistics().refused_connections == 1


async def test_a_full_outbox_refuses_and_send_waits_for_room(kind: str) -> None:
    """``send_nowait`` says `Overloaded` at the bound, ``send`` waits until the other side has read."""
    peers: list[Peer[bytes]] = []

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        peers.append(peer)

    framing = LengthPrefixed(10_000_000)
    chunk = b"x" * 5_000_000
    limits = PeerLimits(max_outbox_bytes=1_000_000)
    async with serving(kind, handler, framing=framing, limits=limits) as running:
        client = await running.connect()
        await client.stream.send_all(framing.encode(b"hello"))
        while not peers:
            await trio.lowlevel.checkpoint()
        sent = 0
        while peers[0].statistics().outbox_bytes < 1_000_000:
            peers[0].send_nowait(chunk)
            sent += 1
            await wait_all_tasks_blocked(0.01)
        with pytest.raises(Overloaded) as caught:
            peers[0].send_nowait(chunk)
        assert caught.value.reason == "outbox"

        with trio.move_on_after(0):
            await peers[0].send(chunk)

        async def read() -> None:
            received = 0
            while received < (sent + 1) * (len(chunk) + 4):
                received += len(await client.stream.receive_some())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(peers[0].send, chunk)
            await wait_all_tasks_blocked()
            await read()
        assert peers[0].statistics().outbox_bytes == 0


async def test_what_is_held_of_a_peers_input_is_bounded(kind: str) -> None:
    """While its message is in hand, a peer that sends on is read up to the bound and one read more, then served on."""
    release = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        await release.wait()
        return b"%d" % len(message)

    framing = LengthPrefixed(20_000)
    limits = PeerLimits(max_input_bytes=100_000)
    async with serving(kind, handler, framing=framing, limits=limits) as running:
        client = await running.connect()

        async def send() -> None:
            for _ in range(60):
                await client.stream.send_all(framing.encode(bytes(20_000)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while not (running.server.peers and running.server.peers[0].statistics().paused):
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked(0.01)
            statistics = running.server.peers[0].statistics()
            assert 100_000 < statistics.bytes_received <= 100_000 + READ_SIZE
            assert statistics.backlog <= 8
            release.set()
            assert [await client.receive() for _ in range(60)] == [b"20000"] * 60
            release = trio.Event()
            await client.stream.send_all(framing.encode(bytes(20_000)) * 4)  # what was served counts no more
            while running.server.peers[0].statistics().backlog < 4:
                await trio.lowlevel.checkpoint()
            assert not running.server.peers[0].statistics().paused
            release.set()
            assert [await client.receive() for _ in range(4)] == [b"20000"] * 4


async def test_a_reader_that_does_not_read_is_cut_off(kind: str, autojump_clock: MockClock) -> None:
    """Output that is not read within the grace ends the connection; what is held for it stays within the bound."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        return bytes(900)

    limits = PeerLimits(max_outbox_bytes=10_000, send_grace=5, min_send_rate=100)
    async with serving(kind, handler, limits=limits) as running:
        client = await running.connect()
        most = 0.0
        with trio.move_on_after(60):
            while True:
                with suppress(trio.BrokenResourceError):
                    await client.send(*[b"more"] * 10)
                for peer in running.server.peers:
                    most = max(most, peer.statistics().outbox_bytes)
                if running.server.statistics().closed:
                    break
                await trio.sleep(0.001)
        assert running.server.statistics().closed == {CloseReason.SLOW_READER: 1}
        assert most <= 10_000 + 64 * 904


async def test_nothing_of_a_closed_connection_is_kept(kind: str) -> None:
    """What the queue remembers of flows holds on to no peer."""
    seen: list[weakref.ref[Any]] = []

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        seen.append(weakref.ref(peer))
        return message

    async with serving(kind, handler) as running:
        for _ in range(20):
            client = await running.connect()
            await client.send(b"x")
            assert await client.receive() == b"x"
            await client.stream.aclose()
        await closed_by(running, CloseReason.ENDED)
        await wait_all_tasks_blocked()
        gc.collect()
        # The latest may still be the item in hand of an idle worker.
        assert sum(peer() is not None for peer in seen) <= 1


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("max_decoded", 0, ValueError),
        ("max_outbox_bytes", "1", TypeError),
        ("first_frame_within", -1, ValueError),
        ("min_send_rate", -1, ValueError),
        ("min_receive_rate", True, TypeError),
        ("linger", 0, ValueError),
    ],
)
def test_wrong_limits_are_named(argument: str, value: object, error: type[Exception]) -> None:
    """The message says which limit was wrong and what it was."""
    with pytest.raises(error, match=f"{argument}.*{value!r}"):
        PeerLimits(**{argument: value})  # type: ignore[arg-type]
