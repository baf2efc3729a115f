"""Beside the watchdog: Ctrl-C, debuggers, coverage tools, and other clocks."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import pytest
import trio

from stagetrio.watchdog import Watchdog, open_watchdog

passes = 0


@pytest.fixture
async def counting() -> AsyncIterator[None]:
    """A task that counts passes."""

    async def count() -> None:
        global passes
        while True:
            passes += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture
async def watchdog(counting: None) -> AsyncIterator[Watchdog]:
    """A watchdog with a short quantum, beside a task that counts passes."""
    async with open_watchdog(quantum=0.001) as watchdog:
        yield watchdog


def be_stopped(times: int = 1) -> None:
    """Hold the loop until others have had their pass."""
    start = passes
    while passes < start + times:
        pass


def test_ctrl_c_reaches_a_handler_that_never_awaits() -> None:
    """KeyboardInterrupt is raised in the handler's own code, at once, as it would be without a stack of its own."""
    caught: list[str] = []

    async def handler() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            while True:
                pass
        except KeyboardInterrupt:
            caught.append("in the handler")
            raise

    async def main() -> None:
        async with open_watchdog(quantum=1) as watchdog:
            await watchdog.run(handler)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert caught == ["in the handler"]


def test_ctrl_c_in_a_protected_task_waits_for_a_checkpoint() -> None:
    """System tasks are protected, and a stack does not change that: the main task gets it."""
    ended: list[str] = []

    async def handler() -> None:
        signal.raise_signal(signal.SIGINT)
        ended.append("not interrupted")

    async def main() -> None:
        async with open_watchdog() as watchdog:
            trio.lowlevel.spawn_system_task(watchdog.run, handler)
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert ended == ["not interrupted"]


def test_ctrl_c_while_a_handler_waits_for_its_turn() -> None:
    """The main task, suspended in mid-work, gets it at its forced checkpoint."""
    caught: list[str] = []

    async def interrupt() -> None:
        await trio.lowlevel.checkpoint()
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    async def handler() -> None:
        try:
            while True:
                for _ in range(100):
                    pass
        except KeyboardInterrupt:
            caught.append("in the handler")
            raise

    async def main() -> None:
        async with open_watchdog(quantum=0.001) as watchdog, trio.open_nursery() as nursery:
            nursery.start_soon(interrupt)
            await watchdog.run(handler)

    with pytest.raises(BaseException) as raised:
        trio.run(main)
    assert isinstance(raised.value, KeyboardInterrupt) or raised.group_contains(KeyboardInterrupt)


async def test_a_debugger_sees_the_lines_of_a_handler_and_of_the_others(watchdog: Watchdog) -> None:
    """``sys.settrace`` (pdb, coverage before 3.12) goes on before, during and after a forced checkpoint."""
    lines: dict[str, set[int]] = {}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_globals is not globals():
            return None
        if event == "line":
            lines.setdefault(frame.f_code.co_name, set()).add(frame.f_lineno - frame.f_code.co_firstlineno)
        return trace

    def marked() -> int:
        return passes

    async def other() -> None:
        await trio.lowlevel.checkpoint()
        marked()

    async def handler() -> int:
        before = passes
        be_stopped()
        after = passes
        return after - before

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert await watchdog.run(handler) > 0
    finally:
        sys.settrace(old)
    assert lines["handler"] == {1, 2, 3, 4}
    assert lines["marked"] == {1}
    assert watchdog.statistics().forced > 0


async def spin(times: int) -> None:
    """Be stopped a number of times."""
    be_stopped(times)


async def test_a_watchdog_on_a_mock_clock_still_measures_real_time(
    autojump_clock: trio.testing.MockClock, watchdog: Watchdog
) -> None:
    """Virtual time does not pass while a handler holds the loop; its turns do."""
    start = trio.current_time()
    await watchdog.run(spin, 3)
    assert trio.current_time() == start
    assert watchdog.statistics().forced > 0
