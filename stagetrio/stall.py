"""The monitor: a thread that sees when a step of the loop takes too long, and says whose step it is.

Theory of operation
===================

The loop counts its passes (one instrument hook per pass, none per step). The monitor wakes once per quantum and reads
the count. If it moved, nothing is wrong and nothing else is looked at: that is all the monitor costs. If it did not
move, the loop is either waiting for I/O or held. The frames of its thread tell which, and whose step it is: the
outermost coroutine above Trio's run loop is the task's own. The same step in two looks has lasted a quantum at least:
a stall. (In one pass a task is stepped once, so the same task in the same pass is the same step.)

A stall is reported once per *cause*, the task's function together with the function that holds the loop, while it
lasts: in the log, and to ``on_stall``. How often each cause came and what was its worst is in the statistics, for the
`MAX_CAUSES` most recent.

Nothing here stops anything. C code that holds the GIL holds the monitor too; it is reported when it has ended, if
the step then still runs.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from time import perf_counter
from types import CodeType, FrameType
from typing import Any

import attrs
import trio

logger = logging.getLogger("stagetrio.watchdog")

MAX_CAUSES = 256
STACK_DEPTH = 8
OFTEN = 20  # slices of one handler that ended a quantum late, after which it is reported

Cause = tuple[CodeType, CodeType]  # of the task's outermost coroutine, and of the innermost frame


@attrs.frozen
class Stall:
    """A step of the loop that lasts too long, as it was seen.

    Args:
        task: The name of the task.
        handler: The qualified name of the handler under the watchdog, or of the task's function.
        flow: The flow given to the watchdog; None where there was none.
        seconds: How long the loop had been held when it was seen; at least a quantum.
        file: Path of the source file of the line that is being executed.
        line: Its number, from 1.
        stack: The innermost frames as ``function (file:line)``, the innermost first.
        preemptible: Whether the handler runs with forced checkpoints, so that this is one that could not be stopped
            where it was.
    """

    task: str
    handler: str
    flow: Hashable
    seconds: float
    file: str
    line: int
    stack: tuple[str, ...]
    preemptible: bool = False

    def __str__(self) -> str:
        flow = "" if self.flow is None else f" for flow {self.flow!r}"
        return (
            f"the loop has been held for {self.seconds * 1000:.0f} ms by {self.handler}{flow} "
            f"in task {self.task}, at {self.file}:{self.line}: {' < '.join(self.stack)}"
        )


@attrs.frozen
class StallCause:
    """How often one cause has stalled the loop.

    Args:
        first: The stall as it was reported.
        count: Stalls of this cause so far.
        worst_seconds: The longest, as far as it was seen.
    """

    first: Stall
    count: int
    worst_seconds: float


@attrs.define
class Work:
    """What the watchdog knows about the work that a task does: for reports."""

    handler: Callable[..., Any]
    flow: Hashable
    task: trio.lowlevel.Task
    preemptible: bool


@attrs.define
class _Step:
    """The step of the loop that the monitor saw last."""

    number: int
    root: CodeType | None
    identity: int
    since: float
    cause: Cause | None = None


def name_of(handler: Callable[..., Any]) -> str:
    """Return the qualified name of a handler, for people."""
    while not hasattr(handler, "__qualname__") and hasattr(handler, "func"):
        handler = handler.func  # a partial
    module = getattr(handler, "__module__", None)
    name = getattr(handler, "__qualname__", None) or type(handler).__qualname__
    return f"{module}.{name}" if module else name


def frames_of_step(frame: FrameType | None) -> tuple[list[FrameType], bool]:
    """Return the frames of the current task's step, innermost first, and whether the loop itself was reached.

    On a stack of its own (`stagetrio.preempt`) a handler's frames end where it is driven.
    """
    frames: list[FrameType] = []
    while frame is not None:
        name = frame.f_code.co_name
        if name == "unrolled_run" and frame.f_globals.get("__name__") == "trio._core._run":
            return frames, True
        if name == "_work" and frame.f_globals.get("__name__") == "stagetrio.preempt":
            return frames, False
        frames.append(frame)
        frame = frame.f_back
    return frames, False


def all_tasks(root: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    """Every task below ``root``, from a thread other than the loop's: the sets are copied before they are walked."""
    tasks = [root]
    while tasks:
        task = tasks.pop()
        yield task
        for nursery in list(task.child_nurseries):
            tasks.extend(list(nursery.child_tasks))


