"""Connections that come through proxies: who has connected is read from the PROXY header before all else.

`Proxies` says which addresses may speak for others. A connection from one of these must begin with a header
(`stagetrio.proxy_header`); what it says becomes `stagetrio.peer.Peer.address`, and by that address the connection is
filtered, counted and bounded (`stagetrio.admission`). TLS, where there is any, begins behind the header.

Theory of operation. Until its header is there, a connection is nobody's: it has no peer, no place among
``max_connections``, and nothing is known to admit it by. What is held of such connections is bounded apart:

- *At most* ``max_waiting`` *wait for their header*; one more is closed.
- *The deadline is absolute*: ``header_within`` seconds after the connection it is closed, whatever has come.
- *At most one read* (64 KiB) is held of each, as the header is judged with every byte that comes.

Each of these ends, and a wrong header, is counted by its reason in `ProxyStatistics.failed`, and in
`stagetrio.server.ServerStatistics` as `stagetrio.rules.CloseReason.PROXY`. No farewell is said: nobody knows yet what
the other side speaks.

From an address that is not trusted no header is expected. Its connections are its own, and a header which it sends is
data like any other, that is, a mistake in every framing but its own. So nobody can claim to be somebody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf

import attrs
import trio

from stagetrio.addresses import Address, UnixAddress
from stagetrio.framing import ProtocolError
from stagetrio.networks import Networks, ip_of
from stagetrio.proxy_header import parse_header
from stagetrio.reaper import Reaper
from stagetrio.rules import CloseReason
from stagetrio.transport import OnData, OnEnd, OnWritable, Transport

Welcome = Callable[[Transport, Address | None], None]


class Proxies:
    """Who may speak for others.

    Args:
        trusted: Networks such as ``"10.0.0.0/8"`` or single addresses; ``"unix"`` stands for all who connect to a
            Unix socket.
        header_within: Seconds from the connection to the end of its header, > 0; ``math.inf`` for any.
        max_waiting: Connections that may wait for their header at once, ≥ 1.

    Raises:
        ValueError, TypeError: An argument is out of range.
    """

    def __init__(self, trusted: Iterable[str], *, header_within: float = 10.0, max_waiting: float = 1000) -> None:
        if not header_within > 0:
            raise ValueError(f"header_within must be positive, not {header_within!r}")
        if not max_waiting >= 1:
            raise ValueError(f"max_waiting must be at least 1, not {max_waiting!r}")
        if isinstance(trusted, str):
            raise TypeError(f"trusted must be a sequence of networks, not the str {trusted!r}")
        names = list(trusted)
        self.header_within = header_within
        self.max_waiting = max_waiting
        self._unix = "unix" in names
        self._networks = Networks(name for name in names if name != "unix")

    def trusts(self, address: Address | None) -> bool:
        """Whether a connection from there must begin with a header.

        Cost: 2 µs.
        """
        return self._unix if isinstance(address, UnixAddress) else ip_of(address) in self._networks


@attrs.frozen
class ProxyStatistics:
    """What became of the connections from proxies.

    Args:
        waiting: Those whose header is not complete yet.
        introduced: Those whose header was right.
        failed: ``{reason in words: connections}`` of the others.
    """

    waiting: int
    introduced: int
    failed: dict[str, int]


class Arrivals:
    """The connections of one server which wait for their header.

    Args:
        proxies: Who must send one.
        reaper: What looks after the deadlines.
        lost: Told why, when a connection comes to nothing.
    """

    def __init__(self, proxies: Proxies, reaper: Reaper, lost: Callable[[CloseReason], None]) -> None:
        self.proxies = proxies
        self._reaper = reaper
        self._lost = lost
        self._waiting: set[ProxiedTransport] = set()
        self._introduced = 0
        self._failed: Counter[str] = Counter()

    def expect(self, transport: Transport, address: Address | None, welcome: Welcome) -> None:
        """Wait for the header of a connection from a trusted address, and then hand it to ``welcome``."""
        arrival = ProxiedTransport(transport, address, self, welcome)
        self._waiting.add(arrival)
        if len(self._waiting) > self.proxies.max_waiting:
            arrival.fail("too many connections without a header")
            return
        self._reaper.watch(trio.current_time() + self.proxies.header_within, arrival.check_deadline)
        arrival.listen()

    def settle(self, arrival: ProxiedTransport, reason: str | None = None) -> None:
        """Count one that waits no more, with the reason for which it failed."""
        self._waiting.discard(arrival)
        if reason is None:
            self._introduced += 1
        else:
            self._failed[reason] += 1
            self._lost(CloseReason.PROXY)

    def close(self) -> None:
        """Close those that still wait."""
        for arrival in tuple(self._waiting):
            arrival.fail("the server stopped accepting")

    def statistics(self) -> ProxyStatistics:
        """Return a snapshot of the counts."""
        return ProxyStatistics(len(self._waiting), self._introduced, dict(self._failed))


class ProxiedTransport:
    """A connection without its header: first it reads that, then it hands on all that comes."""

    __slots__ = (
        "__weakref__",
        "_address",
        "_arrivals",
        "_data",
        "_inner",
        "_on_data",
        "_on_end",
        "_on_writable",
        "_settled",
        "_welcome",
        "close",
        "end_output",
        "pause",
        "resume",
        "unacknowledged",
        "write",
    )

    _on_data: OnData
    _on_end: OnEnd
    _on_writable: OnWritable

    def __init__(self, inner: Transport, address: Address | None, arrivals: Arrivals, welcome: Welcome) -> None:
        self._inner = inner
        self._address = address
        self._arrivals = arrivals
        self._welcome = welcome
        self._data = b""  # before the header is complete, and what followed it until `start`
        self._settled = False
        self.write = inner.write
        self.unacknowledged = inner.unacknowledged
        self.pause = inner.pause
        self.resume = inner.resume
        self.end_output = inner.end_output
        self.close = inner.close

    @property
    def busy(self) -> bool:
        return self._inner.busy

    def listen(self) -> None:
        """Begin to wait for the header."""
        self._on_data, self._on_end, self._on_writable = self._receive_header, self._end_early, _nothing
        self._inner.start(self._receive, self._end, self._writable)

    def start(self, on_data: OnData, on_end: OnEnd, on_writable: OnWritable) -> None:
        self._on_data, self._on_end, self._on_writable = on_data, on_end, on_writable
        self._inner.resume()
        data, self._data = self._data, b""
        if data:
            on_data(data)

    def check_deadline(self, now: float) -> float:
        """Give up on a header that has not come by now."""
        if not self._settled:
            self.fail("the PROXY header took too long")
        return inf

    def fail(self, reason: str) -> None:
        """Close before anybody has been introduced."""
        self._settled = True
        self._inner.close()
        self._arrivals.settle(self, reason)

    def _receive(self, data: bytes) -> None:
        self._on_data(data)

    def _end(self, error: OSError | None) -> None:
        self._on_end(error)

    def _writable(self) -> None:
        self._on_writable()

    def _receive_header(self, data: bytes) -> None:
        if self._settled:
            return
        self._data += data
        try:
            header = parse_header(self._data)
        except ProtocolError as error:
            self.fail(error.reason)
            return
        if header is not None:
            self._settled = True
            self._data = self._data[header.size :]
            self._inner.pause()  # until `start`
            self._arrivals.settle(self)
            self._welcome(self, header.address or self._address)

    def _end_early(self, error: OSError | None) -> None:
        if not self._settled:
            self.fail("the connection ended before its PROXY header")


def _nothing() -> None:
    """Nobody writes yet."""
