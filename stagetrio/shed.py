"""Refusing some so that the others are served: the same ones everywhere.

Theory of operation. A server that is offered twice what it can do has to refuse half. Where one request needs four
calls, each to a server that refuses half at random, one request in sixteen succeeds, and the work of the others is
wasted. So each request carries a *priority*, a number that all its calls share, and a server that has to refuse does so
from one end: it admits what is below its *level*. Servers that are about equally loaded then refuse the same requests.
A priority derived from who asks (`priority_of`) needs no number to be carried, and one with a changing salt does not
always hit the same people.

The level is looked at by the window, and two things move it. The time that admitted work waited before it was begun is
to be the target: the further it is off, up to a twentieth either way. And as much is to be admitted as is begun: half
of what is missing, by the mean of the last windows, is made up for at once, which keeps the first from swinging. (Steps
of a fixed size, a twentieth down and a fiftieth up, swing by a tenth, and of four services the lowest counts.)

Source: Zhou et al.: Overload Control for Scaling WeChat Microservices (SoCC 2018), from which the level, and the
measure: waiting time, not response time.
"""

from __future__ import annotations

import hashlib
import math

import attrs
from trio import current_time

from stagetrio.amounts import check_above_zero
from stagetrio.overload import Overloaded

STEP = 0.05  # of the level, for a waiting time twice the target, or none
MEMORY = 0.8  # of what was admitted and begun, from window to window
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
            if check_above_zero(argument, value) == math.inf:
                raise ValueError(f"{argument} must be > 0 and finite, not {value!r}")
        self._target = target
        self._window = window
        self._level = 1.0
        self._ends = -math.inf
        self._admitted = 0  # in this window, like the next two
        self._begun = 0
        self._waited = 0.0
        self._admitted_lately = 0.0  # in the windows before, the older the less, like the next
        self._begun_lately = 0.0
        self._admitted_before = 0
        self._shed = 0
        self._mean_wait = 0.0

    @property
    def level(self) -> float:
        """The share of priorities admitted now; a caller that knows it need not ask in vain."""
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
            waited: Seconds since it was admitted, ≥ 0 and finite.
        """
        if not 0 <= waited < math.inf:
            raise ValueError(f"waited must be >= 0 and finite, not {waited!r}")
        self._begun += 1
        self._waited += waited

    def statistics(self) -> ShedderStatistics:
        """Return the figures of this shedder."""
        return ShedderStatistics(self._level, self._admitted_before + self._admitted, self._shed, self._mean_wait)

    def _look(self) -> None:
        self._admitted_lately = self._admitted_lately * MEMORY + self._admitted
        self._begun_lately = self._begun_lately * MEMORY + self._begun
        late = -1.0
        if self._begun:
            self._mean_wait = self._waited / self._begun
            late = max(-1.0, min(1.0, self._mean_wait / self._target - 1))
        elif self._admitted:
            late = 1.0
        kept_up = self._begun_lately / self._admitted_lately if self._admitted_lately else 1.0
        level = self._level * math.sqrt(max(0.5, min(1.5, kept_up))) * (1 - STEP * late)
        self._level = max(LEAST, min(1.0, level))
        self._admitted_before += self._admitted
        self._admitted = self._begun = 0
        self._waited = 0.0
