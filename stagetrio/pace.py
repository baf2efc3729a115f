"""How fast a counter rises, looked at only when somebody asks."""

from __future__ import annotations

import math

WINDOW = 1.0
"""Seconds; a pace is measured over one to two of them."""


class Pace:
    """The recent pace of a counter that is kept elsewhere: whatever is counted, counting it costs nothing more."""

    __slots__ = ("_newer", "_older")

    def __init__(self) -> None:
        self._older = (math.inf, 0)
        self._newer = (math.inf, 0)

    def seconds_for(self, count: float, counter: int, now: float) -> float:
        """Estimate the seconds in which the counter will rise by `count`; 0 when it was not seen to rise yet.

        Args:
            count: How much, ≥ 0.
            counter: What it is at now.
            now: Seconds, on one clock.
        """
        if self._older[0] == math.inf:
            self._older = self._newer = (now, counter)
        elif now - self._newer[0] >= WINDOW:
            self._older, self._newer = self._newer, (now, counter)
        since, was = self._older
        if counter == was:
            return 0.0
        return count * (now - since) / (counter - was)
