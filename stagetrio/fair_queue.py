"""A bounded queue whose consumers are shared fairly among flows, by work.

Theory of operation
===================

`FairOrder` decides who is next; this module adds what needs an event loop: the bounds, and the tasks that wait at
both ends.

**Hand-over.** Whoever makes something possible does it on behalf of the one who waits for it, in the same synchronous
step: a send gives its item to a waiting receiver, a receive puts the item of a waiting sender into the place it has
freed. A task that waits either has been served, and then its cancellation comes too late, or it has not, and then
leaving the line undoes everything. So no wake-up can be lost, whatever is cancelled when, and nothing is done in an
``abort_fn`` except leaving the line. A receiver of batches is handed its first item; what comes until it runs is left
for it (``_collecting``), so that a burst wakes one task and not all of them.

**The bounds.** Below `_soft` items, and while no receiver waits, a send is an append. From there on `_refusal`
decides: by the bound of the flow, by the bound of the queue, and by the *reserve*. The X otherwise one flow that sends
faster than it is served would fill the queue, and the polite ones would be refused on its account. The reserve opens
with the first receive (a queue nobody has read from is being filled, not overloaded), and it does not exist for a flow
that is alone.

**Waiting senders** stand in one line per flow; the lines take turns. A flow at its own bound leaves the turn until one
of its items has been taken.

Source: trio's memory channel for the hand-over; Choudhury and Hahne, "Dynamic queue length thresholds", 1998, for
what a shared buffer needs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, cast, final

import attrs
import outcome
import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from stagetrio.fair_order import FairOrder
from stagetrio.flow import EMPTY, Delivery, F, Flow, T, check_positive
from stagetrio.limiter import Overloaded
from stagetrio.runs import Run, put_back, take_runs

PILE = 32  # items up to which a flow is never thought to crowd others out

__all__ = ["Delivery", "FairQueue", "FairQueueStatistics", "FlowChannel"]


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


def _check_bound(name: str, value: float) -> float:
    if value != math.inf and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be an int or math.inf, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    return value


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
        self._max_items = _check_bound("max_items", max_items)
        self._flow_bound = _check_bound("max_items_per_flow", max_items_per_flow)
        if weight is not None and not callable(weight):
            raise TypeError(f"weight must be callable or None, not {weight!r}")
        self._order: FairOrder[F, T] = FairOrder(weight=weight)
        self._flows = self._order.flows
        self._woken = self._order.woken
        self._rest_bound = self._flow_bound - 1  # of the items behind a flow's first
        self._items = 0
        self._reserve = max(0, (int(max_items) - 64) // 8) if max_items != math.inf else 0
        self._soft = max_items  # up to here a send needs no decision; -1 when closed
        self._receivers: OrderedDict[Task, tuple[Callable[[int], list[Any]], int]] = OrderedDict()
        self._collecting = 0  # items that receivers woken and not yet run may still take
        self._lines: OrderedDict[Flow[F, T], None] = OrderedDict()  # flows with waiting senders, next turn first
        self._waiting_senders = 0
        self._closed = False
        self._received = self._refused = self._shed = self._discarded = 0
        self._measured: tuple[float, int] | None = None  # when, and after how many items, the drain was measured
        self._drain_rate = 0.0

    def __repr__(self) -> str:
        return f"<FairQueue: {self._items} of {self._max_items} items, {self._order.backlogged} flows>"

    # Sending

    @enable_ki_protection
    def send_nowait(self, flow: F, item: T, *, cost: float = 1.0) -> None:
        """Queue an item, or refuse it at once.

        Args:
            flow: Whose item it is.
            item: Anything.
            cost: The work it is, finite and above 0.

        Raises:
            Overloaded: Its ``reason`` is ``"queue"`` at the bound of the queue, and ``"flow"`` where this flow holds as
                much as it may while others may still send.
            trio.ClosedResourceError: The queue is closed.

        Cost: 0.1 to 0.2 µs.
        """
        record = self._flows.get(flow)
        if record is None:
            record = self._order.flow(flow)
        count = self._items
        if count < self._soft and cost == 1.0 and record.first is EMPTY:
            record.first = item
            self._woken.append(record)
            self._items = count + 1
            if self._receivers:
                self._hand_over()
        else:
            self._send(record, item, cost)

    @enable_ki_protection
    def _send(self, record: Flow[F, T], item: T, cost: float) -> None:
        if cost != 1.0:
            check_positive("cost", cost)
        if self._items >= self._soft or len(record) >= self._flow_bound:
            self._decide(record)
        self._order.push(record, item, cost)
        self._items += 1
        if self._receivers:
            self._hand_over()

    @enable_ki_protection
    def _send_many(self, record: Flow[F, T], items: Sequence[T], cost: float) -> int:
        check_positive("cost", cost)
        bound = min(self._soft - self._items, self._flow_bound - len(record), len(items))
        easy = 0
        if bound > 1 and cost == 1.0 and record.costs is None:
            easy = int(bound)
            self._order.push(record, items[0], cost)
            record.extend(list(items[1:easy]))
            self._items += easy
            if self._receivers:
                self._hand_over()
        for sent in range(easy, len(items)):
            try:
                self._send(record, items[sent], cost)
            except Overloaded:
                self._refused += len(items) - sent - 1
                return sent
        return len(items)

    def _decide(self, record: Flow[F, T]) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the queue is closed")
        reason = self._refusal(record)
        if reason is not None:
            self._refused += 1
            raise Overloaded(reason, self._retry_after())

    def _refusal(self, record: Flow[F, T]) -> str | None:
        count, own = self._items, len(record)
        if own >= self._flow_bound:
            return "flow"
        if count >= self._max_items:
            return "queue"
        if own >= PILE and len(self._flows) > 1 and own * (self._order.backlogged + 1) >= self._max_items:
            return "flow"
        return None

    def _retry_after(self) -> float:
        """Seconds until this flow's turn will have freed a place, from how fast items were taken lately."""
        now = _now()
        if self._measured is None:
            return 0.0
        then, taken = self._measured
        if now - then >= 0.1 and self._received > taken:
            rate = (self._received - taken) / (now - then)
            self._drain_rate = rate if not self._drain_rate else (self._drain_rate + rate) / 2
            self._measured = now, self._received
        return max(1, self._order.backlogged) / self._drain_rate if self._drain_rate else 0.0

    async def send(self, flow: F, item: T, *, cost: float = 1.0) -> None:
        """Queue an item; wait for a place where there is none.

        Those who wait are served first come, first served within a flow, and the flows in turn.

        Args:
            flow: Whose item it is.
            item: Anything.
            cost: The work it is, finite and above 0.

        Raises:
            trio.ClosedResourceError: The queue is closed, or was closed while this waited.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        record = self._flows.get(flow)
        if record is None:
            record = self._order.flow(flow)
        await self._send_wait(record, item, cost)

    @enable_ki_protection
    async def _send_wait(self, record: Flow[F, T], item: T, cost: float) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if not record.waiters:
            full = self._items >= self._soft or len(record) >= self._flow_bound
            if not full or (not self._closed and self._refusal(record) is None):
                self._send(record, item, cost)
                await trio.lowlevel.cancel_shielded_checkpoint()
                return
        if self._closed:
            raise trio.ClosedResourceError("the queue is closed")
        check_positive("cost", cost)
        task = current_task()
        line: OrderedDict[Task, tuple[T, float]] | None = record.waiters
        if line is None:
            line = record.waiters = OrderedDict()
            self._lines[record] = None
        line[task] = (item, cost)
        self._waiting_senders += 1

        def leave(_: RaiseCancelT) -> Abort:
            del line[task]
            self._left(record)
            return Abort.SUCCEEDED

        await wait_task_rescheduled(leave)

    def _left(self, record: Flow[F, T]) -> None:
        self._waiting_senders -= 1
        if not record.waiters:
            record.waiters = None
            self._lines.pop(record, None)

    def _admit(self) -> None:
        """Put items of waiting senders into the places that are free, one of each flow in turn."""
        lines = self._lines
        unlucky = 0  # lines looked at since the last one that was served
        while unlucky < len(lines):
            record = next(iter(lines))
            reason = self._refusal(record)
            if reason == "queue":
                return
            if reason is None:
                unlucky = 0
                task, (item, cost) = record.waiters.popitem(last=False)
                self._left(record)
                self._order.push(record, item, cost)
                self._items += 1
                reschedule(task)
                if record not in lines:
                    continue
            elif len(record) >= self._flow_bound:
                del lines[record]  # until one of its items is taken
                continue
            else:
                unlucky += 1
            lines.move_to_end(record)

    def open_flow(self, flow: F, *, weight: float | None = None) -> FlowChannel[F, T]:
        """Return a channel that sends to one flow, faster than by the flow's name.

        Args:
            flow: Whose items will be sent.
            weight: The flow's weight from now on; None: what it is.
        """
        if weight is not None:
            check_positive("weight", weight)
        return FlowChannel(self, self._order.flow(flow, weight))

    # Receiving

    def receive_nowait(self) -> T:
        """Return the next item in fair order; its declared cost is booked.

        Raises:
            trio.WouldBlock: There is none now.
            trio.EndOfChannel: The queue is closed, and nothing is left in it.
        """
        return cast(T, self._take_nowait(self._order.take_items, 1)[0])

    async def receive(self) -> T:
        """Wait for the next item in fair order; its declared cost is booked.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return (await self._take_wait(self._order.take_items, 1))[0]  # type: ignore[no-any-return]

    def receive_batch_nowait(self, max_items: int) -> list[T]:
        """Like `receive_batch`, but raises `trio.WouldBlock` where there is nothing now."""
        return self._take_nowait(self._order.take_items, max_items)

    async def receive_batch(self, max_items: int) -> list[T]:
        """Wait for items, and return as many as there are, at most ``max_items``, in fair order; at least one.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return await self._take_wait(self._order.take_items, max_items)

    def receive_delivery_nowait(self) -> Delivery[F, T]:
        """Like `receive_delivery`, but raises `trio.WouldBlock` where there is nothing now."""
        return self._take_nowait(self._order.take, 1)[0]  # type: ignore[no-any-return]

    async def receive_delivery(self) -> Delivery[F, T]:
        """Wait for the next item in fair order, whose true cost the caller will tell by `Delivery.settle`.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return (await self._take_wait(self._order.take, 1))[0]  # type: ignore[no-any-return]

    def receive_deliveries_nowait(self, max_items: int) -> list[Delivery[F, T]]:
        """Like `receive_deliveries`, but raises `trio.WouldBlock` where there is nothing now."""
        return self._take_nowait(self._order.take, max_items)

    async def receive_deliveries(self, max_items: int) -> list[Delivery[F, T]]:
        """Wait for items, and return as many as there are as deliveries, at most ``max_items``, at least one.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return await self._take_wait(self._order.take, max_items)

    def receive_runs_nowait(self, max_items: int, quantum: float) -> list[Run[F, T]]:
        """Take items in runs of one flow each, up to ``quantum`` of estimated work: for a consumer that serves in turn.

        Args:
            max_items: How many at most, ≥ 1.
            quantum: The work of a run, in the unit of the queue, > 0; a dearer item is a run of its own.

        Raises:
            trio.WouldBlock: There is nothing now.
            trio.EndOfChannel: The queue is closed, and nothing is left in it.
        """

        def take(count: int) -> list[Run[F, T]]:
            return take_runs(self._order, count, quantum)

        if self._waiting_senders or self._closed or not self._received:
            return self._take_nowait(take, max_items)
        runs = take(max_items)
        if not runs:
            raise trio.WouldBlock
        for run in runs:
            self._items -= len(run.items)
            self._received += len(run.items)
        return runs

    def put_back(self, run: Run[F, T]) -> None:
        """Give the items of a run that have not begun back to the front of their flow, to be ordered anew.

        They count as queued again, also where others have taken their places.
        """
        count = put_back(run)
        self._items += count
        self._received -= count

    async def receive_run(self, quantum: float) -> Run[F, T]:
        """Wait for an item, and return it as a run; `receive_runs_nowait` then gives more at once.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        run: Run[F, T] = (await self._take_wait(lambda count: take_runs(self._order, count, quantum), 1))[0]
        return run

    def _take_nowait(self, take: Callable[[int], list[Any]], max_items: int) -> list[Any]:
        taken = self._taken(take, max_items)
        if not taken:
            if max_items < 1:
                raise ValueError(f"max_items must be at least 1, not {max_items!r}")
            if self._closed and not self._items:
                raise trio.EndOfChannel
            raise trio.WouldBlock
        return taken

    @enable_ki_protection
    def _taken(self, take: Callable[[int], list[Any]], max_items: int) -> list[Any]:
        if self._waiting_senders or self._closed or not self._received:
            return self._taken_singly(take, max_items)
        taken = take(max_items)
        self._items -= len(taken)
        self._received += len(taken)
        return taken

    def _taken_singly(self, take: Callable[[int], list[Any]], max_items: int) -> list[Any]:
        """Take one by one, since each may let a sender in; and see what the first and the last one open or end."""
        taken: list[Any] = []
        while len(taken) < max_items:
            record = self._order.head()
            if record is None:
                break
            taken += take(1)
            self._items -= 1
            self._received += 1
            if record.waiters is not None:
                self._lines[record] = None
            if self._lines:
                self._admit()
        if taken and not self._closed and self._measured is None:
            self._soft = self._max_items - self._reserve
            self._measured = _now(), 0
        self._end_if_drained()
        return taken

    async def _take_wait(self, take: Callable[[int], list[Any]], max_items: int) -> list[Any]:
        await trio.lowlevel.checkpoint_if_cancelled()
        taken = self._taken(take, max_items)
        if taken:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return taken
        if max_items < 1:
            raise ValueError(f"max_items must be at least 1, not {max_items!r}")
        if self._closed and not self._items:
            raise trio.EndOfChannel
        return await self._park(take, max_items)

    @enable_ki_protection
    async def _park(self, take: Callable[[int], list[Any]], max_items: int) -> list[Any]:
        task = current_task()
        self._receivers[task] = (take, max_items)

        def leave(_: RaiseCancelT) -> Abort:
            del self._receivers[task]
            return Abort.SUCCEEDED

        taken: list[Any] = await wait_task_rescheduled(leave)
        if max_items > 1:
            self._collecting -= max_items - 1
            taken += self._taken(take, max_items - 1)
            self._hand_over()
        return taken

    def _hand_over(self) -> None:
        """Give queued items to waiting receivers, except those a woken receiver is about to collect."""
        while self._receivers and self._items > self._collecting:
            if self._order.head() is None:
                return
            task, (take, max_items) = self._receivers.popitem(last=False)
            self._collecting += max_items - 1
            reschedule(task, outcome.Value(self._taken(take, 1)))

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
        self._items -= len(items)
        self._discarded += len(items)
        if record.waiters is not None:
            self._lines[record] = None
        self._admit()
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
        if self._closed:
            return
        self._closed = True
        self._soft = -1
        for record in list(self._flows.values()):
            for task in record.waiters or ():
                reschedule(task, outcome.Error(trio.ClosedResourceError("the queue was closed")))
            record.waiters = None
        self._lines.clear()
        self._waiting_senders = 0
        self._end_if_drained()

    async def aclose(self) -> None:
        """Do what `close` does.

        Checkpoints: Always; the queue is closed even where it is cancelled.
        """
        self.close()
        await trio.lowlevel.checkpoint()

    def _end_if_drained(self) -> None:
        if self._closed and not self._items:
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
        order = self._order
        gone = self._received + self._shed + self._discarded
        return FairQueueStatistics(
            items=self._items,
            max_items=self._max_items,
            flows_backlogged=order.backlogged,
            flows_known=len(order.flows),
            in_hand=order.in_hand - len(order.abandoned),
            tasks_waiting_send=self._waiting_senders,
            tasks_waiting_receive=len(self._receivers),
            sent=gone + self._items,
            received=self._received,
            refused=self._refused,
            shed=self._shed,
            discarded=self._discarded,
            closed=self._closed,
        )


