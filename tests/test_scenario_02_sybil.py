"""Scenario 2, sybil: the hog of scenario 1 opens 200 connections under one identity.

Its share is unchanged. The control takes each connection for a flow, as servers that are fair among connections do: the
hog has 200 shares, and the others next to nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from stagetrio.fair_queue import FairQueue
from stagetrio.limiter import Overloaded

OTHERS = 20  # who always want more than they get
CONNECTIONS = 200
CAPACITY = 1000  # a second
SECONDS = 2.0
WARM_UP = 0.5


async def share_of_the_hog(flow_of: Callable[[int], str], connections: int, seed: int) -> float:
    """The hog's share of the work, by 16 items in flight from each of its connections and of the others' one."""
    chance = random.Random(seed)
    queue: FairQueue[str, str] = FairQueue(8000)
    served = {"hog": 0, "other": 0}

    async def client(flow: str, who: str) -> None:
        await trio.sleep(chance.random() / 10)
        while True:
            try:
                for _ in range(16):
                    queue.send_nowait(flow, who)
            except Overloaded as full:
                await trio.sleep(0.05 + full.retry_after * chance.random())
            await trio.sleep(0.1 * (0.5 + chance.random()))

    with trio.move_on_after(WARM_UP + SECONDS):
        async with trio.open_nursery() as nursery:
            for n in range(OTHERS):
                nursery.start_soon(client, f"other {n}", "other")
            for n in range(connections):
                nursery.start_soon(client, flow_of(n), "hog")
            begin = trio.current_time() + WARM_UP
            while True:
                batch = await queue.receive_batch(10)
                if trio.current_time() >= begin:
                    for who in batch:
                        served[who] += 1
                await trio.sleep(len(batch) / CAPACITY)
    return served["hog"] / sum(served.values())


def share(flow_of: Callable[[int], str], connections: int, seed: int) -> float:
    return trio.run(share_of_the_hog, flow_of, connections, seed, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", range(20))
def test_connections_gain_nothing(seed: int) -> None:
    """200 connections under one identity have the share of one, to within 2 %."""
    one = share(lambda _: "hog", 1, seed)
    many = share(lambda _: "hog", CONNECTIONS, seed)
    print(f"seed {seed}: share {one:.4f} by one connection, {many:.4f} by {CONNECTIONS}")
    assert one == pytest.approx(1 / (OTHERS + 1), rel=0.02)
    assert many == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_where_connections_are_flows_they_take_it_all(seed: int) -> None:
    """The control: fair among connections, the hog has 200 shares."""
    control = share(lambda connection: f"hog {connection}", CONNECTIONS, seed)
    print(f"seed {seed}: control {control:.3f}")
    assert control > 0.8
