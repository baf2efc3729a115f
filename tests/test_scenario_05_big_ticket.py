"""Scenario 5, big ticket: one waiter of weight 10 against endless weight 1, limit 10.

It is granted within one full refill plus its fair turn. The control takes its tokens from the first that is free, as a
semaphore or a limiter without a line for several does: it never sees ten at once.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from stagetrio.limiter import Overloaded, Rate, RateLimiter
from stagetrio.ticket import TicketStage

LIMIT = 10
LONGEST = 0.15  # seconds a small one is held at most
FLOWS = 5
SECONDS = 5.0

Work = Callable[[random.Random], Awaitable[None]]


async def endless(chance: random.Random, small: Work, big: Callable[[], Awaitable[None]]) -> float:
    """Let 30 tasks take small ones for ever; return how long the big one waited, SECONDS when it never came."""
    waited = SECONDS
    async with trio.open_nursery() as nursery:

        async def repeat() -> None:
            while True:
                await small(chance)

        for _ in range(30):
            nursery.start_soon(repeat)
        await trio.sleep(2 + chance.random())
        start = trio.current_time()
        with trio.move_on_after(SECONDS):
            await big()
            waited = trio.current_time() - start
        nursery.cancel_scope.cancel()
    return waited


async def fair(chance: random.Random, flows: int) -> float:
    stage = TicketStage("pool", LIMIT)
    held = 0

    async def small(chance: random.Random) -> None:
        nonlocal held
        async with stage.ticket(chance.randrange(flows)):
            held += 1
            await trio.sleep(LONGEST * chance.uniform(0.3, 1))
            held -= 1

    async def big() -> None:
        async with stage.ticket("big", cost=LIMIT):
            assert held == 0

    return await endless(chance, small, big)


async def naive(chance: random.Random) -> float:
    limiter = trio.CapacityLimiter(LIMIT)

    async def small(chance: random.Random) -> None:
        async with limiter:
            await trio.sleep(LONGEST * chance.uniform(0.3, 1))

    async def big() -> None:
        while limiter.available_tokens < LIMIT:  # noqa: ASYNC110 – polling is what the naive way does
            await trio.sleep(0.01)

    return await endless(chance, small, big)


@pytest.mark.parametrize("seed", range(20))
async def test_a_big_ticket_is_granted_within_a_refill(seed: int, autojump_clock: MockClock) -> None:
    """It waits for its fair turn among the flows and for one refill; the control waits as long as one looks."""
    alone = await fair(random.Random(seed), 1)
    among = await fair(random.Random(seed), FLOWS)
    control = await naive(random.Random(seed))
    print(f"seed {seed}: waited {alone:.3f} s against one flow, {among:.3f} s against {FLOWS}, control {control:.0f} s")
    # Its fair turn is one service of each flow that waits, fewer than there are tickets; then everybody leaves.
    assert alone <= 2 * LONGEST
    assert among <= 2 * LONGEST
    assert control == SECONDS


@pytest.mark.parametrize("seed", range(20))
async def test_a_big_cost_is_not_starved_at_a_rate(seed: int, autojump_clock: MockClock) -> None:
    """At a rate limit it waits for its own units and those asked for before; taking them one by one is no way out."""
    chance = random.Random(seed)
    limiter = RateLimiter(Rate(100), burst=10)

    async def small(chance: random.Random) -> None:
        await trio.sleep(chance.random() / 100)
        await limiter.acquire()

    waited = await endless(chance, small, lambda: limiter.acquire(10))

    bucket = RateLimiter(Rate(100), burst=10)

    async def grab(chance: random.Random) -> None:
        while True:
            try:
                return bucket.acquire_nowait()
            except Overloaded:
                await trio.sleep(0.01 + chance.random() / 20)

    async def grab_ten() -> None:
        while True:
            try:
                return bucket.acquire_nowait(10)
            except Overloaded as refusal:
                await trio.sleep(refusal.retry_after)

    control = await endless(random.Random(seed), grab, grab_ten)
    print(f"seed {seed}: waited {waited:.3f} s at a rate, control {control:.0f} s")
    assert 0.1 <= waited <= (10 + 30) / 100 + 0.01
    assert control == SECONDS
