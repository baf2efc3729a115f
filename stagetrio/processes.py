"""A pool of worker processes for jobs that compute: fair between producers, killed when cancelled, never left behind.

::

    async with open_process_pool(4) as pool:
        board = await pool.call(solve, puzzle)                     # any importable function, anything that pickles
        image = await pool.call(render, scene, flow=user, key=scene.id)
        primes = await pool.call_batch(is_prime, candidates)       # in as many processes as are free
        async with pool.run(train, model) as progress:             # what train() passes to jobs.report()
            async for loss in progress:
                plot(loss)

Workers are started by ``exec``, not forked: they share nothing with this process, and import the module of the function
they are given. As with `multiprocessing`, a function of the program's own main module is found only where that can be
imported without doing its work (``if __name__ == "__main__":``). Needs POSIX.

Who gets a worker and when is decided in ``process_dispatch.py``, how one is talked to in ``process_link.py``, and its
inside stands in ``process_worker.py``.
"""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

from stagetrio.amounts import check_above_zero, check_amount, check_count
from stagetrio.backstage import open_backstage
from stagetrio.calls import MAX_PROGRESS, Wakeup
from stagetrio.fair_queue import FairQueue
from stagetrio.intake import check_bound
from stagetrio.jobs import Again
from stagetrio.process_dispatch import Limits, ProcessCall, ProcessDispatch, ProcessPoolStatistics
from stagetrio.process_link import unread, unwrap_error
from stagetrio.process_worker import BATCH, CALL, UNREAD, VALUE, frame, preparation
from stagetrio.progress import Progress
from stagetrio.remote_wire import WorkerLost
from stagetrio.stall import name_of

__all__ = ["ProcessPool", "ProcessPoolStatistics", "open_process_pool"]

R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CHUNK = 256  # items of a batch in one frame, at most