class Monitor:
    """The thread, and what it has seen.

    Args:
        quantum: Seconds a step may last, > 0.
        passes: Returns the number of passes of the loop so far.
        working: Returns what the watchdog knows of the work that a task (None: the one that runs on a stack now) does.
        on_stall: Called with each new cause, in the monitor's thread; what it raises ends the monitor.
        on_tick: Called at each look, in the monitor's thread.
        on_failure: Called with what ``on_stall`` raised, in the monitor's thread.
    """

    def __init__(
        self,
        quantum: float,
        *,
        passes: Callable[[], int],
        working: Callable[[trio.lowlevel.Task | None], Work | None],
        on_stall: Callable[[Stall], object] | None,
        on_failure: Callable[[BaseException], object],
    ) -> None:
        self._quantum = quantum
        self._passes = passes
        self._working = working
        self._on_stall = on_stall
        self._on_failure = on_failure
        self._loop = threading.get_ident()
        root = trio.lowlevel.current_root_task()
        assert root is not None
        self._root = root
        self._until_ended = threading.Lock()  # held while the thread is to look; waiting for it is one call to C
        self._until_ended.acquire()
        self._thread = threading.Thread(target=self._run, name="stagetrio stall monitor", daemon=True)
        self._started = False  # until then it is the loop that waits, for this thread
        self._step: _Step | None = None
        self._causes: dict[Cause, StallCause] = {}
        self.stalls = 0
        self.worst = 0.0

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()
        self._started = True

    def stop(self) -> None:
        """End the thread and wait for it: at most one call of ``on_stall``."""
        self._until_ended.release()
        if self._thread.ident is not None:
            self._thread.join()

    def causes(self) -> tuple[StallCause, ...]:
        """Return the causes seen, the most recent last."""
        return tuple(self._causes.values())

    def _run(self) -> None:
        try:
            while not self._until_ended.acquire(timeout=self._quantum):
                self._look()
        except BaseException as error:
            self._on_failure(error)

    def _look(self) -> None:
        if not self._started:
            return
        passes = self._passes()
        step = self._step
        if step is None or step.number != passes:
            self._step = _Step(passes, None, 0, perf_counter())
            return
        frames, in_loop = frames_of_step(sys._current_frames().get(self._loop))
        coroutines = [frame for frame in frames if frame.f_code.co_flags & inspect.CO_COROUTINE]
        if not coroutines:
            step.root = None  # between two steps, or waiting for I/O
            return
        root = coroutines[-1]
        if step.root is not root.f_code or step.identity != id(root):
            self._step = _Step(passes, root.f_code, id(root), perf_counter())
            return
        self._stalled(step, frames, root, in_loop)

    def _stalled(self, step: _Step, frames: list[FrameType], root: FrameType, in_loop: bool) -> None:
        held = perf_counter() - step.since
        task = self._task_of(root) if in_loop else None
        work = self._working(task)
        if held < self._quantum or (work is not None and work.preemptible and held < 2 * self._quantum):
            return  # a forced checkpoint may still be on its way
        self.worst = max(self.worst, held)
        if step.cause is None:
            self.stalls += 1
            step.cause = (root.f_code, frames[0].f_code)
            known = self._causes.pop(step.cause, None)
            if known is None:
                known = StallCause(describe(frames, root, task, work, held), 0, 0.0)
                self._causes[step.cause] = known
                if len(self._causes) > MAX_CAUSES:
                    del self._causes[next(iter(self._causes))]
                logger.warning("%s", known.first)
                if self._on_stall is not None:
                    self._on_stall(known.first)
            self._causes[step.cause] = attrs.evolve(known, count=known.count + 1)
        known = self._causes[step.cause]
        self._causes[step.cause] = attrs.evolve(known, worst_seconds=max(known.worst_seconds, held))

    def _task_of(self, root: FrameType) -> trio.lowlevel.Task | None:
        for task in all_tasks(self._root):
            if getattr(task.coro, "cr_frame", None) is root:
                return task
        return None


def describe(
    frames: list[FrameType],
    root: FrameType,
    task: trio.lowlevel.Task | None,
    work: Work | None,
    seconds: float,
) -> Stall:
    """Put what was seen into words and numbers."""
    if task is None and work is not None:
        task = work.task
    return Stall(
        task=root.f_code.co_qualname if task is None else task.name,
        handler=root.f_code.co_qualname if work is None else name_of(work.handler),
        flow=None if work is None else work.flow,
        seconds=seconds,
        file=frames[0].f_code.co_filename,
        line=frames[0].f_lineno or 0,
        stack=tuple(
            f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
            for frame in frames[:STACK_DEPTH]
        ),
        preemptible=False if work is None else work.preemptible,
    )


class StepTimes(trio.abc.Instrument):
    """A histogram of how long steps last; an instrument, at the price of two hooks per step.

    Args:
        bounds: Upper bounds of the classes in seconds, rising; what is above the last is a class of its own.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        if not isinstance(bounds, Sequence) or not all(isinstance(bound, int | float) for bound in bounds):
            raise TypeError(f"step_bounds must be a tuple of seconds, not {bounds!r}")
        if list(bounds) != sorted(set(bounds)) or not all(0 < bound < math.inf for bound in bounds):
            raise ValueError(f"step_bounds must be rising seconds above 0, not {bounds!r}")
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._started = 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Called by Trio."""
        self._started = perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Called by Trio."""
        if self._started:  # not the step in which this was installed
            self._counts[bisect_left(self._bounds, perf_counter() - self._started)] += 1

    def table(self) -> tuple[tuple[float, int], ...]:
        """Return ``(bound, steps up to it and above the one before)``, the last bound unbounded."""
        return tuple(zip((*self._bounds, math.inf), self._counts, strict=True))


class LateHandlers:
    """Counts, by handler, the slices that ended late because they could not be ended where they were.

    The `MAX_CAUSES` most recent are kept, and one that comes often is reported in the log, once.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}  # by name, the most recent last

    def count(self, handler: Callable[..., Any], place: str) -> None:
        """Count one slice, which could last not be ended in ``place``."""
        name = name_of(handler)
        count = self.counts[name] = self.counts.pop(name, 0) + 1
        if len(self.counts) > MAX_CAUSES:
            del self.counts[next(iter(self.counts))]
        if count == OFTEN:
            logger.warning(
                "%s has been stopped a quantum late, or later, %d times, the last time for being in %s; "
                "modules in which it may be stopped are declared by preemptible=",
                name,
                count,
                place,
            )
