"""The way into a fair queue: its bounds, and the senders that wait at them.

Theory of operation
===================

**The fast way.** Below `Intake.soft` items, and while no receiver waits, a send is an append. Whoever sends much does
it inline (`stagetrio.fair_queue`), against the attributes of this class; everything else comes through its methods.

**The bounds.** From ``soft`` on, `Intake.refusal` decides: by the bound of the flow, by the bound of the queue, and by
the *reserve*. The last eighth of the places beyond the first 64 is kept for flows that do not pile up; otherwise one
flow that sends faster than it is served would fill the queue, and the polite ones would be refused on its account. A
flow piles up when it holds `PILE` items or more, and more than its equal share of the queue, one more flow counted. The
reserve opens with the first receive (a queue nobody has read from is being filled, not overloaded), and does not exist
for a flow that is alone.

**Waiting senders** stand in one line per flow, and the lines take turns, so a flow with a thousand waiting tasks holds
up nobody else's. Whoever frees a place puts the next one's item into it, in the same synchronous step. A sender that
waits either has been served, and then its cancellation comes too late, or has not, and then leaving the line undoes
everything. A line whose flow is at its own bound leaves the turn until one of the flow's items has been taken.

Source: trio's memory channel for the hand-over; Choudhury and Hahne, "Dynamic queue length thresholds in a shared
memory ATM switch", 1998, for what a shared buffer needs.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Generic, Protocol, final

import outcome
import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from stagetrio.flow import EMPTY, F, Flow, T, check_positive
from stagetrio.overload import Overloaded

PILE = 32  # items up to which no flow is thought to pile up
WINDOW = 1.0  # seconds over which the drain is measured
LONGEST_RETRY = 60.0  # seconds


def now() -> float:
    """Trio's time; outside of Trio, where nothing waits and nothing is measured, 0."""
    return trio.current_time() if trio.lowlevel.in_trio_run() else 0.0


def check_bound(name: str, value: float) -> float:
    """Return a bound, or raise a `TypeError` or `ValueError` that names it."""
    if value != math.inf and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be an int or math.inf, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    return value


