"""The order of service among flows, by the work each has had. Pure: no clock, no event loop, no bound.

Theory of operation
===================

Every flow has a *tag*, the virtual time at which its next item should start. The flow with the least tag is served
next, and serving an item of cost ``c`` moves its flow's tag on by ``c / weight``. Two flows that both have items
therefore get work in proportion to their weights, to within one item each (start-time fair queueing). Virtual time
is the tag of the latest service. A flow that comes back from idleness starts at ``max(virtual time, tag)``: what it
has had too much it still works off, what it has not asked for it does not get later.

**Costs are known afterwards.** `take` only *reserves*: it lifts the tag by an estimate (the declared cost times what
this flow's items have turned out to cost per declared unit), and `settle` puts the truth in its place. The tag is

    tag = finish (work that is booked) + reserved (estimates of what is in hand)

and virtual time follows ``finish`` alone. So a wrong first guess (``cost=1.0`` for what takes a millisecond) holds
back only the flow it is about, and only while its item is in hand; it never moves the clock by which the others are
judged. `take_items` books the declared cost at once.

**Order within the structure.** Flows with equal tags stand in one bucket, first come, first served; a heap holds the
distinct tags. Where costs are equal the tags coincide, and serving costs no heap operation at all. A flow whose tag
changes while it waits is filed again, and its old place is recognised as stale when it is reached
(``flow.filed != tag of the bucket``).

**What is kept of an idle flow** is one small record: its tag while it is ahead of virtual time, and its rate of cost.
``max_idle`` bounds the records of idle flows. Beyond it each new flow makes the structure look at two old ones, and
forgets those which are idle and owe nothing, or, from twice the bound on, those which are merely idle.

Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; Mace et al., "2DFQ", SIGCOMM 2016.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Hashable)
T = TypeVar("T")

LEARN = 0.25  # how much one settled item moves its flow's rate of cost
LEARN_ALL = 0.05  # and that of flows not seen before


def check_positive(name: str, value: float) -> float:
    """Return ``value``, or raise a `TypeError` or `ValueError` that names it unless it is finite and above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not (value > 0 and value < math.inf):
        raise ValueError(f"{name} must be finite and above 0, not {value!r}")
    return value


class Flow(Generic[F, T]):
    """What the order keeps of one flow.

    Args:
        key: Who it is.
        weight: Its share relative to the others', above 0.
    """

    __slots__ = ("filed", "finish", "held", "in_hand", "inverse", "items", "key", "pins", "rate", "reserved", "waiters")

    def __init__(self, key: F, weight: float) -> None:
        self.key = key
        self.inverse = 1.0 / weight
        self.items: deque[tuple[T, float]] | tuple[()] = ()  # (item, declared cost), oldest first
        self.finish = 0.0  # normalised work booked
        self.reserved = 0.0  # normalised estimates of what is in hand
        self.in_hand = 0
        self.filed: float | None = None  # the tag under which it is filed; None: not in the order
        self.rate = 0.0  # settled cost per declared unit; 0: nothing settled yet
        self.held = 0
        self.pins = 0  # channels that hold on to this record
        self.waiters: Any = None  # whatever the owner of the order keeps here; the record is not forgotten meanwhile


class Delivery(Generic[F, T]):
    """One item in hand, whose true cost is still to be told.

    Attributes:
        flow: Whose item it is.
        item: What was sent.
        declared: The cost its sender gave.
    """

    __slots__ = ("_estimate", "_order", "_record", "declared", "flow", "item")

    def __init__(self, order: FairOrder[F, T], record: Flow[F, T], item: T, declared: float, estimate: float) -> None:
        self._order: FairOrder[F, T] | None = order
        self._record = record
        self._estimate = estimate
        self.flow = record.key
        self.item = item
        self.declared = declared

    def settle(self, actual: float) -> None:
        """Book what the item has cost, in the unit of the queue.

        Only the first call counts; later ones do nothing, so that a ``finally`` may settle what was settled already. A
        delivery that is dropped without it is booked at its estimate.

        Args:
            actual: The cost, finite and ≥ 0.

        Raises:
            ValueError: ``actual`` is negative or not finite.
        """
        order = self._order
        if order is not None:
            if not 0 <= actual < math.inf:
                raise ValueError(f"actual must be finite and at least 0, not {actual!r}")
            self._order = None
            order.settle(self._record, self._estimate, self.declared, actual)

    def __del__(self) -> None:
        if self._order is not None:
            self._order.abandoned.append((self._record, self._estimate))


