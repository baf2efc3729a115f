"""Who sends datagrams: one `Source` for each address, what may be sent to it, and how many of them are remembered.

Theory of operation. The address in a datagram proves nothing: anybody can write any address there. So a server that
answers with more than it was sent is a weapon, as it sends the difference to whoever was named. And a table of sources
is filled by one sender that names a new address in each datagram. Hence:

- *The guard.* An unverified source has a credit: the bytes that came in its name, times ``amplification`` (1.0: it gets
  no more than it sent), less those that were sent to it. What exceeds the credit is withheld and counted.
- *Verification.* Only who receives at an address can send back what was sent there. `Source.token` gives 16 bytes that
  nobody else can know, made from a secret of this server, the address and the time; `Source.verify` recognises them
  for one to two minutes. Nothing is remembered between the two, so asking for tokens costs no memory. (Ask for a
  datagram at least as long as the answer with the token in it.)
- *The table.* At most ``max_sources`` are remembered. Those not heard of for ``idle_within`` seconds are forgotten
  first; then, for a new one, the unverified source which has been silent longest. So no number of invented addresses
  drives out a verified source; when all are verified and lively, who is new is not served.

A source that is forgotten is new when it comes back: it has no credit, and is not verified. What was received from it
is still served and answered.

Source: RFC 9000, QUIC, sections 8.1 (address validation, anti-amplification) and 8.1.4 (tokens).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Hashable
from math import inf
from typing import Any, Generic, Protocol, TypeVar

import attrs
import trio

from stagetrio.addresses import UdpAddress
from stagetrio.overload import Overloaded
from stagetrio.rules import CloseReason

M = TypeVar("M")

TOKEN_PERIOD = 60.0  # seconds; a token is good in the period of its making and in the next
TOKEN_BYTES = 16
EXPIRE_AT_MOST = 256  # sources, for each new one


@attrs.frozen
class SourceStatistics:
    """What one source has sent and got.

    Args:
        received: Datagrams from it.
        bytes_received: Bytes of these.
        sent: Datagrams to it.
        bytes_sent: Bytes of these.
        withheld: Datagrams not sent to it, as they were longer than one may be, or more than it, unverified, has sent.
    """

    received: int
    bytes_received: int
    sent: int
    bytes_sent: int
    withheld: int


class SourceHost(Protocol):
    """What a source needs of its server."""

    max_bytes: int  # of a datagram

    def frame_of(self, message: Any) -> bytes:
        """Return the datagram with a message in it."""

    def transmit(self, source: Any, data: bytes) -> None:
        """Send a datagram now, or count that it could not be sent."""

    def mistaken(self, source: Any, reason: CloseReason) -> None:
        """Count what would end a connection, if this were one."""


class Source(Generic[M]):
    """The other side of datagrams, as handlers see it; made by the server.

    Attributes:
        address: Where its datagrams come from, as far as they say.
        flow: Whose share its datagrams take from: by default its address. A handler that learns who it is sets it.
        data: Whatever the app keeps of this source; the library does not look at it.
        verified: Whether it has shown that it receives at this address.
    """

    __slots__ = (
        "__weakref__",
        "_bytes_received",
        "_bytes_sent",
        "_credit",
        "_received",
        "_sent",
        "_sources",
        "_withheld",
        "address",
        "data",
        "flow",
        "last_seen",
        "name",
        "sock",
        "verified",
    )

    #: For what serves peers and sources alike: a source cannot be closed.
    closed = False

    def __init__(self, sources: Sources, sock: socket.socket, name: tuple[Any, ...]) -> None:
        self.address = UdpAddress(name[0], name[1])
        self.flow: Hashable = self.address
        self.data: Any = None
        self.verified = False
        self.sock = sock
        self.name = name  # as the kernel has it
        self.last_seen = -inf
        self._sources = sources
        self._credit = 0.0
        self._received = self._bytes_received = self._sent = self._bytes_sent = self._withheld = 0

    def __repr__(self) -> str:
        return f"<Source {self.address}{' verified' if self.verified else ''}>"

    def statistics(self) -> SourceStatistics:
        """Return a snapshot of the counts."""
        return SourceStatistics(self._received, self._bytes_received, self._sent, self._bytes_sent, self._withheld)

    def send_nowait(self, message: M) -> None:
        """Send a message that nobody asked for.

        Raises:
            Overloaded: The source is unverified, and this is more than it has sent; its reason is ``"unverified"``.
            TypeError: The codec does not know the message.
            ValueError: The message is longer than a datagram may be.
        """
        if not self._put(self._sources.host.frame_of(message)):
            raise Overloaded("unverified")

    def token(self) -> bytes:
        """Return 16 bytes which only who receives at this address can know, to be sent there and asked back."""
        return self._sources.token_of(self, 0)

    def verify(self, token: bytes) -> bool:
        """Take note that the source has sent back a token; whether it is one, and not older than a minute or two.

        That a source is `verified` proves nothing of a datagram: anybody can write that address, too. A token does.
        """
        good = any(hmac.compare_digest(token, self._sources.token_of(self, age)) for age in (0, 1))
        if good:
            self._sources.verified(self)
        return good

    # What follows is for the host.

    def heard(self, size: int) -> None:
        """A datagram has come in its name."""
        self._received += 1
        self._bytes_received += size
        self._credit += self._sources.worth(size)

    def reply(self, frame: bytes) -> bool:
        """Send what the handler returned."""
        self._put(frame)
        return True

    def put(self, frame: bytes) -> None:
        """Send an answer that is not the handler's."""
        self._put(frame)

    def done(self) -> None:
        """One of its messages has been handled or dropped: nothing was kept of that."""

    def end(self, reason: CloseReason, words: str) -> None:
        """It broke the rules, or its handler failed: that concerns this datagram only."""
        self._sources.host.mistaken(self, reason)

    def _put(self, frame: bytes) -> bool:
        size = len(frame)
        if size > self._sources.host.max_bytes or not (self.verified or size <= self._credit):
            self._withheld += 1
            self._sources.withheld += 1
            return False
        if not self.verified:
            self._credit -= size
        self._sent += 1
        self._bytes_sent += len(frame)
        self._sources.host.transmit(self, frame)
        return True


