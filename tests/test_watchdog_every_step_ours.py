"""Handlers that use each of our primitives, stopped and cancelled at every step: nothing is ever inconsistent."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
from every_step import Inside, Run, Scenario, check, work
from remote_pairs import serving

from stagetrio.adaptive import AdaptiveLimiter
from stagetrio.all_tickets import all_tickets
from stagetrio.fair_channel import open_fair_channel
from stagetrio.fair_queue import FairQueue
from stagetrio.limiter import FlowRateLimiter, Rate, RateLimiter
from stagetrio.nursery_pool import open_nursery_pool
from stagetrio.pacer import Pacer
from stagetrio.remote import Procedures, Remote
from stagetrio.retry import RetryBudget
from stagetrio.snapshot import Snapshot
from stagetrio.stage import Stage
from stagetrio.threads import open_thread_pool
from stagetrio.ticket import TicketStage


async def queue(run: Run) -> None:
    """`FairQueue`: every item is received once and settled, or still there, or was never sent."""
    fair: FairQueue[str, int] = FairQueue(2)
    sent: list[int] = []
    received: list[int] = []

    async def sender() -> None:
        for number in range(3):
            await fair.send("flow", number)
            sent.append(number)
            work()

    async def receiver() -> None:
        while len(received) < 2:
            delivery = await fair.receive_delivery()
            received.append(delivery.item)
            work()
            delivery.settle(1)

    async def end() -> None:
        await trio.sleep(10)
        fair.close()

    async def suppressed() -> None:
        try:
            await receiver()
        except trio.EndOfChannel:
            work()

    await run(sender, suppressed, end)
    assert received == list(range(len(received)))
    assert len(received) + fair.statistics().items in (len(sent), len(sent) + 1)


async def rate(run: Run) -> None:
    """`RateLimiter` and `FlowRateLimiter`: nobody is left in line, and no more is granted than there was time for."""
    limiter = RateLimiter(Rate(10), burst=1)
    flows = FlowRateLimiter(Rate(10), burst=1, max_flows=10)
    granted: list[float] = []

    async def handler() -> None:
        for _ in range(2):
            await limiter.acquire()
            granted.append(trio.current_time())
            work()
            await flows.acquire("flow")
            work()

    await run(handler, handler)
    assert all(later - earlier >= 0.0999 for earlier, later in itertools.pairwise(granted))
    assert limiter.statistics().waiting == 0


async def ticket(run: Run) -> None:
    """`TicketStage`: never over-granted, all tickets back, and a lost lease ends the block."""
    stage = TicketStage("stage", 1, lease=5)
    inside = Inside(1)

    async def handler() -> None:
        async with stage.ticket("flow") as held:
            with inside.enter():
                work()
                held.extend(5)
                await trio.sleep(1)
                work()

    await run(handler, handler, handler, holds=inside.ok)
    assert inside.count == 0
    assert stage.statistics().held == 0
    assert stage.statistics().waiting == 0


async def adaptive(run: Run) -> None:
    """`AdaptiveLimiter`: never over-granted, all tokens back."""
    limiter = AdaptiveLimiter()

    async def handler() -> None:
        async with limiter:
            work()
            await trio.sleep(0.1)
            work()

    await run(handler, handler, handler)
    assert limiter.borrowed_tokens == 0


async def pool(run: Run) -> None:
    """`open_nursery_pool`: every task that was started ends with the pool, and the slots are free."""
    alive = Inside(2)

    async def task() -> None:
        with alive.enter():
            await trio.sleep(1)

    async def handler() -> None:
        async with open_nursery_pool(2) as nurseries:
            for number in range(3):
                await nurseries.spawn(task, key=number)
                work()

    await run(handler, holds=alive.ok)
    assert alive.count == 0


async def snapshot(run: Run) -> None:
    """`Snapshot`: versions rise by one, and no update is lost."""
    shared = Snapshot(0)
    counted: list[int] = []

    async def handler() -> None:
        for _ in range(3):
            shared.update(add_one)
            counted.append(1)
            work()

    await run(handler, handler, holds=lambda: shared.value == shared.version - START)
    assert len(counted) <= shared.value <= len(counted) + 1


START = Snapshot(0).version


def add_one(value: int) -> int:
    """Take some steps in the middle of an update."""
    work()
    return value + 1


async def fair_channel(run: Run) -> None:
    """`open_fair_channel`: as a memory channel; every item is received once, in order, or was never sent."""
    send, receive = open_fair_channel(FairQueue[Any, int](1), flow="flow")
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


async def all_of_them(run: Run) -> None:
    """`all_tickets`: both or none, whoever asks in which order; all are back in the end."""
    one, other = TicketStage("one", 1), TicketStage("other", 1)
    inside = Inside(1)

    async def handler(*stages: TicketStage) -> None:
        async with all_tickets(*(stage.ticket("flow") for stage in stages)):
            with inside.enter():
                work()
                await trio.lowlevel.checkpoint()

    async def forth() -> None:
        await handler(one, other)

    async def back() -> None:
        await handler(other, one)

    await run(forth, back, holds=inside.ok)
    assert one.statistics().held == other.statistics().held == 0


async def waiting_for_a_version(run: Run) -> None:
    """`Snapshot.wait_changed`: who waits for the next version sees it, or was cancelled."""
    shared = Snapshot(0)
    seen: list[int] = []

    async def waiter() -> None:
        version = shared.version
        while shared.value < 2:
            await shared.wait_changed(version)
            version = shared.version
            work()
        seen.append(shared.value)

    async def writer() -> None:
        for _ in range(2):
            work()
            shared.update(add_one)
            await trio.lowlevel.checkpoint()

    await run(waiter, writer)
    assert shared.version - START == 2
    assert seen == [2] or (run.cancelled and not seen)


async def pacer(run: Run) -> None:
    """`Pacer`: what was touched is flushed once per touch and tick, by whoever touched it, cancelled or not."""
    paced = Pacer(1)
    numbers = itertools.count()
    touched: list[int] = []
    flushed: list[int] = []

    def flush() -> None:
        flushed.extend(touched[len(flushed) :])

    async def handler() -> None:
        for _ in range(3):
            touched.append(next(numbers))
            paced.touch(flush)
            work()
            await trio.sleep(0.7)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(paced.run)
        await run(handler, handler)
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert flushed == touched[: len(flushed)]
    assert len(touched) - len(flushed) <= run.cancelled  # cancelled between the two
    assert paced.statistics().touched == 0


async def retries(run: Run) -> None:
    """`RetryBudget`: no more attempts than there is budget for, and each call ends."""
    budget = RetryBudget(0, burst=3, attempts=4, retry_on=ValueError)
    attempts: list[int] = []

    async def attempt() -> None:
        attempts.append(work())
        raise ValueError

    async def handler() -> None:
        for _ in range(2):
            work()
            try:
                await budget.call(attempt)
            except ValueError:
                work()

    await run(handler, handler)
    assert len(attempts) <= 4 + 3
    assert run.cancelled or len(attempts) == 4 + 3


async def staged(run: Run) -> None:
    """`Stage` with the watchdog: each key's items one after the other and in order, whichever handler is stopped."""
    served: dict[str, list[int]] = {"a": [], "b": []}
    inside = {"a": Inside(1), "b": Inside(1)}
    fair: FairQueue[str, tuple[str, int]] = FairQueue(10)

    async def serve(item: tuple[str, int]) -> None:
        key, number = item
        with inside[key].enter():
            work()
            await trio.lowlevel.checkpoint()
            work()
        served[key].append(number)

    stage = Stage(serve, queue=fair, workers=2, watchdog=run.watchdog)

    async def sender() -> None:
        for number in range(2):
            for key in ("a", "b"):
                await fair.send(key, (key, number))
                work()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        await run(sender, holds=lambda: inside["a"].ok() and inside["b"].ok())
        fair.close()
    assert all(numbers == list(range(len(numbers))) for numbers in served.values())
    assert run.cancelled or served == {"a": [0, 1], "b": [0, 1]}
    assert stage.statistics().handled == sum(map(len, served.values()))


