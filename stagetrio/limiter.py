"""Limits on rates, and what a refusal looks like.

`Overloaded` is the one refusal of the whole library: every ``*_nowait`` function of every room raises it, with the
reason and the time after which another attempt is worth making.
"""

from __future__ import annotations

import trio


class Overloaded(trio.WouldBlock):
    """A bound was reached, so the work was refused and nothing of it was done.

    Args:
        reason: Which bound: ``"queue"``, ``"flow"``, ``"rate"``, ``"tickets"`` or ``"waiting"``.
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
