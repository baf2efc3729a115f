"""Tickets: a bounded number of holders, and a fair line before them.

Theory of operation. A stage made with an int counts its free tickets itself: a grant is a subtraction, a return an
addition and, when somebody waits, a hand-over to the head of the `Line`, all in one synchronous step of the task that
returns. So a ticket is never free while somebody waits for it, nobody polls, and nobody barges in between: a newcomer
stands in line whenever there is one. The head may need more tickets than are free; then nobody behind it is served
either, so a large ticket waits for its turn and at most one refill. (A `trio.CapacityLimiter` of the stage's own
behaves the same and costs a third more; ``benchmarks/ticket.py``.)

A stage made with a limiter shares it with others whose releases it does not see, so somebody has to wait in the
limiter itself: the head of the line does, and when it has what it came for it calls the next forward.

A waiter is woken only by the task that grants or closes; `_abort` just marks it, because Trio runs aborts in no fixed
order. A marked waiter is never granted, and the rest (leaving the line, freeing its key, letting those behind it move
up) it does itself when it wakes. Three things can happen to a waiter, and each at most once: it is granted (then it
wakes with its ticket, and a cancellation that comes too late is seen at its next checkpoint, with the ticket held and
given back like any other), it is aborted, or the stage closes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any

import attrs
import trio

from stagetrio.borrow import Limiter, Loan
from stagetrio.broadcast import Broadcasts, Messages
from stagetrio.lease import LeaseLost, Ticket
from stagetrio.limiter import Overloaded
from stagetrio.line import Line
from stagetrio.pace import Pace

__all__ = ["LeaseLost", "Limiter", "Ticket", "TicketRequest", "TicketStage", "TicketStatistics"]


@attrs.frozen
class TicketStatistics:
    """What `TicketStage.statistics` returns."""

    name: str
    """The stage's."""
    tickets: float
    """How many may be held at once, now."""
    held: float
    """How many are: the sum of the costs of the holders, those past their lease included."""
    holders: int
    """Tickets granted and not given back."""
    waiting: int
    """Requests in line, or behind others with the same key."""
    granted: int
    """Tickets granted so far; the fence of the newest."""
    refused: int
    """Requests refused so far: none free, the line full, or waited too long."""
    gave_up: int
    """Requests cancelled while they waited."""
    lost: int
    """Leases that ended, by time or by revocation, before their block did."""
    overrun: int
    """Holders that lost their lease and have not left their block yet; their tickets are not handed on before."""
    overrun_seconds: float
    """Time all holders so far, the present ones included, spent in their blocks after losing their lease."""
    broadcasts: int
    """Messages sent to holders and waiters."""
    closed: bool
    """Whether the stage grants no more."""