async def remote_calls(run: Run) -> None:
    """Calls, streams and one-way messages: each caller gets its own answer, and nothing is left of those who left."""
    procedures = Procedures()
    told: list[int] = []

    @procedures.procedure
    async def double(number: int) -> int:
        await trio.sleep(0.1)
        return 2 * number

    @procedures.procedure
    async def count(number: int) -> AsyncIterator[int]:
        for one in range(number):
            yield one

    @procedures.procedure
    async def tell(number: int) -> None:
        told.append(number)

    def handler(remote: Remote, number: int) -> Callable[[], Awaitable[None]]:
        async def call() -> None:
            assert await remote.call(double, number) == 2 * number
            work()
            async with remote.stream(count, 3) as values:
                got = [value async for value in values]
            assert got == [0, 1, 2]
            await remote.post(tell, number)
            work()

        return call

    async with serving(procedures, trio.testing.memory_stream_pair()) as remote:
        await run(handler(remote, 1), handler(remote, 2))
        assert await remote.call(double, 5) == 10
    assert 2 in told
    assert run.cancelled or sorted(told) == [1, 2]


async def threads(run: Run) -> None:
    """`open_thread_pool`: each caller gets its own result, and no job is left in hand."""

    async def stay_awake() -> None:  # virtual time does not wait for threads
        while True:
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery, open_thread_pool(2) as pool:
        nursery.start_soon(stay_awake)

        async def handler() -> None:
            for number in range(2):
                assert await pool.call(abs, -number) == number
                work()

        await run(handler, handler)
        assert await pool.call(abs, -3) == 3
        nursery.cancel_scope.cancel()


SCENARIOS: list[Scenario] = [
    queue,
    rate,
    ticket,
    adaptive,
    pool,
    snapshot,
    fair_channel,
    all_of_them,
    waiting_for_a_version,
    pacer,
    retries,
    staged,
    remote_calls,
    threads,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_nothing_is_inconsistent_wherever_it_is_stopped(
    scenario: Scenario, autojump_clock: trio.testing.MockClock
) -> None:
    """With a forced checkpoint at every step; and cancelled at every single one of them."""
    await check(scenario)
