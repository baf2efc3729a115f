"""Jobs that wait for a worker: fair among flows, one at a time per key.

Theory of operation. Jobs wait in a `FairQueue`, so the flows of many producers take turns by the time their jobs have
taken. `take` gives the next one whose key is free. A job that comes up while its key is in hand is parked behind it,
without a worker, and comes out first when the key is released; so jobs of one key never overlap and come in the order
of their turns. At most `MAX_PARKED` are parked per key: from then on the flows that bring more of it are held in the
queue. So what is taken out of the queue before it can run is bounded by the number of keys in hand, and what waits in
all by that and the bound of the queue.

A job that is not wanted any more (``dropped``) stays in its place and is passed over, at no cost to its flow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

import trio

from stagetrio.calls import Call
from stagetrio.fair_queue import FairQueue, FairQueueStatistics
from stagetrio.flow import check_positive

MAX_PARKED = 64


C = TypeVar("C", bound=Call)


class _Key(Generic[C]):
    __slots__ = ("held", "parked")

    def __init__(self) -> None:
        self.parked: deque[C] = deque()
        self.held: list[Hashable] = []  # flows held in the queue because they bring more of this key


class Backlog(Generic[C]):
    """Jobs that wait for a worker.

    Args:
        queue: where they wait; the backlog receives from it, and nobody else.
    """

    def __init__(self, queue: FairQueue[Hashable, C]) -> None:
        self._queue = queue
        self._keys: dict[Hashable, _Key[C]] = {}  # the keys in hand
        self._freed: deque[C] = deque()  # came up while their key was in hand, and hold it now
        self._parked = 0
        self.queued = 0  # jobs in the queue, dropped ones included

    def check(self, job: C) -> None:
        """Refuse a job that could not be filed or booked later, when there is no caller to be told.

        Raises:
            TypeError, ValueError: The argument is named.
        """
        try:
            hash(job.flow), hash(job.key)
        except TypeError:
            name, value = ("key", job.key) if isinstance(job.flow, Hashable) else ("flow", job.flow)
            raise TypeError(f"{name} must be hashable, not {value!r}") from None
        if job.cost != 1.0:
            check_positive("cost", job.cost)
        self._queue.charge(job.flow, 0.0)  # asks for the weight of a flow that is new

    def add(self, job: C) -> None:
        """Let a job wait for its turn.

        Raises:
            Overloaded: Too many wait already.
        """
        self._queue.send_nowait(job.flow, job, cost=job.cost)
        self.queued += 1

    async def add_again(self, job: C) -> None:
        """Let a job wait that has been accepted before: where there is no place, it waits for one.

        Checkpoints: always; cancelled, the job does not wait.
        """
        self.queued += 1
        try:
            await self._queue.send(job.flow, job, cost=job.cost)
        except BaseException:
            self.queued -= 1
            raise

    def take(self) -> C | None:
        """The next job in fair order whose key is free, its key in hand now; None: there is none."""
        while self:  # asked first, since an exception costs more than a trivial job
            if self._freed:
                job = self._freed.popleft()
            else:
                try:
                    delivery = self._queue.receive_delivery_nowait()
                except (trio.WouldBlock, trio.EndOfChannel):
                    return None
                self.queued -= 1
                job = delivery.item
                job.delivery = delivery
                if not job.dropped and not self._acquire_key(job):
                    continue
            if not job.dropped:
                return job
            self.settle(job, 0)
            self.release_key(job)
        return None

    def __bool__(self) -> bool:
        """Whether there may be a job to take."""
        return bool(self.queued or self._freed)

    def settle(self, job: C, seconds: float) -> None:
        """Book what one call of a job has taken."""
        if job.delivery is not None:
            job.delivery.settle(seconds)
            job.delivery = None
        elif seconds:
            self._queue.charge(job.flow, seconds)

    def release_key(self, job: C) -> None:
        """Give the job's key, if it holds it, to whoever has waited longest for it."""
        if not job.holds_key:
            return
        job.holds_key = False
        key = self._keys[job.key]
        if key.parked:
            heir = key.parked.popleft()
            heir.holds_key = True
            self._parked -= 1
            self._freed.append(heir)
            if len(key.parked) < MAX_PARKED:
                self._resume(key)
        else:
            del self._keys[job.key]
            self._resume(key)

    def _acquire_key(self, job: C) -> bool:
        if job.key is None or job.holds_key:
            return True
        key = self._keys.get(job.key)
        if key is None:
            self._keys[job.key] = _Key()
            job.holds_key = True
            return True
        key.parked.append(job)
        self._parked += 1
        if len(key.parked) >= MAX_PARKED:
            self._queue.hold(job.flow)
            key.held.append(job.flow)
        return False

    def _resume(self, key: _Key[C]) -> None:
        for flow in key.held:
            self._queue.resume(flow)
        key.held.clear()

    @property
    def parked(self) -> int:
        """Jobs that came up while their key was in hand."""
        return self._parked + len(self._freed)

    def statistics(self) -> FairQueueStatistics:
        """Those of the queue."""
        return self._queue.statistics()