def check_deadline(value: float) -> float:
    """Return a deadline, or raise a `TypeError` or `ValueError` that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"deadline must be a number, not {value!r}")
    if math.isnan(value):
        raise ValueError(f"deadline must be a time, not {value!r}")
    return value


class Order(Protocol):
    """What takes the items."""

    flows: dict[Any, Flow[Any, Any]]
    woken: list[Flow[Any, Any]]

    @property
    def backlogged(self) -> int: ...

    def push(self, record: Flow[Any, Any], item: Any, cost: float) -> None: ...


class Shedder(Protocol):
    """What sheds items; see `stagetrio.sojourn`."""

    def stamp(self, record: Flow[Any, Any], item: Any, deadline: float) -> Any: ...

    def make_room(self, record: Flow[Any, Any]) -> bool: ...


class Receivers(Protocol):
    """The other end."""

    def hand_over(self) -> None:
        """Called when there are items and receivers that wait."""

    def hand_through(self, record: Flow[Any, Any], item: Any, cost: float) -> bool:
        """Called when a receiver waits and nothing is queued; tells whether it was given the item."""

    def begin_to_shed(self) -> None:
        """Called when an item has a deadline and there is no shedder yet, which there is afterwards."""


class Intake(Generic[F, T]):
    """Counts what is queued and decides what more is let in.

    Args:
        order: Where the items go.
        max_items: Items queued at once, over all flows.
        max_items_per_flow: Items of one flow queued at once.
    """

    def __init__(
        self,
        order: Order,
        max_items: float,
        max_items_per_flow: float,
    ) -> None:
        self.order = order
        self.max_items = check_bound("max_items", max_items)
        self._flow_bound = check_bound("max_items_per_flow", max_items_per_flow)
        self.rest_bound = self._flow_bound - 1  # of the items behind a flow's first
        self._reserve = max(0, (int(max_items) - 64) // 8) if max_items != math.inf else 0
        self.woken = order.woken
        self.other_end: Receivers
        self.receivers: OrderedDict[Task, Any] = OrderedDict()  # those that wait there
        self.items = 0
        self.soft = self.max_items  # up to here a send needs no decision; -1: always one
        self.shedder: Shedder | None = None
        self._fast = True
        self.closed = False
        self.waiting = 0  # tasks
        self.evicts = False  # the longest flow gives way instead
        self.refuses = False  # nobody waits
        self._lines: OrderedDict[Flow[F, T], None] = OrderedDict()  # flows with waiting senders, next turn first
        self.blocked: set[Flow[F, T]] = set()  # those of them that are at their own bound
        self.drained = self.refused = 0
        self._measured: tuple[float, int] | None = None  # when, and after how many items, the window began
        self._rate = 0.0

    def go_slow(self, shedder: Shedder | None = None) -> None:
        """Let every item come through the methods, because there are classes, or because a shedder stamps it."""
        self.soft = -1
        self._fast = False
        self.shedder = shedder

    def opened(self) -> None:
        """Take note of the first receive."""
        self._measured = now(), self.drained
        if self.soft > 0 and self.max_items != math.inf:
            self.soft = self.max_items - self._reserve

    def send_nowait(self, record: Flow[F, T], item: T, cost: float, deadline: float = math.inf) -> None:
        """Queue an item, or refuse it.

        Raises:
            Overloaded: At a bound.
            trio.ClosedResourceError: Nothing more is let in.
        """
        if cost != 1.0:
            check_positive("cost", cost)
        if deadline != math.inf:
            check_deadline(deadline)
        if self.items >= self.soft or len(record) >= self._flow_bound:
            reason = self.refusal(record)
            if reason is not None:
                self.refused += 1
                raise Overloaded(reason, self.retry_after(reason))
        self.put(record, item, cost, deadline)

    def send_many_nowait(self, record: Flow[F, T], items: Sequence[T], cost: float) -> int:
        """Queue as many items as are let in; return their number."""
        if cost != 1.0:
            check_positive("cost", cost)
        count = len(items)
        if not self.items + count <= self.soft or len(record) + count > self._flow_bound or cost != 1.0 or not count:
            for sent, item in enumerate(items):
                try:
                    self.send_nowait(record, item, cost)
                except Overloaded:
                    self.refused += count - sent - 1
                    return sent
            return count
        if record.first is EMPTY:
            record.first = items[0]
            self.woken.append(record)
            if count > 1:
                record.extend(items[1:])
        elif record.costs is None:
            record.extend(items)
        else:
            for item in items:
                record.append(item, 1.0)
        self.items += count
        if self.receivers:
            self.other_end.hand_over()
        return count

    def put(self, record: Flow[F, T], item: T, cost: float, deadline: float = math.inf) -> None:
        """Queue an item that is let in, or give it to a receiver that waits."""
        if deadline != math.inf and self.shedder is None:
            self.other_end.begin_to_shed()
        if self.shedder is not None:
            item = self.shedder.stamp(record, item, deadline)
        elif self.receivers and not self.items and not record.held and self.other_end.hand_through(record, item, cost):
            return
        if record.first is EMPTY and cost == 1.0 and self._fast:
            record.first = item
            self.woken.append(record)
        else:
            self.order.push(record, item, cost)
        self.items += 1
        if self.receivers:
            self.other_end.hand_over()

    def refusal(self, record: Flow[F, T]) -> str | None:
        """Return the bound at which an item of this flow is not let in; None where it is.

        Raises:
            trio.ClosedResourceError: Nothing more is let in.
        """
        if self.closed:
            raise trio.ClosedResourceError("the queue is closed")
        own = len(record)
        if own >= self._flow_bound:
            return "flow"
        if self.items >= self.max_items:
            if self.shedder is not None and self.shedder.make_room(record):
                return None
            return "queue"
        if (
            own >= PILE
            and not self.evicts
            and self.items >= self.max_items - self._reserve
            and self._measured is not None
            and len(self.order.flows) > 1
            and own * (self.order.backlogged + 1) >= self.max_items
        ):
            return "flow"
        return None

    def retry_after(self, reason: str) -> float:
        """Seconds until a place may be free for a flow that is refused, from how fast items were taken lately.

        At the bound of the queue it waits for as many services as there are senders before it, at a flow's own bound
        for one of its own, which takes one of every other flow.
        """
        if self._measured is None:
            return 0.0
        since, count = self._measured
        elapsed = now() - since
        if elapsed >= WINDOW:
            rate = (self.drained - count) / elapsed
            self._rate = (self._rate + rate) / 2 if self._rate else rate
            self._measured = now(), self.drained
        elif not self._rate or elapsed >= WINDOW / 4:
            rate = (self.drained - count) / elapsed if elapsed > 0 else 0.0
        else:
            rate = self._rate
        services = 1 + self.waiting if reason == "queue" else max(1, self.order.backlogged)
        return min(LONGEST_RETRY, services / rate) if rate else 0.0

    async def send(
        self, record: Flow[F, T], item: T, cost: float, deadline: float = math.inf, by: object = None
    ) -> None:
        """Queue an item; wait for a place where there is none, unless nobody is to wait.

        Args:
            record: The item's flow.
            item: The item.
            cost: The work it is.
            deadline: When it is not worth serving any more.
            by: Whoever may `send_away` those that wait on its account.

        Raises:
            trio.ClosedResourceError: Nothing more is let in.
            Overloaded: There is no place, and nobody is to wait.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        await checkpoint_if_cancelled()
        if cost != 1.0:
            check_positive("cost", cost)
        if deadline != math.inf:
            check_deadline(deadline)
        if record.waiters is None and (
            (self.items < self.soft and len(record) < self._flow_bound) or self.refusal(record) is None
        ):
            self.put(record, item, cost, deadline)
            await cancel_shielded_checkpoint()
        elif self.refuses:
            self.send_nowait(record, item, cost, deadline)
        else:
            await self._wait(record, (item, cost, deadline), by)

    @enable_ki_protection
    async def _wait(self, record: Flow[F, T], sent: tuple[T, float, float], by: object) -> None:
        task = current_task()
        line: OrderedDict[Task, tuple[tuple[T, float, float], object]] | None = record.waiters
        if line is None:
            line = record.waiters = OrderedDict()
            self._lines[record] = None
        line[task] = sent, by
        self.waiting += 1

        def leave(_: RaiseCancelT) -> Abort:
            del line[task]
            self._left(record)
            return Abort.SUCCEEDED

        await wait_task_rescheduled(leave)

    def _left(self, record: Flow[F, T]) -> None:
        self.waiting -= 1
        if not record.waiters:
            record.waiters = None
            self._lines.pop(record, None)
            self.blocked.discard(record)

    def let_in(self, served: Flow[F, T] | None) -> None:
        """Put items of waiting senders into the places that are free, one of each flow in turn.

        Args:
            served: The one flow of which items were taken; None: there may be several.
        """
        for record in list(self.blocked) if served is None else (served,):
            if record in self.blocked and len(record) < self._flow_bound:
                self.blocked.remove(record)
                self._lines[record] = None
        lines = self._lines
        unlucky = 0  # lines looked at since one was served
        while unlucky < len(lines) and self.items < self.max_items:
            record = next(iter(lines))
            if self.refusal(record) is None:
                unlucky = 0
                task, (sent, _) = record.waiters.popitem(last=False)
                self._left(record)
                self.put(record, *sent)
                reschedule(task)
            elif len(record) >= self._flow_bound:
                del lines[record]
                self.blocked.add(record)
            else:
                unlucky += 1
            if record in lines:
                lines.move_to_end(record)

    def send_away(self, record: Flow[F, T], by: object) -> None:
        """Let nobody wait any more on that account; they get `trio.ClosedResourceError`."""
        if record.waiters is not None:
            for task in [task for task, (_, account) in record.waiters.items() if account is by]:
                del record.waiters[task]
                self._left(record)
                reschedule(task, outcome.Error(trio.ClosedResourceError("the channel was closed")))

    def close(self, error: type[trio.ClosedResourceError | trio.BrokenResourceError]) -> None:
        """Let nothing more in; whoever waits gets the error."""
        self.closed = True
        self.soft = -1
        for record in [*self._lines, *self.blocked]:
            for task in record.waiters:
                reschedule(task, outcome.Error(error("the queue was closed")))
            record.waiters = None
        self._lines.clear()
        self.blocked.clear()
        self.waiting = 0


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
            if rest is None:
                rest = record.rest = deque()
            if len(rest) >= intake.rest_bound or record.costs is not None:
                intake.send_nowait(record, item, cost)
                return
            rest.append(item)
        intake.items = count + 1

    @enable_ki_protection
    def send_many_nowait(self, items: Sequence[T], cost: float = 1.0) -> int:
        """Queue as many items as there are places for, in order, and return their number; the rest is refused.

        Args:
            items: What to send.
            cost: The work each of them is, from 1e-60 to 1e60.

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
            trio.ClosedResourceError: The channel or its queue is closed, or was closed while this waited.
            Overloaded: There is no place, and the queue was made with ``overflow="refuse"``.

        Checkpoints: Always. A cancelled send has not queued anything.
        """
        if self._closed:
            raise trio.ClosedResourceError("the channel is closed")
        await checkpoint_if_cancelled()
        intake, record = self._intake, self._record
        if intake.items < intake.soft and record.first is EMPTY and record.waiters is None:
            if cost != 1.0:
                intake.put(record, value, check_positive("cost", cost))
            elif intake.receivers:
                intake.put(record, value, cost)
            else:
                record.first = value
                intake.woken.append(record)
                intake.items += 1
            await cancel_shielded_checkpoint()
        else:
            await intake.send(record, value, cost, by=self)

    def close(self) -> None:
        """Send nothing more through this channel; who waits in its `send` gets `trio.ClosedResourceError`.

        What is queued stays queued.
        """
        if not self._closed:
            self._closed = True
            self._record.pins -= 1
            self._intake.send_away(self._record, self)

    async def aclose(self) -> None:
        """Do what `close` does.

        Checkpoints: Always; the channel is closed even where it is cancelled.
        """
        self.close()
        await trio.lowlevel.checkpoint()
