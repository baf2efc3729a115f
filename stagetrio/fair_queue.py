"""A bounded queue whose consumers are shared fairly among flows, by work.

Theory of operation
===================

`FairOrder` decides who is next, `Intake` what is let in; this module joins them and adds the receivers.

**Hand-over.** Whoever makes something possible does it on behalf of the one who waits for it, in the same synchronous
step: a send gives its item to a waiting receiver, a receive puts the item of a waiting sender into the place it has
freed. A task that waits either has been served, and then its cancellation comes too late, or it has not, and then
leaving the line undoes everything. So no wake-up can be lost, whatever is cancelled when, and nothing is done in an
``abort_fn`` except leaving the line.

A receiver of batches is only woken; what there is and what comes until it runs is left for it (``_collecting``), so
that a burst wakes one task and not all of them. When it runs it takes what it can, and hands the rest on; if somebody
who did not wait has been faster, it waits again, as the first.

**Where items are taken from** is the order itself, or the `Shedding` in front of it, which takes one by one and looks
at each. A queue that was not asked for anything of that kind, and has not seen a finite deadline, has none.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, cast, final

import attrs
import outcome
import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from stagetrio.fair_order import FairOrder
from stagetrio.flow import EMPTY, Delivery, F, Flow, T, check_positive
from stagetrio.intake import Intake
from stagetrio.runs import Run, put_back, take_runs

__all__ = ["Delivery", "FairQueue", "FairQueueStatistics", "FlowChannel"]

Take = Callable[[int], list[Any]]

FEW = 32  # flows at their own bounds with waiting senders up to which all are looked at after a batch


@attrs.frozen
class FairQueueStatistics:
    """What `FairQueue.statistics` returns: the state now, and counts since the start.

    Attributes:
        items: Items queued now.
        max_items: The bound on them.
        flows_backlogged: Flows with items queued now.
        flows_known: Flows of which a record is kept, idle ones included.
        in_hand: Deliveries that were received and are not settled.
        tasks_waiting_send: Tasks waiting for a place.
        tasks_waiting_receive: Tasks waiting for an item.
        sent: Items accepted.
        received: Items handed to receivers.
        refused: Sends refused by `Overloaded`, and the items `FlowChannel.send_many_nowait` did not take.
        shed: Items accepted and given to ``on_shed`` instead of a receiver.
        discarded: Items removed by `FairQueue.discard`.
        closed: Whether senders are refused for good.
    """

    items: int
    max_items: float
    flows_backlogged: int
    flows_known: int
    in_hand: int
    tasks_waiting_send: int
    tasks_waiting_receive: int
    sent: int
    received: int
    refused: int
    shed: int
    discarded: int
    closed: bool


class FairQueue(Generic[F, T]):
    """A bounded queue of many flows.

    Args:
        max_items: Items queued at once, over all flows; ≥ 1 or `math.inf`.
        max_items_per_flow: Items of one flow queued at once; ≥ 1 or `math.inf`.
        weight: The weight of a flow (finite, above 0), asked when the flow is first seen; None: all weigh 1.0.
    """

    def __init__(
        self,
        max_items: float,
        *,
        max_items_per_flow: float = math.inf,
        weight: Callable[[F], float] | None = None,
    ) -> None:
        if weight is not None and not callable(weight):
            raise TypeError(f"weight must be callable or None, not {weight!r}")
        self._order: FairOrder[F, T] = FairOrder(weight=weight)
        self._flows = self._order.flows
        self._intake: Intake[F, T] = Intake(
            self._order, max_items, max_items_per_flow, self._hand_over, self._hand_through
        )
        self._receivers = self._intake.receivers  # {task: (how it takes, at most how many)}
        self._collecting = 0  # items that receivers woken and not yet run may still take
        self._take_items: Take = self._order.take_items
        self._take_deliveries: Take = self._order.take
        self._singly = (self._take_items, 1)  # how `receive` waits
        self._opened = False
        self._shed = self._discarded = 0

    def __repr__(self) -> str:
        return f"<FairQueue: {self._intake.items} of {self._intake.max_items} items, {self._order.backlogged} flows>"

    # Sending

    @enable_ki_protection
    def send_nowait(self, flow: F, item: T, *, cost: float = 1.0, deadline: float = math.inf) -> None:
        """Queue an item, or refuse it at once.

        Args:
            flow: Whose item it is.
            item: Anything.
            cost: The work it is, finite and above 0.
            deadline: When it is not worth serving any more, absolute, by `trio.current_time`.

        Raises:
            Overloaded: Its ``reason`` is ``"queue"`` at the bound of the queue, and ``"flow"`` where this flow holds as
                much as it may while others may still send. ``retry_after`` is estimated from how fast items are taken.
            trio.ClosedResourceError: The queue is closed.

        Cost: 0.1 to 0.2 µs.
        """
        record = self._flows.get(flow)
        if record is None:
            record = self._order.flow(flow)
        intake = self._intake
        count = intake.items
        if count >= intake.soft or cost != 1.0 or record.first is not EMPTY or intake.receivers or deadline != math.inf:
            intake.send_nowait(record, item, cost, deadline)
        else:
            record.first = item
            intake.woken.append(record)
            intake.items = count + 1

    @enable_ki_protection
    async def send(self, flow: F, item: T, *, cost: float = 1.0, deadline: float = math.inf) -> None:
        """Queue an item; wait for a place where there is none.

        Those who wait are served first come, first served within a flow, and the flows in turn.

        Args:
            flow: Whose item it is.
            item: Anything.
            cost: The work it is, finite and above 0.
            deadline: When it is not worth serving any more, absolute, by `trio.current_time`. It does not end the wait.

        Raises:
            trio.ClosedResourceError: The queue is closed, or was closed while this waited.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        record = self._flows.get(flow)
        if record is None:
            record = self._order.flow(flow)
        await self._intake.send(record, item, cost, deadline)

    def open_flow(self, flow: F, *, weight: float | None = None) -> FlowChannel[F, T]:
        """Return a channel that sends to one flow, faster than by the flow's name.

        Args:
            flow: Whose items will be sent.
            weight: The flow's weight from now on; None: what it is.
        """
        if weight is not None:
            check_positive("weight", weight)
        return FlowChannel(self._intake, self._order.flow(flow, weight))

    # Receiving

    def receive_nowait(self) -> T:
        """Return the next item in fair order; its declared cost is booked.

        Raises:
            trio.WouldBlock: There is none now.
            trio.EndOfChannel: The queue is closed, and nothing is left in it.
        """
        return cast(T, self._take_nowait(self._take_items, 1)[0])

    @enable_ki_protection
    async def receive(self) -> T:
        """Wait for the next item in fair order; its declared cost is booked.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        await checkpoint_if_cancelled()
        if self._intake.items:
            taken = self._taken(self._take_items, 1)
            if taken:
                await cancel_shielded_checkpoint()
                return cast(T, taken[0])
        elif self._intake.closed:
            raise trio.EndOfChannel
        task = current_task()
        self._receivers[task] = self._singly

        def leave(_: RaiseCancelT) -> Abort:
            del self._receivers[task]
            return Abort.SUCCEEDED

        return cast(T, await wait_task_rescheduled(leave))

    def receive_batch_nowait(self, max_items: int) -> list[T]:
        """Like `receive_batch`, but raises `trio.WouldBlock` where there is nothing now."""
        return self._take_nowait(self._take_items, max_items)

    async def receive_batch(self, max_items: int) -> list[T]:
        """Wait for items, and return as many as there are, at most ``max_items``, in fair order; at least one.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return await self._take_wait(self._take_items, max_items)

    def receive_delivery_nowait(self) -> Delivery[F, T]:
        """Like `receive_delivery`, but raises `trio.WouldBlock` where there is nothing now."""
        return self._take_nowait(self._take_deliveries, 1)[0]  # type: ignore[no-any-return]

    async def receive_delivery(self) -> Delivery[F, T]:
        """Wait for the next item in fair order, whose true cost the caller will tell by `Delivery.settle`.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return (await self._take_wait(self._take_deliveries, 1))[0]  # type: ignore[no-any-return]

    def receive_deliveries_nowait(self, max_items: int) -> list[Delivery[F, T]]:
        """Like `receive_deliveries`, but raises `trio.WouldBlock` where there is nothing now."""
        return self._take_nowait(self._take_deliveries, max_items)

    async def receive_deliveries(self, max_items: int) -> list[Delivery[F, T]]:
        """Wait for items, and return as many as there are as deliveries, at most ``max_items``, at least one.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return await self._take_wait(self._take_deliveries, max_items)

    def receive_runs_nowait(self, max_items: int, quantum: float) -> list[Run[F, T]]:
        """Take items in runs of one flow each, up to ``quantum`` of estimated work: for a consumer that serves in turn.

        Args:
            max_items: How many at most, ≥ 1.
            quantum: The work of a run, in the unit of the queue, > 0; a dearer item is a run of its own.

        Raises:
            trio.WouldBlock: There is nothing now.
            trio.EndOfChannel: The queue is closed, and nothing is left in it.
        """
        intake = self._intake
        if not intake.items and not intake.closed:
            raise trio.WouldBlock
        if intake.waiting or intake.closed or not self._opened:
            return self._take_nowait(lambda _: take_runs(self._order, 1, quantum), max_items)
        runs = take_runs(self._order, max_items, quantum)
        if not runs:
            raise trio.WouldBlock
        for run in runs:
            self._count(len(run.items))
        return runs

    def put_back(self, run: Run[F, T]) -> bool:
        """Give the items of a run that have not begun back to the front of their flow, to be ordered anew.

        Returns whether there was room for them; where others have taken their places, they stay in the run.
        """
        if self._intake.items + len(run.items) > self._intake.max_items:
            return False
        self._count(-put_back(run))
        return True

    async def receive_run(self, quantum: float) -> Run[F, T]:
        """Wait for an item, and return it as a run; `receive_runs_nowait` then gives more at once.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        run: Run[F, T] = (await self._take_wait(lambda count: take_runs(self._order, count, quantum), 1))[0]
        return run

    def _count(self, taken: int) -> None:
        self._intake.items -= taken
        self._intake.drained += taken

    def _take_nowait(self, take: Take, max_items: int) -> list[Any]:
        taken = self._taken(take, max_items)
        if not taken:
            self._check_empty(max_items)
            raise trio.WouldBlock
        return taken

    def _check_empty(self, max_items: int) -> None:
        if max_items < 1:
            raise ValueError(f"max_items must be at least 1, not {max_items!r}")
        if self._intake.closed and not self._intake.items:
            raise trio.EndOfChannel

    @enable_ki_protection
    def _taken(self, take: Take, max_items: int) -> list[Any]:
        intake = self._intake
        if intake.waiting or intake.closed or not self._opened:
            return self._taken_slowly(take, max_items)
        taken = take(max_items)
        intake.items -= len(taken)
        intake.drained += len(taken)
        return taken

    def _taken_slowly(self, take: Take, max_items: int) -> list[Any]:
        """Take, let senders in, and take what they have sent; see what the first and the last item open or end."""
        intake = self._intake
        taken: list[Any] = []
        while len(taken) < max_items:
            served = self._order.head() if len(intake.blocked) > FEW else None
            more = take(max_items - len(taken) if served is None else 1)
            if not more:
                break
            taken += more
            self._count(len(more))
            if not intake.waiting:
                continue
            for record in list(intake.blocked) if served is None else (served,):
                intake.unblock(record)
            intake.admit()
        if taken and not self._opened:
            self._opened = True
            intake.opened()
        self._end_if_drained()
        return taken

    async def _take_wait(self, take: Take, max_items: int) -> list[Any]:
        await checkpoint_if_cancelled()
        if self._intake.items:
            taken = self._taken(take, max_items)
            if taken:
                await cancel_shielded_checkpoint()
                return taken
        self._check_empty(max_items)
        return await self._park(take, max_items)

    @enable_ki_protection
    async def _park(self, take: Take, max_items: int) -> list[Any]:
        task = current_task()
        self._receivers[task] = (take, max_items)

        def leave(_: RaiseCancelT) -> Abort:
            del self._receivers[task]
            return Abort.SUCCEEDED

        while True:
            item = await wait_task_rescheduled(leave)
            if max_items == 1:
                return [item]
            self._collecting -= max_items
            taken = self._taken(take, max_items)
            if self._receivers:
                self._hand_over()
            if taken:
                return taken
            self._receivers[task] = (take, max_items)  # somebody else was faster
            self._receivers.move_to_end(task, last=False)

    def _hand_through(self, record: Flow[F, T], item: T, cost: float) -> bool:
        """Give an item to the receiver that has waited longest, if that one takes items singly."""
        task, how = self._receivers.popitem(last=False)
        if how is not self._singly or self._order.in_hand or not self._opened:
            self._receivers[task] = how
            self._receivers.move_to_end(task, last=False)
            return False
        self._order.pass_item(record, cost)
        self._intake.drained += 1
        reschedule(task, outcome.Value(item))
        return True

    def _hand_over(self) -> None:
        """Give queued items to waiting receivers, except those a woken receiver is about to collect."""
        while self._receivers and self._intake.items > self._collecting and self._order.head() is not None:
            task, (take, max_items) = self._receivers.popitem(last=False)
            if max_items == 1:
                reschedule(task, outcome.Value(self._taken(take, 1)[0]))
            else:
                self._collecting += max_items
                reschedule(task)

    # Flows as a whole

    @enable_ki_protection
    def charge(self, flow: F, delta: float) -> None:
        """Book work of a flow beyond (or, negative, below) what was declared for it; divided by the flow's weight.

        Raises:
            ValueError: ``delta`` is not finite.
        """
        if not math.isfinite(delta):
            raise ValueError(f"delta must be finite, not {delta!r}")
        self._order.charge(self._order.flow(flow), delta)

    @enable_ki_protection
    def discard(self, flow: F) -> list[T]:
        """Remove the queued items of a flow, whose peer is gone, and return them, oldest first.

        What is in hand stays in hand, what the flow owes it still owes, and a `send` of it that waits goes on waiting,
        for a place that may now be free.
        """
        record = self._flows.get(flow)
        if record is None:
            return []
        items = self._order.discard(record)
        self._intake.items -= len(items)
        self._intake.drained += len(items)
        self._discarded += len(items)
        self._intake.unblock(record)
        self._intake.admit()
        self._hand_over()
        self._end_if_drained()
        return items

    @enable_ki_protection
    def hold(self, flow: F) -> None:
        """Serve nothing of a flow until it is resumed; its items stay queued and count towards the bounds.

        Calls add up: a flow held twice is served after the second `resume`.
        """
        self._order.hold(self._order.flow(flow))

    @enable_ki_protection
    def resume(self, flow: F) -> None:
        """Undo one `hold`. The flow takes its turn from virtual time on; it saved nothing while it was held.

        A flow that is not held is left as it is.
        """
        record = self._flows.get(flow)
        if record is not None and self._order.resume(record):
            self._hand_over()

    # The end

    @enable_ki_protection
    def close(self) -> None:
        """Take nothing more: senders get `trio.ClosedResourceError`, receivers the rest, then `trio.EndOfChannel`.

        Items of held flows still count as queued: receivers wait until they are resumed or discarded.
        """
        if not self._intake.closed:
            self._intake.close()
            self._end_if_drained()

    async def aclose(self) -> None:
        """Do what `close` does.

        Checkpoints: Always; the queue is closed even where it is cancelled.
        """
        self.close()
        await checkpoint()

    def _end_if_drained(self) -> None:
        if self._intake.closed and not self._intake.items:
            while self._receivers:
                task, _ = self._receivers.popitem(last=False)
                reschedule(task, outcome.Error(trio.EndOfChannel()))

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def statistics(self) -> FairQueueStatistics:
        """Return the state of the queue and its counts."""
        order, intake = self._order, self._intake
        return FairQueueStatistics(
            items=intake.items,
            max_items=intake.max_items,
            flows_backlogged=order.backlogged,
            flows_known=len(order.flows),
            in_hand=order.in_hand - len(order.abandoned),
            tasks_waiting_send=intake.waiting,
            tasks_waiting_receive=len(self._receivers),
            sent=intake.items + intake.drained,
            received=intake.drained - self._shed - self._discarded,
            refused=intake.refused,
            shed=self._shed,
            discarded=self._discarded,
            closed=intake.closed,
        )


@final
class FlowChannel(trio.abc.SendChannel[T], Generic[F, T]):
    """Sends items of one flow to a `FairQueue`. Closing it closes neither the queue nor the flow."""

    def __init__(self, intake: Intake[F, T], record: Flow[F, T]) -> None:
        self._intake = intake
        self._record = record
        self._closed = False
        record.pins += 1

    def __del__(self) -> None:
        self.close()

    @property
    def flow(self) -> F:
        """The flow it sends to."""
        return self._record.key

    @property
    def backlog(self) -> int:
        """Items of this flow queued now."""
        return len(self._record)

    @enable_ki_protection
    def send_nowait(self, item: T, cost: float = 1.0) -> None:
        """Queue an item, or refuse it at once: `FairQueue.send_nowait`.

        Raises:
            Overloaded: At a bound.
            trio.ClosedResourceError: The channel or its queue is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError("the channel is closed")
        record, intake = self._record, self._intake
        count = intake.items
        if count >= intake.soft or cost != 1.0 or intake.receivers:
            intake.send_nowait(record, item, cost)
            return
        if record.first is EMPTY:
            record.first = item
            intake.woken.append(record)
        else:
            rest = record.rest
            if rest is None or len(rest) >= intake.rest_bound or record.costs is not None:
                intake.send_nowait(record, item, cost)
                return
            rest.append(item)
        intake.items = count + 1

    @enable_ki_protection
    def send_many_nowait(self, items: Sequence[T], cost: float = 1.0) -> int:
        """Queue as many items as there are places for, in order, and return their number; the rest is refused.

        Args:
            items: What to send.
            cost: The work each of them is, finite and above 0.

        Raises:
            trio.ClosedResourceError: The channel or its queue is closed.

        Cost: 0.02 µs per item beyond the first.
        """
        if self._closed:
            raise trio.ClosedResourceError("the channel is closed")
        return self._intake.send_many_nowait(self._record, items, cost)

    @enable_ki_protection
    async def send(self, value: T, cost: float = 1.0) -> None:
        """Queue an item; wait for a place where there is none: `FairQueue.send`.

        Raises:
            trio.ClosedResourceError: The channel or its queue is closed.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        if self._closed:
            raise trio.ClosedResourceError("the channel is closed")
        await checkpoint_if_cancelled()
        intake, record = self._intake, self._record
        if intake.items < intake.soft and record.first is EMPTY and record.waiters is None:
            if cost == 1.0 and not intake.receivers:
                record.first = value
                intake.woken.append(record)
                intake.items += 1
            else:
                intake.put(record, value, check_positive("cost", cost))
            await cancel_shielded_checkpoint()
        else:
            await intake.send(record, value, cost)

    def close(self) -> None:
        """Send nothing more through this channel. What is queued stays queued."""
        if not self._closed:
            self._closed = True
            self._record.pins -= 1

    async def aclose(self) -> None:
        """Do what `close` does.

        Checkpoints: Always; the channel is closed even where it is cancelled.
        """
        self.close()
        await checkpoint()
