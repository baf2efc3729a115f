"""What a peer asks of the server it belongs to, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Protocol

import attrs

from stagetrio.rules import CloseReason, PeerLimits


@attrs.frozen
class PeerStatistics:
    """What one connection has carried and holds.

    Args:
        frames_received: Complete frames.
        bytes_received: Bytes of input.
        bytes_sent: Bytes of output taken by the kernel.
        backlog: Messages queued or in hand.
        outbox_bytes: Output not yet taken by the kernel.
        dropped: Messages sent to it that were left out, because its outbox was full.
        coalesced: Messages sent to it that a later one of the same key replaced.
        paused: Whether the socket is left unread.
    """

    frames_received: int
    bytes_received: int
    bytes_sent: int
    backlog: int
    outbox_bytes: int
    dropped: int
    coalesced: int
    paused: bool


class Host(Protocol):
    """What a peer needs of its server."""

    limits: PeerLimits

    def admit(self, peer: Any, frames: list[bytes]) -> tuple[int, int]:
        """Queue frames; return how many were queued and how many refused; `Peer.advance` follows for the rest."""

    def touch(self, peer: Any) -> None:
        """Call `Peer.flush` soon."""

    def check_at(self, peer: Any, when: float, check: Callable[[float], float]) -> None:
        """Have the reaper call a check."""

    def frame_of(self, message: Any) -> bytes:
        """Return the bytes of one frame with a message in it."""

    def farewell(self, words: str, retry_after: float) -> bytes | None:
        """Return the frame which tells a peer why its connection ends, if this wire has one."""

    def ping(self, peer: Any) -> None:
        """Send a peer something that makes it answer."""

    def move(self, peer: Any, flow: Hashable) -> None:
        """Let the peer's further messages belong to another flow."""

    def spawn(self, peer: Any, fn: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
        """Start a task in the scope of this connection."""

    def ending(self, peer: Any, reason: CloseReason) -> None:
        """Drop what is queued for a peer that is no longer open."""

    def gone(self, peer: Any) -> None:
        """Forget a peer."""
