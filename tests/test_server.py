"""Messages come back in order, strangers' mistakes end their own connection only, and everything held is bounded."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import pytest
import trio
from served import CODEC, FRAMING, Raw, Say, closed_by, serving, shout
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.client import RequestFailed, open_client
from stagetrio.codec import Closed, Done, Failed, Refused
from stagetrio.framing import LengthPrefixed
from stagetrio.limiter import Overloaded
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.server import serve_stage
from stagetrio.sockets import TcpAddress, UnixAddress, address_of, connect, open_listeners
from stagetrio.watchdog import BudgetExceeded, open_watchdog


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_what_the_handler_returns_is_the_reply_in_order(kind: str) -> None:
    """500 messages in one write come back complete and in order, though only 64 are taken at once."""
    async with serving(kind) as running, (await running.connect()).stream as stream:
        client = Raw(stream)
        payloads = [b"%d" % i for i in range(500)]
        await client.send(*payloads)
        await stream.send_eof()
        assert await client.receive_all() == payloads
        await closed_by(running, CloseReason.ENDED)
        assert running.server.statistics().stage.handled == 500


async def test_order_is_kept_when_handlers_wait(kind: str) -> None:
    """Some messages wait and some do not: one connection's never overlap, and its replies are in order."""
    running_now = 0

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        nonlocal running_now
        running_now += 1
        assert running_now == 1
        for _ in range(int(message) % 4):
            await trio.lowlevel.checkpoint()
        running_now -= 1
        return message

    async with serving(kind, handler) as running:
        client = await running.connect()
        payloads = [b"%d" % i for i in range(300)]
        await client.send(*payloads)
        await client.stream.send_eof()
        assert await client.receive_all() == payloads


async def test_a_handler_that_waits_hinders_only_its_own_connection(kind: str) -> None:
    """A handler that never returns keeps its connection's next messages waiting, and nobody else's."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        if message == b"hang":
            await trio.sleep_forever()
        return message

    async with serving(kind, handler) as running:
        stuck, other = await running.connect(), await running.connect()
        await stuck.send(b"before", b"hang", b"after")
        assert await stuck.receive() == b"before"
        for _ in range(20):
            await other.send(b"hello")
            assert await other.receive() == b"hello"
        statistics = running.server.statistics().stage
        assert statistics.occupied == 1
        assert statistics.handled == 21


async def test_a_handler_that_never_returns_is_cancelled_at_its_deadline(kind: str, autojump_clock: MockClock) -> None:
    """Past ``max_handling`` the handler is cancelled, the peer told, and its next messages are served."""
    errors: list[Exception] = []

    async def handler(peer: Peer[Any], message: Any) -> Any:
        if message.text == "hang":
            await trio.sleep_forever()
        return message

    def on_error(peer: Peer[Any], error: Exception) -> None:
        errors.append(error)

    async with serving(kind, handler, codec=CODEC, max_handling=3, on_error=on_error) as running:
        client = await running.connect()
        start = trio.current_time()
        await client.send(*[CODEC.encode(Say(text), 1) for text in ("hang", "next")])
        assert await client.message() == Failed("the handler took longer than max_handling=3 s")
        assert trio.current_time() - start == pytest.approx(3)
        assert await client.message() == Say("next")
        assert isinstance(errors[0], trio.TooSlowError)
        assert running.server.statistics().stage.overdue == 1


async def test_a_handler_that_raises_fails_its_message_only(kind: str) -> None:
    """With ``on_error`` the owner hears what was raised, the peer that it failed, and all else goes on."""
    errors: list[tuple[Peer[Any], Exception]] = []

    async def handler(peer: Peer[Any], message: Any) -> Any:
        if message.text == "wait and boom":
            await trio.lowlevel.checkpoint()
        if "boom" in message.text:
            raise KeyError(message.text)
        return message

    async with serving(kind, handler, codec=CODEC, on_error=lambda *args: errors.append(args)) as running:
        client = await running.connect()
        texts = ["one", "boom", "wait and boom", "two"]
        await client.send(*[CODEC.encode(Say(text), i) for i, text in enumerate(texts)])
        failed = Failed("the handler failed")
        assert [await client.message() for _ in texts] == [Say("one"), failed, failed, Say("two")]
        assert [str(error) for _, error in errors] == ["'boom'", "'wait and boom'"]
        assert running.server.statistics().failed == 2


async def test_without_words_for_it_a_failed_message_ends_the_connection(kind: str) -> None:
    """Raw frames cannot say that a reply is missing, so the connection ends instead of shifting the replies."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        if message == b"boom":
            raise ValueError
        return message

    async with serving(kind, handler, on_error=lambda peer, error: None) as running:
        client, other = await running.connect(), await running.connect()
        await client.send(b"one", b"boom", b"two")
        assert await client.receive_all() == [b"one"]
        await client.stream.aclose()
        await other.send(b"still there")
        assert await other.receive() == b"still there"
        assert running.server.statistics().closed == {CloseReason.FAILED: 1}


