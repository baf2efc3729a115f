"""No handler keeps the loop: stall reports, forced checkpoints, budgets.

**Who must not use** `Watchdog.run`: code that relies on "nothing happens between two awaits". Under ``run`` a handler
may be suspended, and cancelled, at any point of its own module. Read "What preemption may do to you" first.
`Watchdog.watch` only reports, and is safe for everyone.

Theory of operation
===================

What stops a handler, and what it is charged, is in `stagetrio.lane`; where it may be stopped in `stagetrio.preempt`;
who goes on next in `stagetrio.turns`; what is reported in `stagetrio.stall`. Here they are put together: `run` takes
an idle lane and runs one handler on it, and `open_watchdog` owns what must be undone: the signal handler, the timer,
the instrument, the monitor's thread and the task that keeps the loop turning.

**Where nothing can be stopped** (``trio.run`` outside of the main thread, Windows, a timer that belongs to someone
else) handlers run all the same, are reported, and are cancelled past their budget at their next own checkpoint.
``statistics().mechanism`` tells.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import ModuleType
from typing import TypeVar

import attrs
import trio
from trio.lowlevel import Task, current_task

from stagetrio.lane import Lane, Loop
from stagetrio.preempt import module_names, no_preempt
from stagetrio.stall import Monitor, Stall, StallCause, Work, name_of

__all__ = [
    "BudgetExceeded",
    "Lane",
    "Stall",
    "StallCause",
    "Watchdog",
    "WatchdogStatistics",
    "no_preempt",
    "open_watchdog",
]

T = TypeVar("T")

MAX_SPARE = 64  # idle stacks that are kept


class BudgetExceeded(Exception):
    """A handler held the loop for longer than its budget and was cancelled.

    Args:
        handler: The qualified name of the handler.
        budget: Its budget, in seconds.
    """

    def __init__(self, handler: str, budget: float) -> None:
        super().__init__(handler, budget)
        self.handler = handler
        self.budget = budget

    def __str__(self) -> str:
        return f"{self.handler} was cancelled: it held the loop for longer than its budget of {self.budget:.3g} s"


@attrs.frozen
class WatchdogStatistics:
    """What a watchdog has seen and done.

    Args:
        mechanism: What stops handlers: ``"timer"``, or ``"none"`` where nothing can.
        quantum: Seconds of opted-in work per pass of the loop.
        passes: Passes of the loop so far.
        forced: Checkpoints that were forced.
        put_off: Attempts to force one where it was not allowed; each is repeated.
        budgets_exceeded: Handlers cancelled for their budget.
        waiting: Handlers that wait for a turn now.
        stalls: Steps of the loop seen to last longer than the quantum.
        worst_stall_seconds: The longest of them, as far as it was seen.
        causes: What caused them, the latest last.
    """

    mechanism: str
    quantum: float
    passes: int
    forced: int
    put_off: int
    budgets_exceeded: int
    waiting: int
    stalls: int
    worst_stall_seconds: float
    causes: tuple[StallCause, ...]


class Watchdog:
    """Runs handlers so that none of them keeps the loop. Made by `open_watchdog`; for Trio's thread only."""

    def __init__(
        self,
        quantum: float,
        on_stall: Callable[[Stall], object] | None,
        preemptible: tuple[ModuleType | str, ...],
        weight: Callable[[Hashable], float] | None,
    ) -> None:
        if not (quantum > 0 and quantum < math.inf):
            raise ValueError(f"quantum must be a finite number of seconds above 0, not {quantum!r}")
        self._loop = Loop(quantum, module_names(preemptible), weight)
        self._turns = self._loop.turns
        self._mechanism = "none"
        self._spare: list[Lane] = []
        self._watched: dict[Task, Work] = {}
        self._failure: BaseException | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        self._monitor = Monitor(
            quantum,
            passes=lambda: self._loop.passes,
            working=self._working,
            on_stall=on_stall,
            on_failure=self._fail,
        )

    async def run(
        self, fn: Callable[..., Awaitable[T]], *args: object, flow: Hashable = None, budget: float = math.inf
    ) -> T:
        """Run ``await fn(*args)``, with checkpoints forced wherever it holds the loop for longer than its turn.

        Args:
            fn: An async function. Children of nurseries that it opens are not covered: see `start_soon`.
            args: Its arguments.
            flow: On whose account it runs; None: on its own.
            budget: Seconds for which it may hold the loop in all, > 0.

        Raises:
            BudgetExceeded: It held the loop for longer than ``budget`` and was cancelled.

        Checkpoints: as ``fn`` does, and wherever they are forced. A cancellation reaches ``fn`` at either.
        Cost: 1 µs where nothing is forced and the budget is unbounded; a cancel scope where it is bounded.
        """
        if budget == math.inf:
            return await self._run(fn, args, flow, budget, None)
        if not budget > 0:
            raise ValueError(f"budget must be a number of seconds above 0, not {budget!r}")
        with trio.CancelScope() as scope:
            return await self._run(fn, args, flow, budget, scope)
        raise BudgetExceeded(name_of(fn), budget)

    async def _run(
        self,
        fn: Callable[..., Awaitable[T]],
        args: tuple[object, ...],
        flow: Hashable,
        budget: float,
        scope: trio.CancelScope | None,
    ) -> T:
        lane = self._spare.pop() if self._spare else Lane(self._loop)
        lane.task = task = current_task()
        lane.handler = fn
        lane.flow = flow
        lane.budget = budget
        lane.held = 0.0
        lane.exceeded = False
        lane.scope = scope
        turns = self._turns
        try:
            if turns.used >= turns.quantum or (turns.overdue and turns.owes(lane.account())):
                await lane.wait_turn()
            lane.coroutine = coroutine = fn(*args)
            result: T = await lane.drive(coroutine, task)
            return result
        finally:
            lane.handler = lane.coroutine = lane.task = lane.scope = None
            if self._loop.contended:
                lane.settle()
            if len(self._spare) < MAX_SPARE:
                self._spare.append(lane)
            else:
                lane.discard_stack()

    async def watch(self, fn: Callable[..., Awaitable[T]], *args: object, flow: Hashable = None) -> T:
        """Run ``await fn(*args)``; a stall it causes is reported by its name and flow. Nothing is forced.

        Args:
            fn: An async function.
            args: Its arguments.
            flow: What reports say it runs for.

        Checkpoints: as ``fn`` does.
        """
        task = current_task()
        before = self._watched.get(task)
        self._watched[task] = Work(fn, flow, task, preemptible=False)
        try:
            return await fn(*args)
        finally:
            if before is None:
                del self._watched[task]
            else:
                self._watched[task] = before

    def start_soon(
        self,
        nursery: trio.Nursery,
        fn: Callable[..., Awaitable[object]],
        *args: object,
        flow: Hashable = None,
    ) -> None:
        """Start a child task under `run`: ``nursery.start_soon`` for nurseries that are opened in a handler."""
        nursery.start_soon(partial(self.run, fn, *args, flow=flow), name=fn)

    def open_lane(self) -> Lane:
        """Return a lane, for a worker that runs many handlers: no stack is switched per handler."""
        return Lane(self._loop)

    def statistics(self) -> WatchdogStatistics:
        """Return a snapshot of the counts."""
        loop, monitor = self._loop, self._monitor
        return WatchdogStatistics(
            mechanism=self._mechanism,
            quantum=self._turns.quantum,
            passes=loop.passes,
            forced=loop.forced,
            put_off=loop.put_off,
            budgets_exceeded=loop.budgets_exceeded,
            waiting=self._turns.waiting,
            stalls=monitor.stalls,
            worst_stall_seconds=monitor.worst,
            causes=monitor.causes(),
        )

    # What the monitor's thread asks and says.

    def _working(self, task: Task | None) -> Work | None:
        if task is not None:
            return self._watched.get(task)
        lane = self._loop.active
        if lane is None or lane.handler is None or lane.task is None:
            return None
        return Work(lane.handler, lane.flow, lane.task, preemptible=self._mechanism != "none")

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._token.run_sync_soon(self._scope.cancel)

    # What must be undone.

    @contextmanager
    def _opened(self) -> Iterator[None]:
        loop = self._loop
        turning = trio.CancelScope()

        async def turn() -> None:
            with turning:
                await loop.turn()

        with self._timer():
            trio.lowlevel.add_instrument(loop)
            trio.lowlevel.spawn_system_task(turn, name="stagetrio turns")
            self._monitor.start()
            try:
                yield
            finally:
                self._monitor.stop()
                turning.cancel()
                trio.lowlevel.remove_instrument(loop)
                while self._spare:
                    self._spare.pop().discard_stack()

    @contextmanager
    def _timer(self) -> Iterator[None]:
        if not _timer_is_free():
            yield
            return
        before = signal.signal(signal.SIGALRM, self._loop.ring)
        self._loop.rings_at = math.inf
        self._mechanism = "timer"
        try:
            yield
        finally:
            self._loop.rings_at = -math.inf
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _timer_is_free() -> bool:
    return (
        threading.current_thread() is threading.main_thread()
        and hasattr(signal, "setitimer")
        and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    )


@asynccontextmanager
async def open_watchdog(
    *,
    quantum: float = 0.005,
    on_stall: Callable[[Stall], object] | None = None,
    preemptible: tuple[ModuleType | str, ...] = (),
    weight: Callable[[Hashable], float] | None = None,
) -> AsyncIterator[Watchdog]:
    """Open the watchdog of this event loop: one per process.

    Args:
        quantum: Seconds for which opted-in work may hold the loop in one pass, and any step before it is reported.
        on_stall: Called with each new cause of a stall, in the monitor's thread, while the loop is held.
        preemptible: Modules and packages, or their names, in which handlers may be stopped besides their own module.
        weight: Maps a flow to its weight, by default 1; turns are shared in proportion.

    Raises:
        ValueError: ``quantum`` is out of range.

    Checkpoints: none.
    """
    watchdog = Watchdog(quantum, on_stall, preemptible, weight)
    with watchdog._opened(), watchdog._scope:
        yield watchdog
    if watchdog._failure is not None:
        raise watchdog._failure
