"""Cancels the k-th checkpoint of one task among others, for every k: what tests of cancellation share.

Each program runs once for each checkpoint of its victim and each of the two moments there are: when the task has
parked, and when it is about to be woken, which is the instant of a grant or a hand-over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.limiter import Overloaded
from stagetrio.ticket import LeaseLost


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
