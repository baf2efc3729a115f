"""What interrupts a handler, where the best means are taken or missing; and what is left behind of it: nothing."""

from __future__ import annotations

import functools
import math
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from stagetrio.watchdog import BudgetExceeded, StepClock, Watchdog, open_watchdog

monitoring: Any = getattr(sys, "monitoring", None)
EVENTS = monitoring is not None


async def hold_for_ever() -> None:
    """Never await, never end."""
    while True:
        for _ in range(100):
            pass


async def stop_and_cancel(watchdog: Watchdog) -> None:
    """Show that others run while a handler holds the loop, and that it is cancelled past its budget."""
    seen: list[str] = []

    async def other() -> None:
        await trio.lowlevel.checkpoint()
        seen.append("other")

    async def handler() -> None:
        while not seen:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await watchdog.run(handler)
    with pytest.raises(BudgetExceeded):
        await watchdog.run(hold_for_ever, budget=0.01)


def tools() -> list[str | None]:
    """The users of sys.monitoring, by tool id."""
    return [monitoring.get_tool(tool) for tool in range(6)] if EVENTS else []


async def test_the_timer_is_used_where_it_is_free() -> None:
    """In the main thread, with nobody else on SIGALRM; its signal handler and the timer are given back."""
    before = tools()
    async with open_watchdog(quantum=0.002) as watchdog:
        assert watchdog.statistics().mechanism == "timer"
        await stop_and_cancel(watchdog)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert tools() == before


async def test_a_ring_that_comes_too_early_is_not_the_last() -> None:
    """A signal just before a handler begins to wait does not end the waiting; the timer rings again."""
    lock = threading.Lock()
    lock.acquire()
    got: list[bool] = []

    async def other() -> None:
        await trio.lowlevel.checkpoint()
        lock.release()

    async def handler() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        signal.sigwait({signal.SIGALRM})  # as if it had come, and been looked at, before what follows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        got.append(lock.acquire(timeout=30))

    async with open_watchdog(quantum=0.002) as watchdog, trio.open_nursery() as nursery:
        assert watchdog.statistics().mechanism == "timer"
        nursery.start_soon(other)
        await watchdog.run(handler)
    assert got == [True]


async def test_an_idle_timer_does_not_ring() -> None:
    """When the handler that it was armed for has ended, it is not heard of again."""
    async with open_watchdog(quantum=0.001) as watchdog:
        await watchdog.run(trio.lowlevel.checkpoint)
        for _ in range(1000):
            await trio.sleep(0.002)
            if signal.getitimer(signal.ITIMER_REAL) == (0, 0):
                return
    raise AssertionError("it rings and rings")


async def test_whoever_owns_sigalrm_keeps_it() -> None:
    """pytest-timeout sets a handler and the timer; both are as before, and a thread with SIGURG stops handlers."""
    rung: list[int] = []

    def timed_out(signum: int, frame: object) -> None:
        rung.append(signum)

    signal.signal(signal.SIGALRM, timed_out)
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        async with open_watchdog(quantum=0.002) as watchdog:
            assert watchdog.statistics().mechanism == "thread"
            await stop_and_cancel(watchdog)
            assert signal.getsignal(signal.SIGALRM) is timed_out
            assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert not rung


async def test_the_signal_can_be_chosen() -> None:
    """Another signal than SIGALRM comes from a thread; SIGALRM stays free for others."""
    async with open_watchdog(quantum=0.002, signum=signal.SIGUSR2) as watchdog:
        assert watchdog.statistics().mechanism == "thread"
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        await stop_and_cancel(watchdog)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


async def test_a_chosen_signal_that_has_a_handler_is_refused() -> None:
    """It is named; the handler stays."""
    with pytest.raises(ValueError, match="SIGINT"):
        async with open_watchdog(signum=signal.SIGINT):
            raise AssertionError
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_DFL


async def test_a_second_watchdog_is_refused() -> None:
    """There is one loop to keep, and one timer to keep it with."""
    async with open_watchdog():
        with pytest.raises(RuntimeError, match="open already"):
            async with open_watchdog():
                raise AssertionError


async def in_a_loop_without_signals(mechanism: str) -> None:
    """The same, where no signal is to be had."""
    async with open_watchdog(quantum=0.002) as watchdog:
        assert watchdog.statistics().mechanism == mechanism
        if mechanism != "none":
            await stop_and_cancel(watchdog)


