"""Classes and their reserves where costs are told afterwards, by several workers, in any unit."""

from __future__ import annotations

import math

import pytest

from stagetrio.fair_queue import FairQueue, PriorityClass

RESERVE = 0.2
ITEMS = 2000


def crowded(reserve: float = RESERVE) -> FairQueue[tuple[str, int], str]:
    """A queue of two classes, ten flows in each, with more than anybody will serve."""
    queue: FairQueue[tuple[str, int], str] = FairQueue(
        math.inf,
        classes=(PriorityClass("high"), PriorityClass("low", reserve=reserve)),
        class_of=lambda flow: flow[0],
    )
    for n in range(ITEMS):
        for name in ("high", "low"):
            queue.send_nowait((name, n % 10), name)
    return queue


@pytest.mark.parametrize("in_runs", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("cost", [1e-5, 1.0, 50.0])
@pytest.mark.parametrize("dearer", [1, 20])
def test_a_reserve_is_a_share_of_the_work(in_runs: bool, workers: int, cost: float, dearer: int) -> None:
    """Whatever the unit, the workers and the first guess; the lower class waits for no more than its share makes it."""
    queue = crowded()
    work = {"high": 0.0, "low": 0.0}
    waited = longest = 0
    in_hand = []
    for _ in range(ITEMS):
        while len(in_hand) < workers:
            if in_runs:
                (run,) = queue.receive_runs_nowait(1, 3 * cost)
                in_hand.append((run.items.pop(), lambda spent, run=run: run.settle(1, spent)))
            else:
                delivery = queue.receive_delivery_nowait()
                in_hand.append((delivery.item, delivery.settle))
        who, settle = in_hand.pop(0)
        spent = cost * (dearer if who == "low" else 1)
        settle(spent)
        work[who] += spent
        waited = 0 if who == "low" else waited + 1
        longest = max(longest, waited)
    assert work["low"] / sum(work.values()) == pytest.approx(RESERVE, abs=0.03)  # the first guesses included
    assert longest <= (1 / RESERVE) * (dearer + workers)


def test_deliveries_that_are_dropped_hold_no_class_back() -> None:
    """They are booked at their estimates before the next is chosen, so that the class gets its share again."""
    queue = crowded()
    for _ in range(10):
        del [queue.receive_deliveries_nowait(8)][:]
    served = [queue.receive_delivery_nowait() for _ in range(100)]
    for delivery in served:
        delivery.settle(1.0)
    assert sum(delivery.item == "low" for delivery in served) == pytest.approx(RESERVE * 100, abs=3)
    assert queue.statistics().in_hand == 0


def test_a_reserve_is_not_saved() -> None:
    """A class that had nothing, or whose flows were held, has its share from then on and no more."""
    queue: FairQueue[tuple[str, int], str] = FairQueue(
        math.inf,
        classes=(PriorityClass("high"), PriorityClass("low", reserve=RESERVE)),
        class_of=lambda flow: flow[0],
    )
    for _ in range(1000):
        queue.send_nowait(("high", 0), "high")
        queue.send_nowait(("low", 0), "low")
    queue.hold(("low", 0))
    assert set(queue.receive_batch_nowait(500)) == {"high"}
    queue.resume(("low", 0))
    assert queue.receive_batch_nowait(100).count("low") == pytest.approx(RESERVE * 100, abs=1)
