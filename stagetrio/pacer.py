"""Output spaced and batched on a steady tick.

Writing each message as it comes costs a system call per message; writing on a timer per connection costs a timer per
connection, and the connections drift apart. A `Pacer` is one clock for all: whoever has output says so (`Pacer.touch`),
and at the next tick everything touched is flushed, in the order in which it was first touched, once each.

Theory of operation. ``_touched`` maps the flush functions to be called at the next tick to nothing, so a function
touched a thousand times is called once and the bound on memory is the number of distinct functions. The one task in
`Pacer.run` parks while nothing is touched: an idle pacer costs nothing. When it wakes,

- and the last tick is a whole tick ago or more, it flushes at once, and ticks are counted from this moment: an
  answer to a lone request is not delayed, and flushes are never less than a tick apart;
- otherwise it sleeps until the next tick. While output keeps coming, ticks lie at ``start + n × tick``, computed from
  the tick before and never from the time at which the loop got around to it: late by a little, a tick is late alone;
  late by whole ticks, those are left out and counted, and the grid stays.

A flush may touch itself again (it could not write all): that is for the next tick. A long round is cut into slices
with a checkpoint after each, so a thousand connections do not hold the loop; what a cancellation or an exception leaves
undone stays touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import iscoroutine

import attrs
import trio

from stagetrio.amounts import check_above_zero

Flush = Callable[[], object]

SLICE = 64  # flushes between two checkpoints: some 0.3 ms where each is a short send()


@attrs.frozen
class PacerStatistics:
    """What a pacer holds and has done.

    Args:
        tick: seconds between two rounds of flushes while there is output.
        touched: flush functions waiting for the next round.
        rounds: rounds so far; those made at once, after idleness, included.
        flushes: calls of flush functions so far.
        missed: ticks left out because the loop was late by a whole tick or more.
        lateness: seconds by which the latest round of all came after its tick.
    """

    tick: float
    touched: int
    rounds: int
    flushes: int
    missed: int
    lateness: float


class Pacer:
    """One steady tick for everybody's output.

    Nothing runs until the owner starts `run` in a nursery of its own; what is touched before is flushed then. Methods
    are for Trio's thread only.

    Args:
        tick: seconds between two rounds of flushes, > 0 and finite; read from Trio's clock.

    Cost: a touch is a dict entry (0.1 µs); a round is one wake-up of one task for all that was touched.
    """

    def __init__(self, tick: float) -> None:
        check_above_zero("tick", tick)
        if tick == math.inf:
            raise ValueError("tick must be finite, not inf")
        self._tick = tick
        self._touched: dict[Flush, None] = {}
        self._due: dict[Flush, None] = {}  # of the round in progress, not yet called
        self._sleeper: trio.lowlevel.Task | None = None  # the task in run(), parked as nothing is touched
        self._running = False
        self._rounds = self._flushes = self._missed = 0
        self._lateness = 0.0

    @property
    def tick(self) -> float:
        """Seconds between two rounds of flushes."""
        return self._tick

    def touch(self, flush: Flush) -> None:
        """Have ``flush()`` called at the next tick; at once, in the next pass of the loop, after a tick of idleness.

        Touching again before that changes nothing. Equal callables are one: a bound method is equal to itself
        however often it is looked up, a lambda is not.

        Args:
            flush: a synchronous function that writes what there is without waiting. What it raises ends `run`.
        """
        if flush not in self._touched:
            if not callable(flush):
                raise TypeError(f"flush must be a synchronous function, not {flush!r}")
            self._touched[flush] = None
        if self._sleeper is not None:
            sleeper, self._sleeper = self._sleeper, None
            trio.lowlevel.reschedule(sleeper)

    def discard(self, flush: Flush) -> None:
        """Forget that ``flush`` was touched, if it was: it is not called unless it is touched again."""
        self._touched.pop(flush, None)
        self._due.pop(flush, None)

    def flush_all(self) -> None:
        """Call everything touched now, without waiting for the tick: the last output before an end.

        What touches itself again meanwhile stays touched. An exception of a flush leaves the rest touched.
        """
        self._begin_round()
        try:
            self._call(tuple(self._due))
        finally:
            self._end_round()

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Flush what is touched, tick after tick, until cancelled; start it in a nursery, once per pacer.

        Raises:
            RuntimeError: It runs already.

        Checkpoints: always; cancelled, what was not flushed stays touched, for `flush_all` or another ``run``.
        """
        if self._running:
            raise RuntimeError("this pacer runs already; share it, or make another")
        self._running = True
        try:
            await self._run()
        finally:
            self._running = False

    async def _run(self) -> None:
        next_tick = trio.current_time()
        while True:
            idle = not self._touched
            await self._wait_touched()
            if idle and trio.current_time() >= next_tick:
                next_tick = trio.current_time() + self._tick
            else:
                await trio.sleep_until(next_tick)
                late = trio.current_time() - next_tick
                self._lateness = max(self._lateness, late)
                missed = int(late / self._tick)
                self._missed += missed
                next_tick += (1 + missed) * self._tick
            await self._round()

    async def _wait_touched(self) -> None:
        if self._touched:
            await trio.lowlevel.checkpoint()
            return
        self._sleeper = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _round(self) -> None:
        self._begin_round()
        try:
            due = tuple(self._due)
            for start in range(0, len(due), SLICE):
                if start:
                    await trio.lowlevel.checkpoint()
                self._call(due[start : start + SLICE])
        finally:
            self._end_round()

    def _begin_round(self) -> None:
        # a round within a round (flush_all from a flush, or between two slices) takes over what is still due
        self._due, self._touched = {**self._due, **self._touched}, {}
        self._rounds += bool(self._due)

    def _call(self, flushes: tuple[Flush, ...]) -> None:
        for flush in flushes:
            if self._due.pop(flush, self) is None:  # else it was discarded meanwhile
                self._flushes += 1
                done = flush()
                if done is not None and iscoroutine(done):
                    done.close()
                    raise TypeError(f"flush must be a synchronous function, not {flush!r}")

    def _end_round(self) -> None:
        if self._due:
            self._touched = {**self._due, **self._touched}
            self._due = {}

    def statistics(self) -> PacerStatistics:
        """What the pacer holds and has done."""
        return PacerStatistics(
            tick=self._tick,
            touched=len(self._touched) + len(self._due),
            rounds=self._rounds,
            flushes=self._flushes,
            missed=self._missed,
            lateness=self._lateness,
        )
