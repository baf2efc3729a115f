"""A pool of worker threads: fair between producers, in order per key, and able to lose a thread without losing itself.

``trio.to_thread.run_sync`` starts a thread per call and lets whoever comes first have it. A `ThreadPool` has a fixed
number of threads, and takes care of what goes wrong with them::

    async with open_thread_pool(4) as pool:
        text = await pool.call(path.read_text)                          # like to_thread.run_sync, but sooner back
        thumb = await pool.call(shrink, image, flow=user, key=image)     # users take turns; one at a time per image
        sizes = await pool.call_batch(os.path.getsize, paths)            # one crossing there, one back
        async with pool.run(index, folder) as progress:                  # what index() passes to jobs.report()
            async for done in progress:
                print(done)

Who gets a thread and when is decided in ``thread_dispatch.py``, what happens in the threads stands in
``thread_worker.py``, and which of them are able in ``thread_crew.py``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple

import trio

from stagetrio.amounts import check_above_zero, check_amount, check_count
from stagetrio.backstage import open_backstage
from stagetrio.calls import Wakeup
from stagetrio.fair_queue import FairQueue
from stagetrio.intake import check_bound
from stagetrio.jobs import Again
from stagetrio.progress import Progress
from stagetrio.thread_dispatch import Dispatch, ThreadPoolStatistics
from stagetrio.thread_worker import Batch, ThreadJob

__all__ = ["ThreadPool", "ThreadPoolStatistics", "open_thread_pool"]

R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ThreadPool:
    """Worker threads with a fair queue in front; made by `open_thread_pool`."""

    def __init__(self, dispatch: Dispatch, max_threads: int) -> None:
        self._dispatch = dispatch
        self._max_threads = max_threads

    @trio.lowlevel.enable_ki_protection
    async def call(
        self,
        fn: Callable[[*Ts], R],
        *args: *Ts,
        flow: Hashable = None,
        key: Hashable = None,
        cost: float = 1.0,
        interrupt: bool = False,
    ) -> R:
        """Call ``fn(*args)`` in a thread, in a copy of the caller's context, and return what it returns.

        A function that returns `stagetrio.jobs.Again` is called again when its time has come; its key stays in hand.

        Args:
            fn: a synchronous function.
            flow: who is asking; flows that have jobs waiting share the threads by the time their jobs take.
            key: of jobs with an equal key one runs at a time, in the order of their turns; None: no such bound. What
                waits for its key holds no thread.
            cost: what the job will take beside others of its flow, > 0; what it did take is booked afterwards.
            interrupt: allows the pool to raise `stagetrio.jobs.JobInterrupted` between any two lines of the job when it
                is to stop. Only for code that holds no locks, files or invariants: pure computation.

        Raises:
            Overloaded: Too many jobs wait already, in all (``"queue"``) or of this flow (``"flow"``).
            WorkerLost: The job outlived its lease.
            trio.ClosedResourceError: The pool is closed, or was while the job waited.

        Checkpoints: Always. Cancelled before a thread has begun the job, the job never runs. Cancelled later, the job
            is told to stop, and this returns when it has, after the pool's ``grace`` at the latest: then the job has
            run in part or as a whole, and may be running still.
        Cost: about 0.8 × that of ``trio.to_thread.run_sync``.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        _check_sync(fn)
        dispatch = self._dispatch
        job = ThreadJob(fn, args, flow, key, cost, interrupt)
        dispatch.submit(job)
        try:
            while True:
                await job.wait()
                value = job.unwrap()
                if type(value) is not Again:
                    return value  # type: ignore[no-any-return]
                await dispatch.sleep(job, value.seconds)
        except BaseException:
            await dispatch.stop((job,))
            raise
        finally:
            dispatch.calls.forget(job)

    @trio.lowlevel.enable_ki_protection
    async def call_batch(
        self,
        fn: Callable[[T], R],
        items: Iterable[T],
        *,
        flow: Hashable = None,
        cost: float = 1.0,
        interrupt: bool = False,
    ) -> list[R]:
        """Call ``fn(item)`` for each item, in as many threads as are free, and return the results in order.

        The items go to the threads together and come back together: what `call` spends on crossings per call is spent
        here per batch, or per few milliseconds of it, since a batch takes turns with other flows, too.

        Raises:
            Overloaded, WorkerLost, trio.ClosedResourceError: As for `call`.
            Exception: What ``fn`` raised first; items that had not begun then are left out.

        Checkpoints: Always; cancelled, items that have not begun never will, others are told to stop as by `call`.
        Cost: about a microsecond per item.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        batch: Batch[T, R] = Batch(fn, items)
        if not batch.todo:
            await trio.lowlevel.checkpoint()
            return batch.results
        dispatch = self._dispatch
        wakeup = Wakeup()
        jobs: list[ThreadJob] = []
        try:
            while len(jobs) < min(len(batch.todo), self._max_threads) and (not jobs or dispatch.crew.spare > 0):
                job = ThreadJob(batch.work, (), flow, None, cost, interrupt)
                job.wakeup = wakeup
                dispatch.submit(job)
                jobs.append(job)
            running = list(jobs)
            while running:
                await wakeup.wait()
                for job in [job for job in running if job.answered]:
                    job.unwrap()
                    if batch.todo:
                        await dispatch.submit_again(job)
                    else:
                        running.remove(job)
        except BaseException:
            batch.todo.clear()
            await dispatch.stop(jobs)
            raise
        finally:
            for job in jobs:
                dispatch.calls.forget(job)
        return batch.results

    def run(
        self,
        fn: Callable[[*Ts], R],
        *args: *Ts,
        flow: Hashable = None,
        key: Hashable = None,
        cost: float = 1.0,
        interrupt: bool = False,
    ) -> Progress[R]:
        """Call ``fn(*args)`` in a thread while the caller follows its progress, in an ``async with`` block.

        The block's value is iterated over for what the job passes to `stagetrio.jobs.report`, and has the job's result
        (`Progress.result`). Leaving the block early cancels the job. At most 16 values wait for the caller; a job
        that is further ahead waits. Arguments and errors are those of `call`; `Again` is a result like any other here.
        """
        dispatch = self._dispatch
        job = ThreadJob(fn, args, flow, key, cost, interrupt)
        job.listen()

        async def leave() -> None:
            try:
                job.leave()
                await dispatch.stop((job,))
            finally:
                dispatch.calls.forget(job)

        return Progress(job, lambda: dispatch.submit(job), leave)

    def statistics(self) -> ThreadPoolStatistics:
        """What the pool holds and has done."""
        return self._dispatch.statistics()


@asynccontextmanager
async def open_thread_pool(
    max_threads: int,
    *,
    max_waiting: float = 1000,
    max_waiting_per_flow: float = math.inf,
    weight: Callable[[Hashable], float] | None = None,
    max_running: float = math.inf,
    max_lost: float = math.inf,
    lease: float = math.inf,
    grace: float = 0.25,
) -> AsyncIterator[ThreadPool]:
    """Open a `ThreadPool`. Threads are started when they are needed.

    Leaving the block lets all accepted jobs come to their end; leaving it by an exception or a cancellation gives them
    up: threads that do not listen go on, and end with their jobs.

    Args:
        max_threads: Threads, ≥ 1.
        max_waiting: Jobs that may wait for a thread; further ones are refused.
        max_waiting_per_flow: Those of one flow.
        weight: A flow's share relative to the others', > 0; None: all alike.
        max_running: Threads that may run at once, an int ≥ 1 or ``math.inf``; the others wait for their turn. 1 or 2
            for pools whose jobs compute: under the GIL more do not get more done, but make the event loop late (with 16
            computing threads by half a second). A job that waits for something else meanwhile says so by
            `stagetrio.jobs.blocking`, one that computes for long lets others in by `stagetrio.jobs.give_way`.
        max_lost: Unable threads that are replaced, ≥ 0.
        lease: Seconds a job may keep a thread, > 0; read from Trio's clock, four times per lease. Then its caller gets
            `WorkerLost`, and the job is told to stop.
        grace: Seconds a job that is told to stop is given before its thread is counted as lost, ≥ 0.

    Checkpoints: when the block is left.
    """
    check_count("max_threads", max_threads, 1)
    for name, value, least in (("max_running", max_running, 1), ("max_lost", max_lost, 0)):
        if value != math.inf:
            check_count(name, value, least)
    check_above_zero("lease", lease)
    check_amount("grace", grace)
    queue: FairQueue[Hashable, ThreadJob] = FairQueue(
        check_bound("max_waiting", max_waiting),
        max_items_per_flow=check_bound("max_waiting_per_flow", max_waiting_per_flow),
        weight=weight,
    )
    dispatch = Dispatch(max_threads, max_lost, max_running, queue, lease, grace)
    async with open_backstage() as dispatch.crew.nursery:
        if lease < math.inf:
            dispatch.crew.nursery.start_soon(dispatch.watch_leases)
        try:
            yield ThreadPool(dispatch, max_threads)
            await dispatch.calls.drain()
        finally:
            dispatch.close()


def _check_sync(fn: object) -> None:
    if inspect.iscoroutinefunction(fn):
        raise TypeError(f"fn must be a sync function, not {fn!r}: no thread has an event loop to run it in")
