"""Scenario 14, holder crashes: whatever happens to those who hold or wait, no ticket is lost or given twice.

Holders raise, are cancelled while they wait, at the very instant of the grant and while they hold, lose their leases in
and out of shielded scopes, and are revoked. At every moment no more than the tickets are held, in the end all are
back, and an adaptive limit below has learnt nothing from any of it. The control is a semaphore released in the wrong
place, as it is often written.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import trio
from trio.testing import MockClock

from stagetrio.limiter import AdaptiveLimiter, Overloaded
from stagetrio.ticket import LeaseLost, Ticket, TicketStage

TICKETS = 5
TASKS = 60


class Crash(Exception):
    """A holder's own failure."""


class Watch:
    """Counts who is really inside, apart from what the stage says."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0

    @contextlib.contextmanager
    def enter(self, cost: int) -> Iterator[None]:
        self.inside += cost
        self.most = max(self.most, self.inside)
        try:
            yield
        finally:
            self.inside -= cost


async def storm(chance: random.Random, stage: TicketStage) -> Watch:
    """Let every kind of misfortune happen to many holders and waiters at once."""
    watch = Watch()
    held: list[Ticket] = []

    async def holder() -> None:
        await trio.sleep(chance.randrange(20) / 10)  # on a grid, so that much falls on the same instant
        seconds = chance.randrange(5) / 10
        cost = chance.choice([1, 1, 1, 2, TICKETS])
        with contextlib.suppress(Crash, LeaseLost, Overloaded), trio.move_on_after(chance.randrange(1, 30) / 10):
            async with stage.ticket(
                chance.randrange(4),
                cost=cost,
                key=chance.choice([None, None, "k"]),
                lease=chance.choice([0.1, 0.2, 5]),
            ) as ticket:
                held.append(ticket)
                with watch.enter(cost):
                    with trio.CancelScope(shield=chance.random() < 0.3):
                        await trio.sleep(seconds)
                    if chance.random() < 0.3:
                        raise Crash

    async def revoker() -> None:
        for _ in range(20):
            await trio.sleep(0.1)
            if held:
                stage.revoke(chance.choice(held), "bad luck")

    with trio.move_on_after(chance.choice([1.5, 100])):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(revoker)
            for _ in range(TASKS):
                nursery.start_soon(holder)
    return watch


def own_count(_: random.Random) -> TicketStage:
    return TicketStage("own", TICKETS, max_wait=2)


def shared(_: random.Random) -> TicketStage:
    return TicketStage("shared", trio.CapacityLimiter(TICKETS), max_wait=2)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("make", [own_count, shared])
async def test_misfortune_costs_no_ticket(
    seed: int, make: Callable[[random.Random], TicketStage], autojump_clock: MockClock
) -> None:
    """Through all misfortunes the limit holds, and afterwards every ticket can be had again."""
    chance = random.Random(seed)
    stage = make(chance)
    watch = await storm(chance, stage)
    figures = stage.statistics()
    print(
        f"seed {seed}: most {watch.most}/{TICKETS}, granted {figures.granted}, lost {figures.lost}, "
        f"gave up {figures.gave_up}, refused {figures.refused}, overrun {figures.overrun_seconds:.2f} s"
    )
    assert 2 <= watch.most <= TICKETS
    assert watch.inside == 0
    assert (figures.held, figures.holders, figures.waiting, figures.overrun) == (0, 0, 0, 0)
    assert figures.lost > 0
    with stage.ticket_nowait(cost=TICKETS, key="k"):
        pass


@pytest.mark.parametrize("seed", range(20))
async def test_crashes_do_not_train_an_adaptive_limit(seed: int, autojump_clock: MockClock) -> None:
    """What a limiter has learnt from good work stays, however many holders crash on it."""
    chance = random.Random(seed)
    limiter = AdaptiveLimiter(TICKETS, max_limit=TICKETS)
    stage = TicketStage("adaptive", limiter)
    async with trio.open_nursery() as nursery:

        async def good() -> None:
            for _ in range(20):
                async with stage.ticket():
                    await trio.sleep(0.1)

        for _ in range(10):
            nursery.start_soon(good)
    before = limiter.statistics()

    async def bad() -> None:
        with contextlib.suppress(Crash, LeaseLost), trio.move_on_after(chance.uniform(0.001, 5)):
            async with stage.ticket(lease=chance.choice([0.01, 3, 100])):
                await trio.sleep(chance.choice([0.001, 10]))
                raise Crash

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(bad)
    after = limiter.statistics()
    assert after.learnt == before.learnt == 200
    assert after.forgotten > 0
    assert (after.total_tokens, after.baseline_seconds) == (before.total_tokens, before.baseline_seconds)
    assert after.borrowed_tokens == 0


async def test_a_semaphore_released_by_hand_leaks(autojump_clock: MockClock) -> None:
    """The control: acquire, work, release without ``finally``; after the same misfortunes tokens are gone."""
    chance = random.Random(0)
    semaphore = trio.Semaphore(TICKETS)

    async def holder() -> None:
        await trio.sleep(chance.randrange(20) / 10)
        with contextlib.suppress(Crash), trio.move_on_after(chance.randrange(1, 30) / 10):
            await semaphore.acquire()
            await trio.sleep(chance.randrange(5) / 10)
            if chance.random() < 0.3:
                raise Crash
            semaphore.release()

    async with trio.open_nursery() as nursery:
        for _ in range(TASKS):
            nursery.start_soon(holder)
    print(f"control: {semaphore.value} of {TICKETS} tokens are left")
    assert semaphore.value < TICKETS
