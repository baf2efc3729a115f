"""Items come in runs of one flow, fair to within a quantum, and what is put back is as if it had not been taken."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import trio

from stagetrio.fair_queue import FairQueue


def settled_queue(costs: dict[str, float], items: int) -> FairQueue[str, int]:
    """A queue that knows what each flow's items cost, with so many of them queued."""
    queue: FairQueue[str, int] = FairQueue(100_000)
    for flow in costs:
        for item in range(-1, items):
            queue.send_nowait(flow, item)
    for _ in costs:
        (run,) = queue.receive_runs_nowait(1, 1.0)
        run.settle(1, costs[run.flow])
    return queue


def test_a_run_holds_what_fits_into_the_quantum() -> None:
    """Cheap items come together, dear ones alone, and unknown ones alone too."""
    queue = settled_queue({"cheap": 0.1, "dear": 5.0}, 1000)
    lengths: dict[str, set[int]] = {"cheap": set(), "dear": set()}
    for _ in range(5):
        for run in queue.receive_runs_nowait(100, 1.05):
            lengths[run.flow].add(len(run.items))
            run.settle(len(run.items), {"cheap": 0.1, "dear": 5.0}[run.flow] * len(run.items))
    assert lengths["dear"] == {1}
    assert max(lengths["cheap"]) == 10
    queue.send_nowait("new", 1)
    queue.send_nowait("new", 2)
    new = [run for run in queue.receive_runs_nowait(3000, 0.001) if run.flow == "new"]
    assert [len(run.items) for run in new] == [1, 1]


@pytest.mark.parametrize("quantum", [0.0, 1.0, 10.0])
def test_flows_get_equal_work_to_within_a_quantum(quantum: float) -> None:
    """Whatever an item costs, the work two backlogged flows have had differs by a quantum and an item at most."""
    costs = {"a": 0.3, "b": 1.0, "c": 3.0}
    queue = settled_queue(costs, 1000)
    work = Counter(costs)
    order: dict[str, list[int]] = {flow: [] for flow in costs}
    for _ in range(250):
        for run in queue.receive_runs_nowait(5, quantum):
            order[run.flow] += reversed(run.items)
            work[run.flow] += costs[run.flow] * len(run.items)  # type: ignore[assignment]
            run.settle(len(run.items), costs[run.flow] * len(run.items))
        assert max(work.values()) - min(work.values()) <= quantum + 2 * 3.0
    assert all(items == list(range(len(items))) for items in order.values())


def test_what_is_put_back_comes_again_in_order() -> None:
    """Items not begun go back to the front of their flow, whether or not it has others, and count as queued."""
    queue = settled_queue({"a": 0.1}, 10)
    (run,) = queue.receive_runs_nowait(4, 1.0)
    assert run.items.pop() == 0
    run.settle(1, 0.1)
    queue.put_back(run)
    assert queue.statistics().items == 9
    (run,) = queue.receive_runs_nowait(100, 10.0)
    assert list(reversed(run.items)) == list(range(1, 10))
    queue.put_back(run)
    queue.put_back(run)
    assert queue.statistics().items == 9
    assert [queue.receive_nowait() for _ in range(9)] == list(range(1, 10))
    assert queue.statistics().in_hand == 0


def test_what_has_no_place_any_more_is_not_put_back() -> None:
    """The bound of the queue holds: items whose places have been taken stay with who took them."""
    queue: FairQueue[str, int] = FairQueue(4)
    for item in range(4):
        queue.send_nowait("a", item)
    (run,) = queue.receive_runs_nowait(1, 1.0)
    run.settle(1, 0.1)
    (run,) = queue.receive_runs_nowait(2, 1.0)
    for item in range(4, 7):
        queue.send_nowait("a", item)
    assert not queue.put_back(run)
    assert list(reversed(run.items)) == [1, 2]
    assert queue.statistics().items == 4
    assert queue.receive_nowait() == 3
    assert queue.receive_nowait() == 4
    assert queue.put_back(run)
    assert queue.statistics().items == 4


def test_an_item_of_its_own_is_settled_on_its_own() -> None:
    """A run can be settled part by part, and gives items away one by one."""
    queue = settled_queue({"a": 0.1}, 10)
    (run,) = queue.receive_runs_nowait(4, 1.0)
    single = run.single(run.items.pop())
    assert (single.items, single.flow) == ([0], "a")
    run.items.clear()
    run.settle(2, 0.2)
    assert queue.statistics().in_hand == 2
    single.settle(1, 0.1)
    run.settle(1, 0.1)
    assert queue.statistics().in_hand == 0


