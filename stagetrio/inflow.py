"""How fast input may come: messages and bytes per second, of each sender and of all together.

Theory of operation. A `Meter` keeps one number, the *theoretical arrival time* of the generic cell rate algorithm
(`stagetrio.limiter`), and lets a message begin as soon as its allowance is not overdrawn; the message is then booked
whole. So a frame of any length passes some time, and pays for itself by what has to wait behind it: in any span of
``t`` seconds at most ``burst × rate + rate × t`` pass, and of bytes the last message's on top.

A message passes when all meters let it: its sender's and the common ones, of messages and of bytes. Who is over a
limit of its own waits for the moment at which its next message passes, and is then offered again. Those over a common
limit stand in line, newcomers at its end, and take turns: each takes what may pass at that moment, and goes to the end
for the rest. What is not taken of a sender's input waits in the kernel. Looking again happens on a tick of `TICK`
seconds, so that at a high rate one timer serves many messages.

The common limits are a guard for what stands behind the server. They know senders only by their turns; whose share is
how large is decided by the fair queue, among all that was let in.

Source: ITU-T I.371, the generic cell rate algorithm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import inf
from typing import Any
from weakref import ref

import attrs
import trio

from stagetrio.limiter import Overloaded, Rate
from stagetrio.reaper import Reaper

TICK = 0.005  # seconds


def _rate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Rate):
        raise TypeError(f"{attribute.name} must be a Rate, not {value!r}")


def _burst(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not 0 < value < inf:
        raise ValueError(f"{attribute.name} must be a positive number of seconds, not {value!r}")


@attrs.frozen(kw_only=True)
class InputRates:
    """How fast input may come; by default as fast as it likes.

    Args:
        message_rate: Messages of each connection (or source of datagrams).
        byte_rate: Bytes of their payloads.
        total_message_rate: Messages of all together.
        total_byte_rate: Bytes of their payloads.
        burst: How many seconds' worth of each rate may come at once after a pause, > 0; one message always may.
    """

    message_rate: Rate = attrs.field(default=Rate(inf), validator=_rate)
    byte_rate: Rate = attrs.field(default=Rate(inf), validator=_rate)
    total_message_rate: Rate = attrs.field(default=Rate(inf), validator=_rate)
    total_byte_rate: Rate = attrs.field(default=Rate(inf), validator=_rate)
    burst: float = attrs.field(default=1.0, validator=_burst)


_Meters = list[tuple["Meter", bool]]  # and whether it counts bytes


class Meter:
    """One rate, and how much of it is used.

    Args:
        rate: What may pass.
        burst: Seconds' worth of it that may pass at once.
    """

    __slots__ = ("_ahead", "_interval", "_tat")

    def __init__(self, rate: Rate, burst: float) -> None:
        self._interval = rate.interval
        self._ahead = max(0.0, burst - rate.interval)
        self._tat = -inf

    def ready(self) -> float:
        """Return the time from which on something may pass."""
        return self._tat - self._ahead

    def book(self, cost: float, now: float) -> None:
        """Let something pass, whatever its size; a negative cost gives back what has not passed after all."""
        self._tat = max(self._tat, now) + cost * self._interval


class _Allowance:
    """What one sender may send of its own, and whether it waits for that or for the common limits."""

    __slots__ = ("meters", "waiting")

    def __init__(self, meters: _Meters) -> None:
        self.meters = meters
        self.waiting = False


class Inflow:
    """Holds the senders of one server to its rates.

    Args:
        rates: What they may send.
        advance: Called with a sender that waited, when its next message may pass.
    """

    def __init__(self, rates: InputRates, advance: Callable[[Any], None]) -> None:
        self._rates = rates
        self._advance = advance
        self._common = self._meters(rates.total_message_rate, rates.total_byte_rate)
        self._allowances: dict[Any, _Allowance] = {}  # of each sender
        self._line: OrderedDict[Any, _Allowance] = OrderedDict()  # senders over the common limits, next turn first
        self._watched = False  # the reaper looks at the line
        self._turn = False  # one of the line has its turn
        self._reaper = Reaper(TICK)
        #: Times a sender had to wait, and messages refused.
        self.throttled = 0

    def _meters(self, messages: Rate, octets: Rate) -> _Meters:
        pairs = ((messages, False), (octets, True))
        return [(Meter(rate, self._rates.burst), by_size) for rate, by_size in pairs if rate.count != inf]

    def _allowance(self, sender: Any) -> _Allowance:
        allowance = self._allowances.get(sender)
        if allowance is None:
            own = self._meters(self._rates.message_rate, self._rates.byte_rate)
            allowance = self._allowances[sender] = _Allowance(own)
        return allowance

    async def run(self) -> None:
        """Offer those that waited again, until cancelled; run it in a nursery of the owner's.

        Checkpoints: always.
        """
        await self._reaper.run()

    def take(self, sender: Any, payloads: Sequence[bytes]) -> int:
        """Let as many of a sender's messages pass as may now, in order, and return their number.

        Cost: 0.3 µs per message and limit.
        """
        if self._line and not self._turn:
            return 0
        meters, now = self._allowance(sender).meters + self._common, trio.current_time()
        for count, payload in enumerate(payloads):
            if _ready(meters) > now:
                return count
            for meter, by_size in meters:
                meter.book(len(payload) if by_size else 1, now)
        return len(payloads)

    def give_back(self, sender: Any, payloads: Sequence[bytes]) -> None:
        """Undo `take` for messages that were not let in for another reason."""
        now = trio.current_time()
        allowance = self._allowances.get(sender)  # none, if the sender has gone meanwhile
        for meter, by_size in ([] if allowance is None else allowance.meters) + self._common:
            meter.book(-sum(len(payload) if by_size else 1 for payload in payloads), now)

    def refusal(self, sender: Any) -> Overloaded:
        """Count a message that is refused, and return what to say of it."""
        self.throttled += 1
        ready = _ready(self._allowance(sender).meters + self._common)
        return Overloaded("rate", max(0.0, ready - trio.current_time()))

    def wait(self, sender: Any) -> None:
        """Call ``advance`` with a sender when its next message may pass."""
        allowance = self._allowance(sender)
        if allowance.waiting:
            return
        self.throttled += 1
        allowance.waiting = True
        ready = _ready(allowance.meters)
        if ready > trio.current_time():
            self._wait_alone(sender, allowance, ready)
            return
        self._line[sender] = allowance
        if not self._watched:
            self._watched = True
            self._reaper.at(_ready(self._common), self._serve_line)

    def _wait_alone(self, sender: Any, allowance: _Allowance, ready: float) -> None:
        alive = ref(sender)  # a sender that is gone is not kept until then

        def offer(now: float) -> float:
            sender = alive()
            allowance.waiting = False
            if sender is not None:
                self._advance(sender)
            return inf

        self._reaper.at(ready, offer)

    def _serve_line(self, now: float) -> float:
        """Give turns while the common limits let something pass; return when they will again, if others wait."""
        self._turn = True
        while self._line and _ready(self._common) <= now:
            sender, allowance = self._line.popitem(last=False)
            allowance.waiting = False
            self._advance(sender)  # it may stand in line again, behind the others
        self._turn = False
        self._watched = bool(self._line)
        return _ready(self._common) if self._line else inf

    def forget(self, sender: Any) -> None:
        """Drop what is kept of a sender."""
        self._allowances.pop(sender, None)
        self._line.pop(sender, None)


def _ready(meters: _Meters) -> float:
    """When all of them let something pass."""
    return max((meter.ready() for meter, _ in meters), default=-inf)
