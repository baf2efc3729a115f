"""Limits: rates here, concurrency that adapts in `stagetrio.adaptive`, and what a refusal looks like.

`Overloaded` is the one refusal of the whole library: every ``*_nowait`` function that puts something in, or takes a
place, raises it, with the reason and the time after which another attempt is worth making. (One that finds nothing to
take out, such as ``receive_nowait``, raises Trio's own `trio.WouldBlock`: nobody was refused.)

Theory of operation (`RateLimiter`). A token bucket needs no bucket and no refill: the generic cell rate algorithm
keeps one number, the *theoretical arrival time* ``tat``, which is when the bucket will be full again. A request of
cost ``c`` moves it on by ``c × interval`` (from now, if it lies in the past), and may pass from
``ready = tat - (burst - c) × interval`` on, which is when the bucket holds ``c`` units. Nothing happens while nobody
asks, so an idle limiter costs nothing, and two numbers bound what passes in any span ``t``: ``burst + rate × t``.

Who has to wait stands in line, first come, first served. Only the head of the line sleeps; the others are parked
behind it and cost no timer. The head takes what it came for when its time has come, and wakes the next. So a large
cost waits as long as its own size takes to refill, whatever the number of small ones behind it, and a waiter that is
cancelled has taken nothing. (Handing out reservations instead, ``tat`` moved on at arrival and each waiter asleep
until its own moment, is shorter, and wrong: the units of a cancelled waiter are lost to those behind it.)

Limits form a tree by ``parent=``: a connection's below its tenant's below the global one. A request stands in one
line after the other, from the leaf to the root, each time until it is the head *and* that limit is ready for it.
Nobody else can draw from a limit whose line has a head, so what was ready stays ready; at the root all are taken in
one synchronous step, or, when the caller is cancelled before that, none.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Hashable, Iterator

import attrs
import trio

from stagetrio.adaptive import AdaptiveLimiter, AdaptiveLimiterStatistics
from stagetrio.amounts import check_above_zero, check_amount
from stagetrio.overload import Overloaded

__all__ = [
    "AdaptiveLimiter",
    "AdaptiveLimiterStatistics",
    "FlowRateLimit",
    "FlowRateLimiter",
    "FlowRateLimiterStatistics",
    "Overloaded",
    "Rate",
    "RateLimiter",
    "RateLimiterStatistics",
]

_EPSILON = 1e-9
"""Seconds by which a request may be early: sums of floats on a mock clock miss the exact moment by less."""


def _positive(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    check_above_zero(attribute.name, value)


@attrs.frozen
class Rate:
    """So much per so many seconds: ``Rate(100)`` is 100/s, ``Rate(5, per=60)`` is five a minute.

    Args:
        count: Units of cost, > 0; ``math.inf`` for no limit. One of them takes a finite time.
        per: Seconds in which they may pass, > 0 and finite.
    """

    count: float = attrs.field(validator=_positive)
    per: float = attrs.field(default=1.0, validator=_positive)

    def __attrs_post_init__(self) -> None:
        if self.per == math.inf:
            raise ValueError("per must be finite, not inf")
        if self.interval == math.inf:
            raise ValueError(f"count must be such that one takes a finite time, not {self.count!r}")

    @property
    def interval(self) -> float:
        """Seconds for one unit of cost."""
        return self.per / self.count


@attrs.frozen
class RateLimiterStatistics:
    """What `RateLimiter.statistics` returns."""

    waiting: int
    """Tasks in line in ``acquire``."""
    passed: int
    """Requests let through so far."""
    refused: int
    """Requests refused by ``acquire_nowait``, or because the line was full."""


class _Waiter:
    """One task in the line of one limiter."""

    __slots__ = ("cost", "event")

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.event = trio.Event()


_NOBODY: deque[_Waiter] = deque()
"""The line of every limiter that has none: an empty deque is 760 bytes, too much for each of 100,000 flows."""


class RateLimiter:
    """Lets through `rate` units of cost per second on average, and up to `burst` units at once.

    In any span of ``t`` seconds at most ``burst + rate × t`` units pass. Requests that have to wait are served first
    come, first served, each as soon as its whole cost is there and never before.

    Args:
        rate: The average.
        burst: Units that may pass at once after a pause, > 0; also the largest cost of one request.
        parent: A limit above this one. A request passes when it passes all of them, and draws from all or none.
        max_waiting: Tasks that may stand in line in `acquire`; one more gets `Overloaded`.

    Source: ITU-T I.371, the generic cell rate algorithm (virtual scheduling form).
    """

    __slots__ = ("_line", "_line_cost", "_passed", "_refused", "_tat", "burst", "max_waiting", "parent", "rate")

    def __init__(
        self,
        rate: Rate,
        *,
        burst: float,
        parent: RateLimiter | FlowRateLimit | None = None,
        max_waiting: float = math.inf,
    ) -> None:
        if not isinstance(rate, Rate):
            raise TypeError(f"rate must be a Rate, not {rate!r}")
        if not (parent is None or isinstance(parent, RateLimiter | FlowRateLimit)):
            raise TypeError(f"parent must be a RateLimiter or the flow of a FlowRateLimiter, not {parent!r}")
        check_above_zero("burst", burst)
        check_amount("max_waiting", max_waiting)
        if burst < math.inf and burst * rate.interval == math.inf:
            raise ValueError(f"burst must be smaller, to be refilled in a finite time at {rate!r}, not {burst!r}")
        self.rate = rate
        self.burst = burst
        self.parent = parent
        self.max_waiting = max_waiting
        self._tat = -math.inf
        self._line = _NOBODY
        self._line_cost = 0.0
        self._passed = 0
        self._refused = 0

    @trio.lowlevel.enable_ki_protection
    def acquire_nowait(self, cost: float = 1.0) -> None:
        """Draw `cost` units now.

        Args:
            cost: Units, ≥ 0, finite and at most ``burst``.

        Raises:
            Overloaded: They are not there, or others wait in line for theirs; reason ``"rate"``.
            ValueError: `cost` can never pass.

        Cost: about 1 µs for each limit up the tree.
        """
        levels = self._levels(cost)
        now = trio.current_time()
        delay = max(level._delay(cost, now) for level in levels)
        if delay > _EPSILON or any(level._line for level in levels):
            self._refused += 1
            raise Overloaded("rate", delay)
        for level in levels:
            level._take(cost, now)

    @trio.lowlevel.enable_ki_protection
    async def acquire(self, cost: float = 1.0) -> None:
        """Wait in line for `cost` units and draw them.

        Args:
            cost: Units, ≥ 0, finite and at most ``burst``.

        Raises:
            Overloaded: ``max_waiting`` tasks are in line already; reason ``"waiting"``.
            ValueError: `cost` can never pass.

        Checkpoints: always. A cancelled request has drawn nothing, from no limit of the tree.
        """
        levels = self._levels(cost)
        await trio.lowlevel.checkpoint_if_cancelled()
        now = trio.current_time()
        if not any(level._line or level._delay(cost, now) > _EPSILON for level in levels):
            for level in levels:
                level._take(cost, now)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        await self._acquire_in_line(cost)

    def delay(self, cost: float = 1.0) -> float:
        """Return the seconds until a request of `cost` made now would pass, behind those in line; ≥ 0.

        Args:
            cost: Units, ≥ 0, finite and at most ``burst``.

        Raises:
            ValueError: `cost` can never pass.
        """
        now = trio.current_time()
        return max(level._delay(cost, now) for level in self._levels(cost))

    def statistics(self) -> RateLimiterStatistics:
        """Return the figures of this limit."""
        return RateLimiterStatistics(len(self._line), self._passed, self._refused)

    def __repr__(self) -> str:
        return f"RateLimiter({self.rate}, burst={self.burst})"

    def _levels(self, cost: float) -> list[RateLimiter]:
        """This limit and those above it, leaf first, each able to pass `cost` at some time."""
        levels = [self]
        while (parent := levels[-1].parent) is not None:
            levels.append(parent._limiter() if isinstance(parent, FlowRateLimit) else parent)
        for level in levels:
            if not 0 <= cost <= level.burst or cost == math.inf:
                raise ValueError(f"cost must be between 0 and the burst {level.burst!r}, not {cost!r}")
        return levels

    def _refilled_at(self, now: float) -> float:
        """A lower bound of when the whole burst will be there and nobody wait for it."""
        return max(self._tat, now) + self.rate.interval if self._line else self._tat

    def _ready(self, cost: float) -> float:
        """When `cost` may pass, if nobody stands in line."""
        if self.burst == math.inf:
            return -math.inf
        return self._tat - (self.burst - cost) * self.rate.interval

    def _delay(self, cost: float, now: float) -> float:
        return max(0.0, self._ready(cost) + self._line_cost * self.rate.interval - now)

    def _take(self, cost: float, now: float) -> None:
        self._tat = max(self._tat, now) + cost * self.rate.interval
        self._passed += 1

    async def _acquire_in_line(self, cost: float) -> None:
        joined: list[tuple[RateLimiter, _Waiter]] = []
        parent: RateLimiter | FlowRateLimit | None = self
        try:
            while parent is not None:
                # A flow is looked up when its line is joined, for it may have been forgotten since; from then
                # on its line keeps it.
                level = parent._limiter() if isinstance(parent, FlowRateLimit) else parent
                waiter = level._join(cost)
                joined.append((level, waiter))
                if level._line[0] is not waiter:
                    await waiter.event.wait()
                # The clock reaches the very number that was slept for, so nothing has to be asked again.
                await trio.sleep_until(level._ready(cost))
                parent = level.parent
            now = trio.current_time()
            for level, _ in joined:
                level._take(cost, now)
        finally:
            for level, waiter in joined:
                level._leave(waiter)

    def _join(self, cost: float) -> _Waiter:
        if len(self._line) >= self.max_waiting:
            self._refused += 1
            raise Overloaded("waiting", self._delay(cost, trio.current_time()))
        if self._line is _NOBODY:
            self._line = deque()
        waiter = _Waiter(cost)
        self._line.append(waiter)
        self._line_cost += cost
        return waiter

    def _leave(self, waiter: _Waiter) -> None:
        """Step out of line; whoever is the head now is woken."""
        line = self._line
        line.remove(waiter)
        self._line_cost -= waiter.cost
        if line:
            line[0].event.set()
        else:
            self._line = _NOBODY
            self._line_cost = 0.0


@attrs.frozen
class FlowRateLimiterStatistics:
    """What `FlowRateLimiter.statistics` returns."""

    flows: int
    """Flows remembered now, at most ``max_flows``."""
    evicted: int
    """Flows forgotten so far, because they had their whole burst again and the room was needed."""
    turned_away: int
    """Requests of unknown flows refused because no flow could be forgotten."""


class FlowRateLimiter:
    """One `RateLimiter` for each flow, all alike, in bounded memory.

    A flow that has refilled its burst is the same as one never seen, so forgetting it loses nothing. When `max_flows`
    are remembered, room is made for a new one by forgetting such a flow; while there is none, unknown flows are
    refused. A stranger who invents a new identity for each request thus fills the table and is turned away, and
    resets nobody's limit.

    Args:
        rate: The average of each flow.
        burst: Units each flow may draw at once after a pause, > 0.
        max_flows: Flows remembered at most, ≥ 1.
        parent: A limit above all of them, see `RateLimiter`.

    Cost: some 300 bytes for each flow remembered; forgetting is O(log n) amortised.
    """

    def __init__(
        self,
        rate: Rate,
        *,
        burst: float,
        max_flows: float,
        parent: RateLimiter | FlowRateLimit | None = None,
    ) -> None:
        check_amount("max_flows", max_flows, 1)
        RateLimiter(
            rate, burst=burst, parent=parent
        )  # same arguments, same errors, and at once
        self.rate = rate
        self.burst = burst
        self.max_flows = max_flows
        self.parent = parent
        self._limiters: dict[Hashable, RateLimiter] = {}
        # (when it was seen to be refilled, serial, flow), one for each flow; the time may have moved on since.
        self._refilled: list[tuple[float, int, Hashable]] = []
        self._serial = 0
        self._evicted = 0
        self._turned_away = 0

    @trio.lowlevel.enable_ki_protection
    def acquire_nowait(self, flow: Hashable, cost: float = 1.0) -> None:
        """Draw `cost` units of `flow` now.

        Raises:
            Overloaded: They are not there, or the flow is unknown and none can be forgotten; reason ``"rate"``.
            ValueError: `cost` can never pass.
        """
        self._limiter(flow).acquire_nowait(cost)

    @trio.lowlevel.enable_ki_protection
    async def acquire(self, flow: Hashable, cost: float = 1.0) -> None:
        """Wait in the line of `flow` for `cost` units and draw them.

        Raises:
            Overloaded: The flow is unknown and none can be forgotten; reason ``"rate"``.
            ValueError: `cost` can never pass.

        Checkpoints: always. A cancelled request has drawn nothing.
        """
        await self._limiter(flow).acquire(cost)

    @trio.lowlevel.enable_ki_protection
    def delay(self, flow: Hashable, cost: float = 1.0) -> float:
        """Return the seconds until a request of `cost` made now by `flow` would pass; ≥ 0.

        Raises:
            ValueError: `cost` can never pass.
        """
        limiter = self._limiters.get(flow)
        if limiter is None:
            if (wait := self._wait_for_room()) > 0:
                return wait
            limiter = RateLimiter(self.rate, burst=self.burst, parent=self.parent)
        return limiter.delay(cost)

    def flow(self, flow: Hashable) -> FlowRateLimit:
        """Return the limit of one flow, to be the ``parent`` of others."""
        return FlowRateLimit(self, flow)

    def statistics(self) -> FlowRateLimiterStatistics:
        """Return the figures of all flows together."""
        return FlowRateLimiterStatistics(len(self._limiters), self._evicted, self._turned_away)

    def __iter__(self) -> Iterator[Hashable]:
        """The flows remembered now."""
        return iter(self._limiters)

    def _limiter(self, flow: Hashable) -> RateLimiter:
        limiter = self._limiters.get(flow)
        if limiter is None:
            if (wait := self._wait_for_room()) > 0:
                self._turned_away += 1
                raise Overloaded("rate", wait)
            if len(self._limiters) >= self.max_flows:
                del self._limiters[heapq.heappop(self._refilled)[2]]
                self._evicted += 1
            limiter = RateLimiter(self.rate, burst=self.burst, parent=self.parent)
            self._limiters[flow] = limiter
            self._serial += 1
            heapq.heappush(self._refilled, (-math.inf, self._serial, flow))
        return limiter

    def _wait_for_room(self) -> float:
        """Seconds until a flow can be forgotten, 0 when there is room; then it is on top of the heap."""
        if len(self._limiters) < self.max_flows:
            return 0.0
        heap = self._refilled
        now = trio.current_time()
        while True:
            seen, serial, flow = heap[0]
            refilled_at = self._limiters[flow]._refilled_at(now)
            if refilled_at <= seen:
                return max(0.0, seen - now)
            heapq.heapreplace(heap, (refilled_at, serial, flow))


@attrs.frozen
class FlowRateLimit:
    """The limit of one flow of a `FlowRateLimiter`, as a ``parent``; made by `FlowRateLimiter.flow`.

    It names the flow and holds nothing, so the flow can be forgotten while it is at rest.
    """

    flows: FlowRateLimiter
    flow: Hashable

    def _limiter(self) -> RateLimiter:
        return self.flows._limiter(self.flow)
