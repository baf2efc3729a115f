"""Who holds the loop next, among handlers that would like to hold it longer than a quantum. Pure: no clock, no loop.

Theory of operation
===================

A *pass* is one round of the event loop: wait for I/O, then step every task that is ready. All opted-in work together
may hold the loop for one quantum per pass, whoever it belongs to. Passes are of two kinds:

- In a *turn* there is a quantum to spend. Who comes spends from it at once, without queueing, while it lasts.
- In a *rest* there is nothing to spend. A pass is a rest when the pass before was a turn and somebody waits for a
  turn, or more than a quarter of the quantum was spent in it.

So between two stretches of opted-in work lies a pass in which everybody else runs, and what everybody else sees is a
delay of one quantum, however many handlers want the loop. (Giving a slice in every pass would make it two: a task that
becomes ready during one slice would stand behind the next one.)

Two kinds of handlers wait:

- *arrivals*: not begun in this pass because nothing was left to spend, and their flow owes nothing. They are let go in
  the order of arrival, `ARRIVALS` at a time.
- *overdue*: stopped in mid-work, or of a flow that has had a quantum more than its share. One of them is let go at a
  time, fair by time per flow: the tag of a flow is the virtual time at which its next slice should start,
  ``max(virtual time, tag) + seconds / weight`` after each slice; the least tag goes first.

When both kinds wait they alternate, so a burst of newcomers cannot starve the overdue, nor they the newcomers.

Invariants: every waiter is in exactly one of the two structures until it is let go or leaves; ``waiting`` counts
them. The table of tags holds only flows that are ahead of virtual time, at most `MAX_FLOWS` of them: beyond that
those that are least ahead are forgotten.

Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

W = TypeVar("W", bound=Hashable)

ARRIVALS = 16  # let go in one pass: most finish within microseconds, and the quantum bounds the rest
MAX_FLOWS = 4096  # flows ahead of virtual time that are remembered
REST_SHARE = 0.25  # of a quantum: what may be spent in a pass without a rest after it


class Turns(Generic[W]):
    """The run queue of all opted-in handlers of one event loop.

    Args:
        quantum: Seconds of opted-in work per pass, > 0.
        weight: Maps a flow to its weight, > 0; by default every flow weighs 1.
    """

    def __init__(self, quantum: float, weight: Callable[[Hashable], float] | None = None) -> None:
        self.quantum = quantum
        self._weight = weight
        self.used = 0.0  # seconds spent in this pass; the whole quantum in a rest
        self.waiting = 0
        self._resting = False
        self._arrivals: OrderedDict[W, None] = OrderedDict()  # oldest first
        self._heap: list[tuple[float, int, W]] = []  # heap of (tag, sequence, waiter), some of them gone
        self.overdue: dict[W, int] = {}  # waiter: its sequence in the heap; read by the hot path
        self._tags: dict[Hashable, float] = {}
        self._virtual = 0.0
        self._sequence = 0
        self._overdue_was_last = True

    def next_pass(self) -> list[W]:
        """Begin a pass; return the waiters to be let go in it."""
        rest = not self._resting and (self.waiting > 0 or self.used > REST_SHARE * self.quantum)
        self._resting = rest
        if rest:
            self.used = self.quantum
            return []
        self.used = 0.0
        if self._arrivals and (self._overdue_was_last or not self.overdue):
            self._overdue_was_last = False
            return self._let_arrivals_go()
        if self.overdue:
            self._overdue_was_last = True
            return [self._let_overdue_go()]
        return []

    def _let_arrivals_go(self) -> list[W]:
        gone = [waiter for waiter, _ in zip(self._arrivals, range(ARRIVALS), strict=False)]
        for waiter in gone:
            del self._arrivals[waiter]
        self.waiting -= len(gone)
        return gone

    def _let_overdue_go(self) -> W:
        while True:
            tag, sequence, waiter = heappop(self._heap)
            if self.overdue.get(waiter) == sequence:
                del self.overdue[waiter]
                self.waiting -= 1
                self._virtual = max(self._virtual, tag)
                return waiter

    def close(self) -> list[W]:
        """Let everybody go, from now on without bounds; return the waiters."""
        gone = [*self._arrivals, *self.overdue]
        self._arrivals.clear()
        self.overdue.clear()
        self.waiting = 0
        self.used, self.quantum = 0.0, math.inf
        return gone

    def wait(self, waiter: W, flow: Hashable, *, begun: bool, again: bool = False) -> bool:
        """Queue a waiter; return whether it is overdue.

        Args:
            waiter: Not queued yet.
            flow: The flow that its work is charged to.
            begun: It was stopped in mid-work, so it is overdue, whatever it owes.
            again: It was let go, and found that others had spent the quantum: it keeps its place.
        """
        self.waiting += 1
        tag = max(self._virtual, self._tags.get(flow, 0.0))
        if not begun and tag <= self._virtual + self.quantum:
            self._arrivals[waiter] = None
            if again:
                self._arrivals.move_to_end(waiter, last=False)
            return False
        self._sequence += 1
        self.overdue[waiter] = self._sequence
        heappush(self._heap, (tag, self._sequence, waiter))
        if len(self._heap) > 2 * len(self.overdue) + 64:
            self._heap = [place for place in self._heap if self.overdue.get(place[2]) == place[1]]
            heapify(self._heap)
        return True

    def leave(self, waiter: W) -> None:
        """Remove a waiter that was not let go."""
        if waiter in self._arrivals:
            del self._arrivals[waiter]
        else:
            del self.overdue[waiter]
        self.waiting -= 1

    def owes(self, flow: Hashable) -> bool:
        """Whether a flow has had more than a quantum beyond its share, and somebody waits who has not."""
        return bool(self.overdue) and self._tags.get(flow, 0.0) > self._virtual + self.quantum

    def charge(self, flow: Hashable, seconds: float) -> None:
        """Book the time for which a flow's work held the loop."""
        weight = 1.0 if self._weight is None else self._weight(flow)
        if not (weight > 0 and weight < math.inf):
            raise ValueError(f"weight must be finite and above 0, not {weight!r} (of flow {flow!r})")
        self._tags[flow] = max(self._virtual, self._tags.get(flow, 0.0)) + seconds / weight
        if len(self._tags) > MAX_FLOWS:
            self._forget_some()

    def forget(self, flow: Hashable) -> None:
        """Drop what is remembered of a flow that will not come back."""
        self._tags.pop(flow, None)

    def forget_all(self) -> None:
        """Nobody waits and nobody has waited: all start anew."""
        self._tags.clear()

    def _forget_some(self) -> None:
        ahead = sorted((tag, key) for key, tag in enumerate(self._tags.values()) if tag > self._virtual)
        keep = {key for _, key in ahead[-MAX_FLOWS // 2 :]}
        self._tags = {flow: tag for key, (flow, tag) in enumerate(self._tags.items()) if key in keep}
