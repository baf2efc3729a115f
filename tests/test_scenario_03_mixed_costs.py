"""Scenario 3, mixed costs: 16 workers, 50 flows of 1 ms and 50 of 100 ms, costs unknown at first.

A cheap flow has its turns evenly, and half of the work is the cheap ones'. The control serves the flows in turn (round
robin): the cheap ones wait for all the dear ones.
"""

from __future__ import annotations

import random
from collections import deque

import pytest
import trio
from trio.testing import MockClock

from stagetrio.fair_queue import FairQueue

WARM_UP, SECONDS = 1.5, 1.0


async def mixed(seed: int, *, fair: bool) -> tuple[float, float]:
    """The 99th percentile of a cheap flow's gaps between services, and the share of the cheap in the work."""
    flows = [("cheap", n) for n in range(50)] + [("dear", n) for n in range(50)]
    random.Random(seed).shuffle(flows)
    queue: FairQueue[tuple[str, int], None] = FairQueue(1_000_000)
    turns = deque(flows)
    last: dict[tuple[str, int], float] = {}
    gaps: list[float] = []
    work = {"cheap": 0.0, "dear": 0.0}
    for flow in flows:
        for _ in range(20):
            queue.send_nowait(flow, None)

    async def serve() -> None:
        while True:
            if fair:
                delivery = await queue.receive_delivery()
                flow = delivery.flow
                queue.send_nowait(flow, None)  # always backlogged
            else:
                flow = turns[0]
                turns.rotate(-1)
            now = trio.current_time()
            if now > WARM_UP and flow[0] == "cheap":
                gaps.append(now - last.get(flow, now))
            last[flow] = now
            seconds = 0.001 if flow[0] == "cheap" else 0.1
            work[flow[0]] += max(0.0, min(now + seconds, WARM_UP + SECONDS) - max(now, WARM_UP))
            await trio.sleep(seconds)
            if fair:
                delivery.settle(seconds)

    with trio.move_on_after(WARM_UP + SECONDS):
        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(serve)
    gaps.sort()
    return gaps[int(0.99 * len(gaps))], work["cheap"] / sum(work.values())


@pytest.mark.parametrize("seed", range(20))
def test_cheap_flows_do_not_wait_for_dear_ones(seed: int) -> None:
    """The 99th percentile of the gaps is 10 ms at most, and the work is shared half and half."""
    p99, share = trio.run(lambda: mixed(seed, fair=True), clock=MockClock(autojump_threshold=0))
    print(f"p99 gap {p99 * 1000:.2f} ms, share {share:.4f}")
    assert p99 <= 0.010
    assert share == pytest.approx(0.5, abs=0.01)


def test_in_round_robin_the_dear_ones_take_it_all() -> None:
    """The control: a cheap flow waits for every dear one, and has a hundredth of the work."""
    p99, share = trio.run(lambda: mixed(0, fair=False), clock=MockClock(autojump_threshold=0))
    print(f"p99 gap {p99 * 1000:.2f} ms, share {share:.4f}")
    assert p99 > 0.1
    assert share < 0.05
