"""Who is next among those who wait: in order within a flow, in turn between flows, one at a time for a key.

Theory of operation. Each flow with waiters has a start tag, and the flow with the smallest is served next (the one
filed first among equals). A flow that comes gets ``max(virtual time, its finish tag)``; each service moves its tag on
by ``cost / weight``. So flows that always have a waiter share what is granted in proportion to their weights, a flow
that was away gets no credit for it, and one that takes a turn and comes back at once stands behind those that wait.

Virtual time moves on by ``cost / weight of all waiting flows`` with each service. (Taking the served flow's start tag
instead, as start-time fair queueing does, lets a stream of flows never seen before stand before everybody else for
ever: each comes with the smallest tag there is.) A flow without waiters is remembered until virtual time has passed
its finish tag, which bounds the memory by the waiters there were, and nothing is remembered when nobody waits.

Within a flow waiters are kept in a deque by the number they drew on arrival. One that could not stand in line at
first, because its key was busy, comes late with an early number and is put where it belongs, near the front. A waiter
that gives up is only marked, unless it is at an end; marks are swept when they outnumber the waiters, so giving up is
O(1) amortised and memory stays bounded.

A key excludes: the first waiter of a key stands in line as any other, those behind it wait beside the line, in order,
and hold nobody up. When the key is free again, the next of them joins the line with the number it drew on arrival.

Source: Goyal, Vin, Cheng: Start-time fair queueing (SIGCOMM 1996); Bennett, Zhang: WF²Q+ (virtual time by work done).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What stands in line. Its owner gives the first three, the line keeps the rest."""

    flow: Hashable
    key: Hashable
    """None excludes nobody."""
    cost: int
    waits: bool
    """The line sets it while the waiter waits. An owner clears it when the waiter has been told to give up and will
    call `Line.remove` later; it is not served any more."""
    number: int
    """Drawn on arrival, rising."""
    in_line: bool
    """Whether it is counted."""
    has_key: bool
    """Whether its key is busy on its account."""
    booked: float
    """What its flow's tag was moved by when it was taken."""
    weight: float
    """What its flow weighed on arrival; kept of those behind a key only."""


W = TypeVar("W", bound=Waiter)


class _Flow(Generic[W]):
    __slots__ = ("inverse", "name", "queue", "serial", "tag", "weight")

    def __init__(self, name: Hashable, tag: float, weight: float) -> None:
        self.name = name
        self.tag = tag
        self.serial = 0  # of its filing: who was filed first goes first among equals
        self.weight = weight
        self.inverse = 1 / weight
        self.queue: deque[W] = deque()  # some of those that gave up included, but none at its ends

    def insert(self, waiter: W) -> None:
        """Put a waiter where its number belongs."""
        queue = self.queue
        place = next((place for place, other in enumerate(queue) if other.number > waiter.number), len(queue))
        queue.insert(place, waiter)

    def trim(self) -> int:
        """Drop those at the ends that gave up, and say how many."""
        queue, length = self.queue, len(self.queue)
        while queue and not queue[0].in_line:
            queue.popleft()
        while queue and not queue[-1].in_line:
            queue.pop()
        return length - len(queue)


