"""The order of service among flows, by the work each has had. Pure: no clock, no event loop, no bound.

Theory of operation
===================

Every flow has a *tag*, the virtual time at which its next item should start. The flow with the least tag is served
next, and serving an item of cost ``c`` moves its flow's tag on by ``c / weight``. Two flows that both have items
therefore get work in proportion to their weights, to within one item each (start-time fair queueing). *Virtual time*
is the tag of the latest service. A flow that comes back from idleness starts at ``max(virtual time, tag)``: what it has
had too much it still works off, what it did not ask for it does not get later.

**Costs are known afterwards.** `FairOrder.take` only *reserves*: it lifts the tag by an estimate, the declared cost
times what the flow's items have turned out to cost per declared unit (a new flow's: what all flows' have), and
`FairOrder.settle` puts the truth in its place. The tag is

    tag = finish (work that is booked) + reserved (estimates of what is in hand)

and virtual time follows ``finish`` alone. A flow that waits is not filed anew for an error of less than one item. So it
has its turn to within two items' work, and a wrong first guess (``cost=1.0`` for what takes a millisecond) holds back
only the flow it is about, and only while its item is in hand; it never moves the clock by which others are judged.

**Several workers** serving in order of tags would all take a dear item at the same time, since dear flows stand at the
same old tag together, and the cheap flows' next turn comes when those are done. So flows are kept in *ranks* of those
whose items cost about the same, to within a factor of two. While there is one rank, it is served as above. With several
there is a second clock, which moves by each item's share of the work, ``cost / sum of the weights that wait``. A rank's
head may start when this clock has reached its tag, and among those that may, the one that would finish first does. So a
dear item lets every cheap flow have a turn before the next dear one. This is 2DFQ's spreading of dear items over time;
because the clock moves with the work taken, and not with the wall's, it needs to know neither how many workers there
are nor how fast they are. It keeps between the least tag and the first finish among the heads (plus `SLACK` dear items'
share), so that neither idle moments nor a flow's debt can carry it away. (Measured for 16 workers, 50 flows of 1 ms and
50 of 100 ms, 99th percentile of a cheap flow's wait between turns, for which 6.25 ms would be even: least tag first
303 ms; eligible by worker number as in 2DFQ 9 ms; this 7 ms. With a mean of all tags as the clock 7 ms as well, but
400 ms where one item in ten of a flow costs 400 times the others, and this 35 ms.)

**Strangers.** A stream of flows never seen before, each with one item, would keep virtual time where it is, and a flow
that has been served once would wait for ever behind them. So they start by a clock of their own, which is not behind
virtual time, and moves by each piece of work divided by the number of flows that wait: by what each of them should have
had of it.

What is kept of a flow, and where it is filed, is the matter of `stagetrio.filing`.

Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; Bennett and Zhang, "WF2Q", INFOCOM 1996; Mace et
al., "2DFQ: Two-Dimensional Fair Queueing for Multi-Tenant Cloud Services", SIGCOMM 2016.
"""

from __future__ import annotations

import math
from heapq import heappush

from stagetrio.filing import Filing
from stagetrio.flow import EMPTY, Delivery, F, Flow, T

LEARN = 0.25  # how much one settled item moves its flow's rate of cost
LEARN_ALL = 0.05  # and the first one of a flow the rate by which flows not seen before are judged
SLACK = 2.0  # shares of a dear item by which the clock may pass the first finish