class Sources:
    """The sources that one server remembers.

    Args:
        host: The server.
        amplification: Bytes an unverified source may be sent for each that came in its name, ≥ 0.
        max_sources: How many, ≥ 1.
        idle_within: Seconds after which a silent one is forgotten, > 0.
        on_forget: Called with each that is forgotten.
    """

    def __init__(
        self,
        host: SourceHost,
        amplification: float,
        max_sources: float,
        idle_within: float,
        on_forget: Callable[[Source[Any]], None],
    ) -> None:
        if not amplification >= 0:
            raise ValueError(f"amplification must not be negative, not {amplification!r}")
        if not max_sources >= 1:
            raise ValueError(f"max_sources must be at least 1, not {max_sources!r}")
        if not idle_within > 0:
            raise ValueError(f"idle_within must be positive, not {idle_within!r}")
        self.host = host
        self._amplification = amplification
        self._max = max_sources
        self._idle_within = idle_within
        self._on_forget = on_forget
        self._secret = os.urandom(32)
        # {(descriptor, address): source}, the one silent for longest first
        self._strangers: OrderedDict[tuple[int, Any], Source[Any]] = OrderedDict()
        self._verified: OrderedDict[tuple[int, Any], Source[Any]] = OrderedDict()
        #: Datagrams not sent, because they were more than an unverified source had sent.
        self.withheld = 0

    def __len__(self) -> int:
        return len(self._strangers) + len(self._verified)

    @property
    def verified_count(self) -> int:
        """How many of them are verified."""
        return len(self._verified)

    def get(self, sock: socket.socket, name: tuple[Any, ...], now: float) -> Source[Any] | None:
        """Return the source of a datagram, if it is remembered, as the one heard of last."""
        key = (sock.fileno(), name)
        for table in (self._strangers, self._verified):
            source = table.get(key)
            if source is not None:
                if now - source.last_seen > self._idle_within:
                    self._forget(table, key)
                    return None
                source.last_seen = now
                table.move_to_end(key)
                return source
        return None

    def expire(self, now: float) -> None:
        """Forget those that have been silent for too long, of very many the first ones only.

        A flood of strangers falls silent all at once, and forgetting costs 4 µs each: nobody shall wait for all of it.
        """
        left = EXPIRE_AT_MOST
        for table in (self._strangers, self._verified):
            while left and table and now - next(iter(table.values())).last_seen > self._idle_within:
                self._forget(table, next(iter(table)))
                left -= 1

    def make_room(self) -> bool:
        """Forget an unverified source if there are as many as there may be; return whether there is room for one."""
        if len(self) >= self._max and self._strangers:
            self._forget(self._strangers, next(iter(self._strangers)))
        return len(self) < self._max

    def add(self, sock: socket.socket, name: tuple[Any, ...], now: float) -> Source[Any]:
        """Remember a new source."""
        source: Source[Any] = Source(self, sock, name)
        source.last_seen = now
        self._strangers[sock.fileno(), name] = source
        return source

    def clear(self) -> None:
        """Forget them all."""
        for table in (self._strangers, self._verified):
            while table:
                self._forget(table, next(iter(table)))

    def _forget(self, table: OrderedDict[tuple[int, Any], Source[Any]], key: tuple[int, Any]) -> None:
        self._on_forget(table.pop(key))

    def verified(self, source: Source[Any]) -> None:
        """A source has sent a token back."""
        key = (source.sock.fileno(), source.name)
        if self._strangers.get(key) is source:
            self._verified[key] = self._strangers.pop(key)
        source.verified = True

    def worth(self, size: int) -> float:
        """Return how many bytes may be sent for so many that came from an unverified source."""
        return inf if self._amplification == inf else size * self._amplification

    def token_of(self, source: Source[Any], age: int) -> bytes:
        """Return the token of a source that is good now, or was ``age`` periods ago."""
        period = int(trio.current_time() // TOKEN_PERIOD) - age
        text = f"{source.name} {period}".encode()  # all of it: an address of a link is one on that link only
        return hashlib.blake2b(text, key=self._secret, digest_size=TOKEN_BYTES).digest()
