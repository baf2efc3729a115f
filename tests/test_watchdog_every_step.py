"""Handlers that use each of Trio's primitives, stopped and cancelled at every step: nothing is ever inconsistent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from every_step import Inside, Run, Scenario, check, work


async def exclusion(run: Run, make: Callable[[], Any], most: int) -> None:
    """What lets a number of tasks in, used by ``async with``: never more than that, and all are out in the end."""
    primitive = make()
    inside = Inside(most)

    async def handler() -> None:
        async with primitive:
            with inside.enter():
                work()
                await trio.lowlevel.checkpoint()
                work()

    await run(handler, handler, handler, holds=inside.ok)
    assert inside.count == 0
    for _ in range(most):
        primitive.acquire_nowait()


async def lock(run: Run) -> None:
    """`trio.Lock`."""
    await exclusion(run, trio.Lock, 1)


async def strict_lock(run: Run) -> None:
    """`trio.StrictFIFOLock`."""
    await exclusion(run, trio.StrictFIFOLock, 1)


async def semaphore(run: Run) -> None:
    """`trio.Semaphore`."""
    await exclusion(run, lambda: trio.Semaphore(2), 2)


async def capacity(run: Run) -> None:
    """`trio.CapacityLimiter`."""
    limiter = trio.CapacityLimiter(2)
    inside = Inside(2)

    async def handler() -> None:
        async with limiter:
            with inside.enter():
                work()
                await trio.lowlevel.checkpoint()
                work()

    await run(handler, handler, handler, holds=lambda: inside.ok() and inside.count <= limiter.borrowed_tokens)
    assert limiter.borrowed_tokens == 0


async def condition(run: Run) -> None:
    """`trio.Condition`: every waiter is woken, or was cancelled."""
    ready = trio.Condition()
    values: list[int] = []

    async def waiter() -> None:
        async with ready:
            while not values:
                await ready.wait()
            work()

    async def setter() -> None:
        work()
        async with ready:
            values.append(work())
            ready.notify_all()

    await run(waiter, waiter, setter)
    assert ready.statistics().tasks_waiting == 0
    assert not ready.locked()


async def event(run: Run) -> None:
    """`trio.Event`: whoever waits goes on."""
    done = trio.Event()
    ended: list[int] = []

    async def waiter() -> None:
        work()
        await done.wait()
        ended.append(work())

    async def setter() -> None:
        work()
        done.set()

    await run(waiter, waiter, setter)
    assert len(ended) >= 2 - run.cancelled


async def channel(run: Run) -> None:
    """Memory channels: every item is received once, in order, or was never sent."""
    send, receive = trio.open_memory_channel[int](1)
    sent: list[int] = []
    received: list[int] = []

    async def sender() -> None:
        for number in range(3):
            await send.send(number)
            sent.append(number)
            work()

    async def receiver() -> None:
        async for number in receive:
            received.append(number)
            work()

    async def close() -> None:
        await trio.sleep(10)
        send.close()

    await run(sender, receiver, close)
    assert received == list(range(len(received)))
    assert len(sent) <= len(received) <= len(sent) + 1


async def nursery(run: Run) -> None:
    """Nurseries: no child outlives its handler."""
    alive = Inside(3)

    async def child() -> None:
        with alive.enter():
            await trio.sleep(1)

    async def handler() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(child)
                work()
            await trio.lowlevel.checkpoint()
            work()

    await run(handler, holds=alive.ok)
    assert alive.count == 0


async def scopes(run: Run) -> None:
    """Cancel scopes, shielded ones among them: what is shielded is done whole."""
    done: list[str] = []

    async def handler() -> None:
        with trio.move_on_after(5):
            work()
            with trio.CancelScope(shield=True):
                done.append("begun")
                work()
                await trio.sleep(1)
                done.append("ended")
            await trio.sleep_forever()

    await run(handler, handler)
    assert done.count("begun") == done.count("ended")


async def stream(run: Run) -> None:
    """Streams: what is received is a beginning of what was sent."""
    one, other = trio.testing.memory_stream_one_way_pair()
    received = bytearray()

    async def sender() -> None:
        for letter in b"abc":
            await one.send_all(bytes([letter]) * 3)
            work()

    async def receiver() -> None:
        async for data in other:
            received.extend(data)
            work()

    async def close() -> None:
        await trio.sleep(10)
        await one.aclose()

    await run(sender, receiver, close)
    assert b"aaabbbccc".startswith(bytes(received))


SCENARIOS: list[Scenario] = [
    lock,
    strict_lock,
    semaphore,
    capacity,
    condition,
    event,
    channel,
    nursery,
    scopes,
    stream,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_nothing_is_inconsistent_wherever_it_is_stopped(
    scenario: Scenario, autojump_clock: trio.testing.MockClock
) -> None:
    """With a forced checkpoint at every step; and cancelled at every single one of them."""
    await check(scenario)
