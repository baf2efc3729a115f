"""The stacks that handlers run on: what ends them, what they keep, how deep they go, and what they let through."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import math
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from time import perf_counter
from types import FrameType
from typing import Any

import greenlet
import pytest
import trio

from stagetrio.watchdog import Watchdog, open_watchdog

passes = 0


@pytest.fixture
async def watchdog() -> AsyncIterator[Watchdog]:
    """A watchdog with a short quantum, beside a task that counts passes."""

    async def count() -> None:
        global passes
        while True:
            passes += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery, open_watchdog(quantum=0.001) as watchdog:
        nursery.start_soon(count)
        yield watchdog
        nursery.cancel_scope.cancel()


def be_stopped(times: int = 1) -> None:
    """Hold the loop until others have had their pass."""
    start, began = passes, perf_counter()
    while passes < start + times:
        assert perf_counter() < began + 30, "never stopped"


def stacks() -> int:
    """How many there are in this process."""
    gc.collect()
    return sum(isinstance(thing, greenlet.greenlet) for thing in gc.get_objects())


async def test_who_waits_for_a_turn_when_the_watchdog_closes_goes_on() -> None:
    """Handlers that outlive it, stopped in mid-work or not begun, end as they are; new ones are refused."""
    ended: list[int] = []

    async def handler(number: int) -> None:
        for _ in range(300_000):
            pass
        ended.append(number)

    async with trio.open_nursery() as nursery:
        async with open_watchdog(quantum=0.001) as watchdog:
            for number in range(4):
                watchdog.start_soon(nursery, handler, number)
            while watchdog.statistics().waiting < 4:
                await trio.lowlevel.checkpoint()
            assert len(ended) < 4
    assert sorted(ended) == [0, 1, 2, 3]
    with pytest.raises(trio.ClosedResourceError):
        await watchdog.run(handler, 5)


async def test_stacks_are_reused_and_freed() -> None:
    """However many handlers and workers there are, at once or in turn, none is left of them in the end."""

    async def handler() -> None:
        be_stopped(0)
        await trio.lowlevel.checkpoint()

    async def once() -> None:
        async with open_watchdog(quantum=0.001) as watchdog:
            before = stacks()
            for _ in range(100):
                await watchdog.run(handler)
            assert stacks() <= before + 1
            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    watchdog.start_soon(nursery, handler)
            assert stacks() <= before + 64
            for _ in range(3):
                await watchdog.open_lane().run(watchdog.run, handler)

    await once()
    before = stacks()
    await once()
    assert stacks() == before


async def test_nothing_of_a_handler_is_kept(watchdog: Watchdog) -> None:
    """Neither its arguments nor its task's context, however it ended: idle stacks hold nobody's memory."""

    class Thing:
        pass

    variable: contextvars.ContextVar[Thing] = contextvars.ContextVar("variable")
    things: list[weakref.ref[Thing]] = []

    async def short(thing: Thing) -> None:
        pass

    async def stopped(thing: Thing) -> None:
        be_stopped()

    async def failing(thing: Thing) -> None:
        be_stopped()
        raise ValueError(thing)

    async def task(handler: Callable[[Thing], Awaitable[None]], budget: float) -> None:
        thing = Thing()
        things.append(weakref.ref(thing))
        variable.set(thing)
        with contextlib.suppress(ValueError):
            await watchdog.run(handler, thing, budget=budget)

    for handler in (short, stopped, failing):
        for budget in (math.inf, 10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(task, handler, budget)
            gc.collect()
            assert things.pop()() is None


async def test_the_context_of_an_error_is_its_own(watchdog: Watchdog) -> None:
    """A caller that is handling an error of its own does not take the place of what the handler was handling."""

    async def handler() -> None:
        try:
            raise ValueError("the handler's")
        except ValueError:
            be_stopped()
            raise KeyError("raised while handling it")  # noqa: B904 – the implicit context is meant

    try:
        raise RuntimeError("the caller's")
    except RuntimeError:
        with pytest.raises(KeyError) as raised:
            await watchdog.run(handler)
    assert isinstance(raised.value.__context__, ValueError)


async def test_the_end_of_a_greenlet_is_an_error_like_others(watchdog: Watchdog) -> None:
    """`GreenletExit`, which ends a greenlet quietly, comes out of ``run``, and the stack can be used again."""

    async def handler() -> None:
        raise greenlet.GreenletExit

    async def other() -> int:
        be_stopped()
        return 5

    with pytest.raises(greenlet.GreenletExit):
        await watchdog.run(handler)
    assert await watchdog.run(other) == 5


async def test_anything_that_can_be_awaited_can_be_run(watchdog: Watchdog) -> None:
    """A function may return an object with ``__await__``; what cannot be awaited is refused."""

    class Awaitable:
        def __await__(self) -> Generator[Any, Any, int]:
            yield from trio.lowlevel.checkpoint().__await__()  # noqa: ASYNC105
            return 7

    assert await watchdog.run(Awaitable) == 7
    not_async: Any = lambda: None  # noqa: E731
    with pytest.raises(TypeError, match="fn must be an async function, not one that returns None"):
        await watchdog.run(not_async)
    assert await watchdog.run(Awaitable) == 7


async def test_deep_recursion_is_met_with_an_error_and_not_with_silence(watchdog: Watchdog) -> None:
    """A handler that comes to the limit again and again, while it is stopped, gets `RecursionError`, and goes on."""
    depths: list[int] = []

    def descend(depth: int) -> int:
        for _ in range(8_000 if depth > sys.getrecursionlimit() - 100 else 20):
            pass
        depths.append(depth)
        return descend(depth + 1) + 1

    async def handler() -> None:
        for _ in range(4):
            with pytest.raises(RecursionError):
                descend(0)
        be_stopped(5)

    await watchdog.run(handler)
    assert max(depths) > sys.getrecursionlimit() * 0.8


async def test_a_run_in_a_context_of_its_own_is_suspended_with_it(watchdog: Watchdog) -> None:
    """``Context.run`` inside of a handler: others do not see its values, and it finds them again."""
    variable = contextvars.ContextVar("variable", default="outside")
    seen: set[str] = set()

    def inside() -> None:
        variable.set("inside")
        be_stopped(3)
        seen.add(variable.get())

    async def handler() -> None:
        context = contextvars.copy_context()
        context.run(inside)
        be_stopped()
        seen.add(variable.get())

    await watchdog.run(handler)
    assert seen == {"inside", "outside"}


async def test_a_trace_function_is_not_stopped(watchdog: Watchdog) -> None:
    """Even where it belongs to the handler's module: while it runs nothing else is traced."""
    during: list[int] = []
    traced: set[str] = set()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_globals is not globals():
            return None
        before = passes
        for _ in range(2000):
            pass
        during.append(passes - before)
        traced.add(frame.f_code.co_name)
        return trace

    async def handler() -> None:
        for _ in range(20):
            pass
        be_stopped(2)

    async def other() -> None:
        for _ in range(5):
            await trio.lowlevel.checkpoint()

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(2):
                watchdog.start_soon(nursery, handler)
    finally:
        sys.settrace(old)
    assert set(during) == {0}
    assert {"handler", "be_stopped", "other"} <= traced
    assert watchdog.statistics().forced > 0
