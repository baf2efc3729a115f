"""What a refusal looks like, for the whole library."""

from __future__ import annotations

import trio


class Overloaded(trio.WouldBlock):
    """A bound was reached, so the work was refused and nothing of it was done.

    Args:
        reason: Which bound: of all that is queued (``"queue"``) or of one flow (``"flow"``), ``"rate"``, ``"tickets"``,
            those who are ``"waiting"``, the ``"tasks"`` of a pool, the ``"outbox"`` of a peer, or what is sent to an
            ``"unverified"`` source of datagrams.
        retry_after: Seconds after which another attempt may succeed, an estimate, ≥ 0; 0 when nothing is known.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason, retry_after)
        self.reason = reason
        self.retry_after = retry_after

    def __str__(self) -> str:
        if self.retry_after:
            return f"overloaded ({self.reason}): retry after {self.retry_after:.3g} s"
        return f"overloaded ({self.reason})"