def test_a_run_that_is_dropped_is_booked_at_its_estimate() -> None:
    """Work that nobody settled does not stay in hand for ever."""
    queue = settled_queue({"a": 0.1}, 10)
    runs = queue.receive_runs_nowait(4, 1.0)
    assert queue.statistics().in_hand == 4
    del runs
    gc.collect()
    (run,) = queue.receive_runs_nowait(1, 1.0)
    run.settle(1, 0.1)
    assert queue.statistics().in_hand == 0


async def test_waiting_and_the_end() -> None:
    """A waiting receiver gets a run of one; an empty queue blocks, a closed one ends."""
    queue: FairQueue[str, int] = FairQueue(10)
    with pytest.raises(trio.WouldBlock):
        queue.receive_runs_nowait(1, 1.0)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            run = await queue.receive_run(1.0)
            assert (run.flow, run.items) == ("a", [1])
            run.settle(1, 1.0)

        await trio.testing.wait_all_tasks_blocked()
        queue.send_nowait("a", 1)
    queue.close()
    with pytest.raises(trio.EndOfChannel):
        queue.receive_runs_nowait(1, 1.0)
    with pytest.raises(trio.EndOfChannel):
        await queue.receive_run(1.0)


async def test_declared_costs_are_learned_from_per_unit_and_survive_being_put_back() -> None:
    """What costs as declared is estimated as declared, and the estimate does not grow by the cost each time."""
    queue: FairQueue[str, int] = FairQueue(10)
    for _ in range(3):
        queue.send_nowait("a", 1, cost=5.0)
        (run,) = queue.receive_runs_nowait(1, 1.0)
        assert run.estimate == 5.0
        run.items.pop()
        run.settle(1, 5.0)
    queue.send_nowait("a", 1, cost=5.0)
    queue.send_nowait("a", 2, cost=3.0)
    (run,) = queue.receive_runs_nowait(1, 1.0)
    assert queue.put_back(run)
    assert [queue.receive_delivery_nowait().declared for _ in range(2)] == [5.0, 3.0]
    queue.send_nowait("a", 3, cost=5.0)
    (run,) = queue.receive_runs_nowait(1, 1.0)
    queue.send_nowait("a", 4)
    assert queue.put_back(run)
    assert [queue.receive_delivery_nowait().declared for _ in range(2)] == [5.0, 1.0]


@pytest.mark.parametrize("actual", [0.0, 1e-60])
async def test_a_run_of_what_costs_nothing_is_bounded_by_its_items(actual: float) -> None:
    """However often a flow has cost next to nothing, and however long a run may be, it has at most ``max_items``."""
    queue: FairQueue[str, int] = FairQueue(100)
    for _ in range(3000):
        queue.send_nowait("a", 0)
        (run,) = queue.receive_runs_nowait(1, 0.1)
        run.settle(1, actual)
    for quantum in (1e300, float("inf")):
        for item in range(20):
            queue.send_nowait("a", item)
        queue.send_nowait("b", 0)
        assert {run.flow: len(run.items) for run in queue.receive_runs_nowait(15, quantum)}["a"] >= 10


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 1e100])
async def test_a_cost_that_cannot_be_is_not_booked(bad: float) -> None:
    """It is refused by name, and the run can still be settled."""
    queue: FairQueue[str, int] = FairQueue(10)
    queue.send_nowait("a", 1)
    (run,) = queue.receive_runs_nowait(1, 1.0)
    with pytest.raises(ValueError, match="actual must be finite"):
        run.settle(1, bad)
    assert queue.statistics().in_hand == 1
    run.settle(1, 2.0)
    assert queue.statistics().in_hand == 0


@pytest.mark.parametrize(("max_items", "quantum"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
async def test_runs_out_of_range_are_refused(max_items: int, quantum: float) -> None:
    """Also where there is nothing to take."""
    queue: FairQueue[str, int] = FairQueue(10)
    with pytest.raises(ValueError, match="max_items must be at least 1 and quantum at least 0"):
        queue.receive_runs_nowait(max_items, quantum)
