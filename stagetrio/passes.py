"""Counts the passes of an event loop, and lets go, at the start of each, those whose turn it is.

Theory of operation. Trio calls an instrument when it has waited for I/O and before it steps the tasks that are ready:
there a pass begins, and a task rescheduled there is stepped in that very pass. One hook per pass costs 0.3 µs, none per
step costs nothing; idle, there are no passes.

A loop with nothing to do sleeps. While somebody waits for a turn it must not, so `Passes.keep_turning` wakes a task
that does nothing but yield until nobody waits any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, cancel_shielded_checkpoint, current_task, reschedule


class Waiter(Protocol):
    """Somebody whose task is parked until its turn."""

    task: Task | None


class Turning(Protocol):
    """Who decides whose turn it is: `stagetrio.turns.Turns`."""

    used: float
    waiting: int

    def next_pass(self) -> Iterable[Waiter]:
        """Begin a pass; return who is to be let go in it."""

    def close(self) -> Iterable[Waiter]:
        """Return all who wait; nobody will any more."""


class Passes(trio.abc.Instrument):
    """The passes of the current event loop.

    Attributes:
        count: Passes so far.
    """

    def __init__(self, turns: Turning) -> None:
        self.count = 0
        self._turns = turns
        self._turner: Task | None = None

    def after_io_wait(self, timeout: float) -> None:
        """Count a pass, and let those go whose turn it is. Called by Trio."""
        self.count += 1
        turns = self._turns
        if turns.used or turns.waiting:
            _let_go(turns.next_pass())

    def close(self) -> None:
        """Let all go who wait: nobody counts passes any more."""
        _let_go(self._turns.close())

    def keep_turning(self) -> None:
        """Do not let the loop sleep: somebody waits for a turn."""
        if self._turner is not None:
            turner, self._turner = self._turner, None
            reschedule(turner)

    async def turn(self) -> None:
        """Keep the loop turning while somebody waits; runs as a task of its own until it is cancelled.

        Checkpoints: always.
        """

        def abort(_: RaiseCancelT) -> Abort:
            self._turner = None
            return Abort.SUCCEEDED

        while True:
            if self._turns.waiting:
                await cancel_shielded_checkpoint()
            else:
                self._turner = current_task()
                await trio.lowlevel.wait_task_rescheduled(abort)


def _let_go(waiters: Iterable[Waiter]) -> None:
    for waiter in waiters:
        assert waiter.task is not None
        reschedule(waiter.task)
