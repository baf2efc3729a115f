"""One task that watches over everything that must not last too long.

Theory of operation. A timer per connection, moved at every message, would cost more than the message. Instead a check
is due at a time when the rule *could* first be broken, and looks then: either the rule is broken, or it says when it
could be broken next. Activity itself touches no timer. So a connection has at most one entry per rule, and each entry
is looked at about once per period of its rule, however busy the connection is.

Checks that fall into one tick (by default of `TICK` seconds) are made together at its end, which is how late one can
be. Between them the reaper sleeps until the next one is due; nothing due, or nothing for long, costs nothing.

Whose connection has ended is gone before its checks are due: what is checked is not kept (`Reaper.watch`), and when
more than half of the checks are for nothing they are thrown out together. So under a churn of connections, too, what is
held is proportional to those that are open.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from weakref import WeakMethod

import trio

TICK = 0.25  # seconds
FEW = 64  # dead checks are not worth a pass over all

Check = Callable[[float], float]


class Reaper:
    """Calls checks when they are due.

    Args:
        tick: Seconds by which a check may be late, > 0.

    Cost: O(log n) per check, nothing in between; no task and no cancel scope per check.
    """

    def __init__(self, tick: float = TICK) -> None:
        self._tick = tick
        # [(time, serial, check)], a heap; a check returns the time of its next look, or inf
        self._due: list[tuple[float, int, Check | WeakMethod[Check]]] = []
        self._dead = 0  # checks of what is gone, give or take those that died in a pass
        self._serial = count()
        self._sleeps_until = inf
        self._wake = trio.Event()  # something is due before that

    @property
    def pending(self) -> int:
        """Checks that are held."""
        return len(self._due)

    def at(self, when: float, check: Check) -> None:
        """Have a check called with the current time, at ``when`` or up to a tick later, and when it says next.

        Args:
            when: On trio's clock; inf: never.
            check: Synchronous, must not raise; returns the time of its next look, or inf when it is done.
        """
        self._push(when, check)

    def watch(self, when: float, check: Check) -> None:
        """As `at`, for a bound method of something that need not live until then; what is gone is not checked."""
        self._push(when, WeakMethod(check, self._died))

    def _push(self, when: float, check: Check | WeakMethod[Check]) -> None:
        if when != inf:
            heappush(self._due, (when, next(self._serial), check))
            if when < self._sleeps_until:
                self._wake.set()
            if self._dead > FEW and self._dead > len(self._due) // 2:
                self._bury()

    def _died(self, check: WeakMethod[Check]) -> None:
        self._dead += 1  # and no more: this may be called amid anything

    def _bury(self) -> None:
        self._dead = 0
        self._due = [entry for entry in self._due if not (isinstance(entry[2], WeakMethod) and entry[2]() is None)]
        heapify(self._due)

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
        entry = heappop(self._due)[2]
        check = entry() if isinstance(entry, WeakMethod) else entry
        if check is None:
            self._dead -= 1
        else:
            self._push(check(now), entry)
