"""Strangers' mistakes and failing handlers: a clear reason, one connection or message lost, all others unaffected."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
from served import CODEC, FRAMING, Say, closed_by, serving, shout
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.codec import Closed, Failed, Refused
from stagetrio.framing import LengthPrefixed
from stagetrio.limiter import Overloaded
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.watchdog import BudgetExceeded, open_watchdog


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


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


async def test_a_full_queue_behind_busy_workers_leaves_the_loop_idle(kind: str, autojump_clock: MockClock) -> None:
    """Whoever wants room is not offered it for ever where there is none; time, which jumps when idle, goes on."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        await trio.sleep(1)
        return message

    async with serving(kind, handler, workers=1, max_items=1) as running:
        client = await running.connect()
        await client.send(*[b"x"] * 20)
        assert [await client.receive() for _ in range(20)] == [b"x"] * 20


async def test_ten_thousand_messages_to_a_full_queue_are_refused_with_a_reason(kind: str) -> None:
    """With ``refuse`` each message gets its reply or its refusal, by id, and a polite peer is served meanwhile."""
    proceed = trio.Event()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        await proceed.wait()
        return message

    # More than the queue and what is parked behind the message in hand take, else the socket is left unread.
    limits = PeerLimits(max_decoded=1000)
    options = {"codec": CODEC, "max_items": 20, "workers": 2, "refuse": True, "limits": limits}
    async with serving(kind, handler, **options) as running:
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


@pytest.mark.parametrize("tail", [b"garbage", b"\x93\xa3Say\x01\x80"])
async def test_garbage_among_refused_messages_ends_its_connection_only(kind: str, tail: bytes) -> None:
    """A payload that is refused and turns out to be no message is the peer's mistake, and nobody else's trouble."""
    proceed = trio.Event()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        await proceed.wait()
        return message

    options = {"codec": CODEC, "max_items": 1, "workers": 1, "refuse": True}
    async with serving(kind, handler, **options) as running:
        client, other = await running.connect(), await running.connect()
        good = CODEC.encode(Say("x"), 1)
        await client.send(*[good] * 70, tail, *[good] * 80)
        await closed_by_reason(running, CloseReason.PROTOCOL)
        proceed.set()
        await other.send(good)
        assert await other.message() == Say("x")


async def test_whoever_is_refused_may_be_closed_for_it(kind: str) -> None:
    """`on_refused` may end the connection in the middle of what it has sent."""
    proceed = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        await proceed.wait()
        return message

    options = {"max_items": 1, "workers": 1, "refuse": True, "on_refused": lambda peer, overloaded: peer.close()}
    async with serving(kind, handler, **options) as running:
        client, other = await running.connect(), await running.connect()
        await client.send(*[b"x"] * 200)
        await closed_by_reason(running, CloseReason.CLOSED)
        proceed.set()
        await other.send(b"y")
        assert await other.receive() == b"y"


async def test_a_frame_too_small_for_a_farewell_closes_without_one(kind: str) -> None:
    """What does not fit into a frame is not said; the server goes on."""

    async def handler(peer: Peer[Any], message: Any) -> Any:
        raise Overloaded("tickets" * 10)

    framing = LengthPrefixed(30)
    async with serving(kind, handler, codec=CODEC, framing=framing, on_error=lambda peer, error: None) as running:
        for wire in (b"\0\0\x13\x88", framing.encode(CODEC.encode(Say("x"), 1))):
            client = await running.connect()
            await client.stream.send_all(wire)
            assert await client.receive() is None
            await client.stream.aclose()
        assert set(running.server.statistics().closed) == {CloseReason.PROTOCOL, CloseReason.FAILED}


async def closed_by_reason(running: Any, reason: CloseReason) -> None:
    """Wait until a connection has ended for a reason."""
    with trio.fail_after(20):
        while not running.server.statistics().closed.get(reason):
            await trio.lowlevel.checkpoint()
