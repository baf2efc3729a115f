"""Rates: what passes, when, in which order, and what a refusal says."""

from __future__ import annotations

import math

import pytest
import trio

from stagetrio.limiter import FlowRateLimiter, Overloaded, Rate, RateLimiter


def refusal(limiter: RateLimiter, cost: float = 1.0) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        limiter.acquire_nowait(cost)
    return caught.value


@pytest.mark.parametrize(
    ("count", "per", "name"),
    [(0, 1, "count"), (-1, 1, "count"), (1, 0, "per"), (1, math.inf, "per"), (5e-324, 1, "count")],
)
def test_rate_rejects_what_is_no_rate(count: float, per: float, name: str) -> None:
    """A rate that is not positive, or takes an infinite time, is refused by the name of the argument."""
    with pytest.raises(ValueError, match=name):
        Rate(count, per)


def test_rate_limiter_rejects_bad_arguments() -> None:
    """Wrong constructor arguments are refused by name."""
    with pytest.raises(ValueError, match="burst"):
        RateLimiter(Rate(1), burst=0)
    with pytest.raises(TypeError, match="rate"):
        RateLimiter(5, burst=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="burst"):
        RateLimiter(Rate(1), burst="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parent"):
        FlowRateLimiter(Rate(1), burst=1, max_flows=5, parent=Rate(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_waiting"):
        RateLimiter(Rate(1), burst=1, max_waiting=-1)
    with pytest.raises(ValueError, match="max_flows"):
        FlowRateLimiter(Rate(1), burst=1, max_flows=0)
    with pytest.raises(ValueError, match="burst"):
        FlowRateLimiter(Rate(1), burst=-1, max_flows=1)
    with pytest.raises(ValueError, match="burst must be smaller"):
        RateLimiter(Rate(1e-300), burst=1e10)


async def test_a_burst_passes_at_once_and_then_the_rate_governs(autojump_clock: trio.testing.MockClock) -> None:
    """After a pause `burst` units pass at once, one more is refused with the time to wait for it."""
    limiter = RateLimiter(Rate(10), burst=3)
    for _ in range(3):
        limiter.acquire_nowait()
    refused = refusal(limiter)
    assert refused.reason == "rate"
    assert refused.retry_after == pytest.approx(0.1)
    assert limiter.delay() == pytest.approx(0.1)
    await trio.sleep(refused.retry_after)
    limiter.acquire_nowait()
    refusal(limiter)
    assert limiter.statistics().passed == 4
    assert limiter.statistics().refused == 2


async def test_a_pause_saves_up_no_more_than_the_burst(autojump_clock: trio.testing.MockClock) -> None:
    """An hour of silence earns the burst, not an hour's worth."""
    limiter = RateLimiter(Rate(100), burst=2)
    await trio.sleep(3600)
    limiter.acquire_nowait(2)
    refusal(limiter, 1)


async def test_a_cost_that_can_never_pass_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    """A cost above the burst, or below zero, is a ValueError from every function."""
    limiter = RateLimiter(Rate(10), burst=3)
    for cost in (3.5, -1):
        with pytest.raises(ValueError, match="cost"):
            limiter.acquire_nowait(cost)
        with pytest.raises(ValueError, match="cost"):
            limiter.delay(cost)
        with pytest.raises(ValueError, match="cost"):
            await limiter.acquire(cost)
    assert limiter.delay(3) == 0


async def test_an_infinite_cost_is_an_error_also_without_a_burst(autojump_clock: trio.testing.MockClock) -> None:
    """Booked, it would be no time at all to reckon with, and no flow could be forgotten any more."""
    flows = FlowRateLimiter(Rate(math.inf), burst=math.inf, max_flows=1)
    for cost in (math.inf, math.nan):
        with pytest.raises(ValueError, match="cost"):
            flows.acquire_nowait("a", cost)
    flows.acquire_nowait("b")
    assert list(flows) == ["b"]


class Watched(float):
    """A cost that notes whether Ctrl-C is held off while it is booked."""

    held_off: list[bool]

    def __mul__(self, other: float) -> float:
        self.held_off.append(trio.lowlevel.currently_ki_protected())
        return float(self) * other


async def test_ctrl_c_does_not_come_between_two_limits_of_a_tree(autojump_clock: trio.testing.MockClock) -> None:
    """What is drawn from all or none is booked out of the reach of Ctrl-C, at once or after a wait in line."""
    limits = FlowRateLimiter(Rate(1), burst=1, max_flows=9, parent=RateLimiter(Rate(1), burst=1))
    cost = Watched(1.0)
    cost.held_off = []
    limits.acquire_nowait("a", cost)
    await limits.acquire("b", cost)
    await limits.acquire("c", cost)
    assert len(cost.held_off) >= 6
    assert all(cost.held_off)


async def test_an_infinite_rate_lets_everything_pass(autojump_clock: trio.testing.MockClock) -> None:
    """`math.inf` is how to say that there is no limit."""
    for limiter in (RateLimiter(Rate(math.inf), burst=5), RateLimiter(Rate(1), burst=math.inf)):
        for _ in range(1000):
            limiter.acquire_nowait(5)
        assert limiter.delay(5) == 0


async def test_waiters_pass_first_come_first_served_each_at_its_moment(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Waiters of mixed cost pass in their order, each exactly when its units are there."""
    limiter = RateLimiter(Rate(10), burst=5)
    limiter.acquire_nowait(5)
    passed: list[tuple[int, float]] = []

    async def take(number: int, cost: float) -> None:
        await limiter.acquire(cost)
        passed.append((number, trio.current_time()))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number, cost in enumerate([1, 5, 2, 1]):
            nursery.start_soon(take, number, cost)
            await trio.testing.wait_all_tasks_blocked()
    assert [number for number, _ in passed] == [0, 1, 2, 3]
    assert [moment - start for _, moment in passed] == pytest.approx([0.1, 0.6, 0.8, 0.9])


async def test_a_large_cost_is_not_starved_by_small_ones(autojump_clock: trio.testing.MockClock) -> None:
    """Against endless small requests a large one waits for its own refill and not for the others."""
    limiter = RateLimiter(Rate(100), burst=10)
    limiter.acquire_nowait(10)
    waited = math.nan

    async def hog() -> None:
        while True:
            await limiter.acquire(1)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(hog)
        await trio.sleep(1.003)
        start = trio.current_time()
        await limiter.acquire(10)
        waited = trio.current_time() - start
        nursery.cancel_scope.cancel()
    assert 0.1 <= waited <= 0.16  # ten units of its own and at most one of each hog before it


async def test_acquire_nowait_does_not_barge_past_the_line(autojump_clock: trio.testing.MockClock) -> None:
    """While somebody waits, a small request that would pass alone is refused, with the time behind the line."""
    limiter = RateLimiter(Rate(10), burst=10)
    limiter.acquire_nowait(5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limiter.acquire, 10)
        await trio.testing.wait_all_tasks_blocked()
        refused = refusal(limiter, 1)
        assert refused.retry_after == pytest.approx(0.6)
        await trio.sleep(refused.retry_after)
        limiter.acquire_nowait(1)


async def test_a_cancelled_waiter_has_drawn_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """When the head or one in the middle gives up, those behind move up as if it had never come."""
    for leaver in (0, 1):
        limiter = RateLimiter(Rate(10), burst=5)
        limiter.acquire_nowait(5)
        moments: dict[int, float] = {}
        scopes = [trio.CancelScope() for _ in range(3)]

        async def take(
            number: int, limiter: RateLimiter, scopes: list[trio.CancelScope], moments: dict[int, float]
        ) -> None:
            with scopes[number]:
                await limiter.acquire(2)
                moments[number] = trio.current_time()

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(take, number, limiter, scopes, moments)
                await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.05)
            scopes[leaver].cancel()
        assert leaver not in moments
        assert [moment - start for moment in moments.values()] == pytest.approx([0.2, 0.4])
        assert limiter.statistics().waiting == 0


async def test_a_full_line_refuses(autojump_clock: trio.testing.MockClock) -> None:
    """`max_waiting` bounds the line; one more is refused at once with the time it would have waited."""
    limiter = RateLimiter(Rate(1), burst=1, max_waiting=1)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limiter.acquire)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Overloaded) as caught:
            await limiter.acquire()
    assert caught.value.reason == "waiting"
    assert caught.value.retry_after == pytest.approx(2)


async def test_acquire_checkpoints_and_can_be_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """`acquire` is a checkpoint when it need not wait, and a cancelled call draws nothing."""
    limiter = RateLimiter(Rate(1), burst=1)
    with trio.testing.assert_checkpoints():
        await limiter.acquire(0.5)
    with trio.CancelScope() as scope:
        scope.cancel()
        await limiter.acquire(0.5)
    assert scope.cancelled_caught
    assert limiter.delay(0.5) == 0


async def test_a_tree_of_limits_is_taken_all_or_none(autojump_clock: trio.testing.MockClock) -> None:
    """A request that any limit above refuses draws from none of them."""
    everyone = RateLimiter(Rate(10), burst=3)
    tenants = FlowRateLimiter(Rate(10), burst=2, max_flows=10, parent=everyone)
    connection = RateLimiter(Rate(10), burst=3, parent=tenants.flow("acme"))
    connection.acquire_nowait(2)
    assert refusal(connection).reason == "rate"  # acme's burst is gone
    tenants.acquire_nowait("other")
    with pytest.raises(Overloaded):
        tenants.acquire_nowait("other")  # the global burst is gone
    assert connection.statistics().passed == 1
    assert everyone.statistics().passed == 2
    assert everyone.delay(3) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="cost"):
        connection.acquire_nowait(3)  # within its own burst, above its tenant's


async def test_waiters_of_a_tree_share_the_root_first_come_first_served(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A child that waits for its own limit holds nobody up; at the root the children's heads pass in order."""
    root = RateLimiter(Rate(10), burst=1)
    slow = RateLimiter(Rate(1), burst=1, parent=root)
    quick = RateLimiter(Rate(100), burst=1, parent=root)
    passed: list[tuple[str, float]] = []

    async def take(name: str, limiter: RateLimiter) -> None:
        await limiter.acquire()
        passed.append((name, round(trio.current_time() - start, 6)))

    start = trio.current_time()
    slow.acquire_nowait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, "slow", slow)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(12):
            nursery.start_soon(take, "quick", quick)
    assert [moment for name, moment in passed if name == "slow"] == pytest.approx([1.05], abs=0.06)
    assert [moment for _, moment in passed] == pytest.approx([0.1 * n for n in range(1, 14)])


async def test_a_cancelled_waiter_of_a_tree_has_drawn_from_none(autojump_clock: trio.testing.MockClock) -> None:
    """Giving up in the root's line leaves the leaf full."""
    root = RateLimiter(Rate(1), burst=1)
    leaf = RateLimiter(Rate(1), burst=5, parent=root)
    root.acquire_nowait()
    with trio.move_on_after(0.5):
        await leaf.acquire()
    assert leaf.statistics() == RateLimiter(Rate(1), burst=1).statistics()
    assert root.delay() == pytest.approx(0.5)


async def test_each_flow_has_a_limit_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    """What one flow draws is no other flow's loss."""
    limits = FlowRateLimiter(Rate(1), burst=2, max_flows=10)
    limits.acquire_nowait("a", 2)
    limits.acquire_nowait("b", 2)
    assert limits.delay("a") == pytest.approx(1)
    assert limits.delay("c", 2) == 0
    start = trio.current_time()
    await limits.acquire("a")
    assert trio.current_time() - start == pytest.approx(1)


async def test_only_refilled_flows_are_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """A full table turns strangers away until a flow has its whole burst again, and forgets no other."""
    limits = FlowRateLimiter(Rate(1), burst=4, max_flows=2)
    limits.acquire_nowait("early", 4)
    limits.acquire_nowait("late", 1)
    with pytest.raises(Overloaded) as caught:
        limits.acquire_nowait("stranger")
    assert caught.value.reason == "rate"
    assert caught.value.retry_after == pytest.approx(1)
    assert limits.delay("stranger") == pytest.approx(1)
    await trio.sleep(1)
    limits.acquire_nowait("stranger", 3)
    assert set(limits) == {"early", "stranger"}
    assert limits.delay("early") == 0
    assert limits.delay("early", 2) == pytest.approx(1)
    figures = limits.statistics()
    assert (figures.flows, figures.evicted, figures.turned_away) == (2, 1, 1)


async def test_a_flow_with_a_waiter_is_not_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """A flow that is refilled but whose waiter stands in a line above is kept."""
    root = RateLimiter(Rate(1), burst=1)
    limits = FlowRateLimiter(Rate(100), burst=1, max_flows=1, parent=root)
    root.acquire_nowait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limits.acquire, "a")
        await trio.sleep(0.5)
        with pytest.raises(Overloaded):
            limits.acquire_nowait("b")
    assert list(limits) == ["a"]
    await trio.sleep(1)
    limits.acquire_nowait("b")


async def test_a_stream_of_invented_flows_stays_within_the_bound(autojump_clock: trio.testing.MockClock) -> None:
    """A new identity for each request never grows the table and never passes more than its slots refill."""
    limits = FlowRateLimiter(Rate(1), burst=1, max_flows=100)
    passed = 0
    for number in range(20_000):
        try:
            limits.acquire_nowait(number)
            passed += 1
        except Overloaded:
            await trio.sleep(0.001)
    assert limits.statistics().flows == 100
    assert 100 * 19 <= passed <= 100 * 21


def test_overloaded_is_a_would_block_that_says_why() -> None:
    """A refusal can be caught as Trio's own and reads as a sentence."""
    assert issubclass(Overloaded, trio.WouldBlock)
    assert str(Overloaded("rate", 0.25)) == "overloaded (rate): retry after 0.25 s"
    assert str(Overloaded("queue")) == "overloaded (queue)"
