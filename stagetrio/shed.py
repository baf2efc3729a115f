"""Refusing some so that the others are served: the same ones everywhere.

Theory of operation. A server that is offered twice what it can do has to refuse half. Where one request needs four
calls, each to a server that refuses half at random, one request in sixteen succeeds, and the work of the others is
wasted. So each request carries a *priority*, a number that all its calls share, and a server that has to refuse does so
from one end: it admits what is below its *level*. Servers that are about equally loaded then refuse the same requests.
A priority derived from who asks (`priority_of`) needs no number to be carried, and one with a changing salt does not
always hit the same people.

The level follows the time that admitted work waited before it was begun, by the window. When the mean is above the
target, the level becomes a twentieth less than the share that was really begun, so that the queue goes away; otherwise
it rises by a fiftieth. A window in which nothing was begun although something was admitted halves it.

Source: Zhou et al.: Overload Control for Scaling WeChat Microservices (SoCC 2018), from which the level, the measure
(waiting time, not response time) and the figures of the steps.
"""

from __future__ import annotations

import hashlib
import math

import attrs
from trio import current_time

from stagetrio.overload import Overloaded

CUT = 0.95
RAISE = 0.02
LEAST = 0.01  # of the level: a server that admits nothing would never learn that it is well again


def priority_of(identity: object, salt: object = "") -> float:
    """Return a number ≥ 0 and < 1 that is the same for the same identity in every process, and evenly spread.

    Args:
        identity: Who asks or what is asked for: a user, a session, a request id; its ``repr`` counts.
        salt: Changes all numbers when it changes, for instance with the hour.
    """
    digest = hashlib.blake2b(repr((identity, salt)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


@attrs.frozen
class ShedderStatistics:
    """What `Shedder.statistics` returns.

    Args:
        level: The share of priorities admitted now, > 0 and ≤ 1.
        admitted: Requests admitted so far.
        shed: Requests refused so far.
        waited_seconds: Mean time that work waited before it was begun, in the last window in which some was.
    """

    level: float
    admitted: int
    shed: int
    waited_seconds: float


class Shedder:
    """Admits the requests a server can serve, from one end of the priorities.

    Ask `admit` when a request comes, and tell `begun` when its work begins: the time it has waited in between for a
    ticket, a worker or its turn in a queue is what says that there is too much.

    Args:
        target: Mean seconds of waiting above which the server takes itself for overloaded, > 0.
        window: Seconds after which the level is looked at, > 0.
    """

    def __init__(self, *, target: float = 0.02, window: float = 1.0) -> None:
        for argument, value in (("target", target), ("window", window)):
            if not 0 < value < math.inf:
                raise ValueError(f"{argument} must be > 0 and finite, not {value!r}")
        self._target = target
        self._window = window
        self._level = 1.0
        self._ends = -math.inf
        self._admitted = 0  # in this window, like the next two
        self._begun = 0
        self._waited = 0.0
        self._admitted_before = 0
        self._shed = 0
        self._mean_wait = 0.0

    @property
    def level(self) -> float:
        """The share of priorities admitted now: a caller that knows it need not ask in vain."""
        return self._level

    def admit(self, priority: float) -> None:
        """Let a request in, or refuse it.

        Args:
            priority: The same for all calls of one request, ≥ 0 and < 1; 0 is admitted as long as anything is.

        Raises:
            Overloaded: There is too much work for requests of this priority; reason ``"rate"``.
        """
        if not 0 <= priority < 1:
            raise ValueError(f"priority must be >= 0 and < 1, not {priority!r}")
        now = current_time()
        if now >= self._ends:
            self._look()
            self._ends = now + self._window
        if priority >= self._level:
            self._shed += 1
            raise Overloaded("rate", self._window)
        self._admitted += 1

    def begun(self, waited: float) -> None:
        """Take in that an admitted request is being served.

        Args:
            waited: Seconds since it was admitted, ≥ 0.
        """
        self._begun += 1
        self._waited += waited

    def statistics(self) -> ShedderStatistics:
        """Return the figures of this shedder."""
        return ShedderStatistics(self._level, self._admitted_before + self._admitted, self._shed, self._mean_wait)

    def _look(self) -> None:
        if self._begun:
            self._mean_wait = self._waited / self._begun
            if self._mean_wait > self._target:
                share = self._level * self._begun / max(1, self._admitted)  # that is what it could have served
                self._level = min(self._level, max(LEAST, CUT * share))
            else:
                self._level = min(1.0, self._level + RAISE)
        elif self._admitted:
            self._level = max(LEAST, self._level / 2)
        else:
            self._level = min(1.0, self._level + RAISE)
        self._admitted_before += self._admitted
        self._admitted = self._begun = 0
        self._waited = 0.0