class Line(Generic[W]):
    """Waiters in the order in which they are to be served.

    Args:
        weight: The weight of a flow, > 0; every flow weighs 1 without it.

    Cost: O(log flows) for each waiter, O(1) with one flow.
    """

    def __init__(self, weight: Callable[[Hashable], float] | None = None) -> None:
        self.size = 0
        """Those who could be served, if there were enough; the ones behind a busy key are not counted."""
        self.waiting = 0
        """All who wait."""
        self._weight = weight
        self._virtual = 0.0
        self._flows: dict[Hashable, _Flow[W]] = {}  # with waiters, or lately so
        self._turns: list[tuple[float, int, _Flow[W]]] = []  # a heap of their tags, one entry each, maybe of an old tag
        self._finished: dict[Hashable, float] = {}  # finish tags above virtual time, of flows without waiters
        self._weight_sum = 0.0  # of the flows in _flows
        self._keys: dict[Hashable, deque[W]] = {}  # {busy key: those behind its first, in order}
        self._arrivals = 0
        self._serial = 0
        self._gone = 0

    def __iter__(self) -> Iterator[W]:
        """Those who wait, flow by flow, and then those behind keys."""
        for flow in self._flows.values():
            yield from (waiter for waiter in flow.queue if waiter.in_line)
        for behind in self._keys.values():
            yield from behind

    def add(self, waiter: W) -> None:
        """Let `waiter` wait, in line or behind its key.

        Raises:
            ValueError: The weight of its flow is not finite and > 0.
        """
        flow = self._flows.get(waiter.flow)
        if flow is None or not flow.queue:
            flow = self._arrive(waiter.flow)
        self.waiting += 1
        self._arrivals = waiter.number = self._arrivals + 1
        if waiter.key is not None and not self._claim(waiter):
            waiter.weight = flow.weight  # whoever frees the key is not to answer for what the weight is by then
            self._gone += not flow.queue  # its place among the turns
            return
        flow.queue.append(waiter)
        waiter.in_line = waiter.waits = True
        self.size += 1

    def take(self, most: float) -> W | None:
        """Take who is next out of the line and book its cost; None when nobody waits, or for more than `most`."""
        turns = self._turns
        while turns:
            tag, _, flow = turns[0]
            queue = flow.queue
            if not queue or tag != flow.tag:
                self._gone -= not queue
                self._refile_top()
                continue
            waiter = queue[0]
            if not waiter.waits:
                self.remove(waiter)
                continue
            cost = waiter.cost
            if cost > most:
                return None
            queue.popleft()
            waiter.in_line = waiter.waits = False
            waiter.booked = 0.0
            self.waiting -= 1
            self.size -= 1
            if not self.size:
                self._clear()
                return waiter
            if len(turns) > 1:  # where one flow waits nothing depends on its tag, which keeps up with virtual time
                waiter.booked = booked = cost * flow.inverse
                flow.tag += booked
                self._virtual += cost / self._weight_sum
                self._refile_top()
            if queue and not queue[0].in_line:
                self._gone -= flow.trim()
            return waiter
        return None

    def refund(self, waiter: W) -> None:
        """Undo the booking of one that was taken, and gave up after all."""
        flow = self._flows.get(waiter.flow)
        if flow is not None:
            flow.tag -= waiter.booked
            self._turns[:] = [(other.tag, serial, other) for _, serial, other in self._turns]
            heapq.heapify(self._turns)
        self._finished.pop(waiter.flow, None)

    def remove(self, waiter: W) -> None:
        """Let `waiter` go, wherever it waits, as if it had never come."""
        if waiter.in_line:
            waiter.in_line = waiter.waits = False
            self.waiting -= 1
            self.size -= 1
            self._gone += 1
            flow = self._flows[waiter.flow]
            self._gone -= flow.trim()
            if not flow.queue:
                self._gone += 1  # its place among the turns
            if not self.size:
                self._clear()
            elif self._gone > self.size + 64:
                self._sweep()
        elif waiter.key is not None and waiter in (behind := self._keys.get(waiter.key, ())):
            assert isinstance(behind, deque)
            behind.remove(waiter)
            self.waiting -= 1
        if waiter.has_key:
            waiter.has_key = False
            self.free_key(waiter.key)

    # Keys.

    def busy(self, key: Hashable) -> bool:
        """Whether somebody has `key`, who holds it or stands in line with it."""
        return key in self._keys

    def take_key(self, key: Hashable) -> None:
        """Make `key` busy, for somebody who need not wait."""
        self._keys[key] = deque()

    def free_key(self, key: Hashable) -> None:
        """Let the next waiter of `key` join the line, past those that have been told to give up."""
        behind = self._keys[key]
        while behind:
            waiter = behind.popleft()
            if waiter.waits:
                waiter.has_key = waiter.in_line = True
                flow = self._flows.get(waiter.flow)
                if flow is None or not flow.queue:
                    flow = self._arrive(waiter.flow, waiter.weight)
                flow.insert(waiter)
                self.size += 1
                return
            self.waiting -= 1
        del self._keys[key]

    def _claim(self, waiter: W) -> bool:
        behind = self._keys.get(waiter.key)
        if behind is not None:
            behind.append(waiter)
            waiter.in_line = False
            waiter.waits = True
            return False
        self._keys[waiter.key] = deque()
        waiter.has_key = True
        return True

    # Flows.

    def _arrive(self, name: Hashable, weight: float | None = None) -> _Flow[W]:
        """Give a flow without waiters its place among the turns; ask for its weight unless that is given."""
        flow = self._flows.get(name)
        if flow is not None:
            self._gone -= 1
            flow.tag = max(flow.tag, self._virtual)
            return flow
        if weight is None:
            weight = 1.0 if self._weight is None else self._weight(name)
            if not 0 < weight < math.inf:
                raise ValueError(f"weight of flow {name!r} must be finite and > 0, not {weight!r}")
        tag = max(self._virtual, self._finished.pop(name, 0.0))
        flow = self._flows[name] = _Flow[W](name, tag, weight)
        self._weight_sum += weight
        self._serial = flow.serial = self._serial + 1
        heapq.heappush(self._turns, (tag, flow.serial, flow))
        return flow

    def _refile_top(self) -> None:
        """File the flow on top of the heap by its present tag, or let it depart."""
        flow = self._turns[0][2]
        if flow.queue:
            self._serial = flow.serial = self._serial + 1
            heapq.heapreplace(self._turns, (flow.tag, flow.serial, flow))
        else:
            heapq.heappop(self._turns)
            self._depart(flow)

    def _depart(self, flow: _Flow[W]) -> None:
        del self._flows[flow.name]
        self._weight_sum -= flow.weight
        if flow.tag > self._virtual:
            self._finished[flow.name] = flow.tag
        if len(self._finished) > 2 * len(self._flows) + 64:
            self._finished = {name: tag for name, tag in self._finished.items() if tag > self._virtual}

    def _sweep(self) -> None:
        for flow in list(self._flows.values()):
            flow.queue = deque(waiter for waiter in flow.queue if waiter.in_line)
            if not flow.queue:
                self._depart(flow)
        self._turns[:] = [entry for entry in self._turns if entry[2].queue]
        heapq.heapify(self._turns)
        self._gone = 0

    def _clear(self) -> None:
        self._flows.clear()
        self._turns.clear()
        self._finished.clear()
        self._virtual = self._weight_sum = 0.0
        self._gone = 0

    def position(self, waiter: W) -> int:
        """Estimate how many would be served up to and including `waiter` if nobody came or went; 0 if it does not wait.

        Cost: proportional to the flows that wait and to the waiters of its own; to all when some gave up lately.
        """
        if not waiter.in_line:
            behind = self._keys.get(waiter.key)
            if waiter.key is None or behind is None or waiter not in behind:
                return 0
            return self.size + behind.index(waiter) + 1
        own = self._flows[waiter.flow]
        position, tag = 1, own.tag
        for other in own.queue:
            if other is waiter:
                break
            if other.in_line:
                position += 1
                tag += other.cost * own.inverse
        for flow in self._flows.values():
            if flow is not own and flow.tag <= tag:
                turns, rest = divmod(tag - flow.tag, flow.inverse)
                # At the same tag the one goes first that was filed there first, or came there from higher up.
                first = rest > 0 or (-flow.tag, flow.serial) < (-own.tag, own.serial)
                waiting = sum(other.in_line for other in flow.queue) if self._gone else len(flow.queue)
                position += min(waiting, int(turns) + first)
        return position
