"""What code that was written for a memory channel relies on: one suite, run over Trio's own and over ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from stagetrio.fair_channel import FairReceiveChannel, FairSendChannel, open_fair_channel
from stagetrio.fair_queue import CoDel, FairQueue, PriorityClass

Send = trio.MemorySendChannel[int] | FairSendChannel[int]
Receive = trio.MemoryReceiveChannel[int] | FairReceiveChannel[int]
Open = Callable[[int], tuple[Send, Receive]]


def open_trios(max_items: int) -> tuple[Send, Receive]:
    return trio.open_memory_channel[int](max_items)


def open_ours(max_items: int) -> tuple[Send, Receive]:
    return open_fair_channel(FairQueue(max_items))


def open_ours_with_everything(max_items: int) -> tuple[Send, Receive]:
    queue: FairQueue[object, int] = FairQueue(
        max_items,
        codel=CoDel(target=1000, interval=1000),
        classes=[PriorityClass("only", reserve=0.5)],
        class_of=lambda _: "only",
    )
    return open_fair_channel(queue)


@pytest.fixture(params=[open_trios, open_ours, open_ours_with_everything])
def open_channel(request: pytest.FixtureRequest) -> Open:
    """Opens a channel of one of the kinds that keep the contract."""
    return request.param  # type: ignore[no-any-return]


async def test_the_ends_are_what_trio_calls_channels(open_channel: Open) -> None:
    """They are instances of Trio's abstract classes."""
    send, receive = open_channel(1)
    assert isinstance(send, trio.abc.SendChannel)
    assert isinstance(receive, trio.abc.ReceiveChannel)


