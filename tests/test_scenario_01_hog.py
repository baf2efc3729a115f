"""Scenario 1, hog against 99: one flow sends 5,000/s, 99 flows 5/s each, and 1,000/s are served.

The polite are all served and soon, at full capacity, and the hog is told when to come again. The control is a shared
first-come-first-served queue of the same bound. ``STAGETRIO_SCENARIO_SECONDS=10`` runs it at full length.
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

SECONDS = float(os.environ.get("STAGETRIO_SCENARIO_SECONDS", "1.5"))
WARM_UP = 0.5  # until the hog's backlog stands
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
    """What becomes of the polite who come after the warm-up, and of the hog; the last ones are served at the end."""
    chance = random.Random(seed)
    start = trio.current_time()
    begin, end = start + WARM_UP, start + WARM_UP + SECONDS
    sent = refused = served = 0
    retry: list[float] = []
    waits: list[float] = []

    async def polite(name: str) -> None:
        nonlocal sent, refused
        await trio.sleep(chance.random() / 5)
        while (now := trio.current_time()) < end:
            counts = now >= begin
            sent += counts
            try:
                queue.send_nowait(name, (name, now))
            except Overloaded:
                refused += counts
            await trio.sleep(0.2)

    async def hog() -> None:
        while True:
            try:
                for _ in range(5):
                    queue.send_nowait("hog", ("hog", trio.current_time()))
            except Overloaded as full:
                retry.append(full.retry_after)
            await trio.sleep(0.001)

    async def serve() -> None:
        nonlocal served
        while True:
            try:
                name, then = queue.receive_nowait()
            except trio.WouldBlock:
                pass
            else:
                served += begin <= trio.current_time() < end
                if name != "hog" and then >= begin:
                    waits.append(trio.current_time() - then)
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hog)
        nursery.start_soon(serve)
        async with trio.open_nursery() as everybody:
            for n in range(POLITE):
                everybody.start_soon(polite, f"p{n}")
        await trio.sleep(2)  # longer than anybody's backlog
        nursery.cancel_scope.cancel()
    waits.sort()
    return {
        "polite served": len(waits) / sent,
        "polite refused": refused / sent,
        "p99 seconds": waits[int(0.99 * len(waits))],
        "of capacity": served / (SECONDS * 1000),
        "least retry_after": min(retry, default=math.nan),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_the_polite_do_not_notice_a_hog(seed: int) -> None:
    """All of the polite are served, soon, at full capacity; the hog's refusals carry ``retry_after``."""
    found = trio.run(storm, FairQueue[str, "tuple[str, float]"](BOUND), seed, clock=MockClock(autojump_threshold=0))
    print(f"seed {seed}: {found}")
    assert found["polite served"] == 1
    assert found["polite refused"] == 0
    assert found["p99 seconds"] <= 0.065
    assert found["of capacity"] >= 0.99
    assert found["least retry_after"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_in_a_shared_queue_the_hog_takes_it_all(seed: int) -> None:
    """The control: most of the polite are refused, and those that are not wait for the hog's backlog."""
    found = trio.run(storm, Fifo(), seed, clock=MockClock(autojump_threshold=0))
    print(f"seed {seed}: {found}")
    assert found["polite served"] < 0.5
    assert found["p99 seconds"] > 0.5
