"""Forced checkpoints, budgets, lanes: what a handler under the watchdog may do, and what the others see of it.

The handlers here really hold the loop. What is asserted is what happened, never how long it took: a test that needs a
handler to be stopped holds the loop until something has happened that only another task can do.
"""

from __future__ import annotations

import contextvars
import math
import signal
import types
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import pytest
import trio

from stagetrio.watchdog import BudgetExceeded, Watchdog, no_preempt, open_watchdog


@pytest.fixture
async def watchdog() -> AsyncIterator[Watchdog]:
    """A watchdog with a short quantum."""
    async with open_watchdog(quantum=0.002) as watchdog:
        yield watchdog


async def hold_until(done: Callable[[], object]) -> str:
    """Hold the loop, without one await, until ``done``."""
    while not done():
        pass
    return "done"


async def hold_for_ever() -> None:
    """Never await, never end."""
    while True:
        for _ in range(100):
            pass


async def test_others_run_while_a_handler_does_not_await(watchdog: Watchdog) -> None:
    """A handler that waits, without awaiting, for another task would deadlock the loop; under the watchdog it ends."""
    seen: list[str] = []

    async def other() -> None:
        await trio.lowlevel.checkpoint()
        seen.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert await watchdog.run(hold_until, lambda: seen) == "done"
    assert watchdog.statistics().forced >= 1


async def test_a_handler_returns_and_raises_as_if_awaited(watchdog: Watchdog) -> None:
    """Values come out, exceptions come out with the handler's line in their traceback, and the next run is clean."""

    async def fail(number: int) -> int:
        if number == 2:
            raise KeyError("two")
        return number

    assert await watchdog.run(fail, 1) == 1
    with pytest.raises(KeyError, match="two") as caught:
        await watchdog.run(fail, 2)
    assert "fail" in [entry.name for entry in caught.traceback]
    assert await watchdog.run(fail, 3) == 3


async def test_awaits_inside_a_handler_reach_trio(watchdog: Watchdog, autojump_clock: trio.testing.MockClock) -> None:
    """Sleeps, events, nurseries and deadlines inside of a handler work as anywhere."""

    async def handler() -> float:
        event = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 10)
            event.set()
            await event.wait()
        with trio.move_on_after(5) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        return trio.current_time()

    start = trio.current_time()
    assert await watchdog.run(handler) == pytest.approx(start + 15)


async def test_even_an_endless_loop_obeys_its_deadline(watchdog: Watchdog) -> None:
    """`trio.Cancelled` is delivered at the forced checkpoint, inside of the handler, whose ``finally`` runs."""
    ended = []

    async def handler() -> None:
        try:
            await hold_for_ever()
        except trio.Cancelled:
            ended.append("cancelled")
            raise
        finally:
            ended.append("finally")

    with trio.move_on_after(0.02) as scope:
        await watchdog.run(handler)
    assert scope.cancelled_caught
    assert ended == ["cancelled", "finally"]


async def test_a_handler_past_its_budget_is_cancelled(watchdog: Watchdog) -> None:
    """Its ``finally`` runs, the caller gets `BudgetExceeded`, and it is counted."""
    ended = []

    async def handler() -> None:
        try:
            await hold_for_ever()
        finally:
            ended.append("finally")

    with pytest.raises(BudgetExceeded, match=r"handler.*0\.01 s") as caught:
        await watchdog.run(handler, budget=0.01)
    assert caught.value.budget == 0.01
    assert ended == ["finally"]
    assert watchdog.statistics().budgets_exceeded == 1


async def test_a_budget_is_not_touched_by_waiting(watchdog: Watchdog, autojump_clock: trio.testing.MockClock) -> None:
    """Only time for which the loop was held counts: an hour of sleep is free."""

    async def handler() -> str:
        await trio.sleep(3600)
        return "slept"

    assert await watchdog.run(handler, budget=0.5) == "slept"


@pytest.mark.parametrize("budget", [0, -1, math.nan])
async def test_a_budget_out_of_range_is_refused(watchdog: Watchdog, budget: float) -> None:
    """The argument is named, with its value, and the handler is not started."""
    with pytest.raises(ValueError, match="budget"):
        await watchdog.run(hold_for_ever, budget=budget)


