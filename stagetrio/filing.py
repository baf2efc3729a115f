"""What is kept of flows, and where they stand: the state behind `stagetrio.fair_order`, which decides.

Every flow with items that is neither woken nor held is filed, in its rank, under its tag: ``finish + reserved``.
*Woken* flows have got a first item since something was taken last. Waking is what a send does, so it is one append; the
places are found for all of them together, when something is to be taken.

**What is kept of an idle flow** is one small record: its tag while that is ahead of virtual time, and its rate of cost.
``max_idle`` bounds the records. Beyond it each new flow makes the order look at two old ones, and forget those which
are idle and owe nothing, or, from twice the bound on, those which are merely idle.

"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Generic

from stagetrio.flow import EMPTY, F, Flow, T, check_positive
from stagetrio.ranks import Rank


class Filing(Generic[F, T]):
    """Records of flows, with their items, filed in ranks.

    Args:
        weight: The weight of a flow, asked once when the flow is first seen; all weigh 1.0 where it is None.
        max_idle: Records of idle flows that are kept, ≥ 1.
        flows: Where the records are kept by name, shared with other filings of other flows; None: in a dict of its own.
    """

    def __init__(
        self,
        *,
        weight: Callable[[F], float] | None = None,
        max_idle: int = 32768,
        flows: dict[F, Flow[F, T]] | None = None,
    ) -> None:
        self._weight_of = weight
        self._max_idle = max_idle
        self.flows: dict[F, Flow[F, T]] = {} if flows is None else flows
        self._ring: deque[Flow[F, T]] = deque()  # every record once, in the order in which they are looked at
        self.woken: list[Flow[F, T]] = []  # flows that have got a first item and are not filed yet
        self._newcomers: Rank[Flow[F, T]] = Rank(0.0)  # flows of which nothing is settled yet
        self._newcomers.listed = True
        self._ranks = [self._newcomers]  # those with flows in them, and perhaps some without
        self._by_size: dict[int, Rank[Flow[F, T]]] = {}
        self._clock = 0.0  # and below: kept from the first settled cost on
        self._weight = 0.0  # sum over the filed flows
        self._stale = 0  # an upper bound on the stale places
        self._rate = 0.0  # what flows' first items cost per declared unit
        self.virtual_time = 0.0
        self.work = 0.0  # booked in all, not normalised
        self._entered = 0.0  # the tag of the latest stranger,
        self._entered_work = 0.0  # and the work when it came
        self._held: set[Flow[F, T]] = set()
        self._filed = 0  # flows with items, not counting the woken
        self.in_hand = 0  # deliveries taken and not settled
        self.reserved = 0.0  # the estimates of those, not normalised
        self.abandoned: deque[tuple[Flow[F, T], float, float]] = deque()  # filled by finalizers, in any thread

    @property
    def backlogged(self) -> int:
        """The number of flows with items."""
        return self._filed + len(self.woken)

    @property
    def servable(self) -> int:
        """The number of flows with items that are not held."""
        held = sum(record.first is not EMPTY for record in self._held) if self._held else 0
        return self._filed + len(self.woken) - held

    @property
    def lost(self) -> int:
        """Deliveries among those in hand that were dropped, and are not booked yet."""
        return len(self.abandoned)

    def flow(self, key: F, weight: float | None = None) -> Flow[F, T]:
        """Return the record of a flow, a new one where there is none. A given ``weight`` stays with the record."""
        record = self.flows.get(key)
        if record is None:
            if weight is None:
                weight = 1.0 if self._weight_of is None else check_positive("weight", self._weight_of(key))
            if len(self.flows) >= self._max_idle:
                self._forget()
            record = self.flows[key] = Flow(key, weight, self, self._entry(), self._newcomers)
            self._ring.append(record)
        elif weight is not None and weight != record.weight:
            if record.filed is not None:
                self._weight += weight - record.weight
            record.reserved *= record.weight / weight  # it is taken back by the new weight
            record.weight, record.inverse = weight, 1.0 / weight
            self._move(record)
        return record

    def _entry(self) -> float:
        """Return the tag with which a flow begins that is not known, see Strangers in `stagetrio.fair_order`."""
        moved = self._entered + (self.work - self._entered_work) / max(1, self.backlogged)
        self._entered, self._entered_work = max(moved, self.virtual_time), self.work
        return self._entered

    def _forget(self) -> None:
        ring = self._ring
        excess = len(self.flows) >= 2 * self._max_idle
        for _ in range(min(2, len(ring))):
            record = ring.popleft()
            used = len(record) or record.in_hand or record.held or record.pins or record.waiters
            if not used and (record.finish <= self.virtual_time or excess):
                del self.flows[record.key]
            else:
                ring.append(record)

    # Places.

    def file_woken(self) -> None:
        """Give the flows that have got a first item their places. Whatever looks at the places does this first."""
        woken, rank, now = self.woken, self._newcomers, self.virtual_time
        self._filed += len(woken)
        if self._by_size or self.in_hand or self._held:
            for record in woken:
                if not record.held:
                    self._enter(record)
        else:
            tag, bucket = rank.tag, rank.bucket  # of the latest record: most stand where the one before them does
            for record in woken:
                mine = record.finish
                if mine < now:
                    record.finish = mine = now
                if mine == tag:
                    record.filed = mine
                    bucket.append(record)
                else:
                    tag = mine
                    bucket = rank.file(record, tag)
        woken.clear()

    def _enter(self, record: Flow[F, T]) -> None:
        tag = record.finish + record.reserved
        if tag < self.virtual_time:
            tag = self.virtual_time
            record.finish = tag - record.reserved
        self._weight += record.weight
        self._file(record, tag)

    def _file(self, record: Flow[F, T], tag: float) -> None:
        rank = record.rank
        if not rank.listed:
            rank.listed = True
            self._ranks.append(rank)
        rank.file(record, tag)

    def _leave(self, record: Flow[F, T]) -> None:
        if record.filed is not None:
            record.filed = None
            if self._by_size:
                self._weight -= record.weight
            self._went_stale()

    def _move(self, record: Flow[F, T]) -> None:
        """File a flow anew, if it is filed, since what it has booked or reserved, or its rank, has changed."""
        if record.filed is not None:
            self._file(record, record.finish + record.reserved)
            self._went_stale()

    def _went_stale(self) -> None:
        self._stale += 1
        if self._stale > 64 + 2 * len(self.flows):
            self._stale = 0
            for rank in self._ranks:
                rank.sweep()

    def _rank(self, record: Flow[F, T], cost: float) -> None:
        """Put a flow whose items cost ``cost`` into a rank of that size."""
        if not self._by_size:
            self._weight = math.fsum(r.weight for r in self.flows.values() if r.filed is not None and r.order is self)
            self._clock = self.virtual_time
        size = math.frexp(cost)[1]
        for near in (size, size - 1, size + 1):
            rank = self._by_size.get(near)
            if rank is not None and rank.low <= cost < rank.high:
                break
        else:
            rank = self._by_size[size] = Rank(cost)
        record.rank = rank

    # Items.

    def push(self, record: Flow[F, T], item: T, cost: float) -> None:
        """Append one item to its flow."""
        if record.first is not EMPTY:
            record.append(item, cost)
        else:
            record.first = item
            if cost != 1.0:
                record.costs = deque((cost,))
            self.woken.append(record)

    def drop(self, record: Flow[F, T]) -> T:
        """Remove the oldest item of a flow, unserved: nothing is booked."""
        if record.rest:
            return record.pop_oldest()
        return self.discard(record)[0]

    def _emptied(self, record: Flow[F, T]) -> None:
        record.first, record.rest, record.costs = EMPTY, None, None
        self._filed -= 1
        if not self._filed:
            self._weight = 0.0  # exactly: sums of floats do not cancel

    def charge(self, record: Flow[F, T], delta: float) -> None:
        """Book work beyond (or below) what was declared, never to before virtual time."""
        finish = record.finish + delta * record.inverse
        if delta < 0:
            finish = max(finish, min(self.virtual_time, record.finish))
        record.finish = finish
        self._move(record)

    # Whole flows.

    def hold(self, record: Flow[F, T]) -> None:
        """Serve nothing of a flow until as many `resume` as `hold` calls have been made."""
        if self.woken:
            self.file_woken()
        record.held += 1
        self._held.add(record)
        self._leave(record)

    def resume(self, record: Flow[F, T]) -> bool:
        """Undo one `hold`; True where the flow has items that can be served now. One too many does nothing."""
        if not record.held:
            return False
        if self.woken:
            self.file_woken()
        record.held -= 1
        if record.held:
            return False
        self._held.remove(record)
        if record.first is EMPTY:
            return False
        self._enter(record)
        return True

    def discard(self, record: Flow[F, T]) -> list[T]:
        """Remove all items of a flow, unserved, oldest first; what it owes and whether it is held stay."""
        if record.first is EMPTY:
            return []
        if self.woken:
            self.file_woken()
        items = record.items()
        self._leave(record)
        self._emptied(record)
        return items