class TicketStage:
    """At most `tickets` holders at a time, and a fair, bounded line before them.

    Args:
        name: For statistics and error messages, and the order in which several stages are entered.
        tickets: How many, ≥ 0; or a limiter to draw them from, which may be shared with others.
        max_waiting: Requests that may wait; one more gets `Overloaded`. 0 makes a stage that refuses when full.
        lease: Seconds a holder may stay, > 0, unless its request says otherwise.
        max_wait: Seconds a request may wait, ≥ 0, before it gets `Overloaded`.
        revocable: Whether tickets without a lease can be revoked; costs what a lease costs, a cancel scope.
        weight: The share of a flow among the flows that wait, > 0; every flow weighs 1 without it.
        max_messages: Broadcasts kept for those who have not read them yet, ≥ 1.
    """

    def __init__(
        self,
        name: str,
        tickets: int | Limiter,
        *,
        max_waiting: float = 1000,
        lease: float = math.inf,
        max_wait: float = math.inf,
        revocable: bool = False,
        weight: Callable[[Hashable], float] | None = None,
        max_messages: int = 64,
    ) -> None:
        if isinstance(tickets, int):
            if tickets < 0:
                raise ValueError(f"tickets must be >= 0, not {tickets!r}")
        elif not hasattr(tickets, "acquire_on_behalf_of"):
            raise TypeError(f"tickets must be an int or a limiter, not {tickets!r}")
        for argument, value in (("max_waiting", max_waiting), ("max_wait", max_wait)):
            if not value >= 0:
                raise ValueError(f"{argument} must be >= 0, not {value!r}")
        if not lease > 0:
            raise ValueError(f"lease must be > 0, not {lease!r}")
        self.name = name
        self.max_waiting = max_waiting
        self.lease = lease
        self.max_wait = max_wait
        self.revocable = revocable
        self._limiter: Limiter | None = None if isinstance(tickets, int) else tickets
        self._tickets = tickets if isinstance(tickets, int) else 0
        self._free = self._tickets  # of an own count; with a limiter 0, so that the quick way is never taken
        self._held = 0
        self._loans: dict[Ticket, Loan] = {}
        self._open = True
        self._closes_at = math.inf
        self._line = Line["TicketRequest"](weight)
        self._front: TicketRequest | None = None  # who waits in the limiter
        self._leases: dict[Ticket, None] = {}
        self._broadcasts = Broadcasts(max_messages)
        self._fence = 0
        self._returned = 0
        self._pace = Pace()
        self._refused = 0
        self._gave_up = 0
        self._lost = 0
        self._overrun_seconds = 0.0

    def ticket(
        self, flow: Hashable = None, *, cost: int = 1, key: Hashable = None, lease: float | None = None
    ) -> TicketRequest:
        """Ask for a ticket: ``async with`` what this returns waits for it, and gives it back at the end.

        Args:
            flow: Who asks; flows are served in turn, and each in its own order.
            cost: How many tickets it takes, ≥ 1, all at once.
            key: Holders with the same key exclude each other, whatever is free; None excludes nobody.
            lease: Seconds, > 0, instead of the stage's ``lease``.
        """
        return TicketRequest(self, flow, cost, key, lease)

    @trio.lowlevel.enable_ki_protection
    def ticket_nowait(
        self, flow: Hashable = None, *, cost: int = 1, key: Hashable = None, lease: float | None = None
    ) -> Ticket:
        """Grant a ticket now; ``with`` what this returns gives it back at the end. Arguments as for `ticket`.

        Raises:
            Overloaded: None is free, somebody waits for one, or the key is busy; reason ``"tickets"``.
            trio.ClosedResourceError: The stage was closed.

        Cost: about a fifth of ``async with trio.CapacityLimiter``.
        """
        if key is None and 0 < cost <= self._free and self._open and not self._line:
            return self._grant(flow, cost, None, lease)
        self._check(cost, lease)
        if (ticket := self._grant_now(flow, cost, key, lease)) is not None:
            return ticket
        self._refused += 1
        raise Overloaded("tickets", self._retry_after())

    def revoke(self, ticket: Ticket, reason: str) -> None:
        """Take `ticket` away: its block is cancelled and raises `LeaseLost` with `reason`.

        The ticket is handed on when the block has been left. One that was given back or lost already stays as it is.

        Raises:
            RuntimeError: The ticket has no lease and the stage is not ``revocable``, so nothing can cancel its block.
            ValueError: The ticket is another stage's.
        """
        if ticket._broadcasts is not self._broadcasts:
            raise ValueError(f"{ticket!r} is not a ticket of {self!r}")
        if not ticket.leased:
            raise RuntimeError(f"{ticket!r} can not be revoked: it has no lease, and {self!r} is not revocable")
        ticket._lose(reason)

    def broadcast(self, value: object) -> None:
        """Send `value` to everyone who holds a ticket or waits for one; they read it from their ``messages``.

        Cost: the same for any number of listeners.
        """
        self._broadcasts.send(value)

    def close_after(self, seconds: float) -> None:
        """Stop granting `seconds` from now: waiters get `trio.ClosedResourceError` then, and holders finish.

        Of several calls the earliest moment counts.

        Args:
            seconds: ≥ 0.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds must be >= 0, not {seconds!r}")
        self._closes_at = min(self._closes_at, trio.current_time() + seconds)
        self._open = False  # for the quick ways; the moment itself is looked at where they are not taken
        # Those who are parked do not watch the clock. They wake once, in no order that matters, since their places
        # are kept, and park again with a deadline.
        for request in self._line:
            request._wake()

    def statistics(self) -> TicketStatistics:
        """Return the figures of this stage. Cost: proportional to the number of leased tickets held."""
        overruns = []
        if self._leases:
            now = trio.current_time()
            overruns = [now - ticket._deadline for ticket in self._leases if ticket.lost is not None]
        limiter = self._limiter
        return TicketStatistics(
            name=self.name,
            tickets=self._tickets if limiter is None else limiter.total_tokens,
            held=self._tickets - self._free if limiter is None else self._held,
            holders=self._fence - self._returned,
            waiting=self._line.waiting,
            granted=self._fence,
            refused=self._refused,
            gave_up=self._gave_up,
            lost=self._lost + len(overruns),
            overrun=len(overruns),
            overrun_seconds=self._overrun_seconds + sum(overruns),
            broadcasts=self._broadcasts.sent,
            closed=not self._open and self._is_closed(),
        )

    def __repr__(self) -> str:
        return f"<TicketStage {self.name!r}: {self._fence - self._returned} hold, {len(self._line)} wait>"

    # Granting and giving back. All of it is synchronous; only a `TicketRequest` waits.

    def _check(self, cost: int, lease: float | None) -> None:
        if self._is_closed():
            raise trio.ClosedResourceError(f"{self!r} is closed")
        total = self._tickets if self._limiter is None else math.inf
        if not 1 <= cost <= max(1, total):
            raise ValueError(f"cost must be between 1 and the {total} tickets of {self.name!r}, not {cost!r}")
        if lease is not None and not lease > 0:  # now, and not when it would be granted
            raise ValueError(f"lease must be > 0, not {lease!r}")

    def _is_closed(self) -> bool:
        return not self._open and trio.current_time() >= self._closes_at

    def _grant(self, flow: Hashable, cost: int, key: Hashable, lease: float | None) -> Ticket:
        """Make the ticket; that it may be had is settled."""
        if lease is None:
            lease = self.lease
        elif not lease > 0:
            raise ValueError(f"lease must be > 0, not {lease!r}")
        leased = lease < math.inf or self.revocable
        ticket = Ticket(self._give_back, self._broadcasts, flow, cost, key, leased)
        self._fence = ticket.fence = self._fence + 1
        if leased:
            ticket._deadline = trio.current_time() + lease
            self._leases[ticket] = None
        if self._limiter is None:
            self._free -= cost
        return ticket

    def _lend(self, loan: Loan, flow: Hashable, key: Hashable, lease: float | None) -> Ticket:
        """Make the ticket that stands for `loan`."""
        ticket = self._grant(flow, loan.tokens, key, lease)
        self._loans[ticket] = loan
        self._held += loan.tokens
        return ticket

    def _grant_now(self, flow: Hashable, cost: int, key: Hashable, lease: float | None) -> Ticket | None:
        """Grant a ticket if it is free and nobody is before."""
        if self._line or (key is not None and self._line.busy(key)):
            return None
        if self._limiter is None:
            if cost > self._free:
                return None
            ticket = self._grant(flow, cost, key, lease)
        else:
            loan = Loan(self._limiter, cost)
            if not loan.take_nowait():
                return None
            ticket = self._lend(loan, flow, key, lease)
        if key is not None:
            self._line.take_key(key)
        return ticket

    def _give_back(self, ticket: Ticket, well: bool) -> None:
        self._returned += 1
        if ticket.leased:
            del self._leases[ticket]
            if ticket._lost is not None:
                self._lost += 1
                self._overrun_seconds += trio.current_time() - ticket._deadline
        if self._limiter is None:
            self._free += ticket.cost
        else:
            self._held -= ticket.cost
            self._loans.pop(ticket).give_back(well)
        if ticket.key is not None:
            self._line.free_key(ticket.key)
        if self._line:
            self._hand_over()

    def _hand_over(self) -> None:
        """Grant to the head of the line as long as there is enough for it; or call it forward, to the limiter."""
        if not self._open and self._is_closed():
            return
        while (request := self._line.head()) is not None:
            if request._aborted:
                self._line.remove(request)
            elif self._limiter is not None:
                if self._front is None:
                    self._front = request
                    request._wake()
                return
            elif request.cost > self._free:
                return
            else:
                self._line.serve(request)
                request._ticket = self._grant(request.flow, request.cost, request.key, request.lease)
                request._wake()

    def _join(self, request: TicketRequest) -> None:
        """Let `request` wait, in line or behind its key; it may be granted at once."""
        if self._line.waiting >= self.max_waiting:
            self._refused += 1
            raise Overloaded("waiting", self._retry_after())
        if self.max_wait < math.inf:
            request._patience = trio.current_time() + self.max_wait
        self._line.add(request)
        self._hand_over()

    def _withdraw(self, request: TicketRequest) -> None:
        """End the wait of `request` as if it had never come."""
        self._line.remove(request)
        if self._front is request:
            self._front = None
        self._hand_over()

    def _retry_after(self) -> float:
        """Seconds until one more request may be served, by the pace at which tickets came back lately."""
        seconds = self._pace.seconds_for(self._line.waiting + 1, self._returned, trio.current_time())
        return seconds or (self.lease if self.lease < math.inf else 0.0)


class TicketRequest:
    """A request for a ticket: an async context manager that waits for it, and can be watched meanwhile."""

    __slots__ = (
        "_aborted",
        "_joined",
        "_messages",
        "_patience",
        "_scope",
        "_stage",
        "_task",
        "_ticket",
        "cost",
        "flow",
        "has_key",
        "in_line",
        "key",
        "lease",
        "number",
    )

    def __init__(self, stage: TicketStage, flow: Hashable, cost: int, key: Hashable, lease: float | None) -> None:
        self._stage = stage
        self.flow = flow
        self.cost = cost
        self.key = key
        self.lease = lease
        self.number = 0
        self.in_line = False
        self.has_key = False
        self._ticket: Ticket | None = None
        self._messages: Messages | None = None
        self._joined = stage._broadcasts.sent

    @property
    def position(self) -> int:
        """How many would be served up to and including this one, by what is known now; 0 when it does not wait."""
        return self._stage._line.position(self)

    @property
    def messages(self) -> Messages:
        """The broadcasts since this was asked for, see `TicketStage.broadcast`; the ticket goes on with the same."""
        if self._ticket is not None:
            return self._ticket.messages
        if self._messages is None:
            self._messages = Messages(self._stage._broadcasts, self._joined)
        return self._messages

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Ticket:
        if self._ticket is not None or self.number:
            raise RuntimeError("a ticket request can be entered once")
        await trio.lowlevel.checkpoint_if_cancelled()
        stage = self._stage
        cost = self.cost
        if self.key is None and 0 < cost <= stage._free and stage._open and not stage._line:
            ticket: Ticket | None = stage._grant(self.flow, cost, None, self.lease)
        else:
            stage._check(cost, self.lease)
            ticket = stage._grant_now(self.flow, cost, self.key, self.lease)
        if ticket is not None:
            self._ticket = ticket
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            ticket = await self._wait()
        ticket._joined = self._joined
        ticket._messages = self._messages
        if ticket.leased:
            ticket.__enter__()
        return ticket

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        assert self._ticket is not None
        return self._ticket.__exit__(exc_type, exc, traceback)

    async def _wait(self) -> Ticket:
        stage = self._stage
        self._task: trio.lowlevel.Task | None = None
        self._scope: trio.CancelScope | None = None
        self._aborted = False
        self._patience = math.inf
        stage._join(self)
        if self._ticket is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
        try:
            while self._ticket is None:
                deadline = min(self._patience, stage._closes_at)
                if deadline == math.inf:
                    await self._step()
                else:
                    with trio.CancelScope(deadline=deadline):
                        await self._step()
                    if self._ticket is None:
                        self._give_up_when_late()
        except BaseException as error:
            if isinstance(error, trio.Cancelled):
                stage._gave_up += 1
            if self._messages is not None:
                self._messages._finish(stage._broadcasts.sent)
            stage._withdraw(self)
            raise
        return self._ticket

    async def _step(self) -> None:
        """Wait until something happens: a grant, a call forward, the closing of the stage."""
        stage = self._stage
        if stage._front is not self:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
            return
        assert stage._limiter is not None
        loan = Loan(stage._limiter, self.cost)
        with trio.CancelScope(deadline=stage._closes_at) as self._scope:
            await loan.take()
            stage._front = None
            stage._line.serve(self)
            self._ticket = stage._lend(loan, self.flow, self.key, self.lease)
            stage._hand_over()
        self._scope = None

    def _give_up_when_late(self) -> None:
        stage = self._stage
        if stage._is_closed():
            raise trio.ClosedResourceError(f"{stage!r} is closed")
        if trio.current_time() >= self._patience:
            stage._refused += 1
            raise Overloaded("waiting", stage._retry_after())

    def _abort(self, _: Any) -> trio.lowlevel.Abort:
        self._aborted = True
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _wake(self) -> None:
        """Let the waiting task look around."""
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None
        if self._scope is not None:
            self._scope.deadline = self._stage._closes_at
