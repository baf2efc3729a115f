"""Who may connect, decided once per connection and before anything is read.

Theory of operation. A connection passes four questions; the first "no" ends it with a
farewell that says why, and when it is worth coming back:

1. whether the server has room at all (``max_connections`` of `stagetrio.server.serve_stage`);
2. the *filter*, the owner's own: maintenance, allow lists, bans;
3. the number of connections its *host* has open (``max_per_host``);
4. the *rate* at which its host connects (``rate_per_host``).

A host is an address of IPv4 and a /64 of IPv6, see `stagetrio.networks`. What is held is bounded: one counter for each
host that has connections, and the flows of the limiter, which has a bound of its own.

Everyone who is turned away at the same time would come back at the same time. So the times after which to come back
are spread: the k-th refusal adds the fractional part of k × the golden ratio, times ``spread``. Any number of
successive refusals lies more evenly in the interval so than at random, and, unlike with appointments in a queue, a
stranger who knocks all day cannot push anybody else's further away.

``pace`` is no question but a brake: accepting waits for it, and who waits stands in the kernel's backlog, unread.

Source: for the spread, the golden-ratio (Kronecker) sequence, https://en.wikipedia.org/wiki/Low-discrepancy_sequence
"""

from __future__ import annotations

import enum
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from math import inf

import attrs

from stagetrio.addresses import Address
from stagetrio.amounts import check_amount, check_count
from stagetrio.limiter import FlowRateLimiter, RateLimiter
from stagetrio.networks import Networks, ip_of, prefix_of
from stagetrio.overload import Overloaded

_GOLDEN = 0.6180339887498949  # the fractional part of the golden ratio


class Refusal(enum.Enum):
    """Which question a connection failed."""

    FILTER = "filter"  #: the owner's filter
    HOST = "host"  #: its host has ``max_per_host`` connections
    FULL = "full"  #: the server has ``max_connections``
    RATE = "rate"  #: its host connects faster than ``rate_per_host``


@attrs.frozen
class TurnedAway:
    """What is told to whom was not admitted.

    Args:
        refusal: Which question it failed.
        words: Why, in words for the other side.
        retry_after: Seconds after which another attempt may succeed.
    """

    refusal: Refusal
    words: str
    retry_after: float


@attrs.frozen
class AdmissionStatistics:
    """Whom an admission has let in.

    Args:
        admitted: Connections let in.
        turned_away: ``{refusal: connections}``.
        hosts: Hosts that have connections now.
        most: Connections of the host which has the most now.
    """

    admitted: int
    turned_away: dict[Refusal, int]
    hosts: int
    most: int


class Admission:
    """Lets connections in, or says why not. One may be shared by several servers.

    Args:
        max_per_host: Connections that one host may have at once, ≥ 1.
        rate_per_host: How fast one host may connect; its ``parent`` may bound all hosts together.
        ipv4_prefix: Leading bits of an IPv4 address that make a host, 1 to 32.
        ipv6_prefix: Leading bits of an IPv6 address that make a host, 1 to 128.
        exempt: Networks whose connections only the filter looks at: load balancers, monitors.
        turn_away: The filter: called with the address of a new connection (None for a stream that has none); returns
            the words with which it is refused, or None to let it in.
        pace: How fast connections are accepted at all; those over it wait in the kernel.
        spread: Seconds over which the return of refused connections is spread, ≥ 0.

    Raises:
        ValueError, TypeError: An argument is out of range.

    Cost: about 5 µs per connection; 200 bytes per host with connections.
    """

    def __init__(
        self,
        *,
        max_per_host: float = inf,
        rate_per_host: FlowRateLimiter | None = None,
        ipv4_prefix: int = 32,
        ipv6_prefix: int = 64,
        exempt: Iterable[str] = (),
        turn_away: Callable[[Address | None], str | None] | None = None,
        pace: RateLimiter | None = None,
        spread: float = 10.0,
    ) -> None:
        check_amount("max_per_host", max_per_host, 1)
        for name, bits, most in (("ipv4_prefix", ipv4_prefix, 32), ("ipv6_prefix", ipv6_prefix, 128)):
            if check_count(name, bits, 1) > most:
                raise ValueError(f"{name} must be between 1 and {most}, not {bits!r}")
        if check_amount("spread", spread) == inf:
            raise ValueError(f"spread must be a number of seconds, 0 or more, not {spread!r}")
        if rate_per_host is not None and not isinstance(rate_per_host, FlowRateLimiter):
            raise TypeError(f"rate_per_host must be a FlowRateLimiter, not {rate_per_host!r}")
        if pace is not None and not isinstance(pace, RateLimiter):
            raise TypeError(f"pace must be a RateLimiter, not {pace!r}")
        if isinstance(exempt, str):
            raise TypeError(f"exempt must be a sequence of networks, not the str {exempt!r}")
        if turn_away is not None and (not callable(turn_away) or inspect.iscoroutinefunction(turn_away)):
            raise TypeError(f"turn_away must be a sync function of an address, not {turn_away!r}")
        self.pace = pace
        self._max_per_host = max_per_host
        self._rate_per_host = rate_per_host
        self._prefixes = (ipv4_prefix, ipv6_prefix)
        self._exempt = Networks(exempt)
        self._turn_away = turn_away
        self._spread = spread
        self._connections: dict[tuple[int, int], int] = {}  # {host: its connections}
        self._turned_away: Counter[Refusal] = Counter()
        self._admitted = 0
        self._phase = 0.0

    def enter(self, address: Address | None) -> TurnedAway | None:
        """Count a new connection in and return None, or say why not; `leave` must follow for those counted in.

        Whatever ``turn_away`` raises comes out of this, and the connection is not counted.
        """
        words = None if self._turn_away is None else self._turn_away(address)
        if words is not None:
            return self._refuse(Refusal.FILTER, words, 0.0)
        host = self._host_of(address)
        if host is not None:
            connections = self._connections.get(host, 0)
            if connections >= self._max_per_host:
                words = f"your address has {connections} connections, as many as it may"
                return self._refuse(Refusal.HOST, words, 0.0)
            if self._rate_per_host is not None:
                try:
                    self._rate_per_host.acquire_nowait(host)
                except Overloaded as overloaded:
                    words = "your address connects too often"
                    return self._refuse(Refusal.RATE, words, overloaded.retry_after)
            self._connections[host] = connections + 1
        self._admitted += 1
        return None

    def leave(self, address: Address | None) -> None:
        """Count a connection out which `enter` let in."""
        host = self._host_of(address)
        if host is None:
            return
        connections = self._connections[host]
        if connections == 1:
            del self._connections[host]
        else:
            self._connections[host] = connections - 1

    def full(self) -> TurnedAway:
        """Return what to tell a connection for which the server has no room; it was not counted in."""
        return self._refuse(Refusal.FULL, "the server has as many connections as it may", 0.0)

    def statistics(self) -> AdmissionStatistics:
        """Return a snapshot of the counts.

        Cost: a pass over the hosts with connections.
        """
        return AdmissionStatistics(
            admitted=self._admitted,
            turned_away=dict(self._turned_away),
            hosts=len(self._connections),
            most=max(self._connections.values(), default=0),
        )

    def _host_of(self, address: Address | None) -> tuple[int, int] | None:
        ip = ip_of(address)
        return None if ip is None or ip in self._exempt else prefix_of(ip, *self._prefixes)

    def _refuse(self, refusal: Refusal, words: str, retry_after: float) -> TurnedAway:
        self._turned_away[refusal] += 1
        self._phase = (self._phase + _GOLDEN) % 1.0
        return TurnedAway(refusal, words, retry_after + self._phase * self._spread)
