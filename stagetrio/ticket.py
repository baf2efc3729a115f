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

from collections.abc import Callable, Hashable
from math import fsum, inf
from types import TracebackType
from typing import Any, NoReturn

import trio
from trio import current_time
from trio.lowlevel import (
    Abort,
    Task,
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from stagetrio.amounts import check_above_zero, check_amount, check_count
from stagetrio.borrow import Lending, Limiter
from stagetrio.broadcast import Broadcasts
from stagetrio.lease import LeaseLost, Ticket
from stagetrio.limiter import Overloaded
from stagetrio.line import Line
from stagetrio.pace import Pace
from stagetrio.ticket_statistics import TicketStatistics

__all__ = ["LeaseLost", "Limiter", "Ticket", "TicketRequest", "TicketStage", "TicketStatistics"]


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
        lease: float = inf,
        max_wait: float = inf,
        revocable: bool = False,
        weight: Callable[[Hashable], float] | None = None,
        max_messages: int = 64,
    ) -> None:
        if isinstance(tickets, int):
            check_count("tickets", tickets, 0)
        elif not hasattr(tickets, "acquire_on_behalf_of"):
            raise TypeError(f"tickets must be an int or a limiter, not {tickets!r}")
        check_amount("max_waiting", max_waiting)
        check_amount("max_wait", max_wait)
        check_above_zero("lease", lease)
        if weight is not None and not callable(weight):
            raise TypeError(f"weight must be callable or None, not {weight!r}")
        self.name = name
        self.max_waiting = max_waiting
        self.lease = lease
        self.max_wait = max_wait
        self.revocable = revocable
        self._lending = None if isinstance(tickets, int) else Lending(tickets)
        self._tickets = tickets if isinstance(tickets, int) else 0
        self._free = self._tickets  # of an own count; with a limiter 0, so that the quick way is never taken
        self._line = Line["TicketRequest"](weight)
        self._front: TicketRequest | None = None  # who waits in the limiter
        self._open = True  # False from `close_after` on: then the clock has to be asked
        self._watchful = max_wait < inf  # whether waiters have deadlines
        self._closes_at = inf
        self._leasing = revocable or lease < inf
        self._leases: set[Ticket] = set()
        self._broadcasts = Broadcasts(max_messages)
        self._sent = 0
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
            cost: How many tickets it takes, ≥ 1, all at once; no more than the stage has. What exceeds the total of a
                limiter waits, and everybody behind it, until the limiter grows.
            key: Holders with the same key exclude each other, whatever is free; None excludes nobody.
            lease: Seconds, > 0, instead of the stage's ``lease``.
        """
        return TicketRequest(self, flow, cost, key, lease)

    @enable_ki_protection
    def ticket_nowait(
        self, flow: Hashable = None, *, cost: int = 1, key: Hashable = None, lease: float | None = None
    ) -> Ticket:
        """Grant a ticket now; ``with`` what this returns gives it back at the end. Arguments as for `ticket`.

        Raises:
            Overloaded: None is free, somebody waits for one, or the key is busy; reason ``"tickets"``.
            trio.ClosedResourceError: The stage was closed.

        Cost: about a fifth of ``async with trio.CapacityLimiter``.
        """
        ticket = Ticket(self, flow, cost, key, lease)
        if not self._grant_now(ticket):
            self._refuse("tickets")
        return ticket

    @property
    def tickets(self) -> float:
        """How many may be held at once, now.

        Of a stage made with an int it can be set: more are handed on at once; fewer wait until holders leave, whom
        nothing disturbs. The tickets of a limiter are the limiter's business.
        """
        return self._tickets if self._lending is None else self._lending.limiter.total_tokens

    @tickets.setter
    @enable_ki_protection
    def tickets(self, tickets: int) -> None:
        if self._lending is not None:
            raise TypeError(f"the tickets of {self!r} are those of its limiter: set its total")
        check_count("tickets", tickets, 0)
        self._free += tickets - self._tickets
        self._tickets = tickets
        self._hand_over()

    @enable_ki_protection
    def revoke(self, ticket: Ticket, reason: str) -> None:
        """Take `ticket` away: its block is cancelled and raises `LeaseLost` with `reason`.

        The ticket is handed on when the block has been left. One that was given back or lost already stays as it is.

        Raises:
            RuntimeError: The ticket has no lease and the stage is not ``revocable``, so nothing can cancel its block.
            ValueError: The ticket is another stage's.
            TypeError: It is no ticket.
        """
        if not isinstance(ticket, Ticket):
            raise TypeError(f"ticket must be a Ticket, not {ticket!r}")
        if ticket._stage is not self:
            raise ValueError(f"{ticket!r} is not a ticket of {self!r}")
        if not ticket.leased:
            raise RuntimeError(f"{ticket!r} can not be revoked: it has no lease, and {self!r} is not revocable")
        ticket._lose(reason)

    def broadcast(self, value: object) -> None:
        """Send `value` to everyone who holds a ticket or waits for one; they read it from their ``messages``.

        Cost: the same for any number of listeners.
        """
        self._broadcasts.send(value)
        self._sent += 1

    @enable_ki_protection
    def close_after(self, seconds: float) -> None:
        """Stop granting `seconds` from now: waiters get `trio.ClosedResourceError` then, and holders finish.

        Of several calls the earliest moment counts.

        Args:
            seconds: ≥ 0.
        """
        check_amount("seconds", seconds)
        self._closes_at = min(self._closes_at, current_time() + seconds)
        self._open, self._watchful = False, True
        # Those who are parked do not watch the clock. They wake once, in no order that matters, since their places
        # are kept, and park again with a deadline.
        for request in self._line:
            request._wake()
        if self._front is not None:
            self._front._wake()

    def statistics(self) -> TicketStatistics:
        """Return the figures of this stage. Cost: proportional to the number of leased tickets held."""
        overruns = []
        if self._leases:
            now = current_time()
            overruns = [now - ticket._deadline for ticket in self._leases if ticket.lost is not None]
        lending = self._lending
        return TicketStatistics(
            name=self.name,
            tickets=self.tickets,
            held=self._tickets - self._free if lending is None else lending.held,
            holders=self._fence - self._returned,
            waiting=self._waiting(),
            granted=self._fence,
            refused=self._refused,
            gave_up=self._gave_up,
            lost=self._lost + len(overruns),
            overrun=len(overruns),
            overrun_seconds=self._overrun_seconds + fsum(overruns),
            broadcasts=self._sent,
            closed=not self._open and self._is_closed(),
        )

    def __repr__(self) -> str:
        return f"<TicketStage {self.name!r}: {self._fence - self._returned} hold, {self._waiting()} wait>"

    # Granting and giving back. All of it is synchronous; only a `TicketRequest` waits.

    def _grant_now(self, ticket: Ticket) -> bool:
        """Grant `ticket` if it is free and nobody is before; say whether it was."""
        cost = ticket.cost
        if ticket.key is None and self._open:
            if self._line.size:
                if 0 < cost <= self._tickets:
                    return False
            elif 0 < cost <= self._free:
                self._free -= cost
                self._grant(ticket)
                return True
        return self._grant_slowly(ticket)

    def _grant_slowly(self, ticket: Ticket) -> bool:
        if self._is_closed():
            raise trio.ClosedResourceError(f"{self!r} is closed")
        cost, key, lending = ticket.cost, ticket.key, self._lending
        most = max(1, self._tickets) if lending is None else inf
        if not 1 <= cost <= most:
            raise ValueError(f"cost must be between 1 and the {most} tickets of {self.name!r}, not {cost!r}")
        if self._line.size or self._front is not None or (key is not None and self._line.busy(key)):
            return False
        if lending is None and cost <= self._free:
            self._free -= cost
        elif lending is None or not lending.take_nowait(ticket, cost):
            return False
        if key is not None:
            self._line.take_key(key)
        self._grant(ticket)
        return True

    def _grant(self, ticket: Ticket) -> None:
        """Make `ticket` one that is held; what it takes was taken."""
        self._fence = ticket.fence = self._fence + 1
        lease = ticket._lease
        if self._leasing or lease is not None:
            if lease is None:
                lease = self.lease
            if lease < inf or self.revocable:
                ticket.leased = True
                ticket._deadline = current_time() + lease
                ticket._lost = ticket._scope = None
                self._leases.add(ticket)

    def _give_back(self, ticket: Ticket, well: bool) -> None:
        ticket._left = self._sent
        if ticket._messages is not None:
            ticket._messages._finish(ticket._left)
        self._returned += 1
        if ticket.leased:
            self._leases.discard(ticket)
            if ticket._lost is not None:
                self._lost += 1
                self._overrun_seconds += current_time() - ticket._deadline
        if self._lending is None:
            self._free += ticket.cost
        else:
            self._lending.give_back(ticket, well)
        if ticket.key is not None:
            self._line.free_key(ticket.key)
        if self._line.size:
            self._hand_over()

    def _hand_over(self) -> None:
        """Grant to the head of the line as long as there is enough for it; or call it forward, to the limiter."""
        if not self._open and self._is_closed():
            return
        if self._lending is not None:
            if self._front is None and (request := self._line.take(inf)) is not None:
                self._front = request
                request._wake()
            return
        take = self._line.take
        while self._free > 0 and (request := take(self._free)) is not None:
            self._free -= request.cost
            self._grant(request)
            if request._task is not None:
                reschedule(request._task)
                request._task = None

    def _waiting(self) -> int:
        return self._line.waiting + (self._front is not None)

    def _is_closed(self) -> bool:
        return not self._open and current_time() >= self._closes_at

    def _refuse(self, reason: str) -> NoReturn:
        """Refuse, with the time to come back by the pace at which tickets were given back lately."""
        self._refused += 1
        seconds = self._pace.seconds_for(self._waiting() + 1, self._returned, current_time())
        raise Overloaded(reason, seconds or (self.lease if self.lease < inf else 0.0))


class TicketRequest(Ticket):
    """A ticket that is asked for: ``async with`` it waits for the grant, and it can be watched meanwhile."""

    __slots__ = ("_patience", "_scope_in_limiter", "_task", "booked", "has_key", "in_line", "number", "waits", "weight")

    _stage: TicketStage
    _patience: float
    """When to stop waiting."""
    _scope_in_limiter: trio.CancelScope | None
    _task: Task | None
    """Who is parked."""
    has_key: bool
    in_line: bool
    number: int
    waits: bool
    weight: float
    booked: float

    @property
    def position(self) -> int:
        """How many would be served up to and including this one, by what is known now; 0 when it does not wait."""
        if self.fence >= 0 or self._left is not None:
            return 0
        front = self._stage._front
        return 1 if front is self else self._stage._line.position(self) + (front is not None)

    def __enter__(self) -> NoReturn:
        raise RuntimeError("a ticket that may have to wait is entered by 'async with'")

    @enable_ki_protection
    async def __aenter__(self) -> Ticket:
        if self.fence:
            raise RuntimeError("a ticket request can be entered once")
        stage = self._stage
        if stage._free or stage._lending is not None:  # else it has to wait, and notices a cancellation then
            await checkpoint_if_cancelled()
        if stage._grant_now(self) or self._join():
            await cancel_shielded_checkpoint()
        else:
            try:
                while self.fence < 0:
                    if stage._watchful or stage._front is self:
                        await self._step()
                    else:
                        self._task = current_task()
                        await wait_task_rescheduled(self._abort)
            except BaseException as error:
                self._withdraw(isinstance(error, trio.Cancelled))
                raise
        if self.leased:
            self._enter_scope()
        return self

    @enable_ki_protection
    async def __aexit__(
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

    def _join(self) -> bool:
        """Stand in line, or behind the key; say whether that was enough for a grant."""
        stage = self._stage
        line = stage._line
        if line.waiting + (stage._front is not None) >= stage.max_waiting:
            stage._refuse("waiting")
        self.has_key = False
        line.add(self)
        self.fence = -1
        self._task = None
        self._scope_in_limiter = None
        self._patience = inf if stage.max_wait == inf else current_time() + stage.max_wait
        if stage._free or stage._lending is not None:
            stage._hand_over()
        return self.fence > 0

    def _withdraw(self, cancelled: bool) -> None:
        """End the wait as if it had never begun."""
        stage = self._stage
        self._left = stage._sent
        if self._messages is not None:
            self._messages._finish(self._left)
        stage._gave_up += cancelled
        if stage._front is self:
            stage._front = None
            stage._line.refund(self)
        stage._line.remove(self)
        stage._hand_over()

    async def _step(self) -> None:
        """Wait until something happens: a grant, a call forward, the closing of the stage, the end of the patience."""
        stage = self._stage
        with trio.CancelScope(deadline=min(self._patience, stage._closes_at)) as scope:
            if stage._front is self:
                self._scope_in_limiter = scope
                await self._borrow()
            else:
                self._task = current_task()
                await wait_task_rescheduled(self._abort)
        if self.fence < 0 and stage._is_closed():
            raise trio.ClosedResourceError(f"{stage!r} is closed")
        if self.fence < 0 and current_time() >= self._patience:
            stage._refuse("waiting")

    async def _borrow(self) -> None:
        """Wait in the limiter, and call the next forward."""
        stage = self._stage
        assert stage._lending is not None
        await stage._lending.take(self, self.cost)
        stage._front = None
        stage._grant(self)
        stage._hand_over()

    def _abort(self, _: Any) -> Abort:
        self.waits = False
        self._task = None
        return Abort.SUCCEEDED

    def _wake(self) -> None:
        """Let the waiting task look around."""
        if self._task is not None:
            reschedule(self._task)
            self._task = None
        if self._scope_in_limiter is not None:
            self._scope_in_limiter.deadline = min(self._patience, self._stage._closes_at)
