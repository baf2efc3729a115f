"""The figures of a ticket stage."""

from __future__ import annotations

import attrs


@attrs.frozen
class TicketStatistics:
    """What `TicketStage.statistics` returns.

    Args:
        name: The stage's.
        tickets: How many may be held at once, now.
        held: How many are: the sum of the costs of the holders, those past their lease included.
        holders: Tickets granted and not given back.
        waiting: Requests in line, or behind others with the same key.
        granted: Tickets granted so far; the fence of the newest.
        refused: Requests refused so far: none free, the line full, or waited too long.
        gave_up: Requests cancelled while they waited.
        lost: Leases that ended, by time or by revocation, before their block did.
        overrun: Holders that lost their lease and have not left their block; their tickets are not handed on before.
        overrun_seconds: What all holders, the present ones included, spent in their blocks after losing their lease.
        broadcasts: Messages sent to holders and waiters.
        closed: Whether the stage grants no more.
    """

    name: str
    tickets: float
    held: float
    holders: int
    waiting: int
    granted: int
    refused: int
    gave_up: int
    lost: int
    overrun: int
    overrun_seconds: float
    broadcasts: int
    closed: bool
