"""Retries that cannot make an overload worse.

Theory of operation. A retry helps against a fault that hits few calls, and feeds one that hits all of them: three
retries make fourfold load out of a backend that has just become slow, and it never gets well again. So retries are
paid for by calls. Each call puts `ratio` into the budget, each retry takes 1 out of it, and the budget holds `burst`
at most: in any span there are at most ``burst + ratio × calls`` retries, whatever fails and however many are calling.
When it is empty, the failure goes to the caller at once, which is also what sheds the load.

Delays double from retry to retry and are spread over their upper half, so that those who failed together do not come
back together. A refusal that says when to come back (`Overloaded.retry_after`) is believed: nobody comes earlier, and
they come spread over half as long again.

Source: Finagle's RetryBudget; AWS Architecture Blog, Exponential Backoff and Jitter (2015); Bronson et al.: Metastable
failures in distributed systems (HotOS 2021).
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import attrs
import trio

from stagetrio.amounts import check_above_zero, check_amount, check_count
from stagetrio.overload import Overloaded

Ts = TypeVarTuple("Ts")
T = TypeVar("T")


@attrs.frozen
class RetryStatistics:
    """What `RetryBudget.statistics` returns.

    Args:
        calls: Calls made, each counted once.
        retries: Attempts beyond the first.
        denied: Failures that would have been retried if the budget had not been empty.
        available: Retries that could be made at once now.
    """

    calls: int
    retries: int
    denied: int
    available: float


class RetryBudget:
    """What a client may retry; one for all calls to the same backend.

    Args:
        ratio: Retries for each call, ≥ 0; 0.2 lets retries add a fifth to the traffic.
        burst: Retries saved up at most, ≥ 0; it begins with as many.
        attempts: Of one call at most, the first included, ≥ 1.
        first_delay: Seconds before the first retry at most; each further retry waits up to twice as long. > 0.
        max_delay: Seconds before any retry at most, ≥ `first_delay`; a ``retry_after`` beyond that ends the call.
        retry_on: Exceptions after which to try again; whatever else is raised comes out at once.
        jitter: A source of numbers ≥ 0 and < 1, for the delays.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        *,
        burst: float = 10,
        attempts: int = 4,
        first_delay: float = 0.1,
        max_delay: float = 10,
        retry_on: type[Exception] | tuple[type[Exception], ...] = Overloaded,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        check_amount("ratio", ratio)
        check_amount("burst", burst)
        check_count("attempts", attempts, 1)
        check_above_zero("first_delay", first_delay)
        if not 0 < first_delay < math.inf:
            raise ValueError(f"first_delay must be > 0 and finite, not {first_delay!r}")
        if not max_delay >= first_delay:
            raise ValueError(f"max_delay must be >= first_delay, not {max_delay!r}")
        self._ratio = ratio
        self._burst = burst
        self._attempts = attempts
        self._first_delay = first_delay
        self._max_delay = max_delay
        self._retry_on = retry_on
        self._jitter = jitter
        self._available = float(burst)
        self._calls = 0
        self._retries = 0
        self._denied = 0

    async def call(self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Return what ``await fn(*args)`` returns, trying again within the budget when it fails.

        An attempt that should not last for ever has a deadline of its own, inside `fn`: with
        ``trio.TooSlowError`` among ``retry_on`` it is tried again, while a deadline around this call ends it.

        Raises:
            Exception: What the last attempt raised.

        Checkpoints: as `fn` does, and between attempts. A cancelled call makes no further attempt; what those made so
        far have done stays done.
        """
        self._calls += 1
        self._available = min(self._burst, self._available + self._ratio)
        attempt = 1
        while True:
            try:
                return await fn(*args)
            except self._retry_on as error:
                delay = self._delay(attempt, error)
                if attempt >= self._attempts or delay is None:
                    raise
                if self._available < 1:
                    self._denied += 1
                    raise
            self._available -= 1
            self._retries += 1
            attempt += 1
            await trio.sleep(delay)

    def statistics(self) -> RetryStatistics:
        """Return the figures of this budget."""
        return RetryStatistics(self._calls, self._retries, self._denied, self._available)

    def _delay(self, attempt: int, error: Exception) -> float | None:
        """Seconds to wait after so many attempts; None when that would be too long."""
        longest: float = min(self._max_delay, self._first_delay * 2.0 ** min(attempt - 1, 1000))
        asked = error.retry_after if isinstance(error, Overloaded) else 0.0
        if asked > self._max_delay:
            return None
        return max(longest * (0.5 + self._jitter() / 2), asked * (1 + self._jitter() / 2))
