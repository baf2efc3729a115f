"""What the fair queue sheds, and in which order it serves classes."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

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
