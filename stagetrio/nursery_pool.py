"""A bounded pool of tasks, each in a cancel scope and a nursery of its own.

A server starts one task per connection. In one shared nursery, nobody can end a single connection, nothing bounds
their number, and one that raises takes all others with it. A pool gives each task what it needs to end alone::

    async with open_nursery_pool(1000, on_error=report) as pool:
        await trio.serve_listeners(handle, listeners, handler_nursery=cast("trio.Nursery", pool))

The states of a task, and who moves it:

- *waiting*: started by `NurseryPool.start_soon` while every slot is taken; it stands in the slots' queue.
- *running*: it holds a slot, from before its function is called until its nursery has closed.
- *gone*: its scope is closed, its slot is with the next in the queue.

`NurseryPool.spawn` waits for the slot first, so its tasks are never *waiting*. A function handed to ``start_soon`` is
always called, because it may own something (``serve_listeners`` hands it an open stream and relies on it to close
it): when its task is cancelled before it has a slot, it is called in the cancelled scope, without a slot, and gets as
far as its first checkpoint. That is the one way in which more than ``max_tasks`` functions can be on the stack.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import TypeVarTuple

import attrs
import trio

from stagetrio.amounts import check_amount
from stagetrio.limiter import Overloaded

Ts = TypeVarTuple("Ts")
OnError = Callable[[Exception, Hashable | None], object]


@attrs.frozen
class NurseryPoolStatistics:
    """What a pool holds now, and what it has seen since it was opened.

    Args:
        max_tasks: Slots, or ``math.inf``.
        running: Tasks that hold a slot.
        waiting: Tasks that wait for a slot: callers of ``spawn`` and tasks begun by ``start_soon``.
        finished: Tasks that ended, however they did.
        failed: Those of them that ended by an exception of their own.
        cancelled: Those of them that were ended by ``cancel`` or ``drain``.
        refused: Calls of ``spawn_nowait`` that raised `Overloaded`.
        closed: Whether new work is turned away.
    """

    max_tasks: float
    running: int
    waiting: int
    finished: int
    failed: int
    cancelled: int
    refused: int
    closed: bool


def _check_key(instance: object, attribute: attrs.Attribute[Hashable], key: Hashable) -> None:
    try:
        hash(key)
    except TypeError:
        raise TypeError(f"key must be hashable, not {key!r}") from None


@attrs.define(eq=False)
class _Task:
    """One task of the pool; also what the slots' limiter knows it by."""

    key: Hashable | None = attrs.field(validator=_check_key)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    nursery: trio.Nursery | None = None


