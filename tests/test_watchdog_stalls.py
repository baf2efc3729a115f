"""Stall reports: who is named, how often, and what goes wrong when a callback does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from stagetrio.watchdog import Stall, StallCause, Watchdog, open_watchdog


class Reports:
    """Collects stalls, and lets a test hold the loop until there are as many as it waits for."""

    def __init__(self) -> None:
        self.stalls: list[Stall] = []

    def __call__(self, stall: Stall) -> None:
        self.stalls.append(stall)


@pytest.fixture
def reports() -> Reports:
    """What the watchdog has reported."""
    return Reports()


@pytest.fixture
async def watchdog(reports: Reports) -> AsyncIterator[Watchdog]:
    """A watchdog that reports to ``reports``."""
    async with open_watchdog(quantum=0.005, on_stall=reports) as watchdog:
        yield watchdog


def hold(done: Callable[[], object]) -> None:
    """Hold the loop, without burning the processor, until the monitor has done something."""
    while not done():
        time.sleep(0.001)


async def test_a_stall_names_task_handler_flow_line_and_stack(watchdog: Watchdog, reports: Reports) -> None:
    """Of a handler under ``watch``: enough to know what to mend."""

    async def handler() -> None:
        hold(lambda: any(stall.flow == "the flow" for stall in reports.stalls))

    async with trio.open_nursery() as nursery:

        async def child() -> None:
            await watchdog.watch(handler, flow="the flow")

        nursery.start_soon(child, name="the task")
    (stall,) = (stall for stall in reports.stalls if stall.flow == "the flow")
    assert stall.task == "the task"
    assert stall.handler.endswith("handler")
    assert stall.seconds >= 0.005
    assert any("hold" in frame and __file__ in frame for frame in stall.stack)
    assert stall.line > 0
    assert "the task" in str(stall)
    assert "'the flow'" in str(stall)


async def test_a_stall_outside_of_the_watchdog_names_the_task(watchdog: Watchdog, reports: Reports) -> None:
    """Any step of the loop is watched; the handler then is the task's function."""

    async def careless() -> None:
        hold(lambda: any("careless" in stall.handler for stall in reports.stalls))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(careless, name="a task of mine")
    (stall,) = (stall for stall in reports.stalls if "careless" in stall.handler)
    assert stall.task == "a task of mine"
    assert stall.flow is None


async def test_a_cause_is_reported_once_and_counted_ever_after(
    watchdog: Watchdog, reports: Reports, caplog: pytest.LogCaptureFixture
) -> None:
    """One handler that stalls three times, for many looks each: one call, one line in the log, a count of three."""

    def cause() -> StallCause | None:
        causes = watchdog.statistics().causes
        return next((cause for cause in causes if "again_and_again" in cause.first.handler), None)

    async def again_and_again(number: int) -> None:
        hold(lambda: (found := cause()) is not None and found.count == number)

    for number in (1, 2, 3):
        await watchdog.watch(again_and_again, number)
        await trio.lowlevel.checkpoint()
    found = cause()
    assert found is not None
    assert found.count == 3
    assert found.worst_seconds >= found.first.seconds
    assert len([stall for stall in reports.stalls if "again_and_again" in stall.handler]) == 1
    assert len([record for record in caplog.records if "again_and_again" in record.message]) == 1
    assert watchdog.statistics().stalls >= 3
    assert watchdog.statistics().worst_stall_seconds >= found.worst_seconds


async def test_two_causes_are_two(watchdog: Watchdog, reports: Reports) -> None:
    """Different functions that hold the loop in one and the same task are told apart."""

    def first() -> None:
        while not any("first" in stall.stack[0] for stall in reports.stalls):
            pass

    def second() -> None:
        while not any("second" in stall.stack[0] for stall in reports.stalls):
            pass

    first()
    await trio.lowlevel.checkpoint()
    second()


async def test_waiting_is_no_stall(watchdog: Watchdog, reports: Reports) -> None:
    """A loop that waits for I/O is not held, and neither is one that takes many short steps."""
    looked = threading.Event()
    for _ in range(3):
        await trio.to_thread.run_sync(looked.wait, 0.02)
    with trio.move_on_after(0.03):
        while True:
            await trio.lowlevel.checkpoint()
    assert [stall for stall in reports.stalls if "test_waiting_is_no_stall" in stall.handler] == []


async def test_a_handler_that_is_stopped_in_time_is_no_stall(watchdog: Watchdog, reports: Reports) -> None:
    """Forced checkpoints are not reported: the loop was not held for longer than it may be."""
    passes = 0

    async def other() -> None:
        nonlocal passes
        while passes < 10:
            passes += 1
            await trio.lowlevel.checkpoint()

    async def hog() -> None:
        while passes < 10:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await watchdog.run(hog)
    assert watchdog.statistics().forced >= 1
    assert [stall for stall in reports.stalls if "hog" in stall.handler and stall.seconds < 0.01] == []


async def test_watch_is_transparent(watchdog: Watchdog) -> None:
    """Values and exceptions pass; nested watches give the inner name and then the outer one back."""

    async def inner(value: int) -> int:
        if value < 0:
            raise ValueError(value)
        return value

    async def outer() -> int:
        with pytest.raises(ValueError, match="-1"):
            await watchdog.watch(inner, -1, flow="inner")
        return await watchdog.watch(inner, 5, flow="inner")

    assert await watchdog.watch(outer, flow="outer") == 5


async def test_what_on_stall_raises_ends_the_block() -> None:
    """It is the owner's code: its failure cancels what the watchdog guards and comes out of ``async with``."""

    def fail(stall: Stall) -> None:
        raise LookupError("in on_stall")

    async def guarded() -> None:
        async with open_watchdog(quantum=0.002, on_stall=fail):
            before = threading.active_count()
            hold(lambda: threading.active_count() < before)
            await trio.sleep_forever()

    with pytest.raises(LookupError, match="in on_stall"):
        await guarded()


async def test_the_monitor_ends_with_the_block() -> None:
    """No thread is left behind."""
    before = threading.active_count()
    async with open_watchdog(quantum=0.002):
        assert threading.active_count() > before
    assert threading.active_count() == before


async def test_a_histogram_of_steps_is_to_be_had() -> None:
    """When bounds are given; each step of each task is in one class."""
    async with open_watchdog(step_bounds=(1e-9, 100.0)) as watchdog:
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        none, all_of_them, more = watchdog.statistics().step_times
    assert none == (1e-9, 0)
    assert all_of_them[0] == 100.0
    assert all_of_them[1] >= 10
    assert more == (math.inf, 0)


async def test_without_bounds_there_is_no_histogram(watchdog: Watchdog) -> None:
    """And no hook per step."""
    assert watchdog.statistics().step_times == ()


@pytest.mark.parametrize("bounds", [(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, math.inf), (math.nan,)])
async def test_bounds_that_do_not_rise_are_refused(bounds: tuple[float, ...]) -> None:
    """The argument is named."""
    with pytest.raises(ValueError, match="step_bounds"):
        async with open_watchdog(step_bounds=bounds):
            raise AssertionError