async def test_items_come_out_in_order(open_channel: Open) -> None:
    """One producer's items are received in the order they were sent."""
    send, receive = open_channel(10)
    for n in range(5):
        await send.send(n)
    for n in range(5, 10):
        send.send_nowait(n)
    assert [await receive.receive() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [receive.receive_nowait() for _ in range(5)] == [5, 6, 7, 8, 9]


async def test_the_nowait_halves_would_block(open_channel: Open) -> None:
    """At the bound, and where there is nothing."""
    send, receive = open_channel(1)
    with pytest.raises(trio.WouldBlock):
        receive.receive_nowait()
    send.send_nowait(1)
    with pytest.raises(trio.WouldBlock):
        send.send_nowait(2)
    assert receive.receive_nowait() == 1


async def test_every_wait_is_a_checkpoint(open_channel: Open) -> None:
    """Also where it need not wait."""
    send, receive = open_channel(2)
    with assert_checkpoints():
        await send.send(1)
    with assert_checkpoints():
        assert await receive.receive() == 1
    with assert_checkpoints():
        await send.aclose()
    with assert_checkpoints():
        await receive.aclose()


async def test_a_cancelled_call_has_not_happened(open_channel: Open) -> None:
    """Whether it need not wait or waits."""
    send, receive = open_channel(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await send.send(0)
    with trio.CancelScope() as scope:
        scope.cancel()
        await receive.receive()
    assert receive.statistics().current_buffer_used == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive.receive)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    send.send_nowait(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send.send, 2)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert receive.receive_nowait() == 1
    with pytest.raises(trio.WouldBlock):
        receive.receive_nowait()


async def test_a_sender_waits_for_a_place_and_a_receiver_for_an_item(open_channel: Open) -> None:
    """Those who wait are served first come, first served."""
    send, receive = open_channel(1)
    got: list[int] = []

    async def take() -> None:
        got.append(await receive.receive())

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(take)
            await wait_all_tasks_blocked()
        send.send_nowait(1)
        await wait_all_tasks_blocked()
        assert got == [1]
        send.send_nowait(2)
    assert got == [1, 2]
    send.send_nowait(3)
    async with trio.open_nursery() as nursery:
        for n in (4, 5):
            nursery.start_soon(send.send, n)
            await wait_all_tasks_blocked()
        assert send.statistics().tasks_waiting_send == 2
        assert [receive.receive_nowait() for _ in range(3)] == [3, 4, 5]


async def test_when_the_last_sender_is_gone_receivers_get_the_rest_and_the_end(open_channel: Open) -> None:
    """Also one that waits; and iteration ends."""
    send, receive = open_channel(5)
    other = send.clone()
    send.send_nowait(1)
    send.close()
    other.send_nowait(2)
    with other:
        pass
    assert [item async for item in receive] == [1, 2]
    with pytest.raises(trio.EndOfChannel):
        receive.receive_nowait()
    with pytest.raises(trio.EndOfChannel):
        await receive.receive()

    send, receive = open_channel(5)
    async with trio.open_nursery() as nursery:

        async def wait_for_the_end() -> None:
            with pytest.raises(trio.EndOfChannel):
                await receive.receive()

        nursery.start_soon(wait_for_the_end)
        await wait_all_tasks_blocked()
        await send.aclose()


async def test_when_the_last_receiver_is_gone_senders_are_told(open_channel: Open) -> None:
    """A send is broken then, also one that waits, and also where there is a place."""
    send, receive = open_channel(1)
    with receive.clone():
        pass
    send.send_nowait(1)
    async with trio.open_nursery() as nursery:

        async def wait_in_vain() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await send.send(2)

        nursery.start_soon(wait_in_vain)
        await wait_all_tasks_blocked()
        await receive.aclose()
    with pytest.raises(trio.BrokenResourceError):
        send.send_nowait(3)
    with pytest.raises(trio.BrokenResourceError):
        await send.send(3)


async def test_a_closed_end_is_closed(open_channel: Open) -> None:
    """For each call, and once is enough; the clone goes on."""
    send, receive = open_channel(3)
    other_send, other_receive = send.clone(), receive.clone()
    for end in (send, send, receive, receive):
        end.close()
    await send.aclose()
    await receive.aclose()
    for call in (send.clone, receive.clone, receive.receive_nowait):
        with pytest.raises(trio.ClosedResourceError):
            call()
    with pytest.raises(trio.ClosedResourceError):
        send.send_nowait(1)
    with pytest.raises(trio.ClosedResourceError):
        await send.send(1)
    with pytest.raises(trio.ClosedResourceError):
        await receive.receive()
    await other_send.send(1)
    assert await other_receive.receive() == 1


async def test_who_waits_at_an_end_that_is_closed_is_told(open_channel: Open) -> None:
    """And nobody who waits at a clone of it."""
    send, receive = open_channel(1)
    send_on, receive_on = send.clone(), receive.clone()
    got: list[int] = []

    async def told(wait: Callable[[], object]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await wait()  # type: ignore[misc]

    async def not_told() -> None:
        got.append(await receive_on.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(told, receive.receive)
        nursery.start_soon(not_told)
        await wait_all_tasks_blocked()
        receive.close()
        await wait_all_tasks_blocked()
        send_on.send_nowait(1)
    assert got == [1]
    send_on.send_nowait(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(told, lambda: send.send(3))
        nursery.start_soon(send_on.send, 4)
        await wait_all_tasks_blocked()
        send.close()
        await wait_all_tasks_blocked()
        assert [receive_on.receive_nowait() for _ in range(2)] == [2, 4]


async def test_statistics_say_who_is_there(open_channel: Open) -> None:
    """Both ends tell the same, by the same names."""
    send, receive = open_channel(3)
    with send.clone(), receive.clone(), receive.clone():
        send.send_nowait(1)
        for end in (send, receive):
            figures = end.statistics()
            assert (figures.current_buffer_used, figures.max_buffer_size) == (1, 3)
            assert (figures.open_send_channels, figures.open_receive_channels) == (2, 3)
            assert (figures.tasks_waiting_send, figures.tasks_waiting_receive) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
async def test_many_producers_and_consumers_move_everything_once(open_channel: Open, seed: int) -> None:
    """Each item comes out once, whoever is cancelled meanwhile."""
    send, receive = open_channel(3)
    sent: list[int] = []
    got: list[int] = []

    async def produce(mine: Send, first: int) -> None:
        with mine:
            for n in range(first, first + 20):
                with trio.CancelScope() as scope:
                    if n % 7 == seed:
                        scope.cancel()
                    await mine.send(n)
                    sent.append(n)

    async def consume(mine: Receive) -> None:
        with mine:
            got.extend([item async for item in mine])

    async with trio.open_nursery() as nursery:
        with send, receive:
            for n in range(4):
                nursery.start_soon(produce, send.clone(), 100 * n)
                nursery.start_soon(consume, receive.clone())
    assert sorted(got) == sorted(sent)


async def test_ours_is_fair_and_trios_is_not() -> None:
    """Of a hundred items of one producer and one of another, the second comes second, and in Trio's channel last."""
    places = {}
    for open_one in (open_trios, open_ours):
        send, receive = open_one(200)
        polite = send.clone()
        for n in range(100):
            send.send_nowait(n)
        polite.send_nowait(-1)
        send.close()
        polite.close()
        places[open_one] = [item async for item in receive].index(-1)
    assert places == {open_trios: 100, open_ours: 1}


async def test_the_flows_of_the_ends_can_be_named() -> None:
    """Then weights hold for them, and the queue's own methods see the same flows."""
    queue: FairQueue[object, int] = FairQueue(100, weight=lambda flow: 3.0 if flow == "a" else 1.0)
    send, _ = open_fair_channel(queue, flow="a")
    other = send.clone("b")
    assert (send.flow, other.flow) == ("a", "b")
    for n in range(20):
        send.send_nowait(n)
        other.send_nowait(100 + n)
    assert sum(item < 100 for item in await queue.receive_batch(12)) == 9
    assert len(queue.discard("b")) == 17


def test_a_number_is_no_queue() -> None:
    """What a memory channel is opened with is not what lies between these ends."""
    with pytest.raises(TypeError, match=r"queue must be a FairQueue, such as FairQueue\(100\), not 100"):
        open_fair_channel(100)  # type: ignore[arg-type]