async def test_without_on_error_a_handlers_exception_reaches_the_owner(kind: str) -> None:
    """Nobody asked to be told, so the exception ends the server and comes out of its nursery."""

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        raise ValueError("mine")

    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="mine"), flatten_subgroups=True):
        async with serving(kind, handler) as running:
            client = await running.connect()
            await client.send(b"x")
            await trio.sleep_forever()


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        (b"\0\0\x03\xe9", "frame of 1001 bytes exceeds the limit of 1000 bytes"),
        (b"\xff" * 100, "frame of 4294967295 bytes"),
        (FRAMING.encode(b"gibberish"), "not a message"),
        (FRAMING.encode(CODEC.encode(Say("x"))[:-1]), "not a message"),
        (FRAMING.encode(b"\x93\xa7Strange\x01\x80"), "unknown message type 'Strange'"),
        (FRAMING.encode(b"\x93\xa3Say\x01\x80"), "not a Say"),
    ],
)
async def test_wrong_bytes_end_their_connection_with_a_reason(kind: str, wire: bytes, words: str) -> None:
    """What came before is answered, then the reason is told; other connections notice nothing."""
    async with serving(kind, shout, codec=CODEC) as running:
        client, other = await running.connect(), await running.connect()
        await client.stream.send_all(FRAMING.encode(CODEC.encode(Say("good"), 1)) + wire)
        assert await client.message() == Say("GOOD")
        farewell = await client.message()
        assert isinstance(farewell, Closed)
        assert words in farewell.reason
        assert await client.message() is None
        await client.stream.aclose()
        await other.send(CODEC.encode(Say("hello"), 1))
        assert await other.message() == Say("HELLO")
        assert running.server.statistics().closed == {CloseReason.PROTOCOL: 1}


async def test_a_connection_closed_in_mid_frame_is_a_mistake(kind: str) -> None:
    """The end of input inside a frame is told to the peer, which may still be reading."""
    async with serving(kind, shout, codec=CODEC) as running:
        client = await running.connect()
        await client.stream.send_all(FRAMING.encode(CODEC.encode(Say("good"), 1)) + b"\0\0\0\x05ab")
        await client.stream.send_eof()
        assert await client.message() == Say("GOOD")
        assert await client.message() == Closed("connection closed in mid-frame, 6 bytes into it")
        assert await client.message() is None
        await closed_by(running, CloseReason.PROTOCOL)


async def test_a_lost_connection_takes_its_queued_messages_with_it(kind: str) -> None:
    """Messages of a connection that is gone are dropped and counted; the handler in hand finishes."""
    finished = trio.Event()
    proceed = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        await proceed.wait()
        finished.set()
        return message

    async with serving(kind, handler) as running:
        client = await running.connect()
        await client.send(*[b"x"] * 10)
        await wait_all_tasks_blocked(0.01)
        await trio.aclose_forcefully(client.stream)
        while running.server.peers:
            for peer in running.server.peers:
                peer.close()
            await trio.lowlevel.checkpoint()
        proceed.set()
        await finished.wait()
        await wait_all_tasks_blocked(0.01)
        statistics = running.server.statistics()
        assert (statistics.discarded, statistics.undeliverable) == (9, 1)


async def test_cancel_on_disconnect_cancels_the_handler_in_hand(kind: str) -> None:
    """When asked for, nobody works for a peer that is gone."""
    cancelled = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with serving(kind, handler, cancel_on_disconnect=True) as running:
        client = await running.connect()
        await client.send(b"x")
        await wait_all_tasks_blocked(0.01)
        running.server.peers[0].close()
        await cancelled.wait()
        await wait_all_tasks_blocked()
        assert running.server.statistics().stage.cancelled == 1
        other = await running.connect()
        await other.send(b"x")


