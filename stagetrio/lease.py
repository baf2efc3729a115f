"""What a holder holds: a ticket, with or without a lease.

Theory of operation. A ticket with a lease has a cancel scope around its block, whose deadline is the end of the
lease. So nothing has to watch the clock: Trio cancels the work, the block unwinds, and only then does its exit hand
the ticket on; a holder that shields itself keeps its place counted until it leaves. A plain cancel scope swallows
the cancellation at its end, and the code after the block would go on as if the work had been done. Leaving the block
therefore raises `LeaseLost` in every case in which the lease was over before the end of the block, except where
something else is on its way out already: a cancellation from outside, or an exception of the block's own, which says
more than that the ticket was late. A ticket without lease or revocation has no scope, which is half its cost.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from types import TracebackType
from typing import Protocol

import trio
from trio import CancelScope, current_time

from stagetrio.amounts import check_above_zero, check_amount, check_count
from stagetrio.broadcast import Broadcasts, Messages


class LeaseLost(Exception):
    """The ticket was taken away before its block ended, and what the block did may be half done.

    Args:
        reason: ``"lease expired"``, or what `TicketStage.revoke` was told.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


EXPIRED = "lease expired"


class Grantor(Protocol):
    """What a ticket needs of the stage that made it."""

    _broadcasts: Broadcasts
    _sent: int
    """How many broadcasts there were."""

    def _give_back(self, ticket: Ticket, well: bool) -> None:
        """Take the ticket back, and note the moment in it."""


class Ticket:
    """Leave to be one of the few; a context manager whose end gives it back. Made by a `TicketStage` only.

    ``fence`` is greater than that of every ticket the stage granted before: a store that remembers the greatest it has
    seen can refuse a holder that lost its ticket and has not noticed. ``flow``, ``cost`` and ``key`` are what the
    ticket was asked for.
    """

    __slots__ = (
        "_deadline",
        "_joined",
        "_lease",
        "_left",
        "_lost",
        "_messages",
        "_scope",
        "_stage",
        "cost",
        "fence",
        "flow",
        "key",
        "leased",
    )

    # These three are set for the leased only.
    _deadline: float
    _lost: str | None
    _scope: CancelScope | None

    def __init__(self, stage: Grantor, flow: Hashable, cost: int, key: Hashable, lease: float | None) -> None:
        if lease is not None:
            check_above_zero("lease", lease)
        if cost.__class__ is not int:
            check_count("cost", cost, 1)
        if key is not None:
            hash(key)  # at once, and not when it is to be remembered
        self._stage = stage
        self._lease = lease
        self._joined = stage._sent
        self._left: int | None = None  # broadcasts sent when it was given back
        self._messages: Messages | None = None
        self.flow = flow
        self.cost = cost
        self.key = key
        self.fence = 0  # until it is granted; -1 while it waits, or if it waited in vain
        self.leased = False

    @property
    def deadline(self) -> float:
        """When the lease ends (or ended), on Trio's clock; ``math.inf`` without a lease."""
        return self._deadline if self.leased else math.inf

    @property
    def lost(self) -> str | None:
        """Why the ticket was taken away, or None while it is not; for cleanup code in the block."""
        if not self.leased:
            return None
        if self._lost is None and self._left is None and current_time() >= self._deadline:
            self._lost = EXPIRED
        return self._lost

    @property
    def held(self) -> bool:
        """Whether the ticket still counts, as until its block is left or it is released, also past its lease."""
        return self.fence > 0 and self._left is None

    @property
    def messages(self) -> Messages:
        """The broadcasts since the ticket was asked for, see `TicketStage.broadcast`."""
        if self._messages is None:
            self._messages = Messages(self._stage._broadcasts, self._joined)
            if self._left is not None:
                self._messages._finish(self._left)
        return self._messages

    @trio.lowlevel.enable_ki_protection
    def extend(self, seconds: float) -> None:
        """Let the lease end `seconds` from now, whenever it would have ended.

        What has no lease and cannot be revoked lasts anyway, and is left as it is.

        Args:
            seconds: ≥ 0; ``math.inf`` lets it last until it is given back, revoked or told another end.

        Raises:
            LeaseLost: It is over already, so the work cannot go on.
        """
        check_amount("seconds", seconds)
        if self._left is None and self.leased:
            if self.lost is not None:
                raise LeaseLost(self.lost)
            self._deadline = current_time() + seconds
            if self._scope is not None:
                self._scope.deadline = self._deadline

    @trio.lowlevel.enable_ki_protection
    def release(self) -> None:
        """Give the ticket back before the end of the block, which then goes on without it and without its lease.

        Once is enough; again is no error, so a holder that is not sure may. A ticket that was lost is given back too,
        and leaving the block still says so.
        """
        if self.held:
            lost = self.lost
            if self.leased and lost is None and self._scope is not None:
                self._scope.deadline = math.inf
            self._stage._give_back(self, lost is None)

    def _lose(self, reason: str) -> None:
        """Cancel the work in the block; the first reason stays."""
        if self._left is None and self.lost is None:
            self._lost = reason
            self._deadline = current_time()
            if self._scope is not None:
                self._scope.cancel(reason=reason)

    @trio.lowlevel.enable_ki_protection
    def __enter__(self) -> Ticket:
        if self.leased:
            if self._scope is not None:
                raise RuntimeError("a ticket's block can be entered once")
            self._enter_scope()
        return self

    def _enter_scope(self) -> None:
        # One that was released before its block began has no lease left to end.
        scope = self._scope = CancelScope(deadline=self._deadline if self._left is None else math.inf)
        scope.__enter__()
        if self._lost is not None:
            scope.cancel(reason=self._lost)

    @trio.lowlevel.enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self.leased:
            return self._exit_scope(exc_type, exc, traceback)
        if self._left is None:
            self._stage._give_back(self, exc is None)
        return False

    def _exit_scope(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        scope = self._scope
        assert scope is not None
        if self._left is None and self._lost is None and current_time() >= self._deadline:
            self._lost = EXPIRED
        try:
            swallowed = scope.__exit__(exc_type, exc, traceback)
        finally:
            if self._left is None:
                self._stage._give_back(self, exc is None and self._lost is None)
        if self._lost is not None and (exc is None or swallowed):
            raise LeaseLost(self._lost) from None
        return swallowed