def run_in_thread(function: Callable[[], Any]) -> None:
    """Run ``trio.run(function)`` in a thread of its own, and raise here what it raises."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            trio.run(function)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def test_outside_of_the_main_thread_events_interrupt() -> None:
    """Signals are for the main thread; from 3.12 on sys.monitoring does it anywhere, before that nothing does."""
    before = tools()
    run_in_thread(functools.partial(in_a_loop_without_signals, "monitoring" if EVENTS else "none"))
    assert tools() == before


async def test_where_nothing_interrupts_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """In the log, when the watchdog is opened; and nothing of the kind where something does."""
    async with open_watchdog():
        pass
    assert not caplog.records
    taken = [3, 4] if EVENTS else []
    for tool in taken:
        monitoring.use_tool_id(tool, "somebody else")
    try:
        async with open_watchdog(signum=0) as watchdog:
            for _ in range(3):
                await watchdog.run(trio.lowlevel.checkpoint)
    finally:
        for tool in taken:
            monitoring.free_tool_id(tool)
    assert [record.name for record in caplog.records] == ["stagetrio.watchdog"]
    assert "nothing can force a checkpoint here" in caplog.text


async def test_without_a_signal_events_interrupt() -> None:
    """``signum=0`` is how a program asks for no signal; it is what Windows has."""
    async with open_watchdog(quantum=0.002, signum=0) as watchdog:
        assert watchdog.statistics().mechanism == ("monitoring" if EVENTS else "none")
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        if EVENTS:
            await stop_and_cancel(watchdog)


async def test_where_nothing_interrupts_a_budget_holds_at_the_next_checkpoint() -> None:
    """Handlers run as they are, and one past its budget is cancelled at its next own checkpoint."""
    taken = [3, 4] if EVENTS else []
    for tool in taken:
        monitoring.use_tool_id(tool, "somebody else")
    try:
        async with open_watchdog(quantum=0.001, signum=0) as watchdog:
            assert watchdog.statistics().mechanism == "none"
            ended: list[str] = []

            async def handler() -> None:
                ended.append("held")
                await trio.lowlevel.checkpoint()
                ended.append("not cancelled")

            with pytest.raises(BudgetExceeded):
                await watchdog.run(handler, budget=1e-9)
            assert ended == ["held"]
            assert watchdog.statistics().forced == 0
    finally:
        for tool in taken:
            monitoring.free_tool_id(tool)


if EVENTS:

    async def test_the_events_of_others_go_on_while_a_handler_is_suspended() -> None:
        """A tool that watches functions start sees those that run while a handler, stopped by events, waits."""
        started: list[str] = []

        def start(code: Any, offset: int) -> None:
            started.append(code.co_name)

        monitoring.use_tool_id(monitoring.COVERAGE_ID, "a test")
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.PY_START, start)
        monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.PY_START)
        seen: list[str] = []

        def marked() -> None:
            seen.append("seen")

        async def other() -> None:
            await trio.lowlevel.checkpoint()
            marked()

        async def handler() -> None:
            while not seen:
                pass

        try:
            async with open_watchdog(quantum=0.002, signum=0) as watchdog, trio.open_nursery() as nursery:
                nursery.start_soon(other)
                await watchdog.run(handler)
        finally:
            monitoring.set_events(monitoring.COVERAGE_ID, 0)
            monitoring.free_tool_id(monitoring.COVERAGE_ID)
        assert "marked" in started

    async def test_a_step_clock_stops_a_handler_at_every_step() -> None:
        """With a quantum of one step another task runs between any two of them."""
        turns: list[str] = []

        async def handler() -> None:
            for _ in range(5):
                turns.append("handler")  # noqa: PERF401 – one step each

        async def other() -> None:
            for _ in range(60):
                turns.append("other")
                await trio.lowlevel.checkpoint()

        async with open_watchdog(quantum=1e-6, clock=StepClock(1e-6)) as watchdog:
            assert watchdog.statistics().mechanism == "steps"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                await watchdog.run(handler)
        assert turns.count("handler") == 5
        assert "handler handler" not in " ".join(turns)

    def test_a_step_clock_makes_preemption_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
        """The same handlers are stopped at the same places, as often, and end in the same order, every time."""

        async def once() -> tuple[list[int], int]:
            order: list[int] = []

            async def handler(number: int) -> None:
                for step in range(20):
                    order.append(number * 100 + step)  # noqa: PERF401 – one step each

            async with open_watchdog(quantum=7e-6, clock=StepClock(1e-6)) as watchdog:
                async with trio.open_nursery() as nursery:
                    for number in range(3):
                        watchdog.start_soon(nursery, handler, number)
                return order, watchdog.statistics().forced

        def seeded() -> tuple[list[int], int]:
            trio._core._run._r.seed(7)
            return trio.run(once)

        monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        first = seeded()
        assert first[1] > 5
        assert [seeded() for _ in range(3)] == [first] * 3

    @pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
    def test_a_step_that_is_no_time_is_refused(seconds: float) -> None:
        """The argument is named."""
        with pytest.raises(ValueError, match="seconds"):
            StepClock(seconds)

else:

    def test_a_step_clock_needs_events() -> None:
        """It says what it needs."""
        with pytest.raises(RuntimeError, match=r"3\.12"):
            StepClock(1e-6)
