"""Scenario 16, the preemption ladder, inside of one loop: what stops a handler that does not await, and what cannot.

Python code and ``time.sleep`` are cancelled past their budget; C code that holds the GIL is not, but is reported, and
cancelled when it has returned. Siblings go on beside whatever can be stopped. How soon, ``benchmarks/`` measures. The
control is plain Trio, where a deadline does not reach a handler that does not await.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable

import pytest
import trio

from stagetrio.watchdog import BudgetExceeded, Stall, open_watchdog

Handler = Callable[[], Awaitable[object]]

ended: list[str] = []


async def python_loop() -> None:
    """Spin in Python."""
    try:
        number = 0
        while True:
            number = number + 1 if number < 1000 else 0
    finally:
        ended.append("finally")


async def blocking_sleep() -> None:
    """Sleep without the loop."""
    try:
        while True:
            time.sleep(0.02)  # noqa: ASYNC251 – that is the point
    finally:
        ended.append("finally")


async def slow_pattern() -> None:
    """Match a pattern that backtracks for minutes; ``re`` asks for signals."""
    pattern = re.compile("(a+)+b")
    try:
        pattern.match("a" * 40)
    finally:
        ended.append("finally")


async def gil_holder() -> None:
    """Sum ranges in C, which asks for nothing, so that the loop is had only between two of them."""
    try:
        while True:
            sum(range(300_000))
    finally:
        ended.append("finally")


async def sibling(until: Callable[[], object]) -> int:
    """Count the passes of the loop."""
    passes = 0
    while not until():
        passes += 1
        await trio.lowlevel.checkpoint()
    return passes


@pytest.mark.parametrize(
    ("handler", "budget"), [(python_loop, 0.05), (blocking_sleep, 0.2), (slow_pattern, 0.05), (gil_holder, 0.4)]
)
async def test_a_handler_past_its_budget_is_cancelled_on_every_rung(handler: Handler, budget: float) -> None:
    """Its ``finally`` runs, the caller gets `BudgetExceeded`, and a sibling has had many passes meanwhile."""
    ended.clear()
    passes: list[int] = []

    async def count() -> None:
        passes.append(await sibling(lambda: ended))

    async with open_watchdog() as watchdog, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        with pytest.raises(BudgetExceeded, match=handler.__name__):
            await watchdog.run(handler, budget=budget)
    assert ended == ["finally"]
    assert passes[0] >= 2


async def test_the_report_names_the_line() -> None:
    """Of C code that holds the loop: the task, the handler, its flow, and the line that called it."""
    stalls: list[Stall] = []

    async def holder() -> None:
        for _ in range(1000):
            if any(stall.flow == "the flow" for stall in stalls):
                return
            sum(range(2_000_000))

    async with open_watchdog(on_stall=stalls.append) as watchdog:
        await watchdog.watch(holder, flow="the flow")
    stall = next(stall for stall in stalls if stall.flow == "the flow")
    assert stall.file == __file__
    assert stall.handler.endswith("holder")


async def test_sixteen_hogs_do_not_starve_a_sibling() -> None:
    """Each of them holds the loop until the sibling has had its passes, and they all end."""
    had = 0
    finished = 0

    async def hog() -> None:
        nonlocal finished
        while had < 20:
            pass
        finished += 1

    async def others() -> None:
        nonlocal had
        while had < 20:
            had += 1
            await trio.lowlevel.checkpoint()

    async with open_watchdog() as watchdog, trio.open_nursery() as nursery:
        nursery.start_soon(others)
        for _ in range(16):
            watchdog.start_soon(nursery, hog)
    assert finished == 16


async def test_the_control_holds_the_loop_past_its_deadline() -> None:
    """Plain Trio: the deadline has long passed, nobody else has run, and the handler goes on to its end."""
    order: list[str] = []

    async def other() -> None:
        order.append("other")

    async def hog() -> None:
        deadline = trio.current_effective_deadline()
        while trio.current_time() < deadline + 0.02:
            pass
        order.append("hog")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with trio.move_on_after(0.01) as scope:
            await hog()
    assert order == ["hog", "other"]
    assert not scope.cancelled_caught
