"""The door of a server: from a connection that was accepted to a peer, or to a farewell.

Theory of operation. Who comes through a proxy is first asked for whom (`stagetrio.proxies`). Then there is room or
not, and the admission lets in or not. Who is let in becomes a peer and counts among ``max_connections`` until it is
gone. Who is not becomes a peer too, but one that is closing from the start: it takes no place from anybody, and is told
why and when to come back, as any peer is that must go. Of those at most `MAX_FAREWELLS` are held; further ones are just
closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from stagetrio.accept import Acceptor
from stagetrio.admission import Admission, TurnedAway
from stagetrio.hub import Hub
from stagetrio.peer import Peer
from stagetrio.proxies import Arrivals, Proxies
from stagetrio.reaper import Reaper
from stagetrio.rules import CloseReason
from stagetrio.sockets import Address
from stagetrio.transport import Transport

MAX_FAREWELLS = 256  # connections that are being told why they are turned away; further ones are just closed


class Door:
    """Lets connections in, or says why not.

    Args:
        hub: What watches plain sockets; None: every connection gets tasks of its own.
        reaper: What looks after handshakes and headers.
        admission: Who may connect; None: everybody.
        proxies: Who opens connections for others; None: nobody.
        max_connections: Connections let in at once.
        vanished_within: Seconds after which a silent host counts as lost.
        take_in: Makes a peer of a connection, which is `left` when it is gone.
        let_in: Called with each peer that may stay.

    Attributes:
        acceptor: What takes the connections from the listeners.
        admission: Who may connect.
        arrivals: The connections that wait for a proxy's header; None without proxies.
        accepted: Connections accepted.
        refused: Those of them that were turned away.
        closed: ``{reason: connections}`` that ended so; the owner counts those of its peers.
    """

    def __init__(
        self,
        hub: Hub | None,
        reaper: Reaper,
        *,
        admission: Admission | None,
        proxies: Proxies | None,
        max_connections: float,
        vanished_within: float,
        take_in: Callable[[Transport, Address | None], Peer[Any]],
        let_in: Callable[[Peer[Any]], None],
    ) -> None:
        self.admission = Admission() if admission is None else admission
        self.arrivals = None if proxies is None else Arrivals(proxies, reaper, self._lost)
        self.acceptor = Acceptor(
            hub,
            reaper,
            self._welcome,
            pace=self.admission.pace,
            arrivals=self.arrivals,
            vanished_within=vanished_within,
        )
        self.accepted = self.refused = 0
        self.closed: Counter[CloseReason] = Counter()
        self._max_connections = max_connections
        self._take_in = take_in
        self._let_in = let_in
        self._inside = 0
        self._turned_away: set[Peer[Any]] = set()  # while they are told so

    def left(self, peer: Peer[Any]) -> bool:
        """Count a peer out that is gone; whether it had been let in."""
        if peer in self._turned_away:
            self._turned_away.remove(peer)
            return False
        self._inside -= 1
        self.admission.leave(peer.address)
        return True

    def _lost(self, reason: CloseReason) -> None:
        self.accepted += 1
        self.closed[reason] += 1

    def _welcome(self, transport: Transport, address: Address | None) -> None:
        self.accepted += 1
        if self._inside >= self._max_connections:
            self._turn_away(transport, address, CloseReason.FULL, self.admission.full())
            return
        try:
            refused = self.admission.enter(address)
        except BaseException:  # the owner's filter failed: the server ends
            transport.close()
            raise
        if refused is not None:
            self._turn_away(transport, address, CloseReason.REFUSED, refused)
            return
        try:
            peer = self._take_in(transport, address)
        except BaseException:  # the owner's flow or weight failed: the server ends
            self.admission.leave(address)  # which other servers may share
            raise
        self._inside += 1
        self._let_in(peer)

    def _turn_away(
        self, transport: Transport, address: Address | None, reason: CloseReason, refused: TurnedAway
    ) -> None:
        self.refused += 1
        if len(self._turned_away) >= MAX_FAREWELLS:
            self.closed[reason] += 1
            transport.close()
            return
        peer = self._take_in(transport, address)
        self._turned_away.add(peer)
        peer.end(reason, refused.words, refused.retry_after)
        peer.start()
