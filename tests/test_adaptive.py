"""The adaptive limiter: a capacity limiter like Trio's own in all that can be seen, and what it learns from."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.limiter import AdaptiveLimiter, Overloaded
from stagetrio.ticket import LeaseLost, TicketStage

Limiter = trio.CapacityLimiter | AdaptiveLimiter


@pytest.fixture(params=[trio.CapacityLimiter, AdaptiveLimiter])
def limiter(request: pytest.FixtureRequest) -> Limiter:
    """Ours and Trio's own keep the same contract."""
    return cast(Limiter, request.param(2))


async def test_tokens_are_lent_up_to_the_limit(limiter: Limiter) -> None:
    """As many as the total are lent, one more would block, and what is given back is lent again."""
    assert (limiter.total_tokens, limiter.borrowed_tokens, limiter.available_tokens) == (2, 0, 2)
    limiter.acquire_on_behalf_of_nowait("a")
    limiter.acquire_nowait()
    assert (limiter.borrowed_tokens, limiter.available_tokens) == (2, 0)
    with pytest.raises(trio.WouldBlock):
        limiter.acquire_on_behalf_of_nowait("b")
    limiter.release_on_behalf_of("a")
    limiter.acquire_on_behalf_of_nowait("b")
    limiter.release()
    limiter.release_on_behalf_of("b")
    assert limiter.borrowed_tokens == 0


async def test_nobody_borrows_twice_or_returns_what_he_has_not(limiter: Limiter) -> None:
    """A borrower has one token at most, and only a borrower gives one back."""
    limiter.acquire_nowait()
    with pytest.raises(RuntimeError):
        limiter.acquire_nowait()
    with pytest.raises(RuntimeError):
        await limiter.acquire()
    limiter.release()
    with pytest.raises(RuntimeError):
        limiter.release()
    async with limiter:
        assert limiter.statistics().borrowed_tokens == 1
        assert limiter.statistics().borrowers == [trio.lowlevel.current_task()]
    assert limiter.statistics().borrowed_tokens == 0


async def test_waiters_are_served_in_order(limiter: Limiter, autojump_clock: MockClock) -> None:
    """First come, first served, also when one in between gives up."""
    order: list[int] = []

    async def work(number: int) -> None:
        with trio.move_on_after(0.5 if number == 3 else 10):
            async with limiter:
                order.append(number)
                await trio.sleep(1 + number / 10)

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(work, number)
            await wait_all_tasks_blocked()
        assert limiter.statistics().tasks_waiting == 4
    assert order == [0, 1, 2, 4, 5]


async def test_acquire_is_a_checkpoint(limiter: Limiter) -> None:
    """`acquire` checkpoints when a token is free, and a cancelled one has none."""
    with trio.testing.assert_checkpoints():
        await limiter.acquire()
    limiter.release()
    with trio.CancelScope() as scope:
        scope.cancel()
        await limiter.acquire()
    assert scope.cancelled_caught
    assert limiter.borrowed_tokens == 0


async def test_threads_and_tickets_take_it_for_a_limiter() -> None:
    """It stands where Trio takes a CapacityLimiter, and where a stage takes one."""
    limiter = AdaptiveLimiter(1)
    assert await trio.to_thread.run_sync(lambda: 7, limiter=cast(trio.CapacityLimiter, limiter)) == 7
    stage = TicketStage("db", limiter)
    async with stage.ticket():
        assert limiter.borrowed_tokens == 1
        with pytest.raises(Overloaded):
            stage.ticket_nowait()
        assert stage.statistics().tickets == 1
    assert limiter.statistics().learnt == 2


async def test_a_refusal_says_when_to_come_back(autojump_clock: MockClock) -> None:
    """Once latencies are known, a refusal carries the time until a token should come back."""
    limiter = AdaptiveLimiter(1)
    await run(limiter, 60, 0.2)
    tokens = limiter.total_tokens
    for number in range(tokens):
        limiter.acquire_on_behalf_of_nowait(number)
    with pytest.raises(Overloaded) as caught:
        limiter.acquire_nowait()
    assert caught.value.reason == "tickets"
    assert caught.value.retry_after == pytest.approx(0.2 / tokens)


