"""A bounded queue whose consumers are shared fairly among flows, by work.

`FairQueue` puts together what other modules do: `stagetrio.fair_order` decides who is next (and `stagetrio.priority`
among classes), `stagetrio.intake` what is let in, `stagetrio.outlet` who gets it, and `stagetrio.sojourn` what is not
worth serving any more.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Generic, Literal, cast

import attrs
import trio
from trio.lowlevel import checkpoint, enable_ki_protection

from stagetrio.amounts import check_count
from stagetrio.fair_order import FairOrder
from stagetrio.flow import EMPTY, MOST, Delivery, F, T, check_positive
from stagetrio.intake import FlowChannel, Intake
from stagetrio.longest import Longest
from stagetrio.outlet import Outlet
from stagetrio.priority import PriorityClass, PriorityOrder
from stagetrio.runs import Run, put_back, take_runs
from stagetrio.sojourn import CoDel, OnShed, Sojourn, bare, check_codel

__all__ = ["CoDel", "Delivery", "FairQueue", "FairQueueStatistics", "FlowChannel", "PriorityClass"]


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
        weight: The weight of a flow (from 1e-60 to 1e60), asked when the flow is first seen; None: all weigh 1.0.
        overflow: What happens to a `send` for which there is no place. ``"wait"``: it waits. ``"refuse"``: it gets
            `Overloaded`, as `send_nowait` does in any case. ``"evict"``: where ``max_items`` is the bound, the flow
            with the most items loses its newest one to ``on_shed``, and only where it is the one that sends, it waits.
        codel: How long items may wait before they are shed; None: as long as it takes. A class has its own.
        classes: Priority classes, the one that is served first first; none: all flows are in one.
        class_of: The name of a flow's class, asked when the flow is first seen; needed where there are classes.
        on_shed: Called with each item that was accepted and will not be served, and the reason: ``"deadline"``,
            ``"sojourn"`` or ``"evicted"``. It must not raise: an exception comes out of whatever call shed the item.
    """

    def __init__(
        self,
        max_items: float,
        *,
        max_items_per_flow: float = math.inf,
        weight: Callable[[F], float] | None = None,
        overflow: Literal["wait", "refuse", "evict"] = "wait",
        codel: CoDel | None = None,
        classes: Sequence[PriorityClass] = (),
        class_of: Callable[[F], str] | None = None,
        on_shed: OnShed | None = None,
    ) -> None:
        for name, function in (("weight", weight), ("class_of", class_of), ("on_shed", on_shed)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable or None, not {function!r}")
        if overflow not in ("wait", "refuse", "evict"):
            raise ValueError(f'overflow must be "wait", "refuse" or "evict", not {overflow!r}')
        check_codel(codel)
        if bool(classes) != (class_of is not None):
            raise ValueError(f"classes and class_of must be given together, not {classes!r} and {class_of!r}")
        self._order: FairOrder[F, T] | PriorityOrder[F, T] = (
            FairOrder(weight=weight) if class_of is None else PriorityOrder(classes, class_of, weight)
        )
        self._codel = codel
        self._on_shed = on_shed
        self._flows = self._order.flows
        self._intake: Intake[F, T] = Intake(self._order, max_items, max_items_per_flow)
        self._intake.evicts = overflow == "evict"
        self._intake.refuses = overflow == "refuse"
        self._outlet = self._intake.other_end = Outlet(self._order, self._intake, self._make_sojourn)
        self._shed = self._discarded = 0
        if class_of is not None:
            self._intake.go_slow()
        if overflow == "evict" or codel is not None or any(each.codel is not None for each in classes):
            self._outlet.begin_to_shed()

    def __repr__(self) -> str:
        return f"<FairQueue: {self._intake.items} of {self._intake.max_items} items, {self._order.backlogged} flows>"

    @property
    def backlog(self) -> int:
        """Items queued now, of all flows."""
        return self._intake.items

    def _make_sojourn(self) -> Sojourn[F, T]:
        order = self._order
        classes = [order] if isinstance(order, FairOrder) else order.codel
        return Sojourn(
            order,
            codel=(lambda _: self._codel)
            if isinstance(order, FairOrder)
            else lambda each: order.codel[each] or self._codel,
            longest={each: Longest() for each in classes} if self._intake.evicts else {},
            on_drop=self._drop,
            on_shed=self._on_shed,
        )

    def _drop(self) -> None:
        self._outlet.count(1)
        self._shed += 1

    # Sending

    @enable_ki_protection
    def send_nowait(self, flow: F, item: T, *, cost: float = 1.0, deadline: float = math.inf) -> None:
        """Queue an item, or refuse it at once.

        Args:
            flow: Whose item it is.
            item: Anything.
            cost: The work it is, from 1e-60 to 1e60.
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
        """Queue an item; wait for a place where there is none, unless ``overflow`` says that nobody waits.

        Those who wait are served first come, first served within a flow, and the flows in turn.

        Args:
            flow: Whose item it is.
            item: Anything.
            cost: The work it is, from 1e-60 to 1e60.
            deadline: When it is not worth serving any more, absolute, by `trio.current_time`. It does not end the wait.

        Raises:
            trio.ClosedResourceError: The queue is closed, or was closed while this waited.
            Overloaded: There is no place, and the queue was made with ``overflow="refuse"``.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        record = self._flows.get(flow)
        if record is None:
            record = self._order.flow(flow)
        await self._intake.send(record, item, cost, deadline)

    @enable_ki_protection
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
        return cast(T, self._outlet.take_nowait(self._outlet.take_items, 1)[0])

    @enable_ki_protection
    async def receive(self) -> T:
        """Wait for the next item in fair order; its declared cost is booked.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return cast(T, await self._outlet.receive())

    def receive_batch_nowait(self, max_items: int) -> list[T]:
        """Like `receive_batch`, but raises `trio.WouldBlock` where there is nothing now."""
        if type(max_items) is not int or max_items < 1:
            check_count("max_items", max_items, 1)
        return self._outlet.take_nowait(self._outlet.take_items, max_items)

    async def receive_batch(self, max_items: int) -> list[T]:
        """Wait for items, and return as many as there are, at most ``max_items``, in fair order; at least one.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        if type(max_items) is not int or max_items < 1:
            check_count("max_items", max_items, 1)
        return await self._outlet.take(self._outlet.take_items, max_items)

    def receive_delivery_nowait(self) -> Delivery[F, T]:
        """Like `receive_delivery`, but raises `trio.WouldBlock` where there is nothing now."""
        return self._outlet.take_nowait(self._outlet.take_deliveries, 1)[0]  # type: ignore[no-any-return]

    async def receive_delivery(self) -> Delivery[F, T]:
        """Wait for the next item in fair order, whose true cost the caller will tell by `Delivery.settle`.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        return (await self._outlet.take(self._outlet.take_deliveries, 1))[0]  # type: ignore[no-any-return]

    def receive_deliveries_nowait(self, max_items: int) -> list[Delivery[F, T]]:
        """Like `receive_deliveries`, but raises `trio.WouldBlock` where there is nothing now."""
        if type(max_items) is not int or max_items < 1:
            check_count("max_items", max_items, 1)
        return self._outlet.take_nowait(self._outlet.take_deliveries, max_items)

    async def receive_deliveries(self, max_items: int) -> list[Delivery[F, T]]:
        """Wait for items, and return as many as there are as deliveries, at most ``max_items``, at least one.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        if type(max_items) is not int or max_items < 1:
            check_count("max_items", max_items, 1)
        return await self._outlet.take(self._outlet.take_deliveries, max_items)

    @enable_ki_protection
    def receive_runs_nowait(self, max_items: int, quantum: float) -> list[Run[F, T]]:
        """Take items in runs of one flow each, up to ``quantum`` of estimated work: for a consumer that serves in turn.

        Args:
            max_items: How many at most, ≥ 1.
            quantum: The work of a run, in the unit of the queue, ≥ 0; a dearer item is a run of its own.

        Raises:
            trio.WouldBlock: There is nothing now.
            trio.EndOfChannel: The queue is closed, and nothing is left in it.
        """
        if not (max_items >= 1 and quantum >= 0):
            raise ValueError(f"max_items must be at least 1 and quantum at least 0, not {max_items!r} and {quantum!r}")
        if not self._intake.items and not self._intake.closed:
            raise trio.WouldBlock
        if self._outlet.hurried and isinstance(self._order, FairOrder):
            runs = take_runs(self._order, max_items, quantum)
            if not runs:
                raise trio.WouldBlock
            for run in runs:
                self._outlet.count(len(run.items))
            return runs
        return self._outlet.take_nowait(self._take_run(quantum), max_items)

    def _take_run(self, quantum: float) -> Callable[[int], list[Run[F, T]]]:
        def take(_: int) -> list[Run[F, T]]:
            sojourn = self._outlet.sojourn
            record = self._order.head() if sojourn is None or sojourn.clear() else None
            if record is None:
                return []
            runs: list[Run[F, T]] = take_runs(record.order, 1, quantum)
            for run in runs:
                run.items[0] = bare(run.items[0])
            return runs

        return take

    @enable_ki_protection
    def put_back(self, run: Run[F, T]) -> bool:
        """Give the items of a run that have not begun back to the front of their flow, to be ordered anew.

        Returns whether there was room for them; where others have taken their places, they stay in the run.
        """
        if self._intake.items + len(run.items) > self._intake.max_items:
            return False
        self._outlet.count(-put_back(run))
        return True

    async def receive_run(self, quantum: float) -> Run[F, T]:
        """Wait for an item, and return it as a run; `receive_runs_nowait` then gives more at once.

        Raises:
            trio.EndOfChannel: The queue is closed, and nothing is left in it.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        run: Run[F, T] = (await self._outlet.take(self._take_run(quantum), 1))[0]
        return run

    # Flows as a whole

    @enable_ki_protection
    def charge(self, flow: F, delta: float) -> None:
        """Book work of a flow beyond (or, negative, below) what was declared for it; divided by the flow's weight.

        Raises:
            ValueError: ``delta`` is not finite, or beyond 1e60.
        """
        if not -MOST <= delta <= MOST:
            raise ValueError(f"delta must be finite and at most {MOST} either way, not {delta!r}")
        record = self._order.flow(flow)
        record.order.charge(record, delta)

    @enable_ki_protection
    def discard(self, flow: F) -> list[T]:
        """Remove the queued items of a flow, whose peer is gone, and return them, oldest first.

        What is in hand stays in hand, what the flow owes it still owes, and a `send` of it that waits goes on waiting,
        for a place that may now be free.
        """
        record = self._flows.get(flow)
        if record is None:
            return []
        items = [bare(item) for item in record.order.discard(record)]
        self._outlet.count(len(items))
        self._discarded += len(items)
        self._outlet.settle_ends()
        self._outlet.hand_over()
        return items

    @enable_ki_protection
    def hold(self, flow: F) -> None:
        """Serve nothing of a flow until it is resumed; its items stay queued and count towards the bounds.

        Calls add up: a flow held twice is served after the second `resume`.
        """
        record = self._order.flow(flow)
        record.order.hold(record)

    @enable_ki_protection
    def resume(self, flow: F) -> None:
        """Undo one `hold`. The flow takes its turn from virtual time on; it saved nothing while it was held.

        A flow that is not held is left as it is.
        """
        record = self._flows.get(flow)
        if record is not None and record.order.resume(record):
            self._outlet.hand_over()

    # The end

    @enable_ki_protection
    def close(self) -> None:
        """Take nothing more: senders get `trio.ClosedResourceError`, receivers the rest, then `trio.EndOfChannel`.

        Items of held flows still count as queued: receivers wait until they are resumed or discarded.
        """
        if not self._intake.closed:
            self._intake.close(trio.ClosedResourceError)
            self._outlet.settle_ends()

    @enable_ki_protection
    def break_off(self) -> None:
        """Take nothing more, since nobody will receive: a sender that waits gets `trio.BrokenResourceError`."""
        if not self._intake.closed:
            self._intake.close(trio.BrokenResourceError)
            self._outlet.settle_ends()

    async def aclose(self) -> None:
        """Do what `close` does.

        Checkpoints: Always; the queue is closed even where it is cancelled.
        """
        self.close()
        await checkpoint()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return cast(T, await self._outlet.receive())
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
            in_hand=order.in_hand - order.lost,
            tasks_waiting_send=intake.waiting,
            tasks_waiting_receive=len(intake.receivers),
            sent=intake.items + intake.drained,
            received=intake.drained - self._shed - self._discarded,
            refused=intake.refused,
            shed=self._shed,
            discarded=self._discarded,
            closed=intake.closed,
        )
