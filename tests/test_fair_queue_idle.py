"""Flows that are idle, many, or come once: what they cost, and what they do to the others."""

from __future__ import annotations

import math
import sys
import tracemalloc
from types import FrameType

import pytest

from stagetrio.fair_queue import FairQueue, PriorityClass

IDLE = 100_000
REMEMBERED = 65_536  # twice what `stagetrio.filing` keeps by choice


def idle_channels(queue: FairQueue[int, None]) -> list[object]:
    """Open a flow for each of very many connections; each has sent once."""
    channels: list[object] = []
    for n in range(IDLE):
        channel = queue.open_flow(n)
        channel.send_nowait(None)
        queue.receive_delivery_nowait().settle(1.0)
        channels.append(channel)
    return channels


@pytest.mark.parametrize(("opened", "most"), [(True, 500), (False, 400)])
def test_an_idle_flow_is_a_small_record(opened: bool, most: int) -> None:
    """It takes some 350 bytes, with an open channel 440, as ``docs/bounds.rst`` says."""
    queue: FairQueue[int, None] = FairQueue(1000)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = idle_channels(queue) if opened else []
        for n in range(0 if opened else IDLE):
            queue.charge(n, 5.0)  # each owes, so it is remembered
        used = (tracemalloc.get_traced_memory()[0] - before) / queue.statistics().flows_known
    finally:
        tracemalloc.stop()
    print(f"{used:.0f} bytes, {queue.statistics().flows_known} flows, {len(kept)} channels")
    assert queue.statistics().flows_known == (IDLE if opened else REMEMBERED)
    assert used < most


def calls_of(queue: FairQueue[int, None]) -> int:
    """The function calls that 1,000 sends and receives of ten flows take."""
    channels = [queue.open_flow(-1 - n) for n in range(10)]
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in range(100):
            for channel in channels:
                channel.send_nowait(None)
            for delivery in queue.receive_deliveries_nowait(10):
                delivery.settle(1.0)
    finally:
        sys.setprofile(None)
    return calls


def test_idle_flows_cost_nothing_per_operation() -> None:
    """With 100,000 of them the same operations take as many function calls as with none."""
    alone: FairQueue[int, None] = FairQueue(1000)
    alone.send_nowait(0, None)
    alone.receive_delivery_nowait().settle(1.0)
    crowded: FairQueue[int, None] = FairQueue(1000)
    channels = idle_channels(crowded)
    few, many = calls_of(alone), calls_of(crowded)
    print(f"{few} calls without idle flows, {many} with {len(channels)}")
    assert many <= 1.01 * few


@pytest.mark.parametrize("classes", [False, True])
def test_a_flow_for_each_message_leaves_nothing_behind(classes: bool) -> None:
    """Records of flows that came once are forgotten, in each class; every message is served."""
    queue: FairQueue[int, int] = FairQueue(
        100,
        classes=[PriorityClass("even"), PriorityClass("odd")] if classes else (),
        class_of=(lambda flow: "odd" if flow % 2 else "even") if classes else None,
    )
    for n in range(2 * IDLE):
        queue.send_nowait(n, n)
        assert queue.receive_nowait() == n
    assert queue.statistics().flows_known <= REMEMBERED


@pytest.mark.parametrize("per_service", [1, 2, 3])
@pytest.mark.parametrize("settled", [False, True])
def test_a_stream_of_strangers_does_not_starve_a_flow(per_service: int, settled: bool) -> None:
    """One with a backlog has about what processor sharing would give it: 1/n of each service, of n flows that wait."""
    queue: FairQueue[int, int] = FairQueue(math.inf)
    for _ in range(2000):
        queue.send_nowait(-1, -1)
    stranger = served = 0
    even = 0.0
    for _ in range(2000):
        for _ in range(per_service):
            stranger += 1
            queue.send_nowait(stranger, stranger)
        even += 1 / queue.statistics().flows_backlogged
        if settled:
            delivery = queue.receive_delivery_nowait()
            delivery.settle(1.0)
            served += delivery.flow == -1
        else:
            served += queue.receive_nowait() == -1
    print(f"{served} services, even would be {even:.1f}")
    assert 0.4 * even - 1 <= served <= 2 * even + 1
