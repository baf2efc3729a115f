"""The fair queue's two ends: order, bounds, waiting, cancelling, closing."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from stagetrio.fair_queue import FairQueue
from stagetrio.limiter import Overloaded


def drain(queue: FairQueue[str, str]) -> list[str]:
    """What the queue gives now, in its order."""
    taken = []
    while True:
        try:
            taken.append(queue.receive_nowait())
        except trio.WouldBlock:
            return taken


async def test_flows_take_turns() -> None:
    """A flow's tenth item waits for the other's first."""
    queue: FairQueue[str, str] = FairQueue(100)
    for n in range(4):
        queue.send_nowait("a", f"a{n}")
    for n in range(2):
        queue.send_nowait("b", f"b{n}")
    assert drain(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


async def test_turns_are_by_cost() -> None:
    """A flow whose items cost three times as much has a third of the turns."""
    queue: FairQueue[str, str] = FairQueue(100)
    for n in range(20):
        queue.send_nowait("dear", f"d{n}", cost=3.0)
        queue.send_nowait("cheap", f"c{n}")
    first = await queue.receive_batch(12)
    assert sum(item[0] == "d" for item in first) == 3


async def test_turns_are_by_weight() -> None:
    """A flow of weight 3 has three turns where one of weight 1 has one; the weight of `open_flow` beats the other."""
    queue: FairQueue[str, str] = FairQueue(100, weight=lambda flow: 3.0 if flow == "a" else 1.0)
    heavy = queue.open_flow("c", weight=6.0)
    for n in range(30):
        queue.send_nowait("a", f"a{n}")
        queue.send_nowait("b", f"b{n}")
        heavy.send_nowait(f"c{n}")
    first = await queue.receive_batch(40)
    assert [sum(item[0] == name for item in first) for name in "abc"] == [12, 4, 24]


async def test_what_an_item_turned_out_to_cost_is_booked() -> None:
    """A settled cost counts instead of the declared one, for the turns that follow."""
    queue: FairQueue[str, str] = FairQueue(100)
    for n in range(20):
        queue.send_nowait("a", f"a{n}")
        queue.send_nowait("b", f"b{n}")
    for _ in range(2):
        delivery = queue.receive_delivery_nowait()
        delivery.settle(9.0 if delivery.flow == "a" else 1.0)
    assert await queue.receive_batch(8) == [f"b{n}" for n in range(1, 9)]


async def test_settling_twice_counts_once() -> None:
    """Only the first settle of a delivery is booked."""
    queue: FairQueue[str, str] = FairQueue(100)
    for n in range(20):
        queue.send_nowait("a", f"a{n}")
        queue.send_nowait("b", f"b{n}")
    first, second = queue.receive_deliveries_nowait(2)
    for delivery in (first, second, first, first):
        delivery.settle(1.0)
    assert await queue.receive_batch(4) == ["a1", "b1", "a2", "b2"]
    assert queue.statistics().in_hand == 0


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
async def test_a_cost_that_is_none_is_refused(cost: float) -> None:
    """A settled cost that is negative or not finite is an error, and the delivery can still be settled."""
    queue: FairQueue[str, str] = FairQueue(1)
    queue.send_nowait("a", "x")
    delivery = queue.receive_delivery_nowait()
    with pytest.raises(ValueError, match="actual"):
        delivery.settle(cost)
    assert queue.statistics().in_hand == 1
    delivery.settle(1.0)
    assert queue.statistics().in_hand == 0


async def test_a_delivery_that_is_dropped_is_booked_at_its_estimate() -> None:
    """Nothing leaks, and nothing is free, when a receiver forgets to settle."""
    queue: FairQueue[str, str] = FairQueue(100)
    for n in range(4):
        queue.send_nowait("a", f"a{n}", cost=2.0)
        queue.send_nowait("b", f"b{n}")
    del [queue.receive_deliveries_nowait(2)][:]
    gc.collect()
    assert queue.receive_delivery_nowait().item == "b1"
    assert queue.statistics().in_hand == 0


async def test_charge_counts_like_work() -> None:
    """Charged work is worked off before the flow has another turn; a negative charge gives nothing in advance."""
    queue: FairQueue[str, str] = FairQueue(100)
    queue.charge("a", 3.0)
    queue.charge("b", -50.0)
    for n in range(8):
        for flow in "abc":
            queue.send_nowait(flow, f"{flow}{n}")
    assert await queue.receive_batch(9) == ["b0", "c0", "b1", "c1", "b2", "c2", "a0", "b3", "c3"]


async def test_the_bound_of_the_queue_refuses() -> None:
    """At ``max_items`` a send is refused with the reason, a receive makes one place."""
    queue: FairQueue[str, str] = FairQueue(2)
    queue.send_nowait("a", "1")
    queue.send_nowait("b", "2")
    with pytest.raises(Overloaded) as caught:
        queue.send_nowait("c", "3")
    assert caught.value.reason == "queue"
    assert queue.receive_nowait() == "1"
    queue.send_nowait("c", "3")
    assert drain(queue) == ["2", "3"]
    assert queue.statistics().refused == 1


async def test_the_bound_of_a_flow_refuses_that_flow_only() -> None:
    """At ``max_items_per_flow`` one flow is refused while others have places."""
    queue: FairQueue[str, str] = FairQueue(10, max_items_per_flow=1)
    queue.send_nowait("a", "1")
    with pytest.raises(Overloaded) as caught:
        queue.send_nowait("a", "2")
    assert caught.value.reason == "flow"
    queue.send_nowait("b", "3")


async def test_a_flow_that_fills_the_queue_leaves_places_to_others() -> None:
    """Once the queue is in use, the last places are not for a flow that holds more than its share."""
    queue: FairQueue[str, int] = FairQueue(1000)
    queue.send_nowait("polite", 0)
    queue.receive_nowait()
    assert queue.open_flow("hog").send_many_nowait(range(1000)) < 900
    with pytest.raises(Overloaded) as caught:
        queue.send_nowait("hog", 0)
    assert caught.value.reason == "flow"
    for n in range(100):
        queue.send_nowait(f"polite {n}", n)


async def test_a_flow_alone_may_fill_the_queue() -> None:
    """No place is kept free where there is nobody to keep it for, nor before anyone has received."""
    queue: FairQueue[str, int] = FairQueue(1000)
    for n in range(1000):
        queue.send_nowait("a", n)
    assert len(await queue.receive_batch(600)) == 600
    for n in range(600):
        queue.send_nowait("a", n)
    assert queue.statistics().items == 1000


async def test_a_waiting_receiver_is_served_in_order_of_arrival() -> None:
    """Receivers that wait are served first come, first served, and a cancelled one takes nothing."""
    queue: FairQueue[str, str] = FairQueue(10)
    got = []

    async def receive(name: str, scope: trio.CancelScope) -> None:
        with scope:
            got.append((name, await queue.receive()))

    scopes = [trio.CancelScope() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for n, scope in enumerate(scopes):
            nursery.start_soon(receive, f"r{n}", scope)
            await wait_all_tasks_blocked()
        scopes[1].cancel()
        await wait_all_tasks_blocked()
        queue.send_nowait("a", "1")
        queue.send_nowait("a", "2")
    assert sorted(got) == [("r0", "1"), ("r2", "2")]


async def test_a_waiting_sender_gets_the_place_that_is_freed() -> None:
    """Waiting senders are served in turn by flow and in order within a flow; a cancelled one has sent nothing."""
    queue: FairQueue[str, str] = FairQueue(1)
    queue.send_nowait("x", "x")
    scope = trio.CancelScope()

    async def send(flow: str, item: str) -> None:
        await queue.send(flow, item)

    async def send_cancelled() -> None:
        with scope:
            await queue.send("hog", "never")

    async with trio.open_nursery() as nursery:
        for n in range(3):
            nursery.start_soon(send, "hog", f"h{n}")
            await wait_all_tasks_blocked()
            if n == 0:
                nursery.start_soon(send_cancelled)
                await wait_all_tasks_blocked()
        nursery.start_soon(send, "polite", "p0")
        await wait_all_tasks_blocked()
        assert queue.statistics().tasks_waiting_send == 5
        scope.cancel()
        await wait_all_tasks_blocked()
        assert [queue.receive_nowait() for _ in range(5)] == ["x", "h0", "p0", "h1", "h2"]


async def test_a_flow_at_its_own_bound_does_not_block_the_line() -> None:
    """A sender that waits for its own flow's bound lets the others pass, and is let in when its flow was served."""
    queue: FairQueue[str, str] = FairQueue(2, max_items_per_flow=1)
    queue.send_nowait("hog", "h0")
    queue.send_nowait("x", "x0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.send, "hog", "h1")
        await wait_all_tasks_blocked()
        nursery.start_soon(queue.send, "y", "y0")
        await wait_all_tasks_blocked()
        assert queue.receive_nowait() == "h0"
        assert queue.receive_nowait() == "x0"
        assert sorted([queue.receive_nowait(), queue.receive_nowait()]) == ["h1", "y0"]


async def test_a_burst_wakes_one_receiver_of_batches() -> None:
    """The receiver of a batch that was woken first collects what came until it ran."""
    queue: FairQueue[str, int] = FairQueue(100)
    got: list[list[int]] = []

    async def receive() -> None:
        got.append(await queue.receive_batch(4))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        for n in range(6):
            queue.send_nowait("a", n)
        assert queue.statistics().tasks_waiting_receive == 1
        await wait_all_tasks_blocked()
        assert sorted(map(len, got)) == [2, 4]
        queue.send_nowait("a", 6)


async def test_a_held_flow_waits_until_it_is_resumed() -> None:
    """Holds add up; a held flow's items are counted and not served; resuming wakes a receiver."""
    queue: FairQueue[str, str] = FairQueue(10)
    queue.hold("a")
    queue.hold("a")
    queue.send_nowait("a", "a0")
    queue.send_nowait("b", "b0")
    assert drain(queue) == ["b0"]
    assert queue.statistics().items == 1
    queue.resume("a")
    assert drain(queue) == []
    got = []

    async def receive() -> None:
        got.append(await queue.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        assert got == []
        queue.resume("a")
    assert got == ["a0"]
    queue.resume("a")  # one too many changes nothing
    queue.send_nowait("a", "a1")
    assert drain(queue) == ["a1"]


async def test_discard_returns_the_backlog_and_lets_senders_in() -> None:
    """Discarding a flow frees its places for those who wait."""
    queue: FairQueue[str, str] = FairQueue(2)
    queue.send_nowait("a", "a0")
    queue.send_nowait("a", "a1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.send, "b", "b0")
        await wait_all_tasks_blocked()
        assert queue.discard("a") == ["a0", "a1"]
    assert drain(queue) == ["b0"]
    assert queue.discard("nobody") == []
    assert queue.statistics().discarded == 2


async def test_closing_refuses_senders_and_drains_receivers() -> None:
    """After close: waiting senders are refused, receivers get the rest, then the end, also those who wait."""
    queue: FairQueue[str, str] = FairQueue(1)
    queue.send_nowait("a", "a0")
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await queue.send("a", "a1")

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        await queue.aclose()
    with pytest.raises(trio.ClosedResourceError):
        queue.send_nowait("a", "a1")
    with pytest.raises(trio.ClosedResourceError):
        await queue.send("a", "a1")
    assert [item async for item in queue] == ["a0"]
    with pytest.raises(trio.EndOfChannel):
        queue.receive_nowait()
    with pytest.raises(trio.EndOfChannel):
        await queue.receive_deliveries(3)


async def test_closing_waits_for_held_flows() -> None:
    """The items of a held flow are still to come: the end is reached when they are resumed or discarded."""
    queue: FairQueue[str, str] = FairQueue(10)
    queue.hold("a")
    queue.send_nowait("a", "a0")
    queue.close()
    ended = []

    async def receive() -> None:
        try:
            ended.append(await queue.receive())
        except trio.EndOfChannel:
            ended.append("end")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        assert ended == []
        queue.resume("a")
    assert sorted(ended) == ["a0", "end"]


async def test_every_async_function_is_a_checkpoint() -> None:
    """Also where it need not wait."""
    queue: FairQueue[str, str] = FairQueue(10)
    channel = queue.open_flow("a")
    with assert_checkpoints():
        await queue.send("a", "1")
    with assert_checkpoints():
        await channel.send("2")
    with assert_checkpoints():
        await queue.receive()
    with assert_checkpoints():
        await queue.receive_batch(9)
    with assert_checkpoints():
        await channel.aclose()
    with assert_checkpoints():
        await queue.aclose()


async def test_a_channel_sends_to_its_flow() -> None:
    """A channel knows its backlog, and takes as many of a list as there are places."""
    queue: FairQueue[str, int] = FairQueue(5)
    channel = queue.open_flow("a")
    assert channel.send_many_nowait([1, 2, 3]) == 3
    assert (channel.flow, channel.backlog) == ("a", 3)
    assert channel.send_many_nowait([4, 5, 6, 7]) == 2
    assert queue.statistics().refused == 2
    assert await queue.receive_batch(9) == [1, 2, 3, 4, 5]
    channel.close()
    with pytest.raises(trio.ClosedResourceError):
        channel.send_nowait(8)
    with pytest.raises(trio.ClosedResourceError):
        channel.send_many_nowait([8])


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "7"])
def test_a_bound_that_is_none_is_refused(bad: float) -> None:
    """The argument and the value are named."""
    with pytest.raises((TypeError, ValueError), match=f"max_items .*{bad!r}"):
        FairQueue(bad)
    with pytest.raises((TypeError, ValueError), match=f"max_items_per_flow .*{bad!r}"):
        FairQueue(10, max_items_per_flow=bad)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), "7"])
