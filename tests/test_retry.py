"""The retry budget: what is tried again, when, and when no more."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from stagetrio.limiter import Overloaded
from stagetrio.retry import RetryBudget


class Flaky:
    """Fails so many times before it succeeds, and notes when it was tried."""

    def __init__(self, failures: float, error: Callable[[], Exception] = lambda: Overloaded("queue")) -> None:
        self.failures = failures
        self.error = error
        self.tried: list[float] = []

    async def __call__(self, answer: int) -> int:
        self.tried.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if len(self.tried) <= self.failures:
            raise self.error()
        return answer


async def test_a_failure_is_tried_again(autojump_clock: MockClock) -> None:
    """A call that fails twice is answered by its third attempt."""
    budget = RetryBudget()
    assert await budget.call(Flaky(2), 7) == 7
    figures = budget.statistics()
    assert (figures.calls, figures.retries, figures.denied) == (1, 2, 0)


async def test_attempts_are_bounded(autojump_clock: MockClock) -> None:
    """After the last attempt its failure comes out."""
    flaky = Flaky(math.inf)
    with pytest.raises(Overloaded):
        await RetryBudget(attempts=3).call(flaky, 7)
    assert len(flaky.tried) == 3


async def test_an_empty_budget_lets_failures_out_at_once(autojump_clock: MockClock) -> None:
    """When everything fails, retries are `burst` and a fifth of the calls, and no more."""
    budget = RetryBudget(0.2, burst=5)
    tries = 0

    async def fail() -> None:
        nonlocal tries
        tries += 1
        await trio.lowlevel.checkpoint()
        raise Overloaded("queue")

    for _ in range(1000):
        with pytest.raises(Overloaded):
            await budget.call(fail)
    assert 1190 <= tries <= 1205
    figures = budget.statistics()
    assert figures.retries == tries - 1000
    assert figures.available < 1
    assert figures.denied >= 795


async def test_a_pause_saves_no_retries_beyond_the_burst(autojump_clock: MockClock) -> None:
    """However many calls went well, no more than `burst` retries are there when all begin to fail."""
    budget = RetryBudget(1, burst=3)
    for _ in range(100):
        await budget.call(Flaky(0), 7)
    assert budget.statistics().available == 3


async def test_delays_double_and_are_spread(autojump_clock: MockClock) -> None:
    """Each delay lies in the upper half of twice the one before, up to the longest, at random."""
    first: set[float] = set()
    for seed in range(20):
        flaky = Flaky(5)
        budget = RetryBudget(attempts=6, first_delay=1, max_delay=5, jitter=random.Random(seed).random)
        await budget.call(flaky, 7)
        delays = [after - before for before, after in zip(flaky.tried, flaky.tried[1:], strict=False)]
        for delay, longest in zip(delays, (1, 2, 4, 5, 5), strict=True):
            assert longest / 2 <= delay <= longest
        first.add(delays[0])
    assert len(first) == 20


async def test_retry_after_is_believed(autojump_clock: MockClock) -> None:
    """Nobody comes back before `retry_after`, those refused together come back spread, and not all too late."""
    delays = []
    for seed in range(20):
        flaky = Flaky(1, lambda: Overloaded("tickets", 3))
        await RetryBudget(jitter=random.Random(seed).random).call(flaky, 7)
        delays.append(flaky.tried[1] - flaky.tried[0])
    assert 3 <= min(delays) < 3.5
    assert 4 < max(delays) <= 4.5


async def test_a_long_retry_after_ends_the_call(autojump_clock: MockClock) -> None:
    """When the time asked for is longer than any delay, waiting is the caller's business."""
    flaky = Flaky(1, lambda: Overloaded("tickets", 30))
    budget = RetryBudget(max_delay=10)
    with pytest.raises(Overloaded):
        await budget.call(flaky, 7)
    assert len(flaky.tried) == 1
    assert budget.statistics().available == 10


async def test_only_what_is_named_is_tried_again(autojump_clock: MockClock) -> None:
    """Other exceptions come out of the first attempt; the named ones are tried again."""
    flaky = Flaky(1, KeyError)
    with pytest.raises(KeyError):
        await RetryBudget().call(flaky, 7)
    assert len(flaky.tried) == 1
    flaky = Flaky(1, trio.TooSlowError)
    assert await RetryBudget(retry_on=(Overloaded, trio.TooSlowError)).call(flaky, 7) == 7


async def test_a_cancelled_call_makes_no_further_attempt(autojump_clock: MockClock) -> None:
    """A deadline around the call ends it between attempts."""
    flaky = Flaky(math.inf)
    with trio.move_on_after(10) as scope:
        await RetryBudget(attempts=100, burst=100, first_delay=4, max_delay=4).call(flaky, 7)
    assert scope.cancelled_caught
    assert 3 <= len(flaky.tried) <= 5


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("ratio", -0.1),
        ("burst", -1),
        ("attempts", 0),
        ("first_delay", 0),
        ("max_delay", 0.01),
        ("first_delay", math.inf),
    ],
)
def test_wrong_arguments_are_refused_by_name(argument: str, value: float) -> None:
    """A wrong constructor argument is named in the error."""
    with pytest.raises(ValueError, match=argument):
        RetryBudget(**{argument: value})  # type: ignore[arg-type]


async def test_retrying_may_go_on_for_thousands_of_attempts(autojump_clock: MockClock) -> None:
    """The delay stops doubling at ``max_delay``, and what comes out in the end is what the last attempt raised."""
    budget = RetryBudget(attempts=1100, burst=math.inf, max_delay=1)

    async def fail() -> None:
        raise Overloaded("queue")

    with pytest.raises(Overloaded):
        await budget.call(fail)
    assert budget.statistics().retries == 1099
