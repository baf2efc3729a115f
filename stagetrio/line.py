"""Who is next among those who wait: in order within a flow, in turn between flows, one at a time for a key.

Theory of operation. Each flow with waiters has a start tag, and the flow with the smallest is served next (the oldest
among equals). A flow that comes gets ``max(virtual time, its finish tag)``; each service moves its tag on by
``cost / weight``. So flows that always have a waiter share what is granted in proportion to their weights, a flow
that was away gets no credit for it, and one that takes a turn and comes back at once stands behind those that wait.

Virtual time moves on by ``cost / weight of all waiting flows`` with each service. (Taking the served flow's start tag
instead, as start-time fair queueing does, lets a stream of flows never seen before stand before everybody else for
ever: each comes with the smallest tag there is.) A flow without waiters is remembered until virtual time has passed
its finish tag, which bounds the memory by the waiters there were, and nothing is remembered when nobody waits.

Within a flow waiters are kept in a deque by the number they drew on arrival. One that could not stand in line at
first (its key was busy) comes late with an early number; those few are in a heap beside it. A waiter that gives up is
only marked; marks are swept when they outnumber the waiters, so giving up is O(1) amortised and memory stays bounded.

A key excludes: the first waiter of a key stands in line as any other, those behind it wait beside the line, in order,
and hold nobody up. When the key is free again, the next of them joins the line with the number it drew on arrival.

Source: Goyal, Vin, Cheng: Start-time fair queueing (1996); Zhang, Keshav: virtual time of WFQ.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from operator import itemgetter
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What stands in line."""

    flow: Hashable
    key: Hashable
    """None excludes nobody."""
    cost: int
    number: int
    """Drawn on arrival, rising; kept by the line like the rest."""
    in_line: bool
    """Whether it may be served; False again once it was, or gave up."""
    has_key: bool
    """Whether its key is busy on its account."""


W = TypeVar("W", bound=Waiter)


class _Flow(Generic[W]):
    __slots__ = ("late", "name", "ordered", "tag", "waiting", "weight")

    def __init__(self, name: Hashable, tag: float, weight: float) -> None:
        self.name = name
        self.tag = tag
        self.weight = weight
        self.waiting = 0
        self.ordered: deque[W] = deque()
        self.late: list[tuple[int, W]] = []

    def head(self) -> W | None:
        """The waiter with the lowest number, past those that gave up."""
        ordered, late = self.ordered, self.late
        while ordered and not ordered[0].in_line:
            ordered.popleft()
        while late and not late[0][1].in_line:
            heapq.heappop(late)
        if late and not (ordered and ordered[0].number < late[0][0]):
            return late[0][1]
        return ordered[0] if ordered else None

    def __iter__(self) -> Iterator[W]:
        late = deque(waiter for _, waiter in sorted(self.late, key=itemgetter(0)) if waiter.in_line)
        for waiter in self.ordered:
            if waiter.in_line:
                while late and late[0].number < waiter.number:
                    yield late.popleft()
                yield waiter
        yield from late

    def add(self, waiter: W) -> None:
        if self.ordered and self.ordered[-1].number > waiter.number:
            heapq.heappush(self.late, (waiter.number, waiter))
        else:
            self.ordered.append(waiter)

    def sweep(self) -> None:
        self.ordered = deque(waiter for waiter in self.ordered if waiter.in_line)
        self.late = [entry for entry in self.late if entry[1].in_line]
        heapq.heapify(self.late)


