"""Scenario 17, fan-out: each request needs four sub-calls, to four services that are all offered twice their capacity.

By one priority for all sub-calls of a request the services refuse the same requests, and nearly half succeed, which is
all there is capacity for. The control sheds as much, each service for itself: of the requests one in sixteen is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from stagetrio.limiter import Overloaded
from stagetrio.shed import Shedder, priority_of
from stagetrio.ticket import TicketStage

SERVICES = 4
SERVERS = 4
TARGET = 0.4  # seconds a sub-call may wait on average
SECONDS = 0.1  # for one sub-call: 40 a second at each service
RATE = 80.0  # requests a second: twice that
WARM_UP, END = 6.0, 20.0
TICK = 0.025

Priority = Callable[[int, int], float]  # (request, service) -> priority


async def fan_out(chance: random.Random, priority: Priority) -> tuple[float, float]:
    """The share of requests of which all four sub-calls were served, and the mean level of the services."""
    stages = [TicketStage(f"service {number}", SERVERS) for number in range(SERVICES)]
    shedders = [Shedder(target=TARGET, window=0.5) for _ in stages]
    offered = succeeded = 0

    async def sub_call(request: int, service: int, served: list[int]) -> None:
        try:
            shedders[service].admit(priority(request, service))
        except Overloaded:
            return
        came = trio.current_time()
        async with stages[service].ticket():
            shedders[service].begun(trio.current_time() - came)
            await trio.sleep(SECONDS)
        served.append(service)

    async def one(request: int, counts: bool) -> None:
        nonlocal offered, succeeded
        served: list[int] = []
        async with trio.open_nursery() as nursery:
            for service in range(SERVICES):
                nursery.start_soon(sub_call, request, service, served)
        offered += counts
        succeeded += counts and len(served) == SERVICES

    async with trio.open_nursery() as nursery:
        start = trio.current_time()
        request = 0
        for tick in range(round(END / TICK)):
            await trio.sleep_until(start + tick * TICK)
            due = chance.expovariate(RATE)
            while due < TICK:
                request += 1
                nursery.start_soon(one, request, tick * TICK >= WARM_UP)
                due += chance.expovariate(RATE)
    return succeeded / offered, sum(shedder.level for shedder in shedders) / SERVICES


@pytest.mark.parametrize("seed", range(20))
async def test_one_priority_for_all_sub_calls(seed: int, autojump_clock: MockClock) -> None:
    """At least 45 % of the requests succeed, against the control's one in sixteen."""
    ours, level = await fan_out(random.Random(seed), lambda request, service: priority_of(request, seed))
    control, _ = await fan_out(random.Random(seed), lambda request, service: priority_of((request, service), seed))
    print(f"seed {seed}: {ours:.1%} succeed, level {level:.2f}; control {control:.1%}")
    assert ours >= 0.45
    assert control <= 0.12
