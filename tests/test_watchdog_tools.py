"""Beside the watchdog: Ctrl-C, debuggers, profilers, coverage tools, pytest-timeout, and other clocks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
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


PROGRAM = """\
import trio
from stagetrio.watchdog import open_watchdog
passes = 0
async def count():
    global passes
    while True:
        await trio.lowlevel.checkpoint()
        passes += 1
def be_stopped(times):
    start = passes
    while passes < start + times:
        pass
    return times
async def handler():
    first = be_stopped(3)
    second = first + be_stopped(3)  # line 16
    if second == 0:
        print("not reached")  # line 18
    await trio.lowlevel.checkpoint()
    return second + be_stopped(2)  # line 20
async def main():
    async with open_watchdog(quantum=0.001) as watchdog, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        async with trio.open_nursery() as handlers:
            for _ in range(2):
                watchdog.start_soon(handlers, handler)
        nursery.cancel_scope.cancel()
    print("forced", watchdog.statistics().forced > 2)
trio.run(main)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program in which two handlers are stopped all the time."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def python(*arguments: object, directory: Path, typed: str = "", **environment: str) -> str:
    """Run Python in a process of its own; return its output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=directory,
        env={**os.environ, **environment},
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("core", ["ctrace", "sysmon"] if sys.version_info >= (3, 12) else ["ctrace"])
def test_coverage_sees_every_line(program: Path, core: str) -> None:
    """Of handlers that are stopped under coverage's tracers nothing is missing, and nothing is made up."""
    how = ["--concurrency=greenlet"] if core == "ctrace" else []
    ran = python("-m", "coverage", "run", *how, program.name, directory=program.parent, COVERAGE_CORE=core)
    assert "forced True" in ran
    report = python("-m", "coverage", "report", "-m", "--include=program.py", directory=program.parent)
    assert report.splitlines()[2].split()[-1] == "18", report


def test_a_debugger_breaks_into_a_handler(program: Path) -> None:
    """pdb breaks into handlers that are stopped all the time, shows their values, and lets them go on."""
    commands = ["tbreak 16", "tbreak 17", "c", "p 'first', first", "c", "p 'second', second", "c", "quit"]
    typed = "\n".join(commands) + "\n"
    told = python("-m", "pdb", program.name, directory=program.parent, typed=typed)
    assert "('first', 3)" in told
    assert "('second', 6)" in told
    assert "forced True" in told


def test_a_profiler_counts_a_handlers_calls(program: Path) -> None:
    """cProfile lives through forced checkpoints and counts the calls made around them."""
    told = python("-m", "cProfile", program.name, directory=program.parent)
    assert "forced True" in told
    (calls,) = [line.split()[0] for line in told.splitlines() if line.endswith("(be_stopped)")]
    assert calls.split("/")[0] == "6"  # of which some began before the one before had ended


def test_pytest_timeout_still_times_out(tmp_path: Path) -> None:
    """It owns SIGALRM: the watchdog stops handlers by other means, and a test that hangs ends by its timeout."""
    (tmp_path / "test_it.py").write_text(
        PROGRAM.replace("trio.run(main)", "")
        + """
def test_ends():
    trio.run(main)

def test_hangs():
    async def hang():
        async with open_watchdog() as watchdog:
            assert watchdog.statistics().mechanism == "thread"
            await trio.sleep_forever()
    trio.run(hang)
"""
    )
    options = ["-p", "no:cacheprovider", "-o", "timeout=2", "-o", "timeout_method=signal"]
    told = python("-m", "pytest", "-c", os.devnull, *options, "test_it.py", directory=tmp_path)
    assert "Timeout" in told
    assert "1 failed, 1 passed" in told


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