async def run(limiter: AdaptiveLimiter, calls: int, seconds: float, clients: int = 30) -> None:
    """Let `clients` make `calls` calls that take so many seconds each."""

    async def client() -> None:
        nonlocal calls
        while calls:
            calls -= 1
            async with limiter:
                await trio.sleep(seconds)

    async with trio.open_nursery() as nursery:
        for _ in range(clients):
            nursery.start_soon(client)


async def test_the_limit_grows_while_nothing_queues(autojump_clock: MockClock) -> None:
    """A backend that answers as fast with more at a time gets more at a time, up to `max_limit`."""
    limiter = AdaptiveLimiter(2, max_limit=25)
    await run(limiter, 1000, 0.1)
    assert limiter.total_tokens == 25
    figures = limiter.statistics()
    assert figures.baseline_seconds == pytest.approx(0.1)
    assert figures.latency_seconds == pytest.approx(0.1)
    assert figures.learnt == 1000


async def test_idleness_and_light_load_change_nothing(autojump_clock: MockClock) -> None:
    """Where nobody has to wait nothing is learnt about the limit, however slow single calls are, or long the pause."""
    limiter = AdaptiveLimiter(2)
    await run(limiter, 400, 0.1)
    limit = limiter.total_tokens
    await trio.sleep(3600)
    await run(limiter, 500, 0.3, clients=limit // 2)
    await trio.sleep(3600)
    assert limiter.total_tokens == limit


@pytest.mark.parametrize("how", ["raise", "cancel", "forget", "lease", "ticket"])
async def test_work_that_was_not_done_teaches_nothing(how: str, autojump_clock: MockClock) -> None:
    """Failures, cancellations and lost leases, however quick or slow, leave the limit and the baseline alone."""
    limiter = AdaptiveLimiter(2)
    await run(limiter, 400, 0.1)
    before = limiter.statistics()
    stage = TicketStage("db", limiter, lease=5)

    async def fail(number: int) -> None:
        seconds = 0.001 if number % 2 else 10
        if how == "forget":
            await limiter.acquire()
            await trio.sleep(seconds)
            limiter.forget()
        elif how == "cancel":
            with trio.move_on_after(seconds):
                async with limiter:
                    await trio.sleep_forever()
        elif how == "lease":
            with pytest.raises(LeaseLost):
                async with stage.ticket(lease=seconds):
                    await trio.sleep_forever()
        else:
            context: Any = limiter if how == "raise" else stage.ticket()
            with pytest.raises((KeyError, LeaseLost)):
                await fail_in(context, seconds)

    async with trio.open_nursery() as nursery:
        for number in range(300):
            nursery.start_soon(fail, number)
    after = limiter.statistics()
    assert (after.total_tokens, after.baseline_seconds) == (before.total_tokens, before.baseline_seconds)
    assert after.learnt == before.learnt
    assert after.forgotten > 50
    assert after.borrowed_tokens == 0


async def fail_in(context: Any, seconds: float) -> None:
    async with context:
        await trio.sleep(seconds)
        raise KeyError


async def test_a_lowered_limit_cuts_nobody_off(autojump_clock: MockClock) -> None:
    """When the limit falls those who have a token keep it, and no new one is lent until there are fewer."""
    limiter = AdaptiveLimiter(2)
    backend = trio.CapacityLimiter(20)
    violations = 0

    async def client() -> None:
        nonlocal violations
        while True:
            async with limiter:
                violations += limiter.borrowed_tokens > most
                async with backend:
                    await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        most = 1000
        for _ in range(40):
            nursery.start_soon(client)
        await trio.sleep(30)
        high = limiter.total_tokens
        most = high + 5
        backend.total_tokens = 4
        await trio.sleep(60)
        low = limiter.total_tokens
        nursery.cancel_scope.cancel()
    assert high >= 16
    assert 3 <= low <= 6
    assert violations == 0
    assert limiter.available_tokens == limiter.total_tokens


@pytest.mark.parametrize(
    "arguments",
    [{"initial": 0}, {"initial": 5, "max_limit": 4}, {"initial": 5, "min_limit": 6}, {"min_limit": 0}],
)
def test_wrong_limits_are_refused(arguments: dict[str, int]) -> None:
    """Limits that contradict each other are a ValueError, limits that are no whole numbers a TypeError."""
    with pytest.raises(ValueError, match="initial must be between"):
        AdaptiveLimiter(**arguments)
    with pytest.raises(TypeError, match="initial"):
        AdaptiveLimiter(2.5)  # type: ignore[arg-type]