def test_a_weight_or_cost_that_is_none_is_refused(bad: float) -> None:
    """Whether it comes from the callable, the channel or the sender; and nothing is queued."""
    queue: FairQueue[str, str] = FairQueue(10, weight=lambda _: bad)
    with pytest.raises((TypeError, ValueError), match=f"weight .*{bad!r}"):
        queue.send_nowait("a", "x")
    with pytest.raises((TypeError, ValueError), match=f"weight .*{bad!r}"):
        queue.open_flow("a", weight=bad)
    channel = queue.open_flow("b", weight=1.0)
    for send in (channel.send_nowait, lambda x, cost: channel.send_many_nowait([x], cost)):
        with pytest.raises((TypeError, ValueError), match=f"cost .*{bad!r}"):
            send("x", bad)
    assert queue.statistics().items == 0


async def test_where_nobody_is_to_wait_a_send_is_refused() -> None:
    """``overflow="refuse"``: at either bound `send` raises what `send_nowait` raises, and queues nothing."""
    queue: FairQueue[str, str] = FairQueue(2, max_items_per_flow=1, overflow="refuse")
    channel = queue.open_flow("a")
    await queue.send("a", "a0")
    for send in (lambda: queue.send("a", "a1"), lambda: channel.send("a1")):
        with pytest.raises(Overloaded) as caught:
            await send()
        assert caught.value.reason == "flow"
    await queue.send("b", "b0")
    with pytest.raises(Overloaded) as caught:
        await queue.send("c", "c0")
    assert caught.value.reason == "queue"
    assert drain(queue) == ["a0", "b0"]
    assert queue.statistics().refused == 3
    with assert_checkpoints():
        await queue.send("c", "c0")


