"""No handler keeps the loop: stall reports, forced checkpoints, budgets.

**Who must not use** `Watchdog.run`: code that relies on "nothing happens between two awaits". Under ``run`` a handler
may be suspended, and cancelled, at any point of its own module. Read "What preemption may do to you" first.
`Watchdog.watch` only reports, and is safe for everyone.

Theory of operation
===================

What stops a handler, and what it is charged, is in `stagetrio.lane`; where it may be stopped in `stagetrio.stopping`;
who goes on next in `stagetrio.turns`; what interrupts in `stagetrio.alarm`; what is reported in `stagetrio.stall`. Here
they are put together: `Watchdog.run` takes an idle lane and runs one handler on it, and `open_watchdog` owns what must
be undone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from math import inf
from time import perf_counter
from types import ModuleType
from typing import Any, TypeVar

import attrs
import trio
from greenlet import getcurrent
from trio.lowlevel import Task, current_task

from stagetrio.alarm import SIGALRM, Alarm, StepClock, choose_alarm
from stagetrio.amounts import check_above_zero, check_amount
from stagetrio.flow import check_positive
from stagetrio.lane import Lane, Loop
from stagetrio.preempt import FINISHED, Stack, no_preempt
from stagetrio.stall import Monitor, Stall, StallCause, StepTimes, Work, logger, name_of
from stagetrio.stopping import module_names

__all__ = [
    "BudgetExceeded",
    "Lane",
    "Stall",
    "StallCause",
    "StepClock",
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
        mechanism: What stops handlers: ``"timer"``, ``"thread"``, ``"monitoring"``, ``"steps"``, or ``"none"`` where
            nothing can; see `stagetrio.alarm`.
        quantum: Seconds of opted-in work per pass of the loop.
        passes: Passes of the loop so far.
        forced: Checkpoints that were forced.
        put_off: Attempts to force one where it was not allowed; each is repeated.
        late: Handlers that were stopped a quantum late, or later, because they could not be stopped where they were,
            and how often.
        budgets_exceeded: Handlers cancelled for their budget.
        waiting: Handlers that wait for a turn now.
        stalls: Steps of the loop seen to last longer than the quantum.
        worst_stall_seconds: The longest of them, as far as it was seen.
        causes: What caused them, the latest last.
        step_times: ``(bound in seconds, steps up to it)``, the last bound unbounded; empty unless asked for.
    """

    mechanism: str
    quantum: float
    passes: int
    forced: int
    put_off: int
    late: dict[str, int]
    budgets_exceeded: int
    waiting: int
    stalls: int
    worst_stall_seconds: float
    causes: tuple[StallCause, ...]
    step_times: tuple[tuple[float, int], ...]