class FairOrder(Generic[F, T]):
    """Items of many flows, served in fair order of work.

    Args:
        weight: The weight of a flow, asked once when the flow is first seen; all weigh 1.0 where it is None.
        max_idle: Records of idle flows that are kept, ≥ 1.
    """

    def __init__(self, *, weight: Callable[[F], float] | None = None, max_idle: int = 32768) -> None:
        self._weight = weight
        self._max_idle = max_idle
        self.flows: dict[F, Flow[F, T]] = {}
        self._ring: deque[Flow[F, T]] = deque()  # every record once, in the order in which they are looked at
        self._buckets: dict[float, list[Flow[F, T]]] = {}
        self._tags: list[float] = []  # heap of the keys of _buckets
        self._bucket: list[Flow[F, T]] = []  # the bucket being served, taken out of _buckets
        self._next = 0  # index in _bucket
        self._tag = -math.inf  # its tag
        self._stale = 0
        self._spare: list[deque[tuple[T, float]]] = []
        self._rate = 0.0  # mean settled cost per declared unit, over all flows
        self.virtual_time = 0.0
        self.backlogged = 0  # flows with items
        self.in_hand = 0  # deliveries taken and not settled
        self.abandoned: deque[tuple[Flow[F, T], float]] = deque()  # filled by finalizers, in whatever thread they run

    def flow(self, key: F, weight: float | None = None) -> Flow[F, T]:
        """Return the record of a flow, a new one where there is none. A given ``weight`` stays with the record."""
        record = self.flows.get(key)
        if record is None:
            if weight is None:
                weight = 1.0 if self._weight is None else check_positive("weight", self._weight(key))
            if len(self.flows) >= self._max_idle:
                self._forget()
            record = self.flows[key] = Flow(key, weight)
            self._ring.append(record)
        elif weight is not None:
            record.inverse = 1.0 / weight
        return record

    def _forget(self) -> None:
        ring, now = self._ring, self.virtual_time
        excess = len(self.flows) >= 2 * self._max_idle
        for _ in range(2):
            record = ring.popleft()
            if record.items or record.in_hand or record.held or record.pins or record.waiters:
                ring.append(record)
            elif record.finish <= now or excess:
                del self.flows[record.key]
            else:
                ring.append(record)

    # Filing. Only here and in the two loops that serve do flows enter and leave the buckets.

    def _file(self, record: Flow[F, T], tag: float) -> None:
        record.filed = tag
        if tag == self._tag:
            self._bucket.append(record)
            return
        if tag < self._tag:
            self._put_back()
        bucket = self._buckets.get(tag)
        if bucket is None:
            self._buckets[tag] = [record]
            heappush(self._tags, tag)
        else:
            bucket.append(record)

    def _put_back(self) -> None:
        rest = self._bucket[self._next :]
        if rest:
            self._buckets[self._tag] = rest
            heappush(self._tags, self._tag)
        self._bucket, self._next, self._tag = [], 0, -math.inf

    def _unfile(self, record: Flow[F, T]) -> None:
        if record.filed is not None:
            record.filed = None
            self._went_stale()

    def _went_stale(self) -> None:
        self._stale += 1
        if self._stale > 64 + 2 * len(self.flows):
            self._sweep()

    def _sweep(self) -> None:
        """Drop every stale place, so that changes of tags cost memory in proportion to the flows only."""
        self._put_back()
        kept = ((tag, [r for r in bucket if r.filed == tag]) for tag, bucket in self._buckets.items())
        self._buckets = {tag: bucket for tag, bucket in kept if bucket}
        self._tags = list(self._buckets)
        heapify(self._tags)
        self._stale = 0

    def _refile(self, record: Flow[F, T]) -> None:
        if record.filed is not None:
            tag = record.finish + record.reserved
            if tag != record.filed:
                self._file(record, tag)
                self._went_stale()

    def _enter(self, record: Flow[F, T]) -> None:
        tag = record.finish + record.reserved
        if tag < self.virtual_time:
            record.finish += self.virtual_time - tag
            tag = self.virtual_time
        self._file(record, tag)

    # Items in.

    def activate(self, record: Flow[F, T]) -> deque[tuple[T, float]]:
        """Give a flow without items its place and an empty deque, to which the caller appends at least one item."""
        self.backlogged += 1
        items = record.items = self._spare.pop() if self._spare else deque()
        if not record.held:
            self._enter(record)
        return items

    def push(self, record: Flow[F, T], item: T, cost: float) -> None:
        """Append one item to its flow."""
        items = record.items or self.activate(record)
        assert isinstance(items, deque)
        items.append((item, cost))

    # Items out.

    def head(self) -> Flow[F, T] | None:
        """Return the flow to be served next; None when none can be served."""
        while True:
            bucket = self._bucket
            if self._next >= 1024:
                del bucket[: self._next]  # newcomers may keep one bucket going for ever
                self._next = 0
            while self._next < len(bucket):
                record = bucket[self._next]
                if record.filed == self._tag:
                    return record
                self._next += 1
                self._stale -= 1
            if not self._tags:
                return None
            self._tag = heappop(self._tags)
            self._bucket = self._buckets.pop(self._tag)
            self._next = 0

    def _idle(self, record: Flow[F, T]) -> None:
        items = record.items
        record.items = ()
        self.backlogged -= 1
        if len(self._spare) < 256 and isinstance(items, deque):
            self._spare.append(items)

    def drop(self, record: Flow[F, T]) -> T:
        """Remove the oldest item of a flow, unserved: nothing is booked."""
        assert isinstance(record.items, deque)
        item = record.items.popleft()[0]
        if not record.items:
            self._unfile(record)
            self._idle(record)
        return item

    def take_items(self, max_items: int) -> list[T]:
        """Remove up to ``max_items`` items in fair order, each booked at its declared cost.

        Cost: 0.05 to 0.2 µs per item, independent of the number of flows where tags coincide.
        """
        taken: list[T] = []
        append = taken.append
        left = max_items
        while left:
            record = self.head()
            if record is None:
                break
            self._next += 1
            items = record.items
            assert isinstance(items, deque)
            inverse, finish = record.inverse, record.finish
            limit = self._limit()
            while True:
                start = finish
                item, cost = items.popleft()
                append(item)
                left -= 1
                finish += cost * inverse
                if not items or not left or finish + record.reserved >= limit:
                    break
            self._served(record, start, finish)
        return taken

    def take(self, max_items: int) -> list[Delivery[F, T]]:
        """Remove up to ``max_items`` items in fair order; each reserves an estimate until it is settled."""
        if self.abandoned:
            self._book_abandoned()
        taken: list[Delivery[F, T]] = []
        while len(taken) < max_items:
            record = self.head()
            if record is None:
                break
            self._next += 1
            items = record.items
            assert isinstance(items, deque)
            item, cost = items.popleft()
            estimate = cost * (record.rate or self._rate or 1.0)
            taken.append(Delivery(self, record, item, cost, estimate))
            record.reserved += estimate * record.inverse
            record.in_hand += 1
            self._served(record, record.finish, record.finish)
        self.in_hand += len(taken)
        return taken

    def _limit(self) -> float:
        """The tag up to which the flow just taken from the bucket may be served on without any other being due."""
        if self._next < len(self._bucket):
            return self._tag
        return self._tags[0] if self._tags else math.inf

    def _served(self, record: Flow[F, T], start: float, finish: float) -> None:
        if start > self.virtual_time:
            self.virtual_time = start
        record.finish = finish
        if record.items:
            self._file(record, finish + record.reserved)
        else:
            record.filed = None
            self._idle(record)

    # Work that is known afterwards.

    def settle(self, record: Flow[F, T], estimate: float, declared: float, actual: float) -> None:
        """Book the true cost of an item that was taken, in place of its estimate."""
        rate = actual / declared
        old = record.rate
        record.rate = old + LEARN * (rate - old) if old else rate
        self._rate = self._rate + LEARN_ALL * (rate - self._rate) if self._rate else rate
        self._book(record, estimate, actual)

    def _book(self, record: Flow[F, T], estimate: float, actual: float) -> None:
        self.in_hand -= 1
        record.in_hand -= 1
        if record.in_hand:
            record.reserved -= estimate * record.inverse
        else:
            record.reserved = 0.0  # exactly: sums of floats do not cancel
        record.finish += actual * record.inverse
        self._refile(record)

    def _book_abandoned(self) -> None:
        while self.abandoned:
            record, estimate = self.abandoned.popleft()
            self._book(record, estimate, estimate)

    def charge(self, record: Flow[F, T], delta: float) -> None:
        """Book work beyond (or below) what was declared, never to before virtual time."""
        finish = record.finish + delta * record.inverse
        if delta < 0:
            finish = max(finish, min(self.virtual_time, record.finish))
        record.finish = finish
        self._refile(record)

    # Whole flows.

    def hold(self, record: Flow[F, T]) -> None:
        """Serve nothing of a flow until as many `resume` as `hold` calls have been made."""
        record.held += 1
        if record.held == 1:
            self._unfile(record)

    def resume(self, record: Flow[F, T]) -> bool:
        """Undo one `hold`; True where the flow has items that can be served now. One too many does nothing."""
        if record.held != 1:
            record.held = max(0, record.held - 1)
            return False
        record.held = 0
        if not record.items:
            return False
        self._enter(record)
        return True

    def discard(self, record: Flow[F, T]) -> list[T]:
        """Remove all items of a flow, unserved, oldest first; what it owes and whether it is held stay."""
        items = [item for item, _ in record.items]
        if items:
            self._unfile(record)
            assert isinstance(record.items, deque)
            record.items.clear()
            self._idle(record)
        return items
