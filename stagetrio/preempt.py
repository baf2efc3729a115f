"""Stacks on which coroutines can be suspended in mid-work.

Theory of operation
===================

A coroutine can be suspended only where it awaits. A *stack* here is a greenlet on which a coroutine is driven, and a
greenlet can be suspended anywhere: a signal handler that runs on it switches away, others run, and when it is switched
back to, the signal handler returns and the interrupted code goes on. Everything the coroutine yields to Trio crosses
to the task that drives the stack, which yields it in turn, so awaits, cancel scopes and nurseries work as always.

Stacks are reused: a greenlet costs ten times a switch. One that is idle waits in `Stack.run` for its next coroutine.

**Ctrl-C.** Trio raises `KeyboardInterrupt` at once where no frame is protected, and finds out by walking the frames
from the interrupted one to the task's own. On a stack the walk ends at the stack's first frame and never meets the
task, and would take everything for protected. So the frame that sends into the coroutine is marked: as unprotected, or,
in a task that is protected, as protected.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from types import FrameType, TracebackType
from typing import Any, NoReturn

import greenlet
from trio.lowlevel import disable_ki_protection, enable_ki_protection

FORCED: Any = object()  # what a stack hands to its driver instead of a trap when it was stopped
FINISHED: Any = object()  # likewise, when its coroutine has returned or raised


class Thrown:
    """An answer that is to be raised in the coroutine, as Trio does for traps it does not recognise."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


@disable_ki_protection
def _send_unprotected(coroutine: Coroutine[Any, Any, Any], answer: Any) -> Any:
    return coroutine.send(answer)


@enable_ki_protection
def _send_protected(coroutine: Coroutine[Any, Any, Any], answer: Any) -> Any:
    return coroutine.send(answer)


class Stack(greenlet.greenlet):  # type: ignore[misc]
    """A stack on which one coroutine after the other is driven. ``owner`` is whoever drives it.

    The driver sets ``back`` (its own greenlet) and ``protected``, then ``switch(coroutine)``, and from then on
    ``switch(answer)`` for each trap, until it gets `FINISHED`; then there is an ``error``, or else a ``value``.
    """

    def __init__(self, owner: object) -> None:
        super().__init__()
        self.owner = owner
        self.back: Any = None
        self.protected = False  # whether Trio may not raise KeyboardInterrupt in what runs here
        self.masked = 0  # depth of no_preempt()
        self.on_unmasked: Callable[[FrameType], object] | None = None  # called once, with the frame that leaves it
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Drive one coroutine after the other until the greenlet is killed."""
        while True:
            send = _send_protected if self.protected else _send_unprotected
            try:
                answer = self.back.switch(send(coroutine, None))
                while True:
                    trap = coroutine.throw(answer.error) if type(answer) is Thrown else send(coroutine, answer)
                    answer = self.back.switch(trap)
            except StopIteration as stop:
                self.value = stop.value
            except greenlet.GreenletExit:
                raise
            except BaseException as error:
                self.error = error
            coroutine = self.back.switch(FINISHED)

    def stop(self) -> None:
        """Hand the loop to the driver; return when it switches back, or raise what it answers.

        Called on this stack, by a signal handler or wherever else the coroutine may be suspended.
        """
        answer = self.back.switch(FORCED)
        if answer is not None:
            raise answer.with_traceback(None)

    def failed(self) -> NoReturn:
        """Raise what the coroutine raised."""
        error, self.error = self.error, None
        assert error is not None
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    def discard(self) -> None:
        """Free the stack, on which nothing runs any more; called on another one."""
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
