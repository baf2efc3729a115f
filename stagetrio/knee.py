"""Where more work at a time stops buying throughput, estimated from latencies. Pure: no clock, no event loop.

Theory of operation. A backend that can do ``c`` things at a time, each in ``s`` seconds, answers ``n`` at a time in
``L(n) = s`` up to the knee ``n = c``, and in ``L(n) = s × n / c`` beyond it, where all that is added stands in a queue.
So from any point beyond the knee the knee can be told at once, ``c = n × s / L``, if ``s`` is known; before the knee
the same formula says ``c = n``, that is: no queue yet, go on. The limit is kept one above the estimate (a twentieth,
where that is more), so that there is a queue of one to be seen, and grows by itself where there is none. Growth that is
confirmed by the next window speeds up by half each time.

**The baseline** ``s`` is where such laws go wrong. A minimum over all time falls for ever when latencies are noisy,
and never rises when the backend gets slower. A long average (Gradient2), or a fresh sample now and then (Vegas with
probes), is taken while there is a queue, so each new baseline holds a little of it, and the limit creeps up for hours.
Here it is measured where there is no queue: every eighth window the limit *dips* by a fifth, which is below the knee
when the estimate is right, and the baseline is the average of the dips (the more the noise, the longer the average). A
dip in which latency falls as the limit falls was still above the knee: if that is beyond doubt it becomes the estimate
and the next one starts from there, else it comes soon. Dips that lie on one side of the baseline twice running make a
new one. The limit stays within a quarter of the knee during a dip.

**Noise.** A window ends after `MIN_SAMPLES` samples, or two for each at a time, when the standard error of its mean is
below a tenth, or after `MAX_SAMPLES`. The estimate follows a window by ``TRUST / (TRUST + error)``, except that a
surprise of more than three errors counts at once. After a change of the limit samples are left out for as long as the
last mean latency, for they still belong to the old one.

**What is not learnt from.** A window in which on average less than three quarters of the limit was in use says nothing
about the limit: idleness does not shrink it, and does not let it grow. Work that failed or was cancelled says nothing
about latency, so its samples are not given to this module at all.

Why this and not one of the three laws it was chosen among is told, with figures, in ``docs/reference/adaptive.rst``.

Source: Brakmo, Peterson: TCP Vegas (1995), the queue estimate; Cardwell et al.: BBR (2016), the dips; Netflix
concurrency-limits, the laws it was compared with, and issue #134 there, the drift.
"""

from __future__ import annotations

import math

MIN_SAMPLES = 20
MAX_SAMPLES = 100
GOOD_ERROR = 0.1  # relative standard error of a window's mean below which more samples are not waited for
TRUST = 0.05  # of a new estimate against its error
BASELINE_TRUST = 0.02
DIP = 0.8  # of the estimate
DIP_EVERY = 8  # windows; sooner while the baseline is young
USED = 0.75  # of the limit: below that a window tells nothing about it
SPEED_UP = 1.5


