"""The way out of a fair queue: receivers, and the hand-over to those that wait.

Theory of operation
===================

Whoever makes something possible does it on behalf of the one who waits for it, in the same synchronous step: a send
gives its item to a waiting receiver, a receive puts the item of a waiting sender into the place it has freed. A task
that waits either has been served, and then its cancellation comes too late, or it has not, and then leaving the line
undoes everything. So no wake-up can be lost, whatever is cancelled when, and nothing is done in an ``abort_fn`` except
leaving the line.

A receiver of batches is only woken; what there is and what comes until it runs is left for it (``_collecting``), so
that a burst wakes one task and not all of them. When it runs it takes what it can, and hands the rest on; if somebody
who did not wait has been faster, it waits again, as the first.

**Where items are taken from** is the order itself, or the `Sojourn` in front of it, which takes one by one and looks at
each. A queue that was not asked for anything of that kind, and has not seen a finite deadline, has none.

Source: trio's memory channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol

import outcome
import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from stagetrio.flow import Delivery, F, Flow, T
from stagetrio.intake import Intake
from stagetrio.sojourn import Sojourn

FEW = 32  # flows at their own bounds with waiting senders up to which all are looked at after a batch

Take = Callable[[int], list[Any]]


class Order(Protocol):
    """Where items come from."""

    def head(self) -> Flow[Any, Any] | None: ...

    def take_items(self, max_items: int) -> list[Any]: ...

    def take(self, max_items: int) -> list[Delivery[Any, Any]]: ...


class Outlet(Generic[F, T]):
    """Takes items out of an order, for receivers that may have to wait.

    Args:
        order: The order.
        intake: What counts the items, and lets more in.
        make_sojourn: Makes what sheds, when it is needed.
    """

    def __init__(self, order: Order, intake: Intake[F, T], make_sojourn: Callable[[], Sojourn[F, T]]) -> None:
        self._order = order
        self._intake = intake
        self._make_sojourn = make_sojourn
        self._receivers = intake.receivers  # {task: (how it takes, how many at most)}
        self._collecting = 0  # items that receivers woken and not yet run may still take
        self._opened = False
        self.take_items: Take = order.take_items
        self.take_deliveries: Take = order.take
        self._singly = (self.take_items, 1)  # how `receive` waits
        self._shedding: dict[Take, Take] = {}  # {how the order is taken from: the same through the sojourn}
        self.sojourn: Sojourn[F, T] | None = None

    @property
    def hurried(self) -> bool:
        """Whether taking is nothing but taking, as nobody waits to send, nothing ends and nothing is shed."""
        intake = self._intake
        return self._opened and not (intake.waiting or intake.closed or self.sojourn is not None)

    def begin_to_shed(self) -> None:
        """Put a `Sojourn` in front of the order, also for those who wait already."""
        if self.sojourn is not None:
            return
        sojourn = self.sojourn = self._make_sojourn()
        self._shedding = {self.take_items: sojourn.take_items, self.take_deliveries: sojourn.take}
        self.take_items, self.take_deliveries = sojourn.take_items, sojourn.take
        self._singly = (self.take_items, 1)
        for task, (take, max_items) in self._receivers.items():
            self._receivers[task] = (self._shedding.get(take, take), max_items)
        self._intake.go_slow(sojourn)

    def count(self, taken: int) -> None:
        """Take note that items have left the queue."""
        self._intake.items -= taken
        self._intake.drained += taken

    def take_nowait(self, take: Take, max_items: int) -> list[Any]:
        """Take at least one thing.

        Raises:
            trio.WouldBlock: There is nothing.
            trio.EndOfChannel: There will never be anything.
        """
        taken = self._taken(take, max_items)
        if not taken:
            self._check_empty(max_items)
            raise trio.WouldBlock
        return taken

    def _check_empty(self, max_items: int) -> None:
        if max_items < 1:
            raise ValueError(f"max_items must be at least 1, not {max_items!r}")
        if self._intake.closed and not self._intake.items:
            raise trio.EndOfChannel

    @enable_ki_protection
    def _taken(self, take: Take, max_items: int) -> list[Any]:
        intake = self._intake
        if intake.waiting or intake.closed or not self._opened or self.sojourn is not None:
            return self._taken_slowly(take, max_items)
        taken = take(max_items)
        intake.items -= len(taken)
        intake.drained += len(taken)
        return taken

    def _taken_slowly(self, take: Take, max_items: int) -> list[Any]:
        """Take, let senders in, and take what they have sent; see what the first and the last item open or end."""
        intake = self._intake
        taken: list[Any] = []
        try:
            while len(taken) < max_items:
                before = intake.drained
                served = self._order.head() if len(intake.blocked) > FEW else None
                more = take(max_items - len(taken) if served is None else 1)
                taken += more
                self.count(len(more))
                if intake.drained == before:
                    break
                if taken and self.sojourn is not None:
                    break  # to shed more might raise, by ``on_shed``, and would lose what is in hand
                if intake.waiting:
                    intake.let_in(served)
        finally:
            if taken and not self._opened:
                self._opened = True
                intake.opened()
            self.settle_ends()
        return taken

    def settle_ends(self) -> None:
        """Let waiting senders in, and end waiting receivers, where items have gone."""
        intake = self._intake
        if intake.waiting:
            intake.let_in(None)
        if intake.closed and not intake.items:
            while self._receivers:
                task, _ = self._receivers.popitem(last=False)
                reschedule(task, outcome.Error(trio.EndOfChannel()))

    @enable_ki_protection
    async def receive(self) -> T:
        """Wait for the next item.

        Raises:
            trio.EndOfChannel: There will never be one.

        Checkpoints: Always. A cancelled receive has not taken anything.
        """
        await checkpoint_if_cancelled()
        intake = self._intake
        if intake.items:
            taken = self._taken(self.take_items, 1)
            if taken:
                await cancel_shielded_checkpoint()
                return taken[0]  # type: ignore[no-any-return]
        if intake.closed and not intake.items:
            raise trio.EndOfChannel
        task = current_task()
        self._receivers[task] = self._singly

        def leave(_: RaiseCancelT) -> Abort:
            del self._receivers[task]
            return Abort.SUCCEEDED

        return await wait_task_rescheduled(leave)  # type: ignore[no-any-return]

    async def take(self, take: Take, max_items: int) -> list[Any]:
        """Wait for something to take.

        Raises:
            trio.EndOfChannel: There will never be anything.

        Checkpoints: Always. A cancelled one has not taken anything.
        """
        await checkpoint_if_cancelled()
        if self._intake.items:
            taken = self._taken(take, max_items)
            if taken:
                await cancel_shielded_checkpoint()
                return taken
        self._check_empty(max_items)
        return await self._park(take, max_items)

    @enable_ki_protection
    async def _park(self, take: Take, max_items: int) -> list[Any]:
        task = current_task()
        self._receivers[task] = (take, max_items)

        def leave(_: RaiseCancelT) -> Abort:
            del self._receivers[task]
            return Abort.SUCCEEDED

        while True:
            item = await wait_task_rescheduled(leave)
            if max_items == 1:
                return [item]
            self._collecting -= max_items
            take = self._shedding.get(take, take)  # an item with a deadline may have come meanwhile
            taken = self._taken(take, max_items)
            if self._receivers:
                self.hand_over()
            if taken:
                return taken
            if self._intake.closed and not self._intake.items:
                raise trio.EndOfChannel
            self._receivers[task] = (take, max_items)  # somebody else was faster
            self._receivers.move_to_end(task, last=False)

    def send_away(self, task: trio.lowlevel.Task) -> None:
        """Let a task, if it waits for one item, wait no more: it gets `trio.ClosedResourceError`."""
        if self._receivers.pop(task, None) is not None:
            reschedule(task, outcome.Error(trio.ClosedResourceError("the channel was closed")))

    def hand_over(self) -> None:
        """Give queued items to waiting receivers, except those a woken receiver is about to collect."""
        while self._receivers and self._intake.items > self._collecting and self._order.head() is not None:
            task, how = self._receivers.popitem(last=False)
            take, max_items = how
            if max_items > 1:
                self._collecting += max_items
                reschedule(task)
                continue
            taken: list[Any] = []
            try:
                taken = self._taken(take, 1)
            finally:
                if taken:
                    reschedule(task, outcome.Value(taken[0]))
                else:  # all there was has been shed
                    self._receivers[task] = how
                    self._receivers.move_to_end(task, last=False)
                    self.settle_ends()

    def hand_through(self, record: Flow[F, T], item: T, cost: float) -> bool:
        """Give an item to the receiver that has waited longest, if that one takes items singly."""
        if record.order.in_hand or not self._opened:
            return False
        task, how = self._receivers.popitem(last=False)
        if how is not self._singly:
            self._receivers[task] = how
            self._receivers.move_to_end(task, last=False)
            return False
        record.order.pass_item(record, cost)
        self._intake.drained += 1
        reschedule(task, outcome.Value(item))
        return True