class Line(Generic[W]):
    """Waiters in the order in which they are to be served.

    Args:
        weight: The weight of a flow, > 0; every flow weighs 1 without it.

    Cost: O(log flows) for each waiter.
    """

    def __init__(self, weight: Callable[[Hashable], float] | None = None) -> None:
        self._weight = weight
        self._virtual = 0.0
        self._flows: dict[Hashable, _Flow[W]] = {}  # with waiters
        self._turns: list[tuple[float, int, _Flow[W]]] = []  # a heap of their tags, one entry each
        self._finished: dict[Hashable, float] = {}  # finish tags above virtual time, of flows without waiters
        self._total_weight = 0.0
        self._keys: dict[Hashable, deque[W]] = {}  # {busy key: those behind its first, in order}
        self._behind = 0
        self._arrivals = 0
        self._serial = 0
        self._size = 0
        self._gone = 0

    def __len__(self) -> int:
        """Those who could be served, if there were enough; the ones behind a busy key are not counted."""
        return self._size

    def __iter__(self) -> Iterator[W]:
        """Those who wait, flow by flow, and then those behind keys."""
        for flow in self._flows.values():
            yield from flow
        for behind in self._keys.values():
            yield from behind

    @property
    def waiting(self) -> int:
        """All who wait."""
        return self._size + self._behind

    def busy(self, key: Hashable) -> bool:
        """Whether somebody has `key`, who holds it or stands in line with it."""
        return key in self._keys

    def take_key(self, key: Hashable) -> None:
        """Make `key` busy, for somebody who need not wait."""
        self._keys[key] = deque()

    def free_key(self, key: Hashable) -> None:
        """Let the next waiter of `key` join the line."""
        behind = self._keys[key]
        if behind:
            waiter = behind.popleft()
            self._behind -= 1
            waiter.has_key = True
            self._stand(waiter)
        else:
            del self._keys[key]

    def add(self, waiter: W) -> None:
        """Let `waiter` wait, in line or behind its key."""
        self._arrivals = waiter.number = self._arrivals + 1
        key = waiter.key
        if key is not None:
            if key in self._keys:
                self._keys[key].append(waiter)
                self._behind += 1
                return
            self._keys[key] = deque()
            waiter.has_key = True
        self._stand(waiter)

    def remove(self, waiter: W) -> None:
        """Let `waiter` go, wherever it waits, as if it had never come."""
        if waiter.in_line:
            self.discard(waiter)
        elif waiter.key is not None and waiter in (behind := self._keys.get(waiter.key, ())):
            assert isinstance(behind, deque)
            behind.remove(waiter)
            self._behind -= 1
        if waiter.has_key:
            waiter.has_key = False
            self.free_key(waiter.key)

    def _stand(self, waiter: W) -> None:
        flow = self._flows.get(waiter.flow)
        if flow is None:
            flow = self._arrive(waiter.flow)
        elif not flow.waiting:
            flow.tag = max(flow.tag, self._virtual)
        waiter.in_line = True
        flow.add(waiter)
        flow.waiting += 1
        self._size += 1

    def head(self) -> W | None:
        """Return who is next, or None when nobody waits."""
        turns = self._turns
        while turns:
            tag, _, flow = turns[0]
            if not flow.waiting:
                heapq.heappop(turns)
                self._depart(flow)
            elif flow.tag != tag:
                self._serial += 1
                heapq.heapreplace(turns, (flow.tag, self._serial, flow))
            else:
                return flow.head()
        return None

    def serve(self, waiter: W) -> None:
        """Take `waiter` out of the line because its turn has come, and book its cost."""
        flow = self._flows[waiter.flow]
        flow.tag += waiter.cost / flow.weight
        self._virtual += waiter.cost / self._total_weight
        self.discard(waiter)

    def discard(self, waiter: W) -> None:
        """Take `waiter` out of the line; its key, if it has one, stays busy."""
        waiter.in_line = False
        self._flows[waiter.flow].waiting -= 1
        self._size -= 1
        self._gone += 1
        if self._size == 0:
            self._clear()
        elif self._gone > self._size + 64:
            self._sweep()

    def position(self, waiter: W) -> int:
        """Estimate how many would be served up to and including `waiter` if nobody came or went; 0 if it does not wait.

        Cost: proportional to the flows that wait and to the waiters of its own.
        """
        if not waiter.in_line:
            behind = self._keys.get(waiter.key)
            if waiter.key is None or behind is None or waiter not in behind:
                return 0
            return self._size + behind.index(waiter) + 1
        own = self._flows[waiter.flow]
        position, tag = 1, own.tag
        for other in own:
            if other is waiter:
                break
            position += 1
            tag += other.cost / own.weight
        for flow in self._flows.values():
            if flow is not own and flow.waiting and flow.tag <= tag:
                position += min(flow.waiting, 1 + int((tag - flow.tag) * flow.weight))
        return position

    def _arrive(self, name: Hashable) -> _Flow[W]:
        weight = 1.0 if self._weight is None else self._weight(name)
        if not weight > 0:
            raise ValueError(f"weight of flow {name!r} must be > 0, not {weight!r}")
        tag = max(self._virtual, self._finished.pop(name, 0.0))
        flow = self._flows[name] = _Flow[W](name, tag, weight)
        self._total_weight += weight
        self._serial += 1
        heapq.heappush(self._turns, (tag, self._serial, flow))
        return flow

    def _depart(self, flow: _Flow[W]) -> None:
        del self._flows[flow.name]
        self._total_weight -= flow.weight
        if flow.tag > self._virtual:
            self._finished[flow.name] = flow.tag
        if len(self._finished) > 2 * len(self._flows) + 64:
            self._finished = {name: tag for name, tag in self._finished.items() if tag > self._virtual}

    def _sweep(self) -> None:
        for flow in list(self._flows.values()):
            if flow.waiting:
                flow.sweep()
            else:
                self._depart(flow)
        self._turns = [entry for entry in self._turns if entry[2].waiting]
        heapq.heapify(self._turns)
        self._gone = 0

    def _clear(self) -> None:
        self._flows.clear()
        self._turns.clear()
        self._finished.clear()
        self._virtual = self._total_weight = 0.0
        self._gone = 0