class FairOrder(Filing[F, T]):
    """Items of many flows, served in fair order of work.

    Args:
        weight: The weight of a flow, asked once when the flow is first seen; all weigh 1.0 where it is None.
        max_idle: Records of idle flows that are kept, ≥ 1.
        flows: Where the records are kept by name, shared with other orders of other flows; None: in a dict of its own.
    """

    def head(self) -> Flow[F, T] | None:
        """Return the flow to be served next; None when none can be served."""
        if self.woken:
            self.file_woken()
        ranks = self._ranks
        return ranks[0].first() if len(ranks) == 1 else self._choose()

    def _choose(self) -> Flow[F, T] | None:
        ranks = self._ranks
        least = first_finish = math.inf
        dearest = 0.0
        soonest = None
        emptied = None
        for rank in ranks:
            record = rank.first()
            if record is None:
                emptied = rank
                continue
            tag = rank.tag
            if tag < least:
                least = tag
            if rank.cost > dearest:
                dearest = rank.cost
            if tag + rank.cost < first_finish:
                first_finish = tag + rank.cost
                soonest = record
        if emptied is not None:
            emptied.listed = False
            ranks.remove(emptied)
        if soonest is None:
            return self._choose() if ranks else None
        clock = self._clock
        if clock > first_finish:
            clock = min(clock, first_finish + SLACK * dearest / self.backlogged)
        self._clock = clock = max(clock, least)
        if soonest.rank.tag <= clock:
            return soonest
        due = [rank for rank in ranks if rank.first() is not None and rank.tag <= clock]
        return min(due, key=lambda rank: rank.tag + rank.cost).first()

    def pass_item(self, record: Flow[F, T], cost: float) -> None:
        """Book an item that is handed over straight away, since nothing else is queued and nothing in hand."""
        finish = record.finish
        if finish > self.virtual_time:
            self.virtual_time = finish
        else:
            finish = self.virtual_time
        self.work += cost
        record.finish = finish + cost * record.inverse

    def take_items(self, max_items: int) -> list[T]:
        """Remove up to ``max_items`` items in fair order, each booked at its declared cost.

        Cost: 0.05 to 0.2 µs per item, independent of the number of flows where tags coincide.
        """
        if self._by_size or self.in_hand:
            taken = self.take(max_items)
            for delivery in taken:
                delivery._books = None
                self.settle(delivery._record, delivery.declared, delivery._estimate, delivery.declared)
            return [delivery.item for delivery in taken]
        if self.woken:
            if not self._filed and len(self.woken) == 1 and self.woken[0].rest is None and not self._held:
                record = self.woken.pop()
                item, record.first = record.first, EMPTY
                cost = 1.0
                if record.costs is not None:
                    cost, record.costs = record.costs[0], None
                self.pass_item(record, cost)
                return [item]
            self.file_woken()
        rank = self._newcomers
        buckets, tags = rank.buckets, rank.tags
        items: list[T] = []
        idle = 0
        while len(items) < max_items:
            bucket, begin, tag = rank.bucket, rank.next, rank.tag
            if begin == len(bucket):
                if not tags:
                    break
                rank.advance()
                continue
            if tag > self.virtual_time:
                self.virtual_time = tag
            if begin + 1 == len(bucket) and bucket[begin].filed == tag:
                self._take_run(bucket[begin], items, max_items)
                continue
            work = self.work
            for record in bucket[begin : begin + max_items - len(items)]:
                begin += 1
                if record.filed != tag:
                    continue  # a stale place
                items.append(record.first)
                cost = 1.0
                if record.costs is not None:
                    cost = record.costs.popleft()
                    if not record.costs:
                        record.costs = None
                work += cost
                record.finish = finish = tag + cost * record.inverse
                if record.rest:
                    record.first = record.rest.popleft()
                    record.filed = finish
                    behind = buckets.get(finish)
                    if behind is not None:
                        behind.append(record)
                    else:
                        buckets[finish] = [record]
                        heappush(tags, finish)
                else:
                    record.filed = None
                    record.first = EMPTY
                    record.rest = None
                    idle += 1
            self.work = work
            rank.next = begin
            rank.trim()
        self._filed -= idle
        return items

    def _take_run(self, record: Flow[F, T], items: list[T], max_items: int) -> None:
        """Serve a flow that is alone at its tag for as long as no other is due."""
        rank, inverse = self._newcomers, record.inverse
        rank.next += 1
        tag = record.finish
        length = len(record)
        count = min(length, max_items - len(items))
        if rank.tags:
            count = min(count, max(1, math.ceil((rank.tags[0] - tag) * record.weight)))
        cost = 1.0
        if record.costs is not None:
            count, cost = 1, record.costs[0]
        if count > 1:
            self.virtual_time = tag + (count - 1) * inverse
        self.work += count * cost
        record.finish = tag + count * cost * inverse
        items.append(record.first)
        if count == length:
            items += record.rest or ()
            record.filed = None
            self._emptied(record)
            return
        assert record.rest is not None
        items += [record.rest.popleft() for _ in range(count - 1)]
        record.first = record.rest.popleft()
        if record.costs is not None:
            record.costs.popleft()
        rank.file(record, record.finish)

    def take(self, max_items: int) -> list[Delivery[F, T]]:
        """Remove up to ``max_items`` items in fair order; each reserves an estimate until it is settled."""
        if self.abandoned:
            self.settle_abandoned()
        if self.woken:
            self.file_woken()
        ranks = self._ranks
        taken: list[Delivery[F, T]] = []
        while len(taken) < max_items:
            if len(ranks) == 1:
                rank, count = ranks[0], max_items - len(taken)
            else:
                head = self._choose()
                if head is None:
                    break
                rank, count = head.rank, 1
            bucket, begin, tag = rank.bucket, rank.next, rank.tag
            if begin == len(bucket):
                if not rank.tags:
                    break
                rank.advance()
                continue
            for record in bucket[begin : begin + count]:
                begin += 1
                if record.filed == tag and record.rank is rank:
                    taken.append(self._deliver(record, tag))
            rank.next = begin
            rank.trim()
        self.in_hand += len(taken)
        return taken

    def _deliver(self, record: Flow[F, T], tag: float) -> Delivery[F, T]:
        """Take the first item of the flow that stands at the least tag, and file the flow anew or let it be idle."""
        costs = record.costs
        cost = 1.0 if costs is None else costs.popleft()
        estimate = cost * (record.rate + record.spread or self._rate or 1.0)
        delivery = Delivery(record.key, record.first, cost, estimate, record, self)
        finish = record.finish
        if finish > self.virtual_time:
            self.virtual_time = finish
        record.in_hand += 1
        record.reserved += estimate * record.inverse
        self.reserved += estimate
        if record.rest:
            record.first = record.rest.popleft()
            finish += record.reserved
            record.rank.file(record, finish if finish > tag else tag)
        else:
            record.filed = None
            record.first, record.rest, record.costs = EMPTY, None, None
            self._filed -= 1
            self._weight = self._weight - record.weight if self._filed else 0.0
        if self._weight > 0:
            self._clock += estimate / self._weight
        return delivery

    def settle_abandoned(self) -> None:
        """Book the deliveries that were dropped, at their estimates."""
        while self.abandoned:
            record, declared, estimate = self.abandoned.popleft()
            self.settle(record, declared, estimate, estimate)

    def settle(self, record: Flow[F, T], declared: float, estimate: float, actual: float) -> None:
        """Book the true cost of an item that was taken, in place of its estimate, and learn from it."""
        rate = actual / declared
        if record.rate:
            off = rate - record.rate
            record.rate += LEARN * off
            record.spread += LEARN * ((off if off > 0 else -off) - record.spread)
        else:
            record.rate = rate
            self._rate = self._rate + LEARN_ALL * (rate - self._rate) if self._rate else rate
        inverse = record.inverse
        cost = slack = declared * (record.rate + record.spread) * inverse
        rank = record.rank
        if not rank.low <= cost < rank.high:
            self._rank(record, cost)
            slack = -1.0  # it must be filed in its new rank
        if self._weight > 0:
            self._clock += (actual - estimate) / self._weight
        self.in_hand -= 1
        self.reserved = self.reserved - estimate if self.in_hand else 0.0
        record.in_hand -= 1
        record.reserved = record.reserved - estimate * inverse if record.in_hand else 0.0
        record.finish += actual * inverse
        self.work += actual
        if record.filed is not None and not -slack <= record.finish + record.reserved - record.filed <= slack:
            self._move(record)