def _now() -> float:
    return trio.current_time() if trio.lowlevel.in_trio_run() else 0.0


@final
class FlowChannel(trio.abc.SendChannel[T], Generic[F, T]):
    """Sends items of one flow to a `FairQueue`. Closing it closes neither the queue nor the flow."""

    def __init__(self, queue: FairQueue[F, T], record: Flow[F, T]) -> None:
        self._queue = queue
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

    def send_nowait(self, item: T, cost: float = 1.0) -> None:
        """Queue an item, or refuse it at once: `FairQueue.send_nowait`.

        Raises:
            Overloaded: At a bound.
            trio.ClosedResourceError: The channel or its queue is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError("the channel is closed")
        record, queue = self._record, self._queue
        count = queue._items
        if count >= queue._soft or cost != 1.0:
            queue._send(record, item, cost)
            return
        if record.first is EMPTY:
            record.first = item
            queue._woken.append(record)
        else:
            rest = record.rest
            if rest is None or len(rest) >= queue._rest_bound or record.costs is not None:
                queue._send(record, item, cost)
                return
            rest.append(item)
        queue._items = count + 1
        if queue._receivers:
            queue._hand_over()

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
        return self._queue._send_many(self._record, items, cost)

    async def send(self, value: T, cost: float = 1.0) -> None:
        """Queue an item; wait for a place where there is none: `FairQueue.send`.

        Raises:
            trio.ClosedResourceError: The channel or its queue is closed.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        if self._closed:
            raise trio.ClosedResourceError("the channel is closed")
        await self._queue._send_wait(self._record, value, cost)

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
        await trio.lowlevel.checkpoint()