class Watchdog:
    """Runs handlers so that none of them keeps the loop. Made by `open_watchdog`; for Trio's thread only."""

    def __init__(
        self,
        loop: Loop,
        on_stall: Callable[[Stall], object] | None,
        step_times: StepTimes | None,
    ) -> None:
        self._loop = loop
        self._turns = loop.turns
        self._spare: list[Lane] = []
        self._max_spare = MAX_SPARE  # none when closed
        self._watched: dict[Task, Work] = {}
        self._failure: BaseException | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        self._step_times = step_times
        self._monitor = Monitor(
            loop.quantum,
            passes=lambda: loop.passes.count,
            working=self._working,
            on_stall=on_stall,
            on_failure=self._fail,
        )

    async def run(
        self, fn: Callable[..., Awaitable[T]], *args: object, flow: Hashable = None, budget: float = inf
    ) -> T:
        """Run ``await fn(*args)``, with checkpoints forced wherever it holds the loop for longer than its turn.

        Args:
            fn: An async function. Children of nurseries that it opens are not covered: see `start_soon`.
            args: Its arguments.
            flow: On whose account it runs; None: on its own.
            budget: Seconds for which it may hold the loop in all, > 0.

        Raises:
            BudgetExceeded: It held the loop for longer than ``budget`` and was cancelled.
            trio.ClosedResourceError: The watchdog has been closed.
            TypeError: ``fn`` is not an async function.

        Checkpoints: as ``fn`` does, and wherever they are forced. A cancellation reaches ``fn`` at either.
        Cost: where nothing is forced and the budget is unbounded, 1.3 µs for switching stacks, or 0.6 µs in a task that
            runs on a lane already (`open_lane`); where the budget is bounded, a cancel scope.
        """
        try:
            if budget != inf:
                return await self._run_within(budget, fn, args, flow)
            here = getcurrent()
            if type(here) is Stack:
                return await self._run_from(here.owner, fn, args, flow)
            turns, spare = self._turns, self._spare
            if not spare or turns.used >= turns.quantum or turns.overdue:
                return await self._run_on(self._take(), fn, args, flow)
            coroutine = fn(*args)
            lane = spare.pop()
            trap = lane.run_through(fn, coroutine, flow, here)
            result: T
            if trap is FINISHED and lane.task is None:
                spare.append(lane)
                result = lane.stack.result()
            else:
                result = await self._go_on(lane, trap)
            return result
        except TypeError:
            if callable(fn):
                raise
            raise TypeError(f"fn must be an async function, not {fn!r}; its arguments come after it") from None

    async def _run_from(
        self, lane: Lane, fn: Callable[..., Awaitable[T]], args: tuple[object, ...], flow: Hashable
    ) -> T:
        """Run in a task that is on a lane: on that lane itself, unless it is in the middle of a handler."""
        if lane.handler is not None:
            return await self._run_on(self._take(), fn, args, flow)
        lane.begin(fn, flow)
        try:
            return await fn(*args)
        finally:
            lane.end()

    async def _run_within(
        self, budget: float, fn: Callable[..., Awaitable[T]], args: tuple[object, ...], flow: Hashable
    ) -> T:
        check_above_zero("budget", budget)
        lane = self._take()
        lane.budget = budget
        with trio.CancelScope() as lane.scope:
            return await self._run_on(lane, fn, args, flow)
        raise BudgetExceeded(name_of(fn), budget)

    async def _run_on(
        self, lane: Lane, fn: Callable[..., Awaitable[T]], args: tuple[object, ...], flow: Hashable
    ) -> T:
        lane.flow = flow
        try:
            await lane.wait_to_run(fn)
            result: T = await lane.go_on(lane.enter(fn, fn(*args)))
            return result
        finally:
            self._put_back(lane)

    async def _go_on(self, lane: Lane, trap: Any) -> Any:
        try:
            return await lane.go_on(trap)
        finally:
            self._put_back(lane)

    def _take(self) -> Lane:
        """Return an idle lane."""
        if self._spare:
            return self._spare.pop()
        if not self._max_spare:
            raise trio.ClosedResourceError("the watchdog has been closed")
        lane = Lane(self._loop)
        lane.stack.begin()
        return lane

    def _put_back(self, lane: Lane) -> None:
        lane.leave()
        if len(self._spare) < self._max_spare:
            self._spare.append(lane)
        else:
            lane.stack.discard()

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
            mechanism=loop.alarm.mechanism,
            quantum=loop.quantum,
            passes=loop.passes.count,
            forced=loop.forced,
            put_off=loop.put_off,
            late=dict(loop.late.counts),
            budgets_exceeded=loop.budgets_exceeded,
            waiting=self._turns.waiting,
            stalls=monitor.stalls,
            worst_stall_seconds=monitor.worst,
            causes=monitor.causes(),
            step_times=() if self._step_times is None else self._step_times.table(),
        )

    # What the monitor's thread asks and says.

    def _working(self, task: Task | None) -> Work | None:
        if task is not None:
            return self._watched.get(task)
        lane = self._loop.active
        if lane is None or lane.handler is None or lane.task is None:
            return None
        return Work(lane.handler, lane.flow, lane.task, preemptible=self._loop.alarm.mechanism != "none")

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
                await loop.passes.turn()

        instruments = [loop.passes, *([] if self._step_times is None else [self._step_times])]
        loop.alarm.open(loop)
        try:
            for instrument in instruments:
                trio.lowlevel.add_instrument(instrument)
            trio.lowlevel.spawn_system_task(turn, name="stagetrio turns")
            if loop.alarm.clock is perf_counter:
                self._monitor.start()
            yield
        finally:
            loop.alarm.close()
            self._monitor.stop()
            turning.cancel()
            for instrument in instruments:
                with suppress(KeyError):  # Trio has removed it, because it raised
                    trio.lowlevel.remove_instrument(instrument)
            loop.passes.close()
            self._max_spare = 0
            while self._spare:
                self._spare.pop().stack.discard()


@asynccontextmanager
async def open_watchdog(
    *,
    quantum: float = 0.005,
    on_stall: Callable[[Stall], object] | None = None,
    preemptible: tuple[ModuleType | str, ...] = (),
    weight: Callable[[Hashable], float] | None = None,
    cleanup: float = 1.0,
    signum: int = SIGALRM,
    clock: StepClock | None = None,
    step_bounds: tuple[float, ...] = (),
) -> AsyncIterator[Watchdog]:
    """Open the watchdog of this event loop: one per process.

    Args:
        quantum: Seconds for which opted-in work may hold the loop in one pass, and any step before it is reported.
        on_stall: Called with each new cause of a stall, in the monitor's thread, while the loop is held. What it
            raises cancels the block and is raised from it.
        preemptible: Modules and packages, or their names, in which handlers may be stopped besides their own module.
        weight: Maps a flow to its weight, by default 1; turns are shared in proportion.
        cleanup: Seconds for which a handler's ``finally`` and ``except`` blocks may hold the loop before a
            cancellation is raised at a forced checkpoint inside of them too; ≥ 0, `math.inf` for never.
        signum: The signal by which handlers are interrupted. Where SIGALRM or its timer has an owner already, such as
            pytest-timeout, a thread and SIGURG are used instead. 0: no signal.
        clock: What slices are measured by instead of the time; for tests.
        step_bounds: Bounds, in rising seconds, of a histogram of step times. Asking for one costs a hook per step.

    Raises:
        ValueError, TypeError: An argument is out of range.
        RuntimeError: A watchdog is open already.

    Checkpoints: none.
    """
    check_positive("quantum", quantum)
    check_amount("cleanup", cleanup)
    for name, function in (("on_stall", on_stall), ("weight", weight)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable or None, not {function!r}")
    if not isinstance(clock, StepClock | None):
        raise TypeError(f"clock must be a StepClock or None, not {clock!r}")
    alarm: Alarm = choose_alarm(signum) if clock is None else clock
    if alarm.mechanism == "none":
        logger.warning(
            "nothing can force a checkpoint here, outside of the main thread or without a signal, before Python 3.12: "
            "handlers that hold the loop are reported, and go on"
        )
    loop = Loop(alarm, quantum, module_names(preemptible), weight, cleanup)
    watchdog = Watchdog(loop, on_stall, StepTimes(step_bounds) if step_bounds else None)
    with watchdog._opened(), watchdog._scope:
        yield watchdog
    if watchdog._failure is not None:
        raise watchdog._failure
