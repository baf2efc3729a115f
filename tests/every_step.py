"""Handlers that use a primitive, stopped at every step, and cancelled at every step: what the tests of it share.

The step counter stands for the clock, so this is exhaustive. Each scenario sets a primitive up, hands two or three
handlers to ``run``, and says what must hold whenever anybody else runs (``holds``) and in the end. It is run once with
a forced checkpoint at every step of every handler, and then once more for each of these checkpoints, at which the first
handler is cancelled. A deadlock shows as `trio.TooSlowError`: the clock is a mock.

Python 3.11 has no events to count; there the scenarios run against the real timer, as often as it rings.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from stagetrio.watchdog import StepClock, Watchdog, open_watchdog

Handler = Callable[[], Awaitable[object]]
STEP = 1e-6
COUNTED = sys.version_info >= (3, 12)


class Run(trio.abc.Instrument):
    """Runs the handlers of one scenario, once, and looks at every pass, without keeping the loop awake.

    Args:
        watchdog: What they run under.
        cancel_at: The forced checkpoint, by number, at which the first handler is cancelled.
    """

    def __init__(self, watchdog: Watchdog, cancel_at: float) -> None:
        self.watchdog = watchdog
        self._cancel_at = watchdog.statistics().forced + cancel_at
        self._holds: Callable[[], bool] = bool
        self._scope = trio.CancelScope()
        self._ok = True
        self.reached = False  # whether there were that many checkpoints
        self.cancelled = False  # whether the handler was

    async def __call__(self, *handlers: Handler, holds: Callable[[], bool] = lambda: True) -> None:
        """Run them side by side; assert that ``holds`` at every pass."""
        self._holds = holds
        trio.lowlevel.add_instrument(self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._first, handlers[0])
            for handler in handlers[1:]:
                self.watchdog.start_soon(nursery, handler)
        trio.lowlevel.remove_instrument(self)
        assert self._ok
        assert holds()

    async def _first(self, handler: Handler) -> None:
        with self._scope:
            await self.watchdog.run(handler)
        self.cancelled = self._scope.cancelled_caught

    def after_io_wait(self, timeout: float) -> None:
        """Look, and cancel. Called by Trio."""
        self._ok = self._ok and self._holds()
        if self.watchdog.statistics().forced >= self._cancel_at:
            self.reached = True
            self._scope.cancel()


Scenario = Callable[[Run], Awaitable[None]]


class Inside:
    """How many are inside of something, and the most that may be."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.count = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside."""
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    def ok(self) -> bool:
        """Whether no more are inside than may be."""
        return 0 <= self.count <= self.most


def work() -> int:
    """Take a few steps, or, where they are not counted, enough of them for the timer to ring."""
    total = 0
    for number in range(1 if COUNTED else 2000):
        total += len(str(number))
    return total


async def check(scenario: Scenario) -> None:
    """Run a scenario with a forced checkpoint at every step; and cancelled at every single one of them."""
    if not COUNTED:
        async with open_watchdog(quantum=1e-4, preemptible=(__name__,)) as watchdog:
            for cancel_at in (math.inf, *range(12)):
                with trio.fail_after(1000):
                    await scenario(Run(watchdog, cancel_at))
        return
    async with open_watchdog(quantum=STEP, clock=StepClock(STEP), preemptible=(__name__,)) as watchdog:
        for checkpoint in itertools.count():
            run = Run(watchdog, checkpoint or math.inf)
            with trio.fail_after(1000):
                await scenario(run)
            if checkpoint and not run.reached:
                break
    assert checkpoint > 10
