"""What the fair queue sheds, and in which order it serves classes."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.fair_queue import CoDel, FairQueue, PriorityClass
from stagetrio.limiter import Overloaded


async def test_an_item_past_its_deadline_is_shed(mock_clock: MockClock) -> None:
    """It goes to ``on_shed`` instead of a receiver, is counted, and costs its flow nothing."""
    shed: list[tuple[str, str]] = []
    queue: FairQueue[str, str] = FairQueue(10, on_shed=lambda item, reason: shed.append((item, reason)))
    queue.send_nowait("a", "late", deadline=trio.current_time() + 1)
    queue.send_nowait("a", "in time", deadline=trio.current_time() + 3)
    queue.send_nowait("a", "whenever")
    mock_clock.jump(2)
    assert await queue.receive_batch(9) == ["in time", "whenever"]
    assert shed == [("late", "deadline")]
    assert queue.statistics().shed == 1
    assert queue.statistics().items == 0


async def test_what_waits_too_long_in_standing_overload_is_shed(mock_clock: MockClock) -> None:
    """A burst may wait the interval, a standing queue the target; the last item is served whatever its age."""
    shed: list[int] = []
    codel = CoDel(target=0.005, interval=0.1)
    queue: FairQueue[str, int] = FairQueue(10, codel=codel, on_shed=lambda item, _: shed.append(item))
    queue.send_nowait("a", 0)
    queue.send_nowait("a", 1)
    mock_clock.jump(0.05)
    assert queue.receive_nowait() == 0
    mock_clock.jump(0.06)
    queue.send_nowait("a", 2)
    queue.send_nowait("a", 3)
    mock_clock.jump(0.01)
    assert queue.receive_nowait() == 3
    assert shed == [1, 2]


async def test_the_longest_flow_gives_way() -> None:
    """At the bound its newest item is evicted for a shorter flow; it cannot evict for itself."""
    shed: list[tuple[str, str]] = []
    queue: FairQueue[str, str] = FairQueue(
        3, overflow="evict", on_shed=lambda item, reason: shed.append((item, reason))
    )
    for n in range(3):
        queue.send_nowait("hog", f"h{n}")
    queue.send_nowait("polite", "p0")
    assert shed == [("h2", "evicted")]
    with pytest.raises(Overloaded):
        queue.send_nowait("hog", "h3")
    assert sorted(await queue.receive_batch(9)) == ["h0", "h1", "p0"]


@pytest.mark.parametrize(("reserve", "background"), [(0.0, 0), (0.25, 25)])
async def test_classes_are_served_strictly_and_reserves_are_kept(reserve: float, background: int) -> None:
    """Of 100 services the lower class gets none, or its reserve."""
    queue: FairQueue[str, str] = FairQueue(
        1000,
        classes=(PriorityClass("high"), PriorityClass("low", reserve=reserve)),
        class_of=lambda flow: flow,
    )
    for _ in range(200):
        queue.send_nowait("low", "low")
        queue.send_nowait("high", "high")
    served = await queue.receive_batch(100)
    assert abs(served.count("low") - background) <= 1


@pytest.mark.parametrize("deliveries", [False, True])
async def test_the_first_deadline_may_come_while_a_batch_is_waited_for(deliveries: bool) -> None:
    """Who waits for a batch gets what was sent, also where the first item that may be shed has come meanwhile."""
    queue: FairQueue[str, str] = FairQueue(10)
    got: list[str] = []

    async def receive() -> None:
        if deliveries:
            got.extend(delivery.item for delivery in await queue.receive_deliveries(2))
        else:
            got.extend(await queue.receive_batch(2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        queue.send_nowait("a", "x", deadline=trio.current_time() + 5)
    assert got == ["x"]


async def test_who_is_let_in_by_shedding_is_served(autojump_clock: MockClock) -> None:
    """Where all that was queued is shed, the receive that found it so gets what those who waited have sent."""
    queue: FairQueue[str, str] = FairQueue(2)
    for item in ("late", "later"):
        queue.send_nowait("a", item, deadline=trio.current_time() + 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.send, "b", "in time")
        await trio.sleep(2)
        with trio.fail_after(1):
            assert await queue.receive() == "in time"
    assert queue.statistics().shed == 2


async def test_what_is_held_keeps_no_worker_busy(mock_clock: MockClock) -> None:
    """The last item that can be served is served whatever its age, also where others are queued and held."""
    queue: FairQueue[str, str] = FairQueue(10, codel=CoDel(target=0.1, interval=0.2))
    queue.send_nowait("held", "h")
    queue.hold("held")
    queue.send_nowait("a", "old")
    mock_clock.jump(1)
    assert queue.receive_nowait() == "old"
    for item in ("new", "newer"):
        queue.send_nowait("a", item)
    mock_clock.jump(0.15)  # more than the target, but nothing that can be served has stood for long
    assert await queue.receive_batch(9) == ["new", "newer"]


async def test_each_class_has_its_patience(mock_clock: MockClock) -> None:
    """CoDel is a class's own; where it has none the queue's holds; a class that is not overloaded sheds nothing."""
    shed: list[tuple[str, str]] = []
    queue: FairQueue[str, str] = FairQueue(
        100,
        codel=CoDel(target=0.5, interval=1.0),
        classes=(PriorityClass("quick", codel=CoDel(target=0.1, interval=0.2)), PriorityClass("patient")),
        class_of=lambda flow: flow,
        on_shed=lambda item, reason: shed.append((item, reason)),
    )
    for n in range(3):
        queue.send_nowait("quick", f"q{n}")
        queue.send_nowait("patient", f"p{n}")
    mock_clock.jump(0.3)
    assert await queue.receive_batch(9) == ["q2", "p0", "p1", "p2"]
    assert shed == [("q0", "sojourn"), ("q1", "sojourn")]


async def test_under_standing_overload_the_newest_come_first(mock_clock: MockClock) -> None:
    """Adaptive LIFO: in order as long as there is no overload, then the newest of each flow, the oldest are shed."""
    shed: list[int] = []
    codel = CoDel(target=0.1, interval=1.0, newest_first=True)
    queue: FairQueue[str, int] = FairQueue(100, codel=codel, on_shed=lambda item, _: shed.append(item))
    for n in range(3):
        queue.send_nowait("a", n)
    assert queue.receive_nowait() == 0
    mock_clock.jump(0.9)
    for n in range(3, 6):
        queue.send_nowait("a", n)
    mock_clock.jump(0.2)  # the queue has stood for 1.1 s
    assert [queue.receive_nowait() for _ in range(3)] == [5, 4, 3]
    assert shed == [1, 2]
    queue.send_nowait("a", 6)  # it was empty: a burst again
    queue.send_nowait("a", 7)
    assert await queue.receive_batch(9) == [6, 7]


async def test_classes_give_way_to_those_before_them() -> None:
    """At the bound the later class is evicted first, an earlier one never, and nobody loses his only item."""
    shed: list[str] = []
    queue: FairQueue[str, str] = FairQueue(
        6,
        overflow="evict",
        classes=(PriorityClass("system"), PriorityClass("user")),
        class_of=lambda flow: flow.split()[0],
        on_shed=lambda item, _: shed.append(item),
    )
    for n in range(3):
        queue.send_nowait("system", f"s{n}")
    for n in range(2):
        queue.send_nowait("user a", f"a{n}")
    queue.send_nowait("user b", "b0")
    queue.send_nowait("system", "s3")
    assert shed == ["a1"]
    for flow in ("system", "user c"):
        with pytest.raises(Overloaded):
            queue.send_nowait(flow, "x")
    assert await queue.receive_batch(9) == ["s0", "s1", "s2", "s3", "a0", "b0"]


async def test_what_on_shed_raises_loses_no_item(mock_clock: MockClock) -> None:
    """It comes out of the call that has shed; every other item is still there, or was received."""
    queue: FairQueue[str, str] = FairQueue(10, on_shed=lambda _, reason: 1 / 0)
    late = trio.current_time() + 1
    for item, deadline in (("a", math.inf), ("late", late), ("b", math.inf)):
        queue.send_nowait("flow", item, deadline=deadline)
    mock_clock.jump(2)
    assert await queue.receive_batch(9) == ["a"]
    with pytest.raises(ZeroDivisionError):
        await queue.receive_batch(9)
    assert await queue.receive_batch(9) == ["b"]
    assert queue.statistics().shed == 1


@pytest.mark.parametrize("overflow", ["wait", "refuse", "evict"])
@pytest.mark.parametrize("bad", ["soon", None, True, math.nan])
async def test_a_deadline_that_is_none_is_refused(bad: float, overflow: Literal["wait", "refuse", "evict"]) -> None:
    """Its sender is told, the argument and the value are named, and nobody else's item is lost or held up by it."""
    queue: FairQueue[str, int] = FairQueue(2, overflow=overflow)
    for full in (1, 2):
        queue.send_nowait("a", full)
        with pytest.raises((TypeError, ValueError), match=f"deadline .*{bad!r}"):
            queue.send_nowait("b", 0, deadline=bad)
        with pytest.raises((TypeError, ValueError), match=f"deadline .*{bad!r}"):
            await queue.send("b", 0, deadline=bad)
        with pytest.raises((TypeError, ValueError), match=r"cost .*-1"):
            await queue.send("b", 0, cost=-1)
    assert await queue.receive_batch(9) == [1, 2]


def test_a_codel_that_is_none_is_refused() -> None:
    """Where it is given, to the queue or to a class; as is a class without a name."""
    with pytest.raises(TypeError, match="codel must be a CoDel or None, not 5"):
        FairQueue(10, codel=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="codel must be a CoDel or None, not 5"):
        PriorityClass("gold", codel=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name must be a string, not 3"):
        PriorityClass(3)  # type: ignore[arg-type]
