"""Scenario 4, wind-up: a flow alone builds a backlog for 10 s, then a second arrives.

They share evenly from then on. The control counts what each has had since the start, and gives the newcomer everything
until it has caught up.
"""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from stagetrio.fair_queue import FairQueue


async def wind_up(seed: int, *, fair: bool) -> float:
    """The newcomer's share of the second 10 s less a half, over a half; 100 services per second by two workers."""
    chance = random.Random(seed)
    queue: FairQueue[str, None] = FairQueue(100_000)
    total = {"old": 0.0, "new": 0.0}
    later = {"old": 0.0, "new": 0.0}
    for _ in range(6000):
        queue.send_nowait("old", None)

    async def serve() -> None:
        while True:
            delivery = await queue.receive_delivery()
            flow = delivery.flow
            if not fair and trio.current_time() > 10:
                flow = min(total, key=lambda name: total[name])
            seconds = 0.02 * chance.uniform(0.5, 1.5)
            await trio.sleep(seconds)
            delivery.settle(seconds)
            total[flow] += seconds
            if trio.current_time() > 10:
                later[flow] += seconds

    with trio.move_on_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            nursery.start_soon(serve)
            await trio.sleep(10)
            for _ in range(6000):
                queue.send_nowait("new", None)
    return abs(later["new"] / sum(later.values()) - 0.5) / 0.5


@pytest.mark.parametrize("seed", range(20))
def test_a_flow_alone_saves_and_owes_nothing(seed: int) -> None:
    """Unfairness in the second half is 5 % at most."""
    unfairness = trio.run(lambda: wind_up(seed, fair=True), clock=MockClock(autojump_threshold=0))
    print(f"unfairness {unfairness:.3f}")
    assert unfairness <= 0.05


def test_counting_from_the_start_is_unfair() -> None:
    """The control: the newcomer has it all."""
    unfairness = trio.run(lambda: wind_up(0, fair=False), clock=MockClock(autojump_threshold=0))
    print(f"unfairness {unfairness:.3f}")
    assert unfairness > 0.5