@pytest.mark.parametrize("quantum", [0, -1, math.inf, math.nan])
async def test_a_quantum_out_of_range_is_refused(quantum: float) -> None:
    """There is no such watchdog, and nothing is left behind of it."""
    with pytest.raises(ValueError, match="quantum"):
        async with open_watchdog(quantum=quantum):
            raise AssertionError
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


@pytest.mark.parametrize("preemptible", ["json", (3,)])
async def test_what_is_not_a_module_is_refused(preemptible: Any) -> None:
    """A bare string, which is a tuple of one-letter names to Python, and anything that names no module."""
    with pytest.raises(TypeError, match="preemptible"):
        async with open_watchdog(preemptible=preemptible):
            raise AssertionError


async def test_many_endless_handlers_all_get_their_turn(watchdog: Watchdog) -> None:
    """Each of eight that never await goes on until all the others have come as far: none is starved."""
    progress = [0] * 8

    async def handler(number: int) -> None:
        while min(progress) < 5:
            own = progress[number]
            while progress[number] == own and min(progress) < 5:
                progress[number] += watchdog.statistics().forced % 2

    async with trio.open_nursery() as nursery:
        for number in range(8):
            watchdog.start_soon(nursery, handler, number)
    assert min(progress) == 5


async def test_context_variables_are_shared_with_the_caller(watchdog: Watchdog) -> None:
    """A handler sees the task's context, what it sets is seen afterwards, and other tasks' values stay theirs."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")
    seen: list[str] = []

    async def other() -> None:
        variable.set("other")
        await trio.lowlevel.checkpoint()
        seen.append(variable.get())

    async def handler() -> str:
        before = variable.get()
        variable.set("handler")
        await hold_until(lambda: seen)
        return before + " " + variable.get()

    variable.set("caller")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert await watchdog.run(handler) == "caller handler"
    assert variable.get() == "handler"
    assert seen == ["other"]


async def test_no_preempt_holds_off_forced_checkpoints(watchdog: Watchdog) -> None:
    """Two values that must change together are never seen apart, although the handler is stopped all the time."""
    pair = [0, 0]
    torn = []
    ended: list[str] = []

    async def watcher() -> None:
        while not ended:
            torn.append(pair[0] != pair[1])
            await trio.lowlevel.checkpoint()

    async def handler() -> None:
        forced = watchdog.statistics().forced
        while watchdog.statistics().forced < forced + 20:
            with no_preempt():
                pair[0] += 1
                for _ in range(1000):
                    pass
                pair[1] += 1
        ended.append("handler")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watcher)
        await watchdog.run(handler)
    assert not any(torn)
    assert pair[0] > 0


async def test_children_run_under_the_watchdog_when_they_are_started_by_it(watchdog: Watchdog) -> None:
    """`start_soon` covers the children of a nursery opened in a handler, and their errors end that nursery."""
    seen: list[str] = []

    async def child(name: str) -> None:
        seen.append(name)
        await hold_until(lambda: len(seen) == 2)

    async def handler() -> None:
        async with trio.open_nursery() as nursery:
            watchdog.start_soon(nursery, child, "one")
            watchdog.start_soon(nursery, child, "two")

    await watchdog.run(handler)
    assert sorted(seen) == ["one", "two"]


async def test_a_handler_may_run_another_one_under_the_watchdog(watchdog: Watchdog) -> None:
    """Nested runs are stopped and resumed like one."""
    seen: list[str] = []

    async def inner() -> str:
        return await hold_until(lambda: seen)

    async def outer() -> str:
        result = await watchdog.run(inner)
        seen.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await hold_until(lambda: seen)
        return result

    async def other() -> None:
        await trio.lowlevel.checkpoint()
        seen.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert await watchdog.run(outer) == "done"


async def test_a_worker_on_a_lane_is_stopped_only_inside_of_its_handlers(watchdog: Watchdog) -> None:
    """Between `begin` and `end`, in the handler's frames; what the worker does itself is never interrupted."""
    lane = watchdog.open_lane()
    seen: list[str] = []
    calls: list[str] = []
    lane.on_preempt = lambda: calls.append("preempted")

    async def other() -> None:
        await trio.lowlevel.checkpoint()
        seen.append("other")

    async def worker() -> list[float]:
        held = []
        for handler in (hold_until, hold_until, hold_until):
            lane.begin(handler)
            await handler(lambda: seen)
            held.append(lane.end())
        return held

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        held = await lane.run(worker)
    assert len(held) == 3
    assert held[0] > held[1] >= 0
    assert calls == ["preempted"]