class ProcessPool:
    """Worker processes with a fair queue in front; made by `open_process_pool`."""

    def __init__(self, dispatch: ProcessDispatch, max_processes: int) -> None:
        self._dispatch = dispatch
        self._max_processes = max_processes

    @trio.lowlevel.enable_ki_protection
    async def call(
        self, fn: Callable[[*Ts], R], *args: *Ts, flow: Hashable = None, key: Hashable = None, cost: float = 1.0
    ) -> R:
        """Call ``fn(*args)`` in a worker process, and return what it returns.

        A function that returns `stagetrio.jobs.Again` is called again when its time has come; its key stays in hand.

        Args:
            fn: a synchronous function that can be imported by its name; it and ``args`` must pickle.
            flow: who is asking; flows that have calls waiting share the workers by the time their calls take.
            key: of calls with an equal key one runs at a time, in the order of their turns; None: no such bound.
            cost: what the call will take beside others of its flow, > 0; what it did take is booked afterwards.

        Raises:
            Overloaded: Too many calls wait already, in all (``"queue"``) or of this flow (``"flow"``).
            WorkerLost: The worker ended in the middle of this call, or none can be started; ``may_have_run`` tells.
            RemoteError: The function raised something that cannot be brought here; otherwise that itself is raised,
                with the traceback of the worker as a note.
            TypeError: ``fn`` or an argument does not pickle, or is not found in the worker, as what is defined in a
                notebook's cell or at a prompt; nothing has run.
            trio.ClosedResourceError: The pool is closed, or was while the call waited.

        Checkpoints: Always. Cancelled before a worker has begun the call, it never runs. Cancelled later, the worker is
            killed, and is gone when this returns: the call has run in part or as a whole.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        dispatch = self._dispatch
        call = ProcessCall(fn, _framed(CALL, fn, args), flow, key, cost)
        dispatch.submit(call)
        try:
            while True:
                value = self._value(call, *await dispatch.made(call))
                if type(value) is not Again:
                    dispatch.release_key(call)
                    return value  # type: ignore[no-any-return]
                await dispatch.sleep(call, value.seconds)
        finally:
            dispatch.calls.forget(call)

    def _value(self, call: ProcessCall, kind: int, payload: bytes) -> Any:
        if kind == VALUE:
            try:
                return pickle.loads(payload)
            except BaseException:
                self._dispatch.release_key(call)
                raise
        self._dispatch.note_failure()
        self._dispatch.release_key(call)
        if kind == UNREAD:
            raise unread(name_of(call.fn), payload)
        raise unwrap_error(payload)

    async def call_batch(
        self, fn: Callable[[T], R], items: Iterable[T], *, flow: Hashable = None, cost: float = 1.0
    ) -> list[R]:
        """Call ``fn(item)`` for each item, in as many processes as the pool may have, and return the results in order.

        Items travel together, some milliseconds' worth at a time.

        Raises:
            Overloaded, WorkerLost, RemoteError, TypeError, trio.ClosedResourceError: As for `call`.
            Exception: What ``fn`` raised first; then the other workers of this batch are killed.

        Checkpoints: Always; cancelled, items that have not begun never will, and the workers of others are killed.
        """
        batch: _Batch[R] = _Batch(list(items))
        if not batch.results:
            await trio.lowlevel.checkpoint()
            return []
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                nonlocal failure
                try:
                    while chunk := batch.take():
                        batch.put(chunk, await self._call_chunk(fn, batch.items_of(chunk), flow, cost))
                except Exception as error:
                    failure = failure or error
                    nursery.cancel_scope.cancel("the batch has failed")

            for _ in range(min(self._max_processes, len(batch.results))):
                nursery.start_soon(work)
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None
        return batch.results

    async def _call_chunk(self, fn: Callable[[T], R], items: list[T], flow: Hashable, cost: float) -> list[R]:
        dispatch = self._dispatch
        call = ProcessCall(fn, _framed(BATCH, fn, items), flow, None, cost)
        dispatch.submit(call)
        try:
            results: list[R] = self._value(call, *await dispatch.made(call))
            return results
        finally:
            dispatch.calls.forget(call)

    def run(
        self, fn: Callable[[*Ts], R], *args: *Ts, flow: Hashable = None, key: Hashable = None, cost: float = 1.0
    ) -> Progress[R]:
        """Call ``fn(*args)`` in a worker process while the caller follows its progress, in an ``async with`` block.

        The block's value is iterated over for what the job passes to `stagetrio.jobs.report`, and has the job's result
        (`Progress.result`). Leaving the block early kills the worker. At most 16 values wait for the caller, and what
        a socket holds; a job that is further ahead waits. Arguments and errors are those of `call`.
        """
        dispatch = self._dispatch
        call = ProcessCall(fn, _framed(CALL, fn, args), flow, key, cost)
        call.progress = deque()
        room, scope, gone = Wakeup(), trio.CancelScope(), trio.Event()
        call.took_progress = room.wake

        async def take(payload: bytes) -> None:
            assert call.progress is not None
            while len(call.progress) >= MAX_PROGRESS:
                await room.wait()
            call.progress.append(pickle.loads(payload))
            call.wakeup.wake()

        async def follow() -> None:
            try:
                with scope:
                    call.error = WorkerLost("the pool was closed", may_have_run=True)  # or it gets further
                    answer = await dispatch.made(call, take)
                    call.error = None
                    call.value = self._value(call, *answer)
                    dispatch.release_key(call)
            except Exception as error:
                call.error = error
            finally:
                dispatch.calls.forget(call)
                gone.set()
                call.answer()

        def start() -> None:
            dispatch.submit(call)
            dispatch.nursery.start_soon(follow)

        async def leave() -> None:
            scope.cancel("the progress is not followed any more")
            with trio.CancelScope(shield=True):  # killing a process does not take long
                await gone.wait()

        return Progress(call, start, leave)

    def statistics(self) -> ProcessPoolStatistics:
        """What the pool holds and has done."""
        return self._dispatch.statistics()


def _framed(kind: int, fn: Callable[..., Any], what: object) -> bytes:
    try:
        return frame(kind, (fn, what))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"{name_of(fn)} and its arguments must be picklable: {error}") from error


class _Batch(Generic[R]):
    """Items on their way to several workers, and their results."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self._spans = deque([(0, len(items))] if items else [])  # (from, to) of what is still to be done
        self._chunk = 1
        self.results: list[Any] = [None] * len(items)

    def take(self) -> tuple[int, int] | None:
        """The next span of items; None: there is none now."""
        if not self._spans:
            return None
        start, stop = self._spans.popleft()
        end = min(stop, start + self._chunk)
        if end < stop:
            self._spans.appendleft((end, stop))
        return start, end

    def items_of(self, span: tuple[int, int]) -> list[Any]:
        """The items of a span."""
        return self._items[span[0] : span[1]]

    def put(self, span: tuple[int, int], results: list[R]) -> None:
        """Keep the results of a span, and what there is none of for later."""
        start, stop = span
        done = start + len(results)
        self.results[start:done] = results
        if done < stop:
            self._spans.append((done, stop))
        self._chunk = max(1, min(CHUNK, 2 * len(results)))


