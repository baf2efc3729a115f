"""Which worker processes there are, and which call gets one.

Theory of operation. A call waits in the backlog (fair among flows, one at a time per key) until a worker is idle, and
is then *given* it: from there on the caller's own task talks to the worker (``process_link.py``), and gives it back, or
kills it. Each worker has a task in the pool's nursery (`ProcessDispatch._live`) that starts it, waits for its end,
however that comes, and cleans up after it.

A worker is started when a call waits and there is room for one, or to keep the pool warm; it is idle, and may be given
away, only when it has said that it is ready. One that could not get ready counts as a failure: the next try waits,
longer each time, and from the third failure in a row on, calls that wait are told.

A worker is retired (let go, and replaced where needed) after ``max_calls``, at ``max_age``, when it has grown past
``max_memory_bytes``, and when it has been idle for long; never in the middle of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Any

import attrs
import trio

from stagetrio.backlog import Backlog
from stagetrio.backoff import backoff
from stagetrio.calls import Call, OpenCalls, Wakeup
from stagetrio.fair_queue import FairQueue, FairQueueStatistics
from stagetrio.process_link import OnProgress, ProcessLink, start_worker
from stagetrio.process_worker import RETIRE
from stagetrio.remote_wire import WorkerLost

TRIES = 3  # starts that may fail in a row before those who wait are told
FAREWELL_SECONDS = 5.0  # given to a retired worker to end


@attrs.frozen
class ProcessPoolStatistics:
    """What a pool of processes holds now, and what it has done.

    Args:
        processes: Worker processes that are ready.
        starting: Those that are not yet.
        idle: Those that have nothing to do.
        waiting: Calls that wait for their turn.
        parked: Calls whose turn has come, but not that of their key.
        ended: Calls that were answered by a worker.
        failed: Those of them that raised.
        cancelled: Calls whose caller was cancelled before they had begun: they never ran.
        killed: Workers killed since their caller was cancelled.
        lost: Workers that ended in the middle of a call.
        retired: Workers let go.
        failed_starts: Workers that did not get ready.
        queue: The statistics of the queue in front.
    """

    processes: int
    starting: int
    idle: int
    waiting: int
    parked: int
    ended: int
    failed: int
    cancelled: int
    killed: int
    lost: int
    retired: int
    failed_starts: int
    queue: FairQueueStatistics


@attrs.frozen
class Limits:
    """When there is a worker, and for how long.

    Args:
        max_processes: at once.
        warm: kept though idle.
        max_calls: after which a worker is retired.
        max_age: seconds, likewise.
        max_idle: seconds without a call, likewise.
        start_within: seconds to get ready.
    """

    max_processes: int
    warm: int
    max_calls: float
    max_age: float
    max_idle: float
    start_within: float


class ProcessCall(Call):
    """A call of a function in a worker process."""

    __slots__ = ("frame", "given", "link")

    def __init__(self, fn: Callable[..., Any], frame: bytes, flow: Hashable, key: Hashable, cost: float) -> None:
        super().__init__(fn, (), flow, key, cost)
        self.frame = frame
        self.link: ProcessLink | None = None  # given, and not taken up yet
        self.given = Wakeup()  # by a link, or by why there will be none


class ProcessDispatch:
    """Gives calls to the processes of one pool.

    Args:
        limits: see `Limits`.
        queue: where calls wait.
        setup: what each worker is told first.
    """

    nursery: trio.Nursery  # set by the owner before anything is started

    def __init__(self, limits: Limits, queue: FairQueue[Hashable, ProcessCall], setup: dict[str, Any]) -> None:
        self._limits = limits
        self._setup = setup
        self._backlog: Backlog[ProcessCall] = Backlog(queue)
        self.calls = OpenCalls("this pool of processes")
        self._links: dict[ProcessLink, None] = {}  # ready and not retired
        self._idle: list[ProcessLink] = []  # the last to have worked is the first to work again
        self._starting = 0
        self._wanted = 0  # accepted calls without a worker
        self._failures = 0  # starts that failed in a row
        self._ended = self._failed = self._cancelled = 0
        self._killed = self._lost = self._retired = self._failed_starts = 0

    # Calls in: by the caller's task.

    @trio.lowlevel.enable_ki_protection
    def submit(self, call: ProcessCall) -> None:
        """Accept a call, which `made` then waits for.

        Raises:
            Overloaded: Too many wait.
            trio.ClosedResourceError: The pool takes nothing more.
            TypeError, ValueError: Its flow, key, cost or weight makes no sense.
        """
        self.calls.check_open()
        self._backlog.check(call)
        self._backlog.add(call)
        self._wanted += 1
        self.calls.add(call)
        self.pump()

    async def made(self, call: ProcessCall, on_progress: OnProgress | None = None) -> tuple[int, bytes]:
        """Wait for a worker, have it make the call, and return the kind and payload of the answer.

        Raises:
            WorkerLost: The worker ended in the middle, or none can be started.
            trio.ClosedResourceError: The pool was closed before the call had a worker.
        """
        try:
            while call.link is None and call.lost is None:
                await call.given.wait()
        except BaseException:
            self._drop(call)
            raise
        if call.lost is not None:
            raise call.lost
        link, call.link = call.link, None
        assert link is not None
        started = perf_counter()
        try:
            kind, payload = await link.exchange(call.frame, on_progress)
        except BaseException as error:
            self._lost += isinstance(error, WorkerLost)
            self._killed += not isinstance(error, WorkerLost)
            self._forget(link)
            await link.end()
            self._backlog.settle(call, perf_counter() - started)
            self.release_key(call)
            raise
        self._ended += 1
        self._backlog.settle(call, perf_counter() - started)
        if kind & RETIRE:
            self._retire(link)
        else:
            self._rest(link)
        return kind & ~RETIRE, payload

    def note_failure(self) -> None:
        """Count a call that raised."""
        self._failed += 1

    def release_key(self, call: ProcessCall) -> None:
        """Let the next call of this key have its turn."""
        self._backlog.release_key(call)
        self.pump()

    async def sleep(self, call: ProcessCall, seconds: float) -> None:
        """Wait until a call that asked for it shall be made again, and accept it again; its key stays in hand."""
        try:
            await self.calls.sleep(call, seconds)
            call.handed = False
            await self._backlog.add_again(call)
        except BaseException:
            self.release_key(call)
            raise
        self._wanted += 1
        self.pump()

    @trio.lowlevel.enable_ki_protection
    def _drop(self, call: ProcessCall) -> None:
        """Nobody wants this call any more, and it has not begun."""
        self._cancelled += 1
        call.dropped = True
        if call.handed:
            self._backlog.settle(call, 0)
            self._backlog.release_key(call)
            link, call.link = call.link, None
            if link is not None and link in self._links:
                self._idle.append(link)
        else:
            self._wanted -= 1
        self.pump()

    # Calls and workers together.

    def pump(self) -> None:
        """Give idle workers to calls that wait, and see that there are workers for the rest."""
        while self._idle:
            call = self._backlog.take()
            if call is None:
                break
            link = self._idle.pop()
            self._wanted -= 1
            call.handed = True
            call.link = link
            call.given.wake()
        there = len(self._links) + self._starting
        most = self._limits.max_processes
        if self._failures:
            most = min(most, there + 1) if not self._starting else there  # one try at a time
        needed = max(self._wanted - self._starting, self._limits.warm - there)
        if not self.calls.closed:
            for _ in range(min(needed, most - there)):
                self._starting += 1
                self.nursery.start_soon(self._live)

    async def _live(self) -> None:
        """The life of one worker, from its start to its end."""
        link = None
        try:
            try:
                await self._back_off()
                link = await start_worker(self._setup, self._limits.start_within)
            finally:
                self._starting -= 1
            self._failures = 0
            self._links[link] = None
            self._rest(link)
            with link.scope:
                await link.process.wait()
        except WorkerLost as error:
            self._failed_start(error)
        except OSError as error:
            self._failed_start(WorkerLost(f"no worker process can be started: {error}", may_have_run=False))
        finally:
            if link is not None:
                await link.end()
                self._forget(link)
        self.pump()

    async def _back_off(self) -> None:
        if self._failures:
            await trio.sleep(backoff(self._failures))

    def _failed_start(self, error: WorkerLost) -> None:
        self._failed_starts += 1
        self._failures += 1
        if self._failures >= TRIES:
            self._tell_waiting(error)

    def close(self) -> None:
        """Take nothing more, and tell everyone who waits for a worker."""
        self.calls.close()
        self._tell_waiting(trio.ClosedResourceError("the pool was closed before the call's turn had come"))

    def _tell_waiting(self, error: Exception) -> None:
        """Raise an error in every call that has no worker."""
        while (call := self._backlog.take()) is not None:
            self._wanted -= 1
            call.handed = True
            call.lost = error
            self._backlog.settle(call, 0)
            self._backlog.release_key(call)
            call.given.wake()

    # Workers.

    def _rest(self, link: ProcessLink) -> None:
        """Make a worker idle, unless it has served its time."""
        limits = self._limits
        if link.calls >= limits.max_calls or trio.current_time() - link.born > limits.max_age:
            self._retire(link)
            return
        if link in self._links:
            link.idle_since = trio.current_time()
            self._idle.append(link)
        self.pump()

    def _retire(self, link: ProcessLink) -> None:
        self._retired += 1
        self._forget(link)
        link.retire(FAREWELL_SECONDS)
        self.pump()

    def _forget(self, link: ProcessLink) -> None:
        self._links.pop(link, None)
        if link in self._idle:
            self._idle.remove(link)

    async def retire_idle(self) -> None:
        """Let workers go that have been idle, or alive, for long; until cancelled."""
        limits = self._limits
        while True:
            await trio.sleep(min(limits.max_idle, limits.max_age) / 4)
            now = trio.current_time()
            for link in tuple(self._idle):
                idle = now - link.idle_since >= limits.max_idle and len(self._links) > limits.warm
                if idle or now - link.born >= limits.max_age:
                    self._retire(link)

    def statistics(self) -> ProcessPoolStatistics:
        """What the pool holds and has done."""
        return ProcessPoolStatistics(
            processes=len(self._links),
            starting=self._starting,
            idle=len(self._idle),
            waiting=self._backlog.queued,
            parked=self._backlog.parked,
            ended=self._ended,
            failed=self._failed,
            cancelled=self._cancelled,
            killed=self._killed,
            lost=self._lost,
            retired=self._retired,
            failed_starts=self._failed_starts,
            queue=self._backlog.statistics(),
        )