async def test_ten_thousand_messages_to_a_full_queue_all_come_back(kind: str) -> None:
    """By default the sender is slowed down by its own TCP: the queue stays within its bound and nothing is lost."""
    payloads = [b"%d" % i for i in range(10_000)]
    most = 0

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        nonlocal most
        most = max(most, running.server.statistics().stage.queue.items)
        if message.endswith(b"7"):
            await trio.lowlevel.checkpoint()
        return message

    async with serving(kind, handler, max_items=20) as running:
        client = await running.connect()
        received: list[bytes] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(client.send, *payloads))
            while len(received) < len(payloads):
                frame = await client.receive()
                assert frame is not None
                received.append(frame)
        assert received == payloads
        assert 0 < most <= 20


async def test_ten_thousand_messages_to_a_full_queue_are_refused_with_a_reason(kind: str) -> None:
    """With ``refuse`` each message gets its reply or its refusal, by id, and a polite peer is served meanwhile."""
    proceed = trio.Event()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        await proceed.wait()
        return message

    async with serving(kind, handler, codec=CODEC, max_items=20, workers=2, refuse=True) as running:
        client, polite = await running.connect(), await running.connect()
        answers: dict[int | None, Any] = {}

        async def collect() -> None:
            while len(answers) < 10_000:
                frame = await client.receive()
                assert frame is not None
                message, id = CODEC.decode(frame)
                answers[id] = message
                if len(answers) == 9_000:
                    await polite.send(CODEC.encode(Say("me too"), 1))
                    proceed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect)
            await client.send(*[CODEC.encode(Say("x"), i) for i in range(10_000)])
        refused = [answer for answer in answers.values() if isinstance(answer, Refused)]
        served = [answer for answer in answers.values() if answer == Say("x")]
        assert len(refused) + len(served) == 10_000
        assert {answer.reason for answer in refused} <= {"queue", "flow"}
        assert len(served) >= 2
        assert running.server.statistics().refused == len(refused)
        assert await polite.message() == Say("me too")


async def test_a_handler_refuses_by_raising_overloaded(kind: str) -> None:
    """`Overloaded` out of a handler, say from a ticket, is a refusal and no failure."""

    async def handler(peer: Peer[Any], message: Any) -> Any:
        raise Overloaded("tickets", 2.5)

    async with serving(kind, handler, codec=CODEC) as running:
        client = await running.connect()
        await client.send(CODEC.encode(Say("x"), 1))
        assert await client.message() == Refused("tickets", 2.5)
        statistics = running.server.statistics()
        assert (statistics.refused, statistics.failed) == (1, 0)