class Knee:
    """The limit that the latencies given so far suggest.

    Args:
        initial: To begin with, ≥ 1.
        lowest: Of the limit, ≥ 1.
        highest: Of the limit, ≥ `initial`.
    """

    def __init__(self, initial: int, lowest: int, highest: float) -> None:
        self.limit = initial
        self.windows = 0
        """How many have been looked at."""
        self.baseline = math.nan
        """Seconds that the work takes without a queue, as far as is known."""
        self.latency = math.nan
        """Mean seconds of the last window."""
        self._lowest = lowest
        self._highest = highest
        self._estimate = float(initial)
        self._headroom = 1.0
        self._growing = True  # from the start on, as long as no queue has been seen
        self._dipping = False
        self._since_dip = 0
        self._dips = 0  # how many the baseline is the average of
        self._one_sided = 0.0  # by how many errors the last dips missed the baseline, each half as much as the next
        self._before = (math.nan, math.nan)  # (at a time, latency) of the last window
        # The window.
        self._begin: float | None = None
        self._quiet_until = -math.inf
        self._count = 0
        self._sum = 0.0
        self._squares = 0.0
        self._at_a_time = 0
        self._area = 0.0  # of `_at_a_time` over time
        self._area_at = 0.0

    def begin(self, now: float) -> None:
        """One more is at work."""
        self._pass(now)
        self._at_a_time += 1

    def end(self, now: float) -> None:
        """One is not at work any more, and there is nothing to learn from it."""
        self._pass(now)
        self._at_a_time -= 1

    def learn(self, now: float, seconds: float) -> bool:
        """Take in how long one that was done has taken; say whether the limit may have changed."""
        if now < self._quiet_until:
            return False
        if self._begin is None:
            self._open(now)
            return False
        self._count += 1
        self._sum += seconds
        self._squares += seconds * seconds
        if self._count < max(MIN_SAMPLES, 2 * self.limit):
            return False
        latency = self._sum / self._count
        if latency <= 0 or now <= self._begin:
            self._open(now)  # no time passes, so nothing is slow
            return False
        error = math.sqrt(max(0.0, self._squares / self._count - latency * latency) / self._count) / latency
        if error > GOOD_ERROR and self._count < MAX_SAMPLES:
            return False
        used = self._area / (now - self._begin)
        self._open(now)
        self._look(latency, min(used, self.limit), error, now)
        return True

    def _pass(self, now: float) -> None:
        self._area += self._at_a_time * (now - self._area_at)
        self._area_at = now

    def _open(self, now: float) -> None:
        self._begin = now
        self._count = 0
        self._sum = self._squares = 0.0
        self._pass(now)
        self._area = 0.0

    # What a window tells.

    def _look(self, latency: float, used: float, error: float, now: float) -> None:
        self.windows += 1
        self.latency = latency
        limit = self.limit
        full = used >= USED * limit
        if self._dips == 0:
            self._learn_baseline(latency, error)
        elif self._growing:
            self._grow_on(latency, error)
        elif full if self._dipping else latency < self.baseline * (0.99 - 3 * error):
            self._learn_baseline(latency, error)
        if self._dipping:
            self._dipping = False
            if full:
                self._judge_dip(latency, used, error)
        elif full:
            self._follow(latency, used, error)
        self._before = (used, latency)
        if full:
            self._set_limit()
        if self.limit != limit:
            self._begin = None
            self._quiet_until = now + latency

    def _grow_on(self, latency: float, error: float) -> None:
        """From the start the limit grows by half a window; its windows are all baseline, until one is slow."""
        if latency > self.baseline * (1.01 + 4 * error):
            self._growing = False
        else:
            self._learn_baseline(latency, error)

    def _learn_baseline(self, latency: float, error: float) -> None:
        if self._dips == 0:
            self.baseline = latency
        miss = (latency - self.baseline) / (self.baseline * (error + 0.01))
        self._one_sided += (miss - self._one_sided) / 2
        if abs(self._one_sided) > 1:
            self._dips, self._one_sided = 1, 0.0
        self._dips += 1
        self.baseline += (latency - self.baseline) * max(1 / self._dips, BASELINE_TRUST / (BASELINE_TRUST + error))

    def _judge_dip(self, latency: float, used: float, error: float) -> None:
        """If latency fell with the limit, all that was cut off was queue: go on from here, and down."""
        used_before, latency_before = self._before
        self._since_dip = 0
        # Most of the fall, for a dip from just above the knee to just below it shows half of it and is all right.
        fall = 0.7 * (1 - used / used_before)
        if latency < latency_before * (1 - fall - 2 * error):
            self._estimate = used
            self._headroom = max(1.0, used / 20)
            self.baseline = latency
            self._dips = 1
            self._since_dip = DIP_EVERY
        elif latency < latency_before * (1 - max(fall, error)):
            self._since_dip = DIP_EVERY - 2

    def _follow(self, latency: float, used: float, error: float) -> None:
        self._since_dip += 1
        if self._growing:
            self._estimate = max(self._estimate, used)
            self._headroom = max(1.0, self._estimate / 2)
            return
        wanted = used * self.baseline / latency - self._estimate
        trust = TRUST / (TRUST + error)
        if abs(wanted) > 3 * error * self._estimate + 1:
            trust = max(trust, 0.7)
        step = wanted * trust
        if step >= 0.3 * trust * self._headroom:
            self._headroom = min(self._headroom * SPEED_UP, max(1.0, self._estimate / 2))
        else:
            self._headroom = max(1.0, self._estimate / 20)
        self._estimate += step

    def _set_limit(self) -> None:
        self._estimate = min(max(self._estimate, self._lowest), self._highest)
        if not self._growing and self._since_dip >= min(DIP_EVERY, 1 + self._dips):
            self._dipping = True
            limit = round(self._estimate * DIP)
        else:
            limit = math.floor(self._estimate + self._headroom + 1e-6)
        self.limit = int(min(max(limit, self._lowest), self._highest))
