"""Tickets and limits with a cancellation at every checkpoint: cancel the k-th, for every k.

Each program runs once for each checkpoint of its victim and each of the two moments there are: when the task has
parked, and when it is about to be woken, which is the instant of the grant.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.all_tickets import all_tickets
from stagetrio.limiter import AdaptiveLimiter, Overloaded, Rate, RateLimiter
from stagetrio.ticket import LeaseLost, TicketStage


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


class CancelAt(trio.abc.Instrument):
    """Cancels a scope at the k-th step of the task in it: when it has parked, or when it is about to be woken."""

    def __init__(self, k: int, parked: bool) -> None:
        self.k = k
        self.parked = parked
        self.steps = 0
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.steps += 1
            if self.parked and self.steps == self.k:
                self.scope.cancel()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task and not self.parked and self.steps == self.k:
            self.scope.cancel()


Use = Callable[[], Awaitable[object]]


def cancel_everywhere(make: Callable[[], tuple[Use, Use, Callable[[], None]]]) -> int:
    """Run a victim among others once for each of its checkpoints, cancelled there; return how many there were.

    `make` returns what the victim does, what each of three others does, and a check for when all are done.
    """
    for k in range(1, 200):
        reached = False
        for parked in (True, False):

            async def main(k: int = k, parked: bool = parked) -> None:
                nonlocal reached
                victim, other, check = make()
                canceller = CancelAt(k, parked)
                done = 0

                async def run_victim() -> None:
                    canceller.task = trio.lowlevel.current_task()
                    with canceller.scope, contextlib.suppress(LeaseLost, Overloaded):
                        await victim()

                async def run_other() -> None:
                    nonlocal done
                    await other()
                    done += 1

                trio.lowlevel.add_instrument(canceller)
                with trio.fail_after(1000):
                    async with trio.open_nursery() as nursery:
                        for number in range(4):
                            nursery.start_soon(run_victim if number == 1 else run_other)
                            await wait_all_tasks_blocked()
                trio.lowlevel.remove_instrument(canceller)
                assert done == 3
                check()
                reached = reached or canceller.steps > k

            run(main)
        if not reached:
            return k
    raise AssertionError("it never ends")


class Inside:
    """Counts the holders, and never lets them be more than they may."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = 0

    async def stay(self, cost: int = 1) -> None:
        self.now += cost
        assert self.now <= self.most
        try:
            await trio.sleep(1)
        finally:
            self.now -= cost


@pytest.mark.parametrize("source", ["int", "limiter", "adaptive"])
@pytest.mark.parametrize("options", [{}, {"lease": 5}, {"lease": 0.5}, {"max_wait": 1.5}, {"cost": 2}, {"key": "k"}])
def test_a_ticket_survives_a_cancellation_anywhere(source: str, options: dict[str, Any]) -> None:
    """Wherever the victim is cancelled the others are all served, and every ticket comes back."""
    sources: dict[str, Callable[[], Any]] = {
        "int": lambda: 2,
        "limiter": lambda: trio.CapacityLimiter(2),
        "adaptive": lambda: AdaptiveLimiter(2, max_limit=2),
    }

    def make() -> tuple[Use, Use, Callable[[], None]]:
        asked = {name: value for name, value in options.items() if name in ("cost", "key", "lease")}
        stage = TicketStage("victim", sources[source](), max_wait=options.get("max_wait", math.inf))
        inside = Inside(2)

        async def use() -> None:
            for _ in range(2):
                with contextlib.suppress(LeaseLost, Overloaded):
                    async with stage.ticket("flow", **asked):
                        await inside.stay(asked.get("cost", 1))

        def check() -> None:
            figures = stage.statistics()
            assert (figures.held, figures.holders, figures.waiting) == (0, 0, 0)
            with stage.ticket_nowait(cost=2, key="k"):
                pass

        return use, use, check

    assert cancel_everywhere(make) >= 5


def test_tickets_together_survive_a_cancellation_anywhere() -> None:
    """The victim of several stages gives back whatever it holds, wherever it is cancelled."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        stages = [TicketStage("a", 1, lease=10), TicketStage("b", 1), TicketStage("c", trio.CapacityLimiter(1))]
        inside = Inside(1)

        async def use() -> None:
            async with all_tickets(*(stage.ticket() for stage in reversed(stages))):
                await inside.stay()

        def check() -> None:
            assert [stage.statistics().held for stage in stages] == [0, 0, 0]

        return use, use, check

    assert cancel_everywhere(make) >= 5


def test_a_tree_of_rates_survives_a_cancellation_anywhere() -> None:
    """A victim in any line of the tree draws from all limits or from none, and the next in line moves up."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        root = RateLimiter(Rate(1), burst=2)
        leaf = RateLimiter(Rate(2), burst=3, parent=root)

        async def use() -> None:
            for _ in range(2):
                await leaf.acquire(1.5)

        def check() -> None:
            assert root.statistics().waiting == leaf.statistics().waiting == 0
            assert root.statistics().passed == leaf.statistics().passed in (6, 7, 8)

        return use, use, check

    assert cancel_everywhere(make) >= 5


def test_messages_survive_a_cancellation_anywhere() -> None:
    """A cancelled receive has taken nothing: what is read after it is the whole rest, in order."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        stage = TicketStage("room", 1)
        ticket = stage.ticket_nowait()
        heard: list[int] = []

        async def listen() -> None:
            while len(heard) < 3:
                heard.append(await ticket.messages.receive())

        async def speak() -> None:
            await trio.sleep(1)
            stage.broadcast(stage.statistics().broadcasts)

        def check() -> None:
            assert heard + list(ticket.messages) == [0, 1, 2]

        return listen, speak, check

    assert cancel_everywhere(make) >= 4