async def test_raw_frames_say_refused_in_their_own_words(kind: str) -> None:
    """`on_refused` gives the words; without it a refused raw message has no answer."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        raise Overloaded("tickets")

    def words(peer: Peer[bytes], overloaded: Overloaded) -> bytes:
        return b"busy: " + overloaded.reason.encode()

    async with serving(kind, handler, on_refused=words) as running:
        client = await running.connect()
        await client.send(b"x")
        assert await client.receive() == b"busy: tickets"


async def test_a_message_without_reply_is_answered_by_done_if_it_has_an_id(kind: str) -> None:
    """Whoever asks hears of the end; whoever does not ask hears nothing."""

    async def handler(peer: Peer[Any], message: Any) -> Any:
        return Say("reply") if message.text == "reply" else None

    async with serving(kind, handler, codec=CODEC) as running:
        client = await running.connect()
        await client.send(CODEC.encode(Say("silent")), CODEC.encode(Say("asked"), 7), CODEC.encode(Say("reply")))
        frames = [await client.receive(), await client.receive()]
        assert [CODEC.decode(frame) for frame in frames if frame] == [(Done(), 7), (Say("reply"), None)]


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


async def test_handlers_that_hold_the_loop_take_turns_under_a_watchdog(kind: str) -> None:
    """Four handlers that spin until all four have begun can only end if each is forced to a checkpoint."""
    begun = 0

    async def spin(peer: Peer[bytes], message: bytes) -> bytes:
        nonlocal begun
        begun += 1
        while begun < 4:
            pass
        return message

    async with open_watchdog(quantum=0.002) as watchdog, serving(kind, spin, watchdog=watchdog) as running:
        clients = [await running.connect() for _ in range(4)]
        for client in clients:
            await client.send(b"first", b"second")
        for client in clients:
            assert [await client.receive(), await client.receive()] == [b"first", b"second"]
        assert watchdog.statistics().forced >= 3
        assert running.server.statistics().stage.handled == 8


async def test_a_handler_that_never_gives_up_the_loop_is_cancelled_past_its_budget(kind: str) -> None:
    """A busy loop is cut off, its peer told, the owner told by name, and everyone else served meanwhile."""
    errors: list[Exception] = []
    served = 0

    async def handler(peer: Peer[Any], message: Any) -> Any:
        nonlocal served
        while message.text == "spin":
            served += 0
        served += 1
        return message

    def on_error(peer: Peer[Any], error: Exception) -> None:
        errors.append(error)

    async with (
        open_watchdog(quantum=0.002) as watchdog,
        serving(kind, handler, codec=CODEC, watchdog=watchdog, budget=0.05, on_error=on_error) as running,
    ):
        spinner, other = await running.connect(), await running.connect()
        await spinner.send(CODEC.encode(Say("spin"), 1), CODEC.encode(Say("after"), 2))
        for _ in range(5):
            await other.send(CODEC.encode(Say("hello"), 1))
            assert await other.message() == Say("hello")
        failed = await spinner.message()
        assert isinstance(failed, Failed)
        assert "budget of 0.05 s" in failed.error
        assert await spinner.message() == Say("after")
        assert [type(error) for error in errors] == [BudgetExceeded]
        assert "handler" in str(errors[0])
        assert running.server.statistics().stage.overdue == 1


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


async def test_hooks_see_connections_come_and_go(kind: str) -> None:
    """Nothing is read before ``on_connect`` returns; what it started ends with the connection, then it is told."""
    events: list[str] = []
    connected = trio.Event()

    async def on_connect(peer: Peer[Any]) -> None:
        async def companion() -> None:
            try:
                await trio.sleep_forever()
            finally:
                events.append("companion ended")

        peer.start_soon(companion)
        await connected.wait()
        events.append("connected")

    gone = trio.Event()

    async def on_disconnect(peer: Peer[Any]) -> None:
        await wait_all_tasks_blocked()
        events.append(f"gone: {peer.close_reason.value if peer.close_reason else None}")
        gone.set()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        events.append("message")
        return message

    async with serving(kind, handler, codec=CODEC, on_connect=on_connect, on_disconnect=on_disconnect) as running:
        client = await running.connect()
        await client.send(CODEC.encode(Say("x"), 1))
        await wait_all_tasks_blocked(0.01)
        assert events == []
        connected.set()
        assert await client.message() == Say("x")
        await client.stream.aclose()
        await gone.wait()
        assert events == ["connected", "message", "companion ended", "gone: ended"]


async def test_a_hook_that_raises_ends_its_connection_only(kind: str) -> None:
    """With ``on_error`` the owner hears of it; the peer is told, the server goes on."""
    errors: list[Exception] = []

    async def on_connect(peer: Peer[Any]) -> None:
        if not errors:
            raise ValueError("no")

    def on_error(peer: Peer[Any], error: Exception) -> None:
        errors.append(error)

    async with serving(kind, shout, codec=CODEC, on_connect=on_connect, on_error=on_error) as running:
        client = await running.connect()
        assert await client.message() == Closed("the server failed to take the connection")
        other = await running.connect()
        await other.send(CODEC.encode(Say("x"), 1))
        assert await other.message() == Say("X")
        assert [str(error) for error in errors] == ["no"]


async def test_draining_serves_what_was_received_and_says_farewell(kind: str) -> None:
    """Queued messages are answered within the grace, nobody new gets in, and the server ends."""
    proceed = trio.Event()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        await proceed.wait()
        return message

    async with serving(kind, handler, codec=CODEC) as running:
        client = await running.connect()
        await client.send(*[CODEC.encode(Say(str(i)), i) for i in range(100)])
        await wait_all_tasks_blocked(0.01)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.server.drain, inf)
            await wait_all_tasks_blocked(0.01)
            proceed.set()
            assert [await client.message() for _ in range(100)] == [Say(str(i)) for i in range(100)]
            assert await client.message() == Closed("the server shuts down")
            await client.stream.aclose()
        assert running.server.statistics().closed == {CloseReason.DRAINED: 1}
        with pytest.raises((OSError, trio.BrokenResourceError)):
            await running.connect()


async def test_the_grace_of_a_drain_ends(kind: str, autojump_clock: MockClock) -> None:
    """What does not finish within the grace is cancelled, and everything is closed."""
    cancelled = trio.Event()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with serving(kind, handler, codec=CODEC) as running:
        client = await running.connect()
        await client.send(CODEC.encode(Say("x"), 1))
        await trio.sleep(1)
        start = trio.current_time()
        await running.server.drain(7)
        assert trio.current_time() - start == pytest.approx(7)
        assert cancelled.is_set()
        assert running.server.peers == ()


async def test_a_broadcast_is_encoded_once_and_reaches_everyone(kind: str) -> None:
    """Each open connection gets it; those that cannot be reached are returned."""
    async with serving(kind, shout, codec=CODEC) as running:
        clients = [await running.connect() for _ in range(5)]
        while len(running.server.peers) < 5:
            await trio.lowlevel.checkpoint()
        gone = running.server.peers[0]
        gone.close("bye")
        assert running.server.broadcast(Say("news")) == [gone]
        assert await clients[0].message() == Closed("bye")
        assert [await client.message() for client in clients[1:]] == [Say("news")] * 4


async def test_many_connections_under_one_flow_share_one_share(kind: str) -> None:
    """Opening more connections gains nothing where the flow is the identity, and order is kept per connection."""
    served: list[bytes] = []
    proceed = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        if message == b"gate":
            await proceed.wait()
        else:
            served.append(message[:1])

    def cost(payload: bytes) -> float:
        return 1.0

    async with serving(kind, handler, workers=1, cost=cost, flow=lambda peer: "x") as running:
        gate = await running.connect()
        await gate.send(b"gate")
        await wait_all_tasks_blocked(0.01)
        many = [await running.connect() for _ in range(9)]
        single = await running.connect()
        await wait_all_tasks_blocked(0.01)
        running.server.peers[-1].flow = "y"
        for client in many:
            await client.send(*[b"many"] * 10)
        await single.send(*[b"single"] * 10)
        await wait_all_tasks_blocked(0.01)
        proceed.set()
        while len(served) < 100:
            await trio.lowlevel.checkpoint()
        assert served[:20].count(b"s") in (9, 10)


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


async def test_peers_know_where_they_come_from(tmp_path: Any) -> None:
    """TCP and Unix peers have an address, and the socket file goes with the server."""
    addresses: list[Any] = []

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        addresses.append(peer.address)
        return message

    listeners = await open_listeners("tcp://127.0.0.1:0", f"unix://{tmp_path}/s.sock")
    tcp = address_of(listeners[0].socket)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_stage, handler, listeners, framing=FRAMING))
        for address in (tcp, f"unix://{tmp_path}/s.sock"):
            async with await connect(address) as stream:
                client = Raw(stream)
                await client.send(b"x")
                assert await client.receive() == b"x"
        nursery.cancel_scope.cancel()
    assert isinstance(addresses[0], TcpAddress)
    assert addresses[1] == UnixAddress("")
    assert list(tmp_path.iterdir()) == []


async def test_a_client_asks_sends_and_listens(kind: str) -> None:
    """Replies find their calls in any order of asking; pushes come by iteration; refusals and failures raise."""

    async def handler(peer: Peer[Any], message: Any) -> Any:
        if message.text == "refuse":
            raise Overloaded("rate", 1.5)
        if message.text == "fail":
            raise ValueError
        if message.text == "push":
            peer.send_nowait(Say("pushed"))
            return None
        if message.text == "bye":
            peer.close("go away")
            return None
        return Say(message.text.upper())

    async with serving(kind, handler, codec=CODEC, on_error=lambda peer, error: None) as running:
        stream = (await running.connect()).stream
        async with open_client(stream, CODEC, framing=FRAMING) as client:
            replies: dict[str, Any] = {}

            async def ask(text: str) -> None:
                replies[text] = await client.ask(Say(text))

            async with trio.open_nursery() as nursery:
                for text in "abcdefgh":
                    nursery.start_soon(ask, text)
            assert replies == {text: Say(text.upper()) for text in "abcdefgh"}
            with pytest.raises(Overloaded) as refused:
                await client.ask(Say("refuse"))
            assert (refused.value.reason, refused.value.retry_after) == ("rate", 1.5)
            with pytest.raises(RequestFailed, match="the handler failed"):
                await client.ask(Say("fail"))
            await client.send(Say("push"))
            assert await client.receive() == Say("pushed")
            assert await client.ask(Say("push")) == Done()
            with pytest.raises(trio.BrokenResourceError, match="go away"):
                await client.ask(Say("bye"))
            assert [message async for message in client] == [Say("pushed")]
            assert client.close_reason == "go away"
            with pytest.raises(trio.BrokenResourceError, match="go away"):
                await client.send(Say("too late"))


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
