"""A handler with a fair queue in front of it and a bounded number of workers behind: SEDA's stage.

Theory of operation. Workers are persistent tasks, and at most one of them, the *leader*, takes messages. It takes a
batch and runs the handlers inline, one after the other, in its own task: as long as none of them blocks, a message
costs neither a task nor a task switch. At the first checkpoint of a handler that really waits, the leader passes its
role, with the rest of the batch, to a *follower* (an idle worker, or a new one while there are fewer than ``workers``)
and stays with its handler until that is done. So a stage whose handlers never wait runs in one task, and one whose
handlers all wait runs ``workers`` of them at once.

    idle ──woken──▶ leading ──handler waits──▶ occupied ──handler done──▶ leading, if nobody is, else idle

- The leader works in slices. After `SLICE` seconds, or `BATCH` messages when costs are declared and no clock is read,
  it calls ``after_slice`` and checkpoints, so that the sockets are read and every other task gets its turn. What it
  has taken and not begun goes back to the queue, to be ordered by what the slice has taught about costs.
- Messages are taken in runs (`stagetrio.runs`) of one flow, `RUN` seconds of estimated work each.
- A message is charged to its flow with the time its handler held the loop, over all of its steps, unless ``cost`` says
  what it costs. Waiting costs nothing: it holds a worker, which ``workers`` bounds, but not the processor.
- Order. A key is *in hand* while a handler with that key is occupied. A message whose key is in hand is parked behind
  it, up to `MAX_PARKED`; from then on the flows that bring more are held in the queue. The worker in hand serves what
  was parked, so a key in hand occupies one worker however much is waiting for it. A handler that does not wait cannot
  overlap another one, so it needs no key, and the common path touches no table. With ``overlap`` a key is in hand under
  as many places; what is parked waits for whichever of them is free first.
- With a source, the leader waits for the source and not for the queue: what reads the sockets and what serves their
  messages is one task. Since the source must be looked after even while all workers are occupied, there is then one
  more, which leads without beginning handlers until one of them has ended.
- With a watchdog, each worker has a lane: a stack of its own on which handlers may be forced to a checkpoint. A handler
  that is made to wait for its turn there is occupied like any other that waits, and the leader's role passes on.
- A worker runs inside one cancel scope for as long as nothing cancels it. A handler that is to be cancelled alone
  (past ``max_handling`` or ``budget``, or by `Stage.cancel`) takes that scope with it, and the worker goes on in a
  fresh one. (A scope cannot be entered around a handler that has begun, and one per message would cost too much.)

- Handlers do not see each other's context variables: a worker whose context is not what it started with when a handler
  has ended makes way for a fresh one. (Only what is parked behind one key is served in one context, since it has one
  worker.)

Rejected: handing each message to a parked worker (slower than spawning a task), and a task per message (ten times the
cost of the whole path here).

Source: Welsh, Culler, Brewer: SEDA (SOSP 2001); Schmidt et al.: Leader/Followers (POSA 2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextvars import Context, copy_context
from functools import partial
from math import inf
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import attrs
import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

from stagetrio.amounts import check_above_zero, check_count
from stagetrio.fair_queue import FairQueue
from stagetrio.lane import Lane
from stagetrio.runs import Run
from stagetrio.stall import name_of
from stagetrio.ticket import TicketStage
from stagetrio.watchdog import BudgetExceeded, Watchdog
from stagetrio.worker import Handling, Worker, resume

T = TypeVar("T")

SLICE = 0.001  # seconds the leader serves before everyone else gets a turn
BATCH = 64  # messages taken from the queue at once
RUN = 50e-6  # seconds of estimated work taken from one flow at once
MAX_PARKED = 64  # messages parked behind one key in hand


class Source(Protocol):
    """What brings items to the queue when the leader looks after it, between its slices and instead of waiting."""

    def poll(self) -> object:
        """Queue what there is, without waiting."""

    async def wait(self) -> None:
        """Wait until there is something to `poll`, or until `wake` was called after the last one."""

    def wake(self) -> None:
        """Let the leader look at the queue."""


@attrs.frozen
class StageStatistics:
    """What a stage has done and is doing.

    Args:
        handled: Messages whose handler returned.
        failed: Messages whose handler raised, among them the overdue.
        overdue: Messages whose handler was cancelled for taking longer than ``max_handling`` or ``budget``.
        cancelled: Messages whose handler was cancelled by `Stage.cancel`.
        occupied: Handlers that are waiting for something now.
        parked: Messages waiting now behind a key in hand.
        workers: Worker tasks now, occupied or not; with a source one more than may be occupied.
        queue: The statistics of the queue.
    """

    handled: int
    failed: int
    overdue: int
    cancelled: int
    occupied: int
    parked: int
    workers: int
    queue: Any


class Stage(Generic[T]):
    """Serves what comes out of a fair queue.

    Args:
        handler: An async function, called with each item. Two items of one key do not overlap, unless ``overlap`` says.
        queue: Where the items come from. The stage receives; whoever owns the queue sends and closes.
        workers: How many handlers may be waiting for something at once; ≥ 1.
        ticket: A ticket that each message needs before its handler starts.
        watchdog: What forces handlers that hold the loop to a checkpoint; `stagetrio.watchdog` says which must not be.
        budget: Seconds a handler may hold the loop in all, before it is cancelled; needs a watchdog.
        order_key: What orders an item; by default its flow.
        overlap: Handlers of one key that may be waiting for something at once; 1 keeps the order within a key.
        cost: What an item costs, in any unit; by default the seconds its handler held the loop, as measured.
            A stage whose costs are declared reads no clock and is deterministic.
        on_error: Called with an item and what its handler raised, instead of letting that end the stage. An overdue
            handler raises `trio.TooSlowError`, one past its budget `BudgetExceeded`.
        after_slice: Called when the leader is about to let others run: the place to write what the slice produced.
        max_handling: Seconds from a handler's first wait after which it is cancelled.
        on_result: Called with an item and what its handler returned; what it raises, the handler has raised.
        inner: With a watchdog, where ``handler`` only leads to it: the function in whose module handlers may be forced.
        source: What the leader waits for instead of waiting for the queue, and lets bring items to it. Whoever else
            sends to the queue, resumes a flow of it or closes it calls `Source.wake`.

    Raises:
        ValueError, TypeError: ``workers``, ``overlap``, ``max_handling`` or ``budget`` is out of range.
    """

    def __init__(
        self,
        handler: Callable[[T], Coroutine[Any, Any, object]],
        *,
        queue: FairQueue[Any, T],
        workers: int,
        ticket: TicketStage | None = None,
        watchdog: Watchdog | None = None,
        budget: float = inf,
        order_key: Callable[[T], Hashable] | None = None,
        overlap: int = 1,
        cost: Callable[[T], float] | None = None,
        on_error: Callable[[T, Exception], None] | None = None,
        after_slice: Callable[[], None] | None = None,
        max_handling: float = inf,
        on_result: Callable[[T, Any], object] | None = None,
        inner: Callable[..., Any] | None = None,
        source: Source | None = None,
    ) -> None:
        check_count("workers", workers, 1)
        check_count("overlap", overlap, 1)
        check_above_zero("max_handling", max_handling)
        check_above_zero("budget", budget)
        if budget != inf and watchdog is None:
            raise ValueError(f"budget needs a watchdog to be kept: budget={budget!r}")
        self._handler = handler
        self._queue = queue
        self._max_workers = workers
        self._ticket = ticket
        self._watchdog = watchdog
        self._budget = budget
        self._order_key = order_key
        self._overlap = overlap
        self._cost = cost
        self._quantum = (
            RUN if cost is None and budget == inf else 0.0
        )  # a budget is for a handler, not for a run of them
        self._on_error = on_error
        self._after_slice = after_slice or (lambda: None)
        self._max_handling = max_handling
        self._on_result = on_result
        self._inner = handler if inner is None else inner
        self._source = source
        self._nursery: trio.Nursery | None = None
        self._context: Context  # what workers start in
        self._workers = 0
        self._idle: dict[Task, None] = {}  # followers, the most recently parked last
        self._leader: Worker[T] | None = None
        self._batch: list[Run[Any, T]] = []  # taken and not yet begun, the next one last
        self._in_hand: dict[Hashable, Worker[T]] = {}
        self._occupied = 0
        self._handled = self._failed = self._overdue = self._cancelled = 0
        self._ended = False
        #: Whether the leader is running handlers at this moment, so that ``after_slice`` is about to follow.
        self.serving = False
        #: The lane of the handler that is starting; it may be told there which function is the handler proper.
        self.lane: Lane | None = None

    def statistics(self) -> StageStatistics:
        """Return a snapshot of the counts."""
        return StageStatistics(
            handled=self._handled,
            failed=self._failed,
            overdue=self._overdue,
            cancelled=self._cancelled,
            occupied=self._occupied,
            parked=sum({id(in_hand.parked): len(in_hand.parked) for in_hand in self._in_hand.values()}.values()),
            workers=self._workers,
            queue=self._queue.statistics(),
        )

    async def run(self) -> None:
        """Serve until the queue is closed and empty and every handler has returned; once per stage.

        Raises:
            RuntimeError: The stage runs already, or has run.

        Checkpoints: throughout. A cancellation cancels the handlers; messages taken and not begun are dropped.
        """
        if self._nursery is not None:
            raise RuntimeError("a stage runs once")
        self._context = copy_context()
        async with trio.open_nursery() as self._nursery:
            self._start_worker()

    def cancel(self, key: Hashable) -> bool:
        """Cancel the handlers that are occupied with this key; return whether there was one."""
        cancelled = False
        for place in self._places(key):
            worker = self._in_hand.get(place)
            if worker is not None and not worker.scope.cancel_called:
                cancelled = worker.cancelled = True
                worker.scope.cancel()
        return cancelled

    def _start_worker(self) -> None:
        assert self._nursery is not None
        self._workers += 1
        self._context.run(self._nursery.start_soon, self._work)

    async def _work(self) -> None:
        if self._watchdog is None:
            await self._work_on(None)
        else:
            lane = self._watchdog.open_lane()
            await lane.run(self._work_on, lane)

    async def _work_on(self, lane: Lane | None) -> None:
        worker: Worker[T] = Worker(current_task(), lane)
        if lane is not None:
            lane.on_preempt = partial(self._preempted, worker)
        while worker.occupied or not self._ended:
            if not worker.occupied and self._leader is not None:
                await self._follow(worker)
                continue
            with trio.CancelScope() as worker.scope:
                if lane is not None:
                    lane.scope = worker.scope
                if worker.occupied:
                    await self._serve_parked(worker)
                else:
                    await self._lead(worker)
            if worker.scope.cancelled_caught:
                self._settle_cancelled(worker)
            worker.cancelled = False
            if not worker.occupied and worker.has_changed():
                break
        self._workers -= 1
        if self._leader is None and not self._ended:
            self._hand_over()

    async def _follow(self, worker: Worker[T]) -> None:
        self._idle[worker.task] = None

        def abort(_: RaiseCancelT) -> Abort:
            self._idle.pop(worker.task, None)
            return Abort.SUCCEEDED

        await wait_task_rescheduled(abort)

    def _hand_over(self) -> None:
        self._leader = None
        self.serving = False
        if self._idle:
            reschedule(self._idle.popitem()[0])
        elif self._workers < self._max_workers + (self._source is not None):  # one watches while all are occupied
            self._start_worker()
        else:
            self._after_slice()

    def _end(self) -> None:
        self._ended = True
        for task in self._idle:
            reschedule(task)
        self._idle.clear()

    async def _lead(self, worker: Worker[T]) -> None:
        """Take and serve until this worker has handed over or the queue has ended."""
        self._leader = worker
        try:
            if self._source is None:
                await self._lead_from_queue(worker)
            else:
                await self._lead_from_source(worker, self._source)
        finally:
            if self._leader is worker:
                self._leader = None

    async def _lead_from_queue(self, worker: Worker[T]) -> None:
        while True:
            if not self._batch:
                self._after_slice()
                try:
                    self._batch = [await self._queue.receive_run(self._quantum)]
                except trio.EndOfChannel:
                    self._end()
                    return
            self.serving = True
            drained = await self._serve_slice(worker)
            if self._leader is not worker:
                return
            self.serving = False
            if worker.stale:
                self._after_slice()
                return
            if not drained:  # else waiting for the queue lets the others run
                self._after_slice()
                await trio.lowlevel.checkpoint()

    async def _lead_from_source(self, worker: Worker[T], source: Source) -> None:
        while True:
            self.serving = True
            source.poll()
            drained = not self._fetch() or await self._serve_slice(worker)
            if self._leader is not worker:
                return
            self.serving = False
            self._after_slice()
            if self._ended or worker.stale:
                return
            if drained:
                await source.wait()
            else:
                await trio.lowlevel.checkpoint()

    def _fetch(self) -> bool:
        """Have a batch to serve, if there is anything and the leader may serve it."""
        if self._occupied >= self._max_workers:
            return False
        if not self._batch:
            try:
                self._batch = self._queue.receive_runs_nowait(BATCH, self._quantum)
            except trio.WouldBlock:
                return False
            except trio.EndOfChannel:
                self._end()
                return False
            self._batch.reverse()
        return True

    async def _serve_slice(self, worker: Worker[T]) -> bool:
        drained = await self._serve_batches(worker)
        if worker.on_lane:
            self._leave_lane(worker)
        return drained

    async def _serve_batches(self, worker: Worker[T]) -> bool:
        """Serve the batch, and more from the queue while the slice lasts, or until a handler has waited.

        Returns whether the queue was found empty.
        """
        clock = perf_counter if worker.lane is None else worker.lane.clock
        end = clock() + SLICE if self._cost is None else inf
        while True:
            while self._batch:
                coroutine = self._serve_runs(worker, clock, end)
                try:
                    trap = coroutine.send(None)
                except StopIteration:
                    pass
                except Exception as error:
                    worker.spent = clock() - worker.begun
                    if not worker.occupied:  # else the rest of its run is another one's by now
                        self._book(worker, worker.served() - 1)
                    self._settle(worker)
                    self._fail(worker.item, error)
                    worker.stale = worker.has_changed()
                else:
                    run = worker.run
                    if not worker.occupied:
                        self._occupy(worker, run, worker.item)
                    await self._finish(worker, run.single(worker.item), coroutine, trap, clock() - worker.begun)
                    await self._serve_parked(worker)
                    return False
                if worker.occupied:  # it was made to wait
                    await self._serve_parked(worker)
                    return False
                if worker.begun > end or worker.stale:
                    self._put_back()
                    return False
            if self._cost is not None:
                return False
            if not self._queue.backlog:
                return True
            try:
                self._batch = self._queue.receive_runs_nowait(BATCH, self._quantum)
            except trio.WouldBlock:
                return True
            except trio.EndOfChannel:
                return False
            self._batch.reverse()

    async def _serve_runs(self, worker: Worker[T], clock: Callable[[], float], end: float) -> None:
        """Call the handler with the items of the batch in turn, until the slice is over or a handler has waited."""
        batch, in_hand, context = self._batch, self._in_hand, worker.context
        handler, on_result, cost = self._handler, self._on_result, self._cost
        worker.begun = clock()
        while batch:
            run = batch[-1]
            items = run.items
            worker.take(run)
            if self._ticket is not None:
                handler = partial(self._handle_with_ticket, self._ticket, run.flow)
            to_begin = worker.lane is not None
            while items:
                if in_hand and self._park(run):
                    worker.taken -= 1
                    continue
                worker.item = item = items.pop()
                if to_begin:
                    to_begin = False
                    self._begin(worker, run)
                result = await handler(item)
                if on_result is not None:
                    on_result(item, result)
                if worker.occupied:
                    if worker.run is run:  # it did not wait, but was made to
                        self._handled += 1
                        self._settle(worker)
                    return
                worker.begun = now = clock()
                if cost is not None:
                    worker.cost += cost(item)
                if now > end or copy_context() != context:
                    worker.stale = worker.has_changed()
                    self._book(worker, worker.served())
                    return
            self._book(worker, worker.served())
            batch.pop()

    def _put_back(self) -> None:
        batch = self._batch  # the latest first, so that each flow's come back in order
        returned = 0
        while returned < len(batch) and self._queue.put_back(batch[returned]):
            returned += 1
        del batch[:returned]

    def _begin(self, worker: Worker[T], run: Run[Any, T]) -> None:
        self.lane = lane = worker.lane
        assert lane is not None
        if worker.on_lane:
            lane.lap()
            lane.flow = run.flow
        else:
            worker.on_lane = True
            lane.begin(self._inner, run.flow, self._budget)
        self.lane = lane  # another one may have been looked at while this one waited

    def _leave_lane(self, worker: Worker[T]) -> float:
        """Return what the handler in hand has held the loop for, which has ended, whatever way."""
        worker.on_lane = False
        assert worker.lane is not None
        return max(0.0, worker.lane.end())  # a difference of sums, what others have held discounted

    def _preempted(self, worker: Worker[T]) -> None:
        """The worker's handler waits for its turn to hold the loop."""
        if not worker.occupied:
            self._occupy(worker, worker.run, worker.item)

    async def _handle(self, run: Run[Any, T], item: T) -> None:
        if self._ticket is None:
            result = await self._handler(item)
        else:
            result = await self._handle_with_ticket(self._ticket, run.flow, item)
        if self._on_result is not None:
            self._on_result(item, result)

    async def _handle_with_ticket(self, ticket: TicketStage, flow: Hashable, item: T) -> Any:
        async with ticket.ticket(flow):
            return await self._handler(item)

    def _key_of(self, run: Run[Any, T], item: T) -> Hashable:
        key = run.flow if self._order_key is None else self._order_key(item)
        if self._overlap == 1:
            return key
        places = self._places(key)
        return next((place for place in places if place not in self._in_hand), places[0])

    def _places(self, key: Hashable) -> Sequence[Hashable]:
        """Under which keys a key can be in hand; those in hand share what is parked."""
        return (key,) if self._overlap == 1 else [(key, number) for number in range(self._overlap)]

    def _share_parked(self, worker: Worker[T], key: Hashable) -> None:
        """Let whichever handler of a key ends first go on with what is parked behind all of them."""
        others = (self._in_hand.get(place) for place in self._places(key))
        other = next(filter(None, others), None)
        worker.parked, worker.held = (deque(), []) if other is None else (other.parked, other.held)

    def _park(self, run: Run[Any, T]) -> bool:
        """Put the next item of a run behind its key if that is in hand."""
        worker = self._in_hand.get(self._key_of(run, run.items[-1]))
        if worker is None:
            return False
        worker.parked.append(run.single(run.items.pop()))
        if len(worker.parked) >= MAX_PARKED:
            self._queue.hold(run.flow)
            worker.held.append(run.flow)
        return True

    def _occupy(self, worker: Worker[T], run: Run[Any, T], item: T) -> None:
        """Leave the worker to its handler, which waits, and to what will be parked behind it; another one leads."""
        self._book(worker, worker.served() - 1)
        worker.key = self._key_of(run, item)
        if self._overlap > 1:
            self._share_parked(worker, worker.key[0])
        self._in_hand[worker.key] = worker
        worker.occupied = True
        self._occupied += 1
        self._hand_over()

    async def _serve_parked(self, worker: Worker[T]) -> None:
        """Serve what waits behind the key in hand and let go of the key, unless the worker's scope is spent first."""
        while worker.parked:
            if worker.scope.cancel_called:
                return
            run = worker.parked.popleft()
            item = run.items.pop()
            worker.item = item
            if worker.lane is not None:
                self._begin(worker, run)
            await self._finish(worker, run, self._handle(run, item), None, 0.0)
            if not worker.scope.cancel_called:  # else it would be taken for the end of a handler that has ended
                await trio.lowlevel.checkpoint()
        del self._in_hand[worker.key]
        for flow in worker.held:
            self._queue.resume(flow)
        if self._source is not None and (worker.held or self._occupied == self._max_workers):
            self._source.wake()
        worker.held.clear()
        worker.occupied = False
        self._occupied -= 1

    async def _finish(
        self, worker: Worker[T], run: Run[Any, T], coroutine: Handling, trap: object, spent: float
    ) -> None:
        """Bring a handler to its end; ``run`` is its item alone."""
        worker.run, worker.spent = run, spent
        if self._max_handling != inf:
            worker.scope.deadline = trio.current_time() + self._max_handling
        try:
            await resume(worker, coroutine, trap)
        except Exception as error:
            self._fail(worker.item, error)
        else:
            self._handled += 1
        worker.scope.deadline = inf
        self._settle(worker)

    def _book(self, worker: Worker[T], served: int) -> None:
        """Settle what the worker has served of its run without waiting."""
        if served:
            seconds = worker.begun - worker.since
            if worker.lane is not None and self._cost is None:
                worker.lane.discount(seconds)
            self._handled += served
            worker.run.settle(served, seconds if self._cost is None else worker.cost)
            worker.taken -= served
            worker.cost = 0.0

    def _settle(self, worker: Worker[T]) -> None:
        spent = worker.spent if worker.lane is None else self._leave_lane(worker)
        worker.run.settle(1, spent if self._cost is None else self._cost(worker.item))

    def _settle_cancelled(self, worker: Worker[T]) -> None:
        """Book a handler that was cancelled alone."""
        lane = worker.lane
        handler = self._inner if lane is None or lane.handler is None else lane.handler
        self._settle(worker)
        if worker.cancelled:
            self._cancelled += 1
            return
        self._overdue += 1
        error: Exception
        if lane is not None and lane.exceeded:
            error = BudgetExceeded(name_of(handler), self._budget)
        else:
            error = trio.TooSlowError(f"the handler took longer than max_handling={self._max_handling:g} s")
        self._fail(worker.item, error)

    def _fail(self, item: T, error: Exception) -> None:
        """The one place where a handler's error is caught, for the owner who asked for it."""
        self._failed += 1
        if self._on_error is None:
            raise error
        self._on_error(item, error)
