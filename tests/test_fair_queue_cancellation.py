"""The fair queue with a cancellation at every checkpoint: cancel the k-th, for every k.

Four tasks send or receive; one of them is cancelled. Then whatever was sent can be received, in order, and the others
have come to their ends: no wake-up was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from cancel_everywhere import Use, cancel_everywhere

from stagetrio.fair_queue import CoDel, FairQueue, PriorityClass

ROUNDS = 3

Item = tuple[str, int]
Receive = Callable[[FairQueue[str, Item]], Any]


async def receive(queue: FairQueue[str, Item]) -> list[Item]:
    return [await queue.receive()]


async def receive_batch(queue: FairQueue[str, Item]) -> list[Item]:
    return await queue.receive_batch(2)


async def receive_delivery(queue: FairQueue[str, Item]) -> list[Item]:
    delivery = await queue.receive_delivery()
    delivery.settle(1.0)
    return [delivery.item]


async def receive_deliveries(queue: FairQueue[str, Item]) -> list[Item]:
    return [delivery.item for delivery in await queue.receive_deliveries(3)]


async def receive_run(queue: FairQueue[str, Item]) -> list[Item]:
    run = await queue.receive_run(1.5)
    run.settle(len(run.items), 1.0 * len(run.items))
    return run.items[::-1]


RECEIVE = [receive, receive_batch, receive_delivery, receive_deliveries, receive_run]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounded flows": {"max_items_per_flow": 1},
    "stamped": {"codel": CoDel(target=100.0, interval=100.0)},
    "classes": {"classes": (PriorityClass("a"), PriorityClass("b", reserve=0.5)), "class_of": lambda flow: flow},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("by_channel", [False, True])
def test_a_send_is_done_or_it_is_not(settings: str, by_channel: bool) -> None:
    """Wherever a send is cancelled its item is queued if it returned, and not if it did not; the others get in."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        queue: FairQueue[str, Item] = FairQueue(2, **SETTINGS[settings])
        channels = {flow: queue.open_flow(flow) for flow in "ab"}
        sent: list[Item] = []
        got: list[Item] = []
        numbers = iter(range(1000))

        def send(flow: str, item: Item) -> Any:
            return channels[flow].send(item) if by_channel else queue.send(flow, item)

        async def victim() -> None:
            for _ in range(ROUNDS):
                item = ("a", next(numbers))
                await send("a", item)
                sent.append(item)

        async def other() -> None:
            item = ("b", next(numbers))
            await send("b", item)
            sent.append(item)
            await trio.sleep(1)  # now everybody is waiting
            with suppress(trio.WouldBlock):
                got.append(queue.receive_nowait())
            await trio.sleep(1)
            with suppress(trio.WouldBlock):
                got.extend(queue.receive_batch_nowait(9))

        def check() -> None:
            with suppress(trio.WouldBlock):
                while True:
                    got.append(queue.receive_nowait())
            assert sorted(got) == sorted(sent)
            figures = queue.statistics()
            assert (figures.items, figures.tasks_waiting_send) == (0, 0)

        return victim, other, check

    assert cancel_everywhere(make) >= ROUNDS


@pytest.mark.parametrize("settings", ["plain", "stamped", "classes"])
@pytest.mark.parametrize("take", RECEIVE)
def test_a_receive_has_taken_or_it_has_not(settings: str, take: Receive) -> None:
    """Wherever a receive is cancelled it has all it took or nothing; the others get the rest, none waits in vain."""

    def make() -> tuple[Use, Use, Callable[[], None]]:
        queue: FairQueue[str, Item] = FairQueue(30, **SETTINGS[settings])
        got: list[Item] = []
        numbers = iter(range(1000))

        async def victim() -> None:
            with trio.move_on_after(5):  # the others may have taken all there is
                for _ in range(ROUNDS):
                    got.extend(await take(queue))

        async def other() -> None:
            for flow in "ab":
                for _ in range(ROUNDS):
                    await queue.send(flow, (flow, next(numbers)))
            with trio.move_on_after(5):
                while True:
                    got.extend(await take(queue))

        def check() -> None:
            with suppress(trio.WouldBlock):
                got.extend(queue.receive_batch_nowait(99))
            assert sorted(number for _, number in got) == list(range(3 * 2 * ROUNDS))
            assert queue.statistics().tasks_waiting_receive == 0

        return victim, other, check

    assert cancel_everywhere(make) >= ROUNDS
