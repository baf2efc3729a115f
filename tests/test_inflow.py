"""Input comes as fast as it may: what is over a rate waits in the kernel, or is refused with a time to come back."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import trio
from served import CODEC, Raw, Say, serving, shout
from trio.testing import MockClock

from stagetrio.codec import Refused
from stagetrio.inflow import Inflow, InputRates
from stagetrio.limiter import Rate
from stagetrio.peer import Peer
from stagetrio.transport import READ_SIZE


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def nobody(sender: object) -> None:
    """Offer nothing again."""


async def test_a_burst_and_then_the_rate(autojump_clock: MockClock) -> None:
    """In any span: what the burst holds, and the rate; an idle hour saves up no more than the burst."""
    inflow = Inflow(InputRates(message_rate=Rate(10), burst=0.5), nobody)
    many = [b""] * 100
    assert inflow.take("a", many) == 5
    assert inflow.take("a", many) == 0
    await trio.sleep(0.2)
    assert inflow.take("a", many) == 2
    await trio.sleep(3600)
    assert inflow.take("a", many) == 5
    assert inflow.take("b", many) == 5


async def test_one_message_always_may_pass_and_pays_for_itself(autojump_clock: MockClock) -> None:
    """One a minute is less than the burst of a second; a frame above the burst of bytes keeps those behind waiting."""
    slow = Inflow(InputRates(message_rate=Rate(1, per=60)), nobody)
    assert slow.take("a", [b""] * 3) == 1
    await trio.sleep(59)
    assert slow.take("a", [b""]) == 0
    await trio.sleep(1)
    assert slow.take("a", [b""]) == 1
    large = Inflow(InputRates(byte_rate=Rate(1000)), nobody)
    assert large.take("a", [bytes(5000), b"x"]) == 1
    await trio.sleep(3.9)
    assert large.take("a", [b"x"]) == 0
    await trio.sleep(0.2)
    assert large.take("a", [b"x"]) == 1


async def test_the_common_rate_is_shared_and_what_is_given_back_can_be_used(autojump_clock: MockClock) -> None:
    """Whoever sends draws from it; what the queue did not take is nobody's debt."""
    inflow = Inflow(InputRates(total_message_rate=Rate(10)), nobody)
    assert inflow.take("a", [b""] * 7) == 7
    assert inflow.take("b", [b""] * 7) == 3
    inflow.give_back("b", [b""] * 3)
    assert inflow.take("c", [b""] * 7) == 3
    assert inflow.refusal("a").retry_after == pytest.approx(0.1)


async def test_nobody_overtakes_those_in_line(autojump_clock: MockClock) -> None:
    """A newcomer takes nothing while others wait for their turn."""
    turns: list[str] = []

    def advance(sender: str) -> None:
        turns.append(sender)
        assert inflow.take(sender, [b""]) == 1

    inflow = Inflow(InputRates(total_message_rate=Rate(10)), advance)
    assert inflow.take("a", [b""] * 20) == 10
    for sender in "abc":
        inflow.wait(sender)
    await trio.sleep(1)
    assert inflow.take("d", [b""]) == 0
    with trio.move_on_after(1):
        await inflow.run()
    assert turns == ["a", "b", "c"]
    assert inflow.take("d", [b""]) == 1


async def test_over_the_rate_the_socket_is_not_read(kind: str, autojump_clock: MockClock) -> None:
    """Everything is served in the end, in order, ten a second, and the rest waits where it is."""
    times: list[float] = []

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        times.append(trio.current_time())
        return message

    async with serving(kind, handler, input_rates=InputRates(message_rate=Rate(10))) as running:
        client = await running.connect()
        start = trio.current_time()
        payloads = [b"%d" % i for i in range(100)]
        await client.send(*payloads)
        assert [await client.receive() for _ in payloads[:10]] == payloads[:10]
        (peer,) = running.server.peers
        assert peer.statistics().paused
        assert [await client.receive() for _ in payloads[10:]] == payloads[10:]
        assert not peer.statistics().paused
        for number, time in enumerate(times):
            assert max(0, number - 9) / 10 <= time - start <= max(0, number - 9) / 10 + 0.02
        assert running.server.statistics().throttled > 0


async def test_a_flood_waits_in_the_kernel(kind: str, autojump_clock: MockClock) -> None:
    """Of a peer that sends megabytes, no more is read than what may pass, and one read."""
    payload = bytes(900)
    async with serving(kind, input_rates=InputRates(byte_rate=Rate(9000))) as running:
        client = await running.connect()
        start = trio.current_time()
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.receive_all)
                while True:
                    await client.send(*[payload] * 100)
        (peer,) = running.server.peers
        statistics = peer.statistics()
        elapsed = trio.current_time() - start
        served = statistics.bytes_sent // 904
        assert 9 * elapsed <= served <= 10 * (elapsed + 1) + 1
        assert statistics.bytes_received <= served * 904 + 2 * READ_SIZE