@asynccontextmanager
async def open_process_pool(
    max_processes: int,
    *,
    warm: int = 0,
    preload: Sequence[str] = (),
    max_waiting: float = 1000,
    max_waiting_per_flow: float = math.inf,
    weight: Callable[[Hashable], float] | None = None,
    max_calls: float = math.inf,
    max_age: float = math.inf,
    max_memory_bytes: float = math.inf,
    max_idle: float = 60.0,
    start_within: float = 30.0,
) -> AsyncIterator[ProcessPool]:
    """Open a `ProcessPool`. Workers are started when they are needed, and replaced when they are gone.

    Leaving the block lets all accepted calls come to their end; leaving it by an exception or a cancellation kills the
    workers. If this process dies, however it does, its idle workers end, and busy ones after two seconds.

    Args:
        max_processes: Workers at once, ≥ 1.
        warm: Workers that are started at once, and kept though they are idle, 0 to ``max_processes``.
        preload: Modules a worker imports before it counts as ready.
        max_waiting: Calls that may wait for a worker; further ones are refused.
        max_waiting_per_flow: Those of one flow.
        weight: A flow's share relative to the others', > 0; None: all alike.
        max_calls: Calls after which a worker is replaced, ≥ 1.
        max_age: Seconds after which an idle worker is replaced, > 0.
        max_memory_bytes: Of RAM, beyond which a worker is replaced when its call has ended; on Linux.
        max_idle: Seconds without a call after which a worker is let go, > 0.
        start_within: Seconds in which a worker must be ready, > 0.

    Checkpoints: when the block is left.
    Cost: 40 ms and 10 MB per worker, and what the modules of its functions take.
    """
    check_count("max_processes", max_processes, 1)
    if check_count("warm", warm, 0) > max_processes:
        raise ValueError(f"warm must be between 0 and max_processes, not {warm!r}")
    if isinstance(preload, str):
        raise TypeError(f"preload must be a sequence of names, not the string {preload!r}")
    check_amount("max_calls", max_calls, 1)
    times = {
        "max_age": max_age,
        "max_memory_bytes": max_memory_bytes,
        "max_idle": max_idle,
        "start_within": start_within,
    }
    for name, value in times.items():
        check_above_zero(name, value)
    queue: FairQueue[Hashable, ProcessCall] = FairQueue(
        check_bound("max_waiting", max_waiting),
        max_items_per_flow=check_bound("max_waiting_per_flow", max_waiting_per_flow),
        weight=weight,
    )
    setup = {"main": preparation(), "preload": list(preload), "max_memory_bytes": max_memory_bytes}
    limits = Limits(max_processes, warm, max_calls, max_age, max_idle, start_within)
    dispatch = ProcessDispatch(limits, queue, setup)
    async with open_backstage() as dispatch.nursery:
        if min(max_idle, max_age) < math.inf:
            dispatch.nursery.start_soon(dispatch.retire_idle)
        dispatch.pump()
        try:
            yield ProcessPool(dispatch, max_processes)
            await dispatch.calls.drain()
        finally:
            dispatch.close()