async def test_a_lane_cancels_the_scope_of_a_handler_past_its_budget(watchdog: Watchdog) -> None:
    """The worker learns it from ``exceeded``, and goes on with the next handler in a fresh scope."""
    lane = watchdog.open_lane()
    outcomes: list[str] = []

    async def quick() -> None:
        await trio.lowlevel.checkpoint()

    async def worker() -> None:
        for handler, budget in ((quick, 0.01), (hold_for_ever, 0.01), (quick, 0.01)):
            with trio.CancelScope() as lane.scope:
                lane.begin(handler, "flow", budget)
                try:
                    await handler()
                finally:
                    lane.end()
            outcomes.append("exceeded" if lane.exceeded else "done")
            assert lane.scope.cancelled_caught == lane.exceeded

    await lane.run(worker)
    assert outcomes == ["done", "exceeded", "done"]


async def test_a_lane_has_one_worker_at_a_time(watchdog: Watchdog) -> None:
    """A second one is refused; when the first has ended, the next one may come."""
    lane = watchdog.open_lane()

    async def worker() -> str:
        with pytest.raises(RuntimeError, match="in use"):
            await lane.run(worker)
        return "worked"

    assert await lane.run(worker) == "worked"
    assert await lane.run(worker) == "worked"


async def test_closing_gives_the_signal_back() -> None:
    """The timer's signal has its former handler, and a signal still on its way does no harm."""
    async with open_watchdog(quantum=0.002) as watchdog:
        assert signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
        assert watchdog.statistics().mechanism == "timer"
        with pytest.raises(BudgetExceeded):
            await watchdog.run(hold_for_ever, budget=0.005)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("budget", [math.inf, 1.0])
async def test_what_is_no_async_function_is_refused(watchdog: Watchdog, budget: float) -> None:
    """By name, and the next handler runs as ever; what raises a `TypeError` of its own raises that."""

    async def add(one: int, two: int) -> int:
        return one + two

    @types.coroutine
    def old() -> Generator[Any, Any, int]:
        yield from trio.lowlevel.checkpoint().__await__()  # noqa: ASYNC105 - awaited in the old way
        raise TypeError("its own")

    called: Any = add(1, 2)
    not_async: Any = lambda: 7  # noqa: E731 - it has no name, and shall have none
    with pytest.raises(TypeError, match=r"fn must be an async function, not <coroutine object .*add at"):
        await watchdog.run(called, budget=budget)
    with pytest.raises(TypeError, match="fn must be an async function, not one that returns 7"):
        await watchdog.run(not_async, budget=budget)
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        await watchdog.run(add, budget=budget)
    with pytest.raises(TypeError, match="its own"):
        await watchdog.run(old, budget=budget)
    with pytest.raises((TypeError, ValueError), match=r"budget must be .* not 'a'"):
        await watchdog.run(add, 1, 2, budget="a")  # type: ignore[arg-type]
    assert await watchdog.run(add, 1, 2, budget=budget) == 3
    called.close()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"quantum": "a"}, TypeError, "quantum must be a number, not 'a'"),
        ({"quantum": math.inf}, ValueError, "quantum must be finite and above 0, not inf"),
        ({"cleanup": "a"}, TypeError, "cleanup must be a number, not 'a'"),
        ({"cleanup": -1}, ValueError, "cleanup must be >= 0, not -1"),
        ({"on_stall": 3}, TypeError, "on_stall must be callable or None, not 3"),
        ({"weight": 3}, TypeError, "weight must be callable or None, not 3"),
        ({"clock": 3}, TypeError, "clock must be a StepClock or None, not 3"),
        ({"step_bounds": 3}, TypeError, "step_bounds must be a tuple of seconds, not 3"),
        ({"step_bounds": "a"}, TypeError, "step_bounds must be a tuple of seconds, not 'a'"),
        ({"step_bounds": (2, 1)}, ValueError, r"step_bounds must be rising seconds above 0, not \(2, 1\)"),
    ],
)
async def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    """Each is refused with its name and value, and leaves nothing open."""
    with pytest.raises(error, match=says):
        async with open_watchdog(**arguments):
            raise AssertionError("unreachable")
    async with open_watchdog():
        pass
