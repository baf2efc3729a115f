# ruff: noqa: ASYNC100 – a scope without an await in it is the point here
"""A handler that is stopped in mid-work is still the same program: what it sees, raises, cleans up and yields.

A task raises a counter at every pass; a handler that holds the loop until the counter has moved has been stopped and
resumed.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from stagetrio.watchdog import BudgetExceeded, Watchdog, no_preempt, open_watchdog

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


async def test_the_exception_being_handled_stays_the_same(watchdog: Watchdog) -> None:
    """Others raise and catch while the handler is suspended in its ``except``; a bare ``raise`` raises its own."""

    async def other() -> None:
        for _ in range(20):
            try:
                raise KeyError("other")
            except KeyError:
                await trio.lowlevel.checkpoint()

    async def handler() -> None:
        try:
            raise ValueError("mine")
        except ValueError as error:
            be_stopped()
            assert sys.exc_info()[1] is error
            raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with pytest.raises(ValueError, match="mine") as caught:
            await watchdog.run(handler)
    assert caught.value.__context__ is None


async def test_tracebacks_show_the_handler_and_who_ran_it(watchdog: Watchdog) -> None:
    """An exception raised after a forced checkpoint has the frames of the caller and of the handler."""

    def deeper() -> None:
        be_stopped()
        raise LookupError("deep")

    async def handler() -> None:
        deeper()

    with pytest.raises(LookupError) as caught:
        await watchdog.run(handler)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[0] == "test_tracebacks_show_the_handler_and_who_ran_it"
    assert names[-2:] == ["handler", "deeper"]


async def test_a_cancellation_shows_the_line_that_was_interrupted(watchdog: Watchdog) -> None:
    """Its traceback ends in the handler's function and the watchdog's, and holds nothing of the loop's."""

    async def handler() -> None:
        while True:
            be_stopped()

    lines: list[str] = []

    async def noted() -> None:
        try:
            await handler()
        except trio.Cancelled as error:
            lines.extend(frame.name for frame in traceback.extract_tb(error.__traceback__))
            raise

    with trio.move_on_after(0.01):
        await watchdog.run(noted)
    assert lines[:2] == ["noted", "handler"]
    assert "unrolled_run" not in lines


async def test_generators_are_suspended_and_go_on(watchdog: Watchdog) -> None:
    """Sync and async generators, comprehensions, ``yield from``: with a forced checkpoint at each of their steps."""

    def numbers(end: int) -> Iterator[int]:
        for number in range(end):
            be_stopped()
            yield number

    def chained() -> Iterator[int]:
        yield from numbers(3)
        be_stopped()

    async def slow_numbers(end: int) -> AsyncIterator[int]:
        for number in range(end):
            be_stopped()
            await trio.lowlevel.checkpoint()
            yield number

    async def handler() -> list[list[int]]:
        return [
            list(chained()),
            [number async for number in slow_numbers(3)],
            [number for number in numbers(2) for _ in numbers(2)],
        ]

    assert await watchdog.run(handler) == [[0, 1, 2], [0, 1, 2], [0, 0, 1, 1]]


async def test_an_async_generator_is_closed_where_it_was_left(watchdog: Watchdog) -> None:
    """``aclosing`` inside of a handler runs the generator's ``finally``."""
    ended: list[str] = []

    async def values() -> AsyncIterator[int]:
        try:
            for number in range(10):
                yield number
        finally:
            await trio.lowlevel.checkpoint()
            ended.append("closed")

    async def handler() -> None:
        async with contextlib.aclosing(values()) as numbers:  # type: ignore[type-var]
            async for number in numbers:
                be_stopped()
                if number == 2:
                    break

    await watchdog.run(handler)
    assert ended == ["closed"]


async def test_nurseries_inside_a_handler_work(watchdog: Watchdog) -> None:
    """Children run while the handler, which opened their nursery, is suspended in its body; nesting is no matter."""
    order: list[str] = []

    async def child(name: str) -> None:
        await trio.lowlevel.checkpoint()
        order.append(name)

    async def handler() -> None:
        async with trio.open_nursery() as outer:
            outer.start_soon(child, "outer")
            async with trio.open_nursery() as inner:
                inner.start_soon(child, "inner")
                while len(order) < 2:
                    pass
            order.append("handler")

    await watchdog.run(handler)
    assert sorted(order[:2]) == ["inner", "outer"]
    assert order[2] == "handler"


async def test_a_child_that_fails_cancels_the_handler_that_spins_in_its_nursery(watchdog: Watchdog) -> None:
    """The nursery's cancellation reaches the body at a forced checkpoint, and the child's error comes out alone."""
    ended: list[str] = []

    async def child() -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("child")

    async def handler() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            try:
                while True:
                    be_stopped()
            except trio.Cancelled:
                ended.append("cancelled")
                raise

    with pytest.RaisesGroup(KeyError) if hasattr(pytest, "RaisesGroup") else pytest.raises(ExceptionGroup):
        await watchdog.run(handler)
    assert ended == ["cancelled"]


