"""Handlers of different keys do not see each other's context variables."""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import trio

from stagetrio.fair_queue import FairQueue
from stagetrio.stage import Stage
from stagetrio.watchdog import open_watchdog

user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")


async def at_once() -> None:
    """Do not wait."""


async def after_a_wait() -> None:
    await trio.lowlevel.checkpoint()


async def with_an_error() -> None:
    raise LookupError


Ends = Callable[[], Awaitable[None]]


async def seen_by_others(ends: Ends, *, flows: int, watched: bool = False) -> tuple[list[str], Stage[int]]:
    """Let the later messages set the variable, after it has been looked at; return what was seen, and the stage.

    The earlier ones teach the queue how little they cost, so that the others come in batches.
    """
    seen: list[str] = []

    async def handler(item: int) -> None:
        seen.append(user.get())
        if item >= 100:
            user.set(f"user {item}")
            await ends()

    queue: FairQueue[int, int] = FairQueue(1000)
    async with AsyncExitStack() as stack:
        watchdog = await stack.enter_async_context(open_watchdog()) if watched else None
        stage: Stage[int] = Stage(handler, queue=queue, workers=3, watchdog=watchdog, on_error=lambda item, error: None)
        for item in range(200):
            queue.send_nowait(item % flows, item)
        queue.close()
        user.set("whoever runs the stage")
        await stage.run()
    return seen, stage


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("ends", [at_once, after_a_wait, with_an_error])
async def test_what_a_handler_sets_is_not_seen_by_the_next(ends: Ends, watched: bool) -> None:
    """Whatever way it ends, the next one finds what the stage was run with."""
    seen, stage = await seen_by_others(ends, flows=200, watched=watched)  # none is parked behind another
    assert seen == ["whoever runs the stage"] * 200
    assert stage.statistics().handled + stage.statistics().failed == 200
    assert stage.statistics().workers == 0


async def test_messages_of_one_flow_served_in_one_run_do_not_see_it_either() -> None:
    """A flow may be a tenant with many users."""
    seen, _ = await seen_by_others(at_once, flows=1)
    assert seen == ["whoever runs the stage"] * 200


async def test_a_variable_that_is_reset_costs_no_worker() -> None:
    """Only what is left set makes a worker give way to a fresh one."""
    tasks: set[str] = set()
    seen: list[str] = []

    async def handler(item: int) -> None:
        tasks.add(repr(trio.lowlevel.current_task()))
        seen.append(user.get())
        token = user.set("somebody")
        user.reset(token)

    queue: FairQueue[int, int] = FairQueue(100)
    stage: Stage[int] = Stage(handler, queue=queue, workers=3)
    for item in range(60):
        queue.send_nowait(item, item)
    queue.close()
    await stage.run()
    assert seen == ["nobody"] * 60
    assert len(tasks) == 1


async def test_a_worker_that_starts_while_a_handler_waits_does_not_inherit_from_it() -> None:
    """A handler that waits lets another worker lead, which begins with the stage's own context."""
    seen: list[str] = []
    go = trio.Event()

    async def handler(item: int) -> None:
        seen.append(user.get())
        user.set("the first")
        if not item:
            await go.wait()
        else:
            go.set()

    queue: FairQueue[int, int] = FairQueue(100)
    stage: Stage[int] = Stage(handler, queue=queue, workers=3)
    queue.send_nowait(0, 0)
    queue.send_nowait(1, 1)
    queue.close()
    await stage.run()
    assert seen == ["nobody", "nobody"]
