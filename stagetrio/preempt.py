"""Stacks on which handlers can be stopped in mid-work, and the rule that says where.

Theory of operation
===================

A coroutine can be suspended only where it awaits. A *stack* here is a greenlet on which a coroutine is driven, and a
greenlet can be suspended anywhere: a signal handler that runs on it switches away, others run, and when it is switched
back to, the signal handler returns and the interrupted code goes on. Everything the coroutine yields to Trio crosses
to the task that drives the stack, which yields it in turn, so awaits, cancel scopes and nurseries work as always.

**The rule (default deny).** Code is written in the belief that nothing happens between two awaits. A switch lands
only where the author of the handler said that this is not believed: every frame from the interrupted one up to the
handler's own must belong to the handler's module or to a module declared preemptible; none of them may be entering or
leaving a context (``__enter__`` and the like: what it acquired is not yet anybody's to release), finalizing, or
comparing and hashing (a container is in the middle of an operation then); and the stack must not be masked by
`no_preempt`. A deny list instead (all but known-dangerous modules) was tried and fails: frames cannot show a lock held
by somebody's ``with self._lock``, and a third module's counter of that shape deadlocked the loop.

The frames below the handler's own need no check: the handler is a coroutine, so each of them is at an ``await`` (or
drives coroutines, as a worker does), and prepared for what may happen there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable
from types import CodeType, FrameType, ModuleType, TracebackType
from typing import Any

import greenlet
from trio.lowlevel import disable_ki_protection, enable_ki_protection

FORCED: Any = object()  # what a stack hands to its driver instead of a trap when it was stopped
FINISHED: Any = object()  # likewise, when its coroutine has returned or raised

CONTEXT_NAMES = {"__enter__", "__exit__", "__aenter__", "__aexit__", "__del__"}
CONTAINER_NAMES = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}
DENIED_NAMES = CONTEXT_NAMES | CONTAINER_NAMES


@disable_ki_protection
def _send_unprotected(coroutine: Coroutine[Any, Any, Any], answer: Any) -> Any:
    return coroutine.send(answer)


@enable_ki_protection
def _send_protected(coroutine: Coroutine[Any, Any, Any], answer: Any) -> Any:
    return coroutine.send(answer)


class Thrown:
    """An answer that is to be raised in the coroutine, as Trio does for traps it does not recognise."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Stack(greenlet.greenlet):  # type: ignore[misc]
    """A stack on which one coroutine after the other is driven.

    The driver sets ``back`` (its own greenlet) and ``protected``, then ``switch(coroutine)``, and from then on
    ``switch(answer)`` for each trap, until it gets `FINISHED` and takes ``value`` or ``error``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.back: Any = None
        self.protected = False  # whether Trio may not raise KeyboardInterrupt in what runs here
        self.masked = 0  # depth of no_preempt()
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Drive coroutines until the greenlet is killed. Trio's frame walk for Ctrl-C ends at this frame."""
        while True:
            self._finish(coroutine)
            coroutine = self.back.switch(FINISHED)

    def _finish(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        send = _send_protected if self.protected else _send_unprotected
        answer: Any = None
        try:
            while True:
                trap = coroutine.throw(answer.error) if type(answer) is Thrown else send(coroutine, answer)
                answer = self.back.switch(trap)
        except StopIteration as stop:
            self.value = stop.value
        except greenlet.GreenletExit:
            raise
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        """Hand the loop to the driver; return when it switches back, or raise what it says.

        Called on this stack, by a signal handler or at any other point at which the coroutine may be stopped.
        """
        answer = self.back.switch(FORCED)
        if answer is not None:
            raise answer.with_traceback(None)


class no_preempt:
    """Hold off forced checkpoints for the length of a ``with`` block::

        with no_preempt():
            self.balance -= amount
            other.balance += amount

    Outside of a handler under ``watchdog.run`` it does nothing. A block that awaits is suspended there as usual; only
    checkpoints that are forced wait until the block has been left.

    Cost: 0.3 µs.
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
        if self._stack is not None:
            self._stack.masked -= 1


def handler_function(handler: Any) -> Any:
    """Return the function whose frame is the handler's own: what is behind partials, methods and decorators."""
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif inspect.ismethod(handler):
            handler = handler.__func__
        elif not inspect.isfunction(handler) and not hasattr(handler, "__wrapped__"):
            call = getattr(type(handler), "__call__", None)  # noqa: B004
            if not inspect.isfunction(call):
                return handler
            handler = call
        else:
            return inspect.unwrap(handler)


def module_names(preemptible: Iterable[ModuleType | str]) -> tuple[str, ...]:
    """Return the names of the modules and packages that handlers may be stopped in besides their own.

    Raises:
        TypeError: One of them is neither a module nor a name, or a bare string was passed for the tuple.
    """
    if isinstance(preemptible, str):
        raise TypeError(f"preemptible must be a tuple of modules or names, not the string {preemptible!r}")
    names = []
    for module in preemptible:
        if not isinstance(module, ModuleType | str):
            raise TypeError(f"preemptible must hold modules or their names, not {module!r}")
        names.append(module if isinstance(module, str) else module.__name__)
    return tuple(names)


def own_code(handler: Callable[..., Any], coroutine: Any = None) -> tuple[CodeType | None, Any]:
    """Return the code and the globals of the handler's own frame; None where it cannot be told.

    A plain function that returns a coroutine has no frame while that runs; then the coroutine says it, if there is one.
    """
    function = handler_function(handler)
    code = getattr(function, "__code__", None)
    if code is not None and code.co_flags & inspect.CO_COROUTINE:
        return code, function.__globals__
    frame = getattr(coroutine, "cr_frame", None)
    return (None, None) if frame is None else (frame.f_code, frame.f_globals)


def may_stop(
    frame: FrameType | None, code: CodeType | None, module: Any, preemptible: tuple[str, ...]
) -> bool:
    """Whether a handler interrupted at ``frame`` may be stopped there, by the rule above.

    The handler's own frame is the outermost with ``code``: a handler that a library calls back recursively is still
    inside of that library.
    """
    allowed = True
    verdict = False
    while frame is not None:
        if frame.f_code.co_name in DENIED_NAMES or not (
            frame.f_globals is module or _declared(frame, preemptible)
        ):
            allowed = False
        if frame.f_code is code:
            verdict = allowed
        frame = frame.f_back
    return verdict


def _declared(frame: FrameType, preemptible: tuple[str, ...]) -> bool:
    name = frame.f_globals.get("__name__", "")
    return any(name == declared or name.startswith(declared + ".") for declared in preemptible)
