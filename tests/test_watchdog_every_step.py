"""Handlers that use each primitive, stopped at every step, and cancelled at every step: nothing is ever inconsistent.

The step counter stands for the clock, so this is exhaustive. Each scenario sets a primitive up, hands two or three
handlers to ``run``, and says what must hold whenever anybody else runs (``holds``) and in the end. It is run once with
a forced checkpoint at every step of every handler, and then once more for each of these checkpoints, at which the first
handler is cancelled. A deadlock shows as `trio.TooSlowError`: the clock is a mock.

Python 3.11 has no events to count; there the scenarios run against the real timer, as often as it rings.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from stagetrio.adaptive import AdaptiveLimiter
from stagetrio.fair_queue import FairQueue
from stagetrio.limiter import FlowRateLimiter, Rate, RateLimiter
from stagetrio.nursery_pool import open_nursery_pool
from stagetrio.snapshot import Snapshot
from stagetrio.ticket import TicketStage
from stagetrio.watchdog import StepClock, Watchdog, open_watchdog

Handler = Callable[[], Awaitable[object]]
STEP = 1e-6
COUNTED = sys.version_info >= (3, 12)


class Run(trio.abc.Instrument):
    """Runs the handlers of one scenario, once, and looks at every pass, without keeping the loop awake.

    Args:
        watchdog: What they run under.
        cancel_at: The forced checkpoint, by number, at which the first handler is cancelled.
    """

    def __init__(self, watchdog: Watchdog, cancel_at: float) -> None:
        self._watchdog = watchdog
        self._cancel_at = watchdog.statistics().forced + cancel_at
        self._holds: Callable[[], bool] = bool
        self._scope = trio.CancelScope()
        self._ok = True
        self.reached = False  # whether there were that many checkpoints
        self.cancelled = False  # whether the handler was

    async def __call__(self, *handlers: Handler, holds: Callable[[], bool] = lambda: True) -> None:
        """Run them side by side; assert that ``holds`` at every pass."""
        self._holds = holds
        trio.lowlevel.add_instrument(self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._first, handlers[0])
            for handler in handlers[1:]:
                self._watchdog.start_soon(nursery, handler)
        trio.lowlevel.remove_instrument(self)
        assert self._ok
        assert holds()

    async def _first(self, handler: Handler) -> None:
        with self._scope:
            await self._watchdog.run(handler)
        self.cancelled = self._scope.cancelled_caught

    def after_io_wait(self, timeout: float) -> None:
        """Look, and cancel. Called by Trio."""
        self._ok = self._ok and self._holds()
        if self._watchdog.statistics().forced >= self._cancel_at:
            self.reached = True
            self._scope.cancel()


Scenario = Callable[[Run], Awaitable[None]]


class Inside:
    """How many are inside of something, and the most that may be."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.count = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside."""
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    def ok(self) -> bool:
        """Whether no more are inside than may be."""
        return 0 <= self.count <= self.most


def work() -> int:
    """Take a few steps, or, where they are not counted, enough of them for the timer to ring."""
    total = 0
    for number in range(1 if COUNTED else 2000):
        total += len(str(number))
    return total


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
    queue,
    rate,
    ticket,
    adaptive,
    pool,
    snapshot,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_nothing_is_inconsistent_wherever_it_is_stopped(
    scenario: Scenario, autojump_clock: trio.testing.MockClock
) -> None:
    """With a forced checkpoint at every step; and cancelled at every single one of them."""
    if not COUNTED:
        async with open_watchdog(quantum=1e-4) as watchdog:
            for cancel_at in (math.inf, *range(12)):
                with trio.fail_after(1000):
                    await scenario(Run(watchdog, cancel_at))
        return
    async with open_watchdog(quantum=STEP, clock=StepClock(STEP)) as watchdog:
        for checkpoint in itertools.count():
            run = Run(watchdog, checkpoint or math.inf)
            with trio.fail_after(1000):
                await scenario(run)
            if checkpoint and not run.reached:
                break
    assert checkpoint > 10
