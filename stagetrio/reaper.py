"""One task that watches over everything that must not last too long.

Theory of operation. A timer per connection, moved at every message, would cost more than the message. Instead a check
is due at a time when the rule *could* first be broken, and looks then: either the rule is broken, or it says when it
could be broken next. Activity itself touches no timer. So a connection has at most one entry per rule, and each entry
is looked at about once per period of its rule, however busy the connection is.

Checks that fall into one tick (by default of `TICK` seconds) are made together at its end, which is how late one can
be. Between them the reaper sleeps until the next one is due; nothing due, or nothing for long, costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import inf

import trio

TICK = 0.25  # seconds


class Reaper:
    """Calls checks when they are due.

    Args:
        tick: Seconds by which a check may be late, > 0.

    Cost: O(log n) per check, nothing in between; no task and no cancel scope per check.
    """

    def __init__(self, tick: float = TICK) -> None:
        self._tick = tick
        # [(time, serial, check)], a heap; a check returns the time of its next look, or inf
        self._due: list[tuple[float, int, Callable[[float], float]]] = []
        self._serial = count()
        self._sleeps_until = inf
        self._wake = trio.Event()  # something is due before that

    def at(self, when: float, check: Callable[[float], float]) -> None:
        """Have a check called with the current time, at ``when`` or up to a tick later, and when it says next.

        Args:
            when: On trio's clock; inf: never.
            check: Synchronous, must not raise; returns the time of its next look, or inf when it is done.
        """
        if when != inf:
            heappush(self._due, (when, next(self._serial), check))
            if when < self._sleeps_until:
                self._wake.set()

    async def run(self) -> None:
        """Call checks until cancelled; run it in a nursery of the owner's.

        Checkpoints: always.
        """
        while True:
            await trio.sleep(self._tick)
            now = trio.current_time()
            while self._due and self._due[0][0] <= now:
                self._call(now)
            self._sleeps_until = self._due[0][0] if self._due else inf
            with trio.move_on_at(self._sleeps_until):
                await self._wake.wait()
            self._sleeps_until = -inf
            self._wake = trio.Event()

    def _call(self, now: float) -> None:
        check = heappop(self._due)[2]
        self.at(check(now), check)
