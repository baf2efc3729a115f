"""A capacity limiter that finds its capacity: a `trio.CapacityLimiter` whose total follows the measured latency."""

from __future__ import annotations

import math
from types import TracebackType

import attrs
import trio
from trio import current_time

from stagetrio.knee import Knee
from stagetrio.overload import Overloaded


@attrs.frozen
class AdaptiveLimiterStatistics:
    """What `AdaptiveLimiter.statistics` returns: the fields of `trio.CapacityLimiterStatistics`, and what it knows.

    Args:
        borrowed_tokens: How many are borrowed.
        total_tokens: The limit now.
        borrowers: Who has one.
        tasks_waiting: How many wait for one.
        baseline_seconds: What the work takes when there is no queue, as far as is known; NaN before the first window.
        latency_seconds: What it took on average in the last window; NaN before that.
        windows: How many windows were looked at.
        learnt: Releases that were learnt from.
        forgotten: Releases that were not: the work failed, was cancelled, or said so.
    """

    borrowed_tokens: int
    total_tokens: int
    borrowers: list[object]
    tasks_waiting: int
    baseline_seconds: float
    latency_seconds: float
    windows: int
    learnt: int
    forgotten: int


class AdaptiveLimiter:
    """A `trio.CapacityLimiter` look-alike whose total is the number of things the backend can do at a time.

    It measures how long its tokens are held and finds the point from which more at a time only wait longer (see
    `stagetrio.knee`). It fits wherever Trio or `TicketStage` takes a limiter; Trio's own class is final, so a type
    checker wants ``cast(trio.CapacityLimiter, limiter)`` there.

    A token whose ``async with`` block raises, or is cancelled, teaches nothing; a `TicketStage` does the same. Those
    who call `release` themselves say what they know: `release` for work that was done, `forget` for work that was not.
    ``trio.to_thread.run_sync(fn, limiter=...)`` releases whatever became of ``fn``, so one that raised is learnt from.

    Args:
        initial: The limit to begin with, ≥ 1. Too low is mended in a few windows; too high overloads meanwhile.
        min_limit: It never goes below, ≥ 1.
        max_limit: It never goes above, ≥ `initial`.

    Cost: about 2 µs more than `trio.CapacityLimiter` for an acquire and a release.
    """

    def __init__(self, initial: int = 4, *, min_limit: int = 1, max_limit: int = 1000) -> None:
        for argument, value in (("initial", initial), ("min_limit", min_limit), ("max_limit", max_limit)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{argument} must be an int, not {value!r}")
        if not 1 <= min_limit <= initial <= max_limit:
            raise ValueError(
                "initial must be between min_limit and max_limit, and these >= 1, "
                f"not {initial!r} between {min_limit!r} and {max_limit!r}"
            )
        self._limiter = trio.CapacityLimiter(initial)
        self._knee = Knee(initial, min_limit, max_limit)
        self._since: dict[object, float] = {}  # {borrower: when it got its token}
        self._learnt = 0
        self._forgotten = 0

    @property
    def total_tokens(self) -> int:
        """The limit now."""
        return self._knee.limit

    @property
    def borrowed_tokens(self) -> int:
        """How many tokens are borrowed; above the limit for a while after it was lowered."""
        return self._limiter.borrowed_tokens

    @property
    def available_tokens(self) -> int:
        """How many are free; below zero for a while after the limit was lowered."""
        return self._knee.limit - self._limiter.borrowed_tokens

    def acquire_nowait(self) -> None:
        """Borrow a token for the current task.

        Raises:
            Overloaded: The limit is reached, or somebody waits; reason ``"tickets"``.
            RuntimeError: The task has one already.
        """
        self.acquire_on_behalf_of_nowait(trio.lowlevel.current_task())

    @trio.lowlevel.enable_ki_protection
    def acquire_on_behalf_of_nowait(self, borrower: object) -> None:
        """Borrow a token for `borrower`, otherwise like `acquire_nowait`."""
        try:
            self._limiter.acquire_on_behalf_of_nowait(borrower)
        except trio.WouldBlock:
            raise Overloaded("tickets", self._retry_after()) from None
        self._begin(borrower)

    async def acquire(self) -> None:
        """Wait for a token for the current task, first come, first served.

        Raises:
            RuntimeError: The task has one already.

        Checkpoints: always. A cancelled call has none.
        """
        await self.acquire_on_behalf_of(trio.lowlevel.current_task())

    @trio.lowlevel.enable_ki_protection
    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Wait for a token for `borrower`, otherwise like `acquire`."""
        await self._limiter.acquire_on_behalf_of(borrower)
        self._begin(borrower)

    def release(self) -> None:
        """Give back the token of the current task, whose work is done: the limit learns how long it took.

        Raises:
            RuntimeError: The task has none.
        """
        self.release_on_behalf_of(trio.lowlevel.current_task())

    @trio.lowlevel.enable_ki_protection
    def release_on_behalf_of(self, borrower: object) -> None:
        """Give back the token of `borrower`, otherwise like `release`."""
        now = self._end(borrower)
        self._learnt += 1
        changed = self._knee.learn(now, now - self._since.pop(borrower))
        if changed and self._limiter.total_tokens != self._knee.limit:
            self._limiter.total_tokens = self._knee.limit

    def forget(self) -> None:
        """Give back the token of the current task, whose work was not done: nothing is learnt from it.

        Raises:
            RuntimeError: The task has none.
        """
        self.forget_on_behalf_of(trio.lowlevel.current_task())

    @trio.lowlevel.enable_ki_protection
    def forget_on_behalf_of(self, borrower: object) -> None:
        """Give back the token of `borrower`, otherwise like `forget`."""
        self._end(borrower)
        self._forgotten += 1
        del self._since[borrower]

    async def __aenter__(self) -> None:
        await self.acquire()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.release()
        else:
            self.forget()

    def statistics(self) -> AdaptiveLimiterStatistics:
        """Return the figures of this limiter."""
        figures = self._limiter.statistics()
        return AdaptiveLimiterStatistics(
            borrowed_tokens=figures.borrowed_tokens,
            total_tokens=self._knee.limit,
            borrowers=figures.borrowers,
            tasks_waiting=figures.tasks_waiting,
            baseline_seconds=self._knee.baseline,
            latency_seconds=self._knee.latency,
            windows=self._knee.windows,
            learnt=self._learnt,
            forgotten=self._forgotten,
        )

    def __repr__(self) -> str:
        return f"<AdaptiveLimiter {self.borrowed_tokens}/{self._knee.limit}>"

    def _begin(self, borrower: object) -> None:
        now = current_time()
        self._since[borrower] = now
        self._knee.begin(now)

    def _end(self, borrower: object) -> float:
        self._limiter.release_on_behalf_of(borrower)
        now = current_time()
        self._knee.end(now)
        return now

    def _retry_after(self) -> float:
        """Seconds until one of those at work will be done, by the last window."""
        latency = self._knee.latency
        return 0.0 if math.isnan(latency) else latency / max(1, self._limiter.borrowed_tokens)
