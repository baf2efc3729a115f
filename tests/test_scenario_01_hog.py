"""Scenarios 1 and 2: one hog against 99 polite flows, from one connection and from 200.

The control is a shared first-come-first-served queue of the same bound. ``SCENARIO_SECONDS=10`` in the environment
runs scenario 1 at full length.
"""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from stagetrio.fair_queue import FairQueue
from stagetrio.limiter import Overloaded

SECONDS = float(os.environ.get("SCENARIO_SECONDS", "1.5"))
SEEDS = range(20)
POLITE = 99
BOUND = 1000
Send = Callable[[str, tuple[str, float]], None]


class Fifo:
    """The control: everybody in one queue."""

    def __init__(self) -> None:
        self.items: deque[tuple[str, float]] = deque()

    def send_nowait(self, flow: str, item: tuple[str, float]) -> None:
        if len(self.items) >= BOUND:
            raise Overloaded("queue")
        self.items.append(item)

    def receive_nowait(self) -> tuple[str, float]:
        if not self.items:
            raise trio.WouldBlock
        return self.items.popleft()


async def storm(queue: FairQueue[str, tuple[str, float]] | Fifo, seed: int) -> dict[str, float]:
    """The hog sends 5,000/s, 99 others 5/s each, and 1,000/s are served."""
    chance = random.Random(seed)
    sent = refused = served = 0
    retry: list[float] = []
    waits: list[float] = []

    async def polite(name: str) -> None:
        nonlocal sent, refused
        await trio.sleep(chance.random() / 5)
        while True:
            sent += 1
            try:
                queue.send_nowait(name, (name, trio.current_time()))
            except Overloaded:
                refused += 1
            await trio.sleep(0.2)

    async def hog() -> None:
        while True:
            try:
                for _ in range(5):
                    queue.send_nowait("hog", ("hog", trio.current_time()))
            except Overloaded as full:
                retry.append(full.retry_after)
            await trio.sleep(0.001)

    with trio.move_on_after(0.5 + SECONDS):
        async with trio.open_nursery() as nursery:
            for n in range(POLITE):
                nursery.start_soon(polite, f"p{n}")
            nursery.start_soon(hog)
            while True:
                try:
                    name, then = queue.receive_nowait()
                except trio.WouldBlock:
                    pass
                else:
                    served += 1
                    if name != "hog":
                        waits.append(trio.current_time() - then)
                await trio.sleep(0.001)
    waits.sort()
    return {
        "polite": len(waits) / (sent - refused),
        "refused": refused / sent,
        "p99": waits[int(0.99 * len(waits))],
        "total": served / ((0.5 + SECONDS) * 1000),
        "retry": min(retry, default=math.nan),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_the_polite_do_not_notice_a_hog(seed: int) -> None:
    """None of the polite is refused, all are served soon, at full capacity; the hog is told when to come again."""
    found = trio.run(storm, FairQueue[str, "tuple[str, float]"](BOUND), seed, clock=MockClock(autojump_threshold=0))
    print(found)
    assert found["refused"] == 0
    assert found["polite"] >= 0.99  # the rest is queued when the time is over
    assert found["p99"] <= 0.065
    assert found["total"] >= 0.98
    assert found["retry"] > 0


def test_in_a_shared_queue_the_hog_takes_it_all() -> None:
    """The control: most of the polite are refused, and those that are not wait for the hog's backlog."""
    found = trio.run(storm, Fifo(), 0, clock=MockClock(autojump_threshold=0))
    print(found)
    assert found["refused"] > 0.3
    assert found["p99"] > 0.5


def share_of_hog(flow_of: Callable[[int], str], seed: int) -> float:
    """The hog's share of 4,000 services beside 20 others that are always backlogged, from 200 connections."""
    chance = random.Random(seed)
    queue: FairQueue[str, str] = FairQueue(math.inf)
    for n in range(20):
        for _ in range(400):
            queue.send_nowait(f"p{n}", "polite")
    for _ in range(4000):
        queue.send_nowait(flow_of(chance.randrange(200)), "hog")
    return sum(queue.receive_nowait() == "hog" for _ in range(4000)) / 4000


@pytest.mark.parametrize("seed", SEEDS)
def test_connections_gain_nothing(seed: int) -> None:
    """200 connections under one identity have the share of one; as 200 flows, the control, they have ten times it."""
    fair = share_of_hog(lambda _: "hog", seed)
    naive = share_of_hog(lambda connection: f"hog{connection}", seed)
    print(fair, naive)
    assert abs(fair - 1 / 21) <= 0.02 / 21
    assert naive > 0.4
