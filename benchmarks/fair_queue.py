"""The fair queue beside a trio memory channel: what fairness costs, and what batches give back.

The peer is a memory channel with a buffer of 100 that moves one item per await, which is how they are used. Seconds
are per item, through both ends and the event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import perf_counter

import trio

from benchmarks.case import Case
from stagetrio.fair_queue import FairQueue

BATCH = 64
ITEMS = 64_000


def timed(program: Callable[[], Awaitable[None]], items: int) -> float:
    """Seconds per item of a program that moves ``items`` items, the start of its event loop left out."""

    async def main() -> float:
        begin = perf_counter()
        await program()
        return perf_counter() - begin

    return trio.run(main) / items


def memory_channel() -> float:
    """One producer, one consumer, one item per await."""
    items = ITEMS // 4

    async def program() -> None:
        send, receive = trio.open_memory_channel[int](100)

        async def produce() -> None:
            async with send:
                for n in range(items):
                    await send.send(n)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(produce)
            async for _ in receive:
                pass

    return timed(program, items)


def memory_channel_100_producers() -> float:
    """A hundred producers, one consumer, one item per await."""
    items = ITEMS // 4

    async def program() -> None:
        send, receive = trio.open_memory_channel[int](100)

        async def produce(mine: trio.MemorySendChannel[int]) -> None:
            async with mine:
                for n in range(items // 100):
                    await mine.send(n)

        async with trio.open_nursery() as nursery:
            async with send:
                for _ in range(100):
                    nursery.start_soon(produce, send.clone())
            async for _ in receive:
                pass

    return timed(program, items)


async def _consume(queue: FairQueue[int, int], items: int) -> None:
    while items:
        items -= len(await queue.receive_batch(BATCH))


def bursts(flows: int) -> Callable[[], float]:
    """One producer that sends bursts through the channels of its flows in turn, one consumer of batches."""

    def run() -> float:
        queue: FairQueue[int, int] = FairQueue(4 * BATCH)
        sends = [queue.open_flow(n).send_nowait for n in range(flows)]  # flows are opened once and used long
        turns = [[sends[(begin + n) % flows] for n in range(BATCH)] for begin in range(0, flows, BATCH)]

        async def program() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_consume, queue, ITEMS)
                for burst in range(ITEMS // BATCH):
                    for send in turns[burst % len(turns)]:
                        send(0)
                    await trio.lowlevel.checkpoint()

        return timed(program, ITEMS)

    return run


def bursts_by_name() -> float:
    """The same for 100 flows, each item sent to the queue under the name of its flow."""

    async def program() -> None:
        queue: FairQueue[int, int] = FairQueue(4 * BATCH)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_consume, queue, ITEMS)
            for burst in range(ITEMS // BATCH):
                begin = burst * BATCH
                for n in range(begin, begin + BATCH):
                    queue.send_nowait(n % 100, n)
                await trio.lowlevel.checkpoint()

    return timed(program, ITEMS)


def whole_reads() -> float:
    """100 flows, each read of a flow's socket bringing 16 items at once; deliveries are settled one by one."""

    async def program() -> None:
        queue: FairQueue[int, int] = FairQueue(4 * BATCH)
        channels = [queue.open_flow(n) for n in range(100)]
        read = list(range(16))

        async def work() -> None:
            left = ITEMS
            cost = 0.9
            while left:
                batch = await queue.receive_deliveries(BATCH)
                left -= len(batch)
                for delivery in batch:
                    cost = 1.9 - cost
                    delivery.settle(cost)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            turn = 0
            for _ in range(ITEMS // BATCH):
                for _ in range(BATCH // 16):
                    channels[turn % 100].send_many_nowait(read)
                    turn += 1
                await trio.lowlevel.checkpoint()

    return timed(program, ITEMS)


def singly() -> float:
    """One producer, one consumer, one item per await at both ends."""
    items = ITEMS // 4

    async def program() -> None:
        queue: FairQueue[str, int] = FairQueue(100)

        async def produce() -> None:
            async with queue.open_flow("one") as channel:
                for n in range(items):
                    await channel.send(n)
            queue.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(produce)
            async for _ in queue:
                pass

    return timed(program, items)


async def _consume_all(queue: FairQueue[int, int], items: int) -> None:
    """Batch after batch while there is something, and one checkpoint for all of them."""
    while items:
        items -= len(await queue.receive_batch(BATCH))
        with suppress(trio.WouldBlock):
            while items:
                items -= len(queue.receive_batch_nowait(BATCH))


def producers_100(max_items: int) -> Callable[[], float]:
    """A hundred producers, each a flow of its own that awaits each send; the consumer takes batches."""
    items = ITEMS // 4

    async def program() -> None:
        queue: FairQueue[int, int] = FairQueue(max_items)

        async def produce(flow: int) -> None:
            async with queue.open_flow(flow) as channel:
                for n in range(items // 100):
                    await channel.send(n)

        async with trio.open_nursery() as nursery:
            for flow in range(100):
                nursery.start_soon(produce, flow)
            await _consume_all(queue, items)

    return lambda: timed(program, items)


CASES = [
    Case("fair queue, batches of 64, 1 flow", bursts(1), memory_channel, 20.0),
    Case("fair queue, batches of 64, 100 flows", bursts(100), memory_channel, 16.0),
    Case("fair queue, batches of 64, 10,000 flows", bursts(10_000), memory_channel, 12.0),
    Case("fair queue, batches of 64, 100 flows by name", bursts_by_name, memory_channel),
    Case("fair queue, reads of 16, deliveries settled", whole_reads, memory_channel, note="100 flows, batches of 64"),
    Case("fair queue, one item per await", singly, memory_channel, 1.0),
    Case(
        "fair queue, 100 producers that checkpoint",
        producers_100(1000),
        memory_channel_100_producers,
        2.8,
        note="each awaits each send, and finds a place",
    ),
    Case(
        "fair queue, 100 producers that wait",
        producers_100(50),
        memory_channel_100_producers,
        note="each awaits each send, and there are places for half of them",
    ),
]