async def test_scopes_inside_a_handler_are_obeyed_one_by_one(watchdog: Watchdog) -> None:
    """An inner deadline ends the inner loop only; a shielded scope is not entered by the outer cancellation."""
    ended: list[str] = []

    async def handler() -> None:
        with trio.move_on_after(0.005):
            while True:
                be_stopped()
        ended.append("inner")
        with trio.CancelScope() as outer:
            with trio.CancelScope(shield=True):
                outer.cancel()
                be_stopped(3)
                ended.append("shielded")
            be_stopped(3)
            ended.append("not reached")

    await watchdog.run(handler)
    assert ended == ["inner", "shielded"]


async def test_cleanup_is_not_cut_short(watchdog: Watchdog) -> None:
    """A ``finally`` that holds the loop after a cancellation is stopped and resumed, and ends what it began."""
    ended: list[str] = []

    async def handler() -> None:
        try:
            while True:
                be_stopped()
        finally:
            be_stopped(3)
            ended.append("first")
            be_stopped(3)
            ended.append("second")

    with trio.move_on_after(0.01) as scope:
        await watchdog.run(handler)
    assert scope.cancelled_caught
    assert ended == ["first", "second"]


async def test_cleanup_on_the_normal_way_is_not_cut_short_either(watchdog: Watchdog) -> None:
    """A handler cancelled while it happens to be in a ``finally`` leaves it whole, and is cancelled after it."""
    ended: list[str] = []

    async def handler() -> None:
        with trio.CancelScope() as scope:
            try:
                ended.append("body")
            finally:
                scope.cancel()
                be_stopped(3)
                ended.append("finally")
            while True:
                be_stopped()

    await watchdog.run(handler)
    assert ended == ["body", "finally"]


async def test_cleanup_that_never_ends_is_cut_short_after_its_grace(counting: None) -> None:
    """``cleanup`` seconds of holding the loop, then the cancellation is raised inside of it too."""
    ended: list[str] = []

    async def handler() -> None:
        try:
            while True:
                be_stopped()
        finally:
            ended.append("cleaning up")
            while True:
                be_stopped()

    async with open_watchdog(quantum=0.001, cleanup=0.005) as watchdog:
        with trio.move_on_after(0.005) as scope:
            await watchdog.run(handler)
    assert scope.cancelled_caught
    assert ended == ["cleaning up"]


async def test_a_handler_that_swallows_its_cancellation_gets_it_again(watchdog: Watchdog) -> None:
    """Like any task in a cancelled scope: at every checkpoint, forced ones included."""
    swallowed = 0

    async def handler() -> None:
        nonlocal swallowed
        while swallowed < 3:
            try:
                while True:
                    be_stopped()
            except trio.Cancelled:
                swallowed += 1

    with trio.CancelScope() as scope:
        scope.cancel()
        await watchdog.run(handler)
    assert swallowed == 3


async def test_budgets_nest(watchdog: Watchdog) -> None:
    """The inner handler's budget ends the inner handler, and the outer goes on; time inside counts for the inner."""
    ended: list[str] = []

    async def inner() -> None:
        while True:
            be_stopped()

    async def outer() -> str:
        with pytest.raises(BudgetExceeded, match=r"inner.*0\.005"):
            await watchdog.run(inner, budget=0.005)
        ended.append("inner")
        be_stopped()
        return "outer"

    assert await watchdog.run(outer, budget=100) == "outer"
    assert ended == ["inner"]


async def test_a_cancelled_outer_scope_is_not_taken_for_a_budget(watchdog: Watchdog) -> None:
    """With a budget far away, a cancellation from outside passes through unchanged."""
    with trio.move_on_after(0.005) as scope:
        await watchdog.run(spin_for_ever, budget=100)
    assert scope.cancelled_caught


async def spin_for_ever() -> None:
    """Never await, never end."""
    while True:
        be_stopped()


async def test_a_handler_past_its_budget_that_ends_by_itself_has_its_result(watchdog: Watchdog) -> None:
    """One that returns before the cancellation reaches it has done its work."""

    async def handler() -> str:
        with no_preempt():
            for _ in range(100_000):
                pass
            return "done"

    assert await watchdog.run(handler, budget=1e-6) == "done"


async def test_cancelled_before_its_first_turn_a_handler_is_not_started(watchdog: Watchdog) -> None:
    """Where a pass has nothing left the next handler waits for its turn; a cancelled operation did not happen."""
    started: list[str] = []

    async def use_the_pass_up() -> None:
        before = watchdog.statistics().put_off
        with no_preempt():
            while watchdog.statistics().put_off == before:
                pass
            started.append("first")
            return

    async def handler() -> None:
        started.append("second")

    with trio.CancelScope() as scope:
        scope.cancel()
        with contextlib.suppress(trio.Cancelled):
            await watchdog.run(use_the_pass_up)
        await watchdog.run(handler)
    assert scope.cancelled_caught
    assert started == ["first"]
    await watchdog.run(handler)
    assert started == ["first", "second"]