async def test_where_the_longest_gives_way_only_it_waits() -> None:
    """``overflow="evict"``: `send` gets a place at once, unless its own flow is the one with the most items."""
    shed: list[str] = []
    queue: FairQueue[str, str] = FairQueue(2, overflow="evict", on_shed=lambda item, _: shed.append(item))
    await queue.send("a", "a0")
    await queue.send("a", "a1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.send, "a", "a2")
        await wait_all_tasks_blocked()
        assert queue.statistics().tasks_waiting_send == 1
        await queue.send("b", "b0")
        assert shed == ["a1"]
        assert drain(queue) == ["a0", "b0", "a2"]


def test_an_answer_that_is_none_is_refused() -> None:
    """What is to happen at the bound is one of three."""
    with pytest.raises(ValueError, match=r"overflow must be .* not 'drop'"):
        FairQueue(1, overflow="drop")  # type: ignore[arg-type]


async def test_who_waits_by_a_channel_that_is_closed_is_told() -> None:
    """Those who wait by other channels of the flow, or by its name, wait on."""
    queue: FairQueue[str, str] = FairQueue(1)
    queue.send_nowait("a", "a0")
    channel, other = queue.open_flow("a"), queue.open_flow("a")

    async def told() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await channel.send("never")

    async with trio.open_nursery() as nursery:
        for wait in (told, lambda: other.send("a1"), lambda: queue.send("a", "a2")):
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
        channel.close()
        await wait_all_tasks_blocked()
        assert queue.statistics().tasks_waiting_send == 2
        assert drain(queue) == ["a0", "a1", "a2"]


@pytest.mark.parametrize("bad", ["a", 1.5, None, True, 0])
async def test_a_batch_of_another_kind_is_refused(bad: Any) -> None:
    """By name and value, whether there is something or not; and nothing is taken."""
    queue: FairQueue[str, int] = FairQueue(10)
    for _ in range(2):
        for receive in (queue.receive_batch_nowait, queue.receive_deliveries_nowait):
            with pytest.raises((TypeError, ValueError), match=f"max_items must be .*, not {bad!r}"):
                receive(bad)
        for wait in (queue.receive_batch, queue.receive_deliveries):
            with pytest.raises((TypeError, ValueError), match=f"max_items must be .*, not {bad!r}"):
                await wait(bad)
        queue.send_nowait("a", 1)
    assert queue.receive_batch_nowait(9) == [1, 1]


@pytest.mark.parametrize("before", [0.01, 100.0])
async def test_a_weight_changed_with_items_in_hand_leaves_no_debt_and_no_credit(before: float) -> None:
    """What an item in hand has reserved by the old weight is not held against the flow, or for it, by the new one."""
    queue: FairQueue[str, int] = FairQueue(1000)
    changed = queue.open_flow("changed", weight=before)
    for item in range(100):
        changed.send_nowait(item)
    first, _second = queue.receive_delivery_nowait(), queue.receive_delivery_nowait()
    other = queue.open_flow("other")
    for item in range(100):
        other.send_nowait(item)
    queue.open_flow("changed", weight=1.0)
    first.settle(1.0)
    flows = []
    for _ in range(20):
        delivery = queue.receive_delivery_nowait()
        delivery.settle(1.0)
        flows.append(delivery.flow)
    assert flows.count("changed") >= 8
    assert flows.count("other") >= 8


@pytest.mark.parametrize("extreme", [1e-61, 1e61, 5e-324, 1.7e308])
async def test_costs_and_weights_that_would_leave_the_floats_are_refused(extreme: float) -> None:
    """One such item would make the tags of everybody infinite or not a number; at the bounds all goes on in turn."""
    queue: FairQueue[str, int] = FairQueue(100)
    with pytest.raises(ValueError, match="cost must be between"):
        queue.send_nowait("a", 1, cost=extreme)
    with pytest.raises(ValueError, match="weight must be between"):
        queue.open_flow("a", weight=extreme)
    bound = 1e-60 if extreme < 1 else 1e60
    extremes = queue.open_flow("extreme", weight=1 / bound)
    for item in range(10):
        extremes.send_nowait(item, cost=bound)
        queue.send_nowait("ordinary", item)
    served = []
    for _ in range(20):
        delivery = queue.receive_delivery_nowait()
        delivery.settle(1e60 if delivery.flow == "extreme" else 1.0)
        served.append(delivery.flow)
    assert sorted(served) == ["extreme"] * 10 + ["ordinary"] * 10
    with pytest.raises(ValueError, match="delta must be finite"):
        queue.charge("a", 1e61)


async def test_ctrl_c_does_not_come_between_an_item_and_its_count() -> None:
    """Whatever changes the queue holds Ctrl-C off while it does, as a key that is asked then can tell."""
    held_off = []

    class Key(str):
        __slots__ = ()

        def __hash__(self) -> int:
            held_off.append(trio.lowlevel.currently_ki_protected())
            return super().__hash__()

    queue: FairQueue[str, int] = FairQueue(10)
    channel = queue.open_flow(Key("a"))
    queue.send_nowait(Key("a"), 1)
    await queue.send(Key("a"), 2)
    queue.hold(Key("a"))
    queue.resume(Key("a"))
    queue.charge(Key("a"), 1.0)
    queue.discard(Key("a"))
    channel.close()
    assert len(held_off) >= 7
    assert all(held_off)