async def test_who_is_refused_is_told_when_to_come_back(kind: str, autojump_clock: MockClock) -> None:
    """And who comes back then is served."""
    rates = InputRates(message_rate=Rate(2))
    async with serving(kind, shout, codec=CODEC, input_rates=rates, refuse=True) as running:
        client = await running.connect()
        await client.send(*[CODEC.encode(Say("hi"), id) for id in range(5)])
        answers = [await client.message() for _ in range(5)]
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert answers.count(Say("HI")) == 2
        assert {answer.reason for answer in refused} == {"rate"}
        await trio.sleep(max(answer.retry_after for answer in refused))
        await client.send(CODEC.encode(Say("again"), 1))
        assert await client.message() == Say("AGAIN")
        statistics = running.server.statistics()
        assert (statistics.refused, statistics.throttled) == (3, 3)


async def test_those_over_the_common_rate_take_turns(autojump_clock: MockClock) -> None:
    """One that has sent a thousand messages does not keep the other from its few."""
    async with serving("tcp", input_rates=InputRates(total_message_rate=Rate(100), burst=0.1)) as running:
        hog, polite = await running.connect(), await running.connect()
        await hog.send(*[b"hog"] * 1000)
        assert await hog.receive() == b"hog"
        start = trio.current_time()
        await polite.send(*[b"polite"] * 5)
        assert [await polite.receive() for _ in range(5)] == [b"polite"] * 5
        assert trio.current_time() - start < 1


async def test_half_closed_peers_over_the_rate_are_served(kind: str, autojump_clock: MockClock) -> None:
    """What was received before the end still passes, at its rate."""
    async with serving(kind, input_rates=InputRates(message_rate=Rate(10))) as running:
        client = await running.connect()
        await client.send(*[b"x"] * 30)
        await client.stream.send_eof()
        assert len(await client.receive_all()) == 30


async def test_nothing_of_a_peer_that_waits_is_kept_when_it_is_gone(autojump_clock: MockClock) -> None:
    """Though its turn would have come in an hour only."""
    async with serving("tcp", input_rates=InputRates(message_rate=Rate(1, per=3600))) as running:
        client: Raw = await running.connect()
        await client.send(b"one", b"two")
        assert await client.receive() == b"one"
        gone = weakref.ref(running.server.peers[0])
        running.server.peers[0].close()
        assert await client.receive() is None
        await client.stream.aclose()
        while running.server.peers:
            await trio.lowlevel.checkpoint()
        other = await running.connect()
        await other.send(b"x")  # and the worker's hand is full of something else
        assert await other.receive() == b"x"
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("limit", ["message_rate", "total_message_rate"])
async def test_a_sender_that_is_forgotten_loses_its_place(limit: str) -> None:
    """In the line, and on the clock."""
    inflow = Inflow(InputRates(**{limit: Rate(1, per=3600)}), nobody)
    sender = trio.Event()
    gone = weakref.ref(sender)
    assert inflow.take(sender, [b""] * 2) == 1
    inflow.wait(sender)
    inflow.forget(sender)
    del sender
    gc.collect()
    assert gone() is None


async def test_what_the_queue_does_not_take_is_not_counted(autojump_clock: MockClock) -> None:
    """A message that waits for room in the queue passes once, however often it is offered."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        await trio.sleep(0.001)
        return message

    rates = InputRates(message_rate=Rate(20))
    async with serving("tcp", handler, input_rates=rates, max_items=1, workers=1) as running:
        client = await running.connect()
        start = trio.current_time()
        await client.send(*[b"x"] * 20)
        assert [await client.receive() for _ in range(20)] == [b"x"] * 20
        assert trio.current_time() - start < 0.1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"message_rate": 10}, TypeError, "message_rate must be a Rate, not 10"),
        ({"total_byte_rate": None}, TypeError, "total_byte_rate must be a Rate, not None"),
        ({"burst": 0}, ValueError, "burst must be a positive number of seconds, not 0"),
        ({"burst": float("inf")}, ValueError, "burst must be a positive number of seconds, not inf"),
    ],
)
def test_wrong_rates_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """At once, and not when the first message comes."""
    with pytest.raises(error, match=words):
        InputRates(**options)


async def test_giving_back_for_a_sender_that_is_gone_keeps_nothing_of_it() -> None:
    """Its connection may end by the very refusal of a message; what all share is given back nevertheless."""
    inflow = Inflow(InputRates(message_rate=Rate(1), total_message_rate=Rate(2), burst=1), nobody)

    class Sender:
        pass

    sender = Sender()
    assert inflow.take(sender, [b"x"]) == 1
    inflow.forget(sender)
    inflow.give_back(sender, [b"x"])
    gone = weakref.ref(sender)
    del sender
    assert gone() is None
    assert [inflow.take(name, [b"x"]) for name in "abc"] == [1, 1, 0]
