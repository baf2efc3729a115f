"""Scenario 7, database stall: 10 servers of 100 ms, 70 calls/s, 1 s of patience, 3 retries; 20 × slower for 10 s.

A ticket stage that refuses who would wait too long, and a retry budget before it: all is well again within 5 s, and
the retries never add more than a fifth. The control is a bounded FIFO and plain retries: each call that has given up
is still worked on, the retries bring fourfold load, and it stays like that.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio
from trio.testing import MockClock

from stagetrio.limiter import Overloaded
from stagetrio.retry import RetryBudget
from stagetrio.ticket import TicketStage

SERVERS = 10
RATE = 70.0
PATIENCE = 1.0
TICK = 0.02  # seconds; what happens on a grid costs the mock clock fewer jumps
STALL, RECOVERY, END = 2.0, 12.0, 20.0


@attrs.define
class Outcome:
    """{second of arrival: calls}, and attempts in all."""

    good: list[int] = attrs.field(factory=lambda: [0] * math.ceil(END))
    all: list[int] = attrs.field(factory=lambda: [0] * math.ceil(END))
    attempts: int = 0

    def goodput(self, since: float, until: float) -> float:
        return sum(self.good[int(since) : int(until)]) / sum(self.all[int(since) : int(until)])

    @property
    def amplification(self) -> float:
        return self.attempts / sum(self.all)


async def query(start: float) -> None:
    """What the database does for a call, to the end, whether or not somebody still waits for it."""
    slow = STALL <= trio.current_time() - start < RECOVERY
    with trio.CancelScope(shield=True):
        await trio.sleep(2.0 if slow else 0.1)


async def arrivals(chance: random.Random, outcome: Outcome, call: Callable[[], Awaitable[None]]) -> None:
    """Make `RATE` calls a second until `END`; `call` raises when it was not answered."""
    start = trio.current_time()

    async def one(second: int) -> None:
        outcome.all[second] += 1
        try:
            await call()
        except (trio.TooSlowError, Overloaded):
            return
        outcome.good[second] += 1

    async with trio.open_nursery() as nursery:
        for tick in range(round(END / TICK)):
            await trio.sleep_until(start + tick * TICK)
            due = chance.expovariate(RATE)
            while due < TICK:
                nursery.start_soon(one, int(tick * TICK))
                due += chance.expovariate(RATE)


async def with_budget(seed: int) -> Outcome:
    chance = random.Random(seed)
    outcome = Outcome()
    start = trio.current_time()
    stage = TicketStage("database", SERVERS, max_wait=PATIENCE / 2)
    budget = RetryBudget(0.2, attempts=4, retry_on=(Overloaded, trio.TooSlowError), jitter=chance.random)

    async def attempt() -> None:
        outcome.attempts += 1
        with trio.fail_after(PATIENCE):
            async with stage.ticket():
                await query(start)
                await trio.lowlevel.checkpoint_if_cancelled()

    await arrivals(chance, outcome, lambda: budget.call(attempt))
    assert stage.statistics().held == 0
    return outcome


async def with_fifo(seed: int) -> Outcome:
    chance = random.Random(seed)
    outcome = Outcome()
    start = trio.current_time()
    send, receive = trio.open_memory_channel[trio.Event](1000)

    async def server() -> None:
        async for answered in receive:
            await query(start)
            answered.set()

    async def attempt() -> None:
        outcome.attempts += 1
        answered = trio.Event()
        with trio.fail_after(PATIENCE):
            await send.send(answered)
            await answered.wait()

    async def call() -> None:
        for _ in range(3):
            with contextlib.suppress(trio.TooSlowError):
                await attempt()
                return
            await trio.sleep(TICK * chance.randint(3, 5))
        await attempt()

    async with trio.open_nursery() as nursery:
        for _ in range(SERVERS):
            nursery.start_soon(server)
        await arrivals(chance, outcome, call)
        nursery.cancel_scope.cancel()
    return outcome


@pytest.mark.parametrize("seed", range(20))
async def test_a_stall_is_over_when_it_is_over(seed: int, autojump_clock: MockClock) -> None:
    """Within 5 s of the database's recovery 99 % are answered, with retries adding a fifth at most; the control not."""
    ours = await with_budget(seed)
    control = await with_fifo(seed)
    print(
        f"seed {seed}: goodput before {ours.goodput(0, STALL - 1):.3f}, after {ours.goodput(RECOVERY + 5, END):.3f}, "
        f"amplification {ours.amplification:.2f}; "
        f"control after {control.goodput(RECOVERY + 5, END):.3f}, amplification {control.amplification:.2f}"
    )
    assert ours.goodput(RECOVERY + 5, END) >= 0.99
    assert ours.amplification <= 1.2
    assert min(ours.goodput(0, STALL - 1), control.goodput(0, STALL - 1)) >= 0.99
    assert control.goodput(RECOVERY + 5, END) <= 0.5
    assert control.amplification >= 1.5
