"""Stacks on which coroutines can be suspended in mid-work.

Theory of operation
===================

A coroutine can be suspended only where it awaits. A *stack* here is a greenlet on which a coroutine is driven, and a
greenlet can be suspended anywhere: a signal handler that runs on it switches away, others run, and when it is switched
back to, the signal handler returns and the interrupted code goes on. Everything the coroutine yields to Trio crosses
to the task that drives the stack, which yields it in turn, so awaits, cancel scopes and nurseries work as always.

Stacks are reused: a greenlet costs ten times a switch. One that is idle waits, in the middle of `Stack._work`, for its
next coroutine, and awaits it: so the end of a coroutine, unlike with ``send``, is not an exception.

**Where a stack begins.** Greenlets share the C stack of their thread. One begins where it is first switched to, and at
every switch what its driver has beyond that place on the C stack is copied to the heap and back: a driver that is
called from deeper than the first one pays twice as much. So a stack begins some way further down than its first driver.

**Ctrl-C.** Trio raises `KeyboardInterrupt` at once where no frame is protected, and finds out by walking the frames
from the interrupted one to the task's own. On a stack the walk ends at the stack's first frame and never meets the
task, and would take everything for protected. So the frame that runs the coroutine is marked: as unprotected, or, in a
task that is protected, another one as protected.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from inspect import isawaitable
from types import FrameType, TracebackType
from typing import Any, NoReturn

import greenlet
from trio.lowlevel import disable_ki_protection, enable_ki_protection

FORCED: Any = object()  # what a stack hands to its driver instead of a trap when it was stopped
FINISHED: Any = object()  # likewise, when its coroutine has returned or raised

DEPTH = 300  # C functions of some 100 bytes between a stack's first driver and its beginning: 40 awaits on 3.11


class Thrown:
    """An answer that is to be raised in the coroutine, as Trio does for traps it does not recognise."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


@enable_ki_protection
async def _protected(coroutine: Awaitable[Any]) -> Any:
    return await coroutine


class Stack(greenlet.greenlet):  # type: ignore[misc]
    """A stack on which one coroutine after the other is driven. ``owner`` is whoever drives it.

    The driver sets ``back`` (its own greenlet) and ``protected``, then ``switch(coroutine)``, and from then on
    ``switch(answer)`` for each trap, until it gets `FINISHED`; then there is an ``error``, or else a ``value``.
    """

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner
        self.back: Any = None
        self.protected = False  # whether Trio may not raise KeyboardInterrupt in what runs here
        self.masked = 0  # depth of no_preempt()
        self.on_unmasked: Callable[[FrameType], object] | None = None  # called once, with the frame that leaves it
        self.value: Any = None
        self.error: BaseException | None = None

    def begin(self) -> None:
        """Make it ready for its first coroutine; it has to be discarded from then on."""
        self.back = greenlet.getcurrent()
        begun: Iterator[object] = map(self.switch, (None,))
        for _ in range(DEPTH):
            begun = filter(None, begun)
        next(begun)

    def run(self, answer: Any) -> None:
        """Drive one coroutine after the other until the greenlet is discarded."""
        while True:
            worker = self._work()
            try:
                while True:
                    trap = worker.throw(answer.error) if type(answer) is Thrown else worker.send(answer)
                    answer = self.back.switch(trap)
            except BaseException as error:
                if self.back is None:
                    raise
                self.error = error  # Ctrl-C, where no handler was to get it
            answer = None

    @disable_ki_protection
    async def _work(self) -> None:
        while True:
            try:
                coroutine = self.back.switch(FINISHED)
                self.value = await (_protected(coroutine) if self.protected else coroutine)
            except BaseException as error:
                if self.back is None:
                    raise
                self.error = error
                if type(error) is TypeError and not isawaitable(coroutine):
                    self.error = TypeError(f"fn must be an async function, not one that returns {coroutine!r}")

    def stop(self) -> None:
        """Hand the loop to the driver; return when it switches back, or raise what it answers.

        Called on this stack, by a signal handler or wherever else the coroutine may be suspended.
        """
        answer = self.back.switch(FORCED)
        if answer is not None:
            raise answer.with_traceback(None)

    def result(self) -> Any:
        """Return what the coroutine returned, or raise what it raised."""
        if self.error is not None:
            self._fail()
        value, self.value = self.value, None
        return value

    def _fail(self) -> NoReturn:
        error, self.error, self.value = self.error, None, None
        assert error is not None
        context = error.__context__
        try:
            raise error
        finally:
            if context is not None:
                error.__context__ = context  # and not what the caller happens to be handling
            del error, context  # its traceback refers to this frame

    def discard(self) -> None:
        """Free the stack; what still runs on it, which should be nothing, is unwound. Called on another one."""
        self.back = None
        self.parent = greenlet.getcurrent()  # where a greenlet that ends goes
        self.throw()


class no_preempt:
    """Hold off forced checkpoints for the length of a ``with`` block::

        with no_preempt():
            self.balance -= amount
            other.balance += amount

    Outside of a handler under ``watchdog.run`` it does nothing. A block that awaits is suspended there as usual; only
    checkpoints that are forced wait until the block has been left. One that became due meanwhile is had at the end of
    the block, where it may raise `trio.Cancelled`.

    Cost: 0.5 µs.
    """

    __slots__ = ("_stack",)

    def __enter__(self) -> None:
        current = greenlet.getcurrent()
        self._stack: Stack | None = current if type(current) is Stack else None
        if self._stack is not None:
            self._stack.masked += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stack = self._stack
        if stack is not None:
            stack.masked -= 1
            if stack.on_unmasked is not None and not stack.masked and kind is None:
                on_unmasked, stack.on_unmasked = stack.on_unmasked, None
                on_unmasked(sys._getframe(1))