class NurseryPool:
    """Tasks in scopes of their own, at most ``max_tasks`` at once; made by `open_nursery_pool`."""

    _nursery: trio.Nursery  # set by open_nursery_pool, before anyone has the pool

    def __init__(self, max_tasks: float, on_error: OnError | None) -> None:
        self._slots = trio.CapacityLimiter(max_tasks)
        self._on_error = on_error
        self._tasks: dict[_Task, None] = {}  # in the order in which they came
        self._by_key: dict[Hashable, dict[_Task, None]] = {}
        self._emptied = trio.Event()
        self._closed = False
        self._finished = self._failed = self._cancelled = self._refused = 0

    @trio.lowlevel.enable_ki_protection
    async def spawn(self, fn: Callable[[*Ts], Awaitable[object]], *args: *Ts, key: Hashable | None = None) -> None:
        """Wait for a slot, then start ``fn(*args)`` in a scope and a nursery of its own.

        Callers are served first come, first served. The call returns once the task is started, not when it ends; one
        with a key has begun by then, so that `nursery_of` has its nursery, unless it has ended already.

        Args:
            fn: an async function.
            key: what `cancel` and `nursery_of` know the task by; several tasks may share one; None: by nothing.

        Raises:
            TypeError: The key is not hashable.
            trio.ClosedResourceError: The pool drains or is closed, or began to while this call waited.

        Checkpoints: always; cancelled, it started nothing.
        """
        self._check_open()
        _check_function(fn)
        task = _Task(key)
        await self._slots.acquire_on_behalf_of(task)
        if self._closed:
            self._slots.release_on_behalf_of(task)
            self._check_open()
        self._start(task, fn, args, holds_slot=True)
        while key is not None and task.nursery is None:  # two passes at most: a new task is in the next one, as we are
            await trio.lowlevel.cancel_shielded_checkpoint()

    @trio.lowlevel.enable_ki_protection
    def spawn_nowait(self, fn: Callable[[*Ts], Awaitable[object]], *args: *Ts, key: Hashable | None = None) -> None:
        """Start ``fn(*args)`` like `spawn` if a slot is free.

        Raises:
            Overloaded: Every slot is taken, or waited for; its reason is ``"tasks"``.
            TypeError: The key is not hashable.
            trio.ClosedResourceError: The pool drains or is closed.
        """
        self._check_open()
        _check_function(fn)
        task = _Task(key)
        try:
            self._slots.acquire_on_behalf_of_nowait(task)
        except trio.WouldBlock:
            self._refused += 1
            raise Overloaded("tasks") from None
        self._start(task, fn, args, holds_slot=True)

    @trio.lowlevel.enable_ki_protection
    def start_soon(self, fn: Callable[[*Ts], Awaitable[object]], *args: *Ts, name: object = None) -> None:
        """Start a task that waits for its slot before it calls ``fn(*args)``, as a nursery's ``start_soon`` would.

        This is the seam for ``trio.serve_listeners(handler_nursery=pool)``. It never refuses, so the number of
        waiting tasks is the caller's to bound: prefer `spawn` where the caller can wait. ``fn`` is always called; in
        a pool that drains, or when the task is cancelled first, it is called in a cancelled scope, to clean up what
        it was handed.

        Args:
            fn: an async function.
            name: the task's name, as for ``trio.Nursery.start_soon``.
        """
        _check_function(fn)
        task = _Task(None)
        if self._closed:
            task.scope.cancel("the pool drains")
        self._start(task, fn, args, holds_slot=False, name=name)

    def cancel(self, key: Hashable, reason: str) -> int:
        """Cancel the tasks of ``key``, running or waiting; their scopes absorb the cancellation.

        Args:
            key: as given to `spawn`; None is nobody's key.
            reason: appears in the ``trio.Cancelled`` they get.

        Returns:
            How many there were.
        """
        if key is None:
            raise ValueError("key must not be None: tasks without a key cannot be told apart")
        tasks = tuple(self._by_key.get(key, ()))
        for task in tasks:
            task.scope.cancel(reason)
        return len(tasks)

    def nursery_of(self, key: Hashable) -> trio.Nursery:
        """The nursery of the oldest running task of ``key``: what is started there ends with that task.

        Raises:
            KeyError: No task of that key has begun; one from `spawn_nowait` begins in the next pass of Trio's loop.
        """
        for task in self._by_key.get(key, ()):
            if task.nursery is not None:
                return task.nursery
        raise KeyError(key)

    async def drain(self, grace: float) -> int:
        """Turn new work away, give what is there ``grace`` seconds to end, then cancel the rest and await its end.

        Tasks begun by `start_soon` that still wait are served within the grace. A task of the pool that drains its own
        pool waits for itself, and is cancelled when the grace is over.

        Args:
            grace: seconds, ≥ 0; ``math.inf`` never cancels.

        Returns:
            How many tasks were cancelled.

        Checkpoints: always; cancelled, the pool stays closed to new work, its tasks go on; drain may be called again.
        """
        check_amount("grace", grace)
        self._closed = True
        with trio.move_on_after(grace):
            await self._wait_empty()
        late = tuple(self._tasks)
        for task in late:
            task.scope.cancel("the grace is over")
        await self._wait_empty()
        return len(late)

    def statistics(self) -> NurseryPoolStatistics:
        """What the pool holds and has seen."""
        slots = self._slots.statistics()
        return NurseryPoolStatistics(
            max_tasks=slots.total_tokens,
            running=slots.borrowed_tokens,
            waiting=slots.tasks_waiting,
            finished=self._finished,
            failed=self._failed,
            cancelled=self._cancelled,
            refused=self._refused,
            closed=self._closed,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the pool drains or is closed")

    def _start(
        self,
        task: _Task,
        fn: Callable[..., Awaitable[object]],
        args: tuple[object, ...],
        *,
        holds_slot: bool,
        name: object = None,
    ) -> None:
        self._nursery.start_soon(self._run, task, fn, args, holds_slot, name=name or fn)
        self._tasks[task] = None
        if task.key is not None:
            self._by_key.setdefault(task.key, {})[task] = None

    async def _run(
        self, task: _Task, fn: Callable[..., Awaitable[object]], args: tuple[object, ...], holds_slot: bool
    ) -> None:
        try:
            with task.scope:
                try:
                    if not holds_slot:
                        await self._slots.acquire_on_behalf_of(task)
                        holds_slot = True
                finally:
                    # also when the wait was cancelled: see the top of this file
                    await self._call(task, fn, args)
        finally:
            if holds_slot:
                self._slots.release_on_behalf_of(task)
            self._forget(task)

    async def _call(self, task: _Task, fn: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            async with trio.open_nursery() as task.nursery:
                await fn(*args)
        except* Exception as group:
            self._failed += 1
            if self._on_error is None:
                raise
            # the nursery's wrapping says nothing where there is one error in it
            only = len(group.exceptions) == 1
            self._on_error(group.exceptions[0] if only else group, task.key)

    def _forget(self, task: _Task) -> None:
        del self._tasks[task]
        if task.key is not None:
            same = self._by_key[task.key]
            del same[task]
            if not same:
                del self._by_key[task.key]
        self._finished += 1
        self._cancelled += task.scope.cancelled_caught
        if not self._tasks:
            self._emptied.set()
            self._emptied = trio.Event()

    async def _wait_empty(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._tasks:
            await self._emptied.wait()


def _check_function(fn: object) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be an async function, not {fn!r}; its arguments come after it")


@asynccontextmanager
async def open_nursery_pool(max_tasks: float, *, on_error: OnError | None = None) -> AsyncIterator[NurseryPool]:
    """Open a `NurseryPool`; leaving the block waits for its tasks, as leaving a nursery does.

    Args:
        max_tasks: slots, an int ≥ 1 or ``math.inf``.
        on_error: called as ``on_error(error, key)`` with the exception that ended one task (an ``ExceptionGroup`` where
            its nursery collected several); the others go on. What it raises propagates. Without it, an exception of
            a task cancels the pool and leaves the block in an exception group. Cancellations and exceptions beyond
            ``Exception`` (``KeyboardInterrupt``) never come here and always propagate.

    Checkpoints: like a nursery, when the block is left.
    Cost: about 25 µs and a few kilobytes per task: a cancel scope, a nursery, a Trio task.
    Source: Erlang's ranch (``ranch_conns_sup``): a supervisor per listener that bounds and owns its connections.
    """
    if max_tasks != math.inf and not isinstance(max_tasks, int):
        raise TypeError(f"max_tasks must be an int or math.inf, not {max_tasks!r}")
    if max_tasks < 1:
        raise ValueError(f"max_tasks must be 1 or more, not {max_tasks!r}")
    if on_error is not None and not callable(on_error):
        raise TypeError(f"on_error must be callable or None, not {on_error!r}")
    pool = NurseryPool(max_tasks, on_error)
    try:
        async with trio.open_nursery() as pool._nursery:
            yield pool
    finally:
        pool._closed = True
