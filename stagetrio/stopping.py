"""Where code may be stopped in mid-work, and where a cancellation may be raised in it. Pure: frames in, verdict out.

Theory of operation
===================

**The rule (default deny).** Code is written in the belief that nothing happens between two awaits. A switch lands
only where the author of the handler said that this is not believed: every frame from the interrupted one up to the
handler's own must belong to the handler's module or to a module declared preemptible, and none of them may be entering
or leaving a context (``__enter__`` and the like: what it acquired is not yet anybody's to release), finalizing, or
comparing and hashing (a container is in the middle of an operation then). A deny list instead (all but known-dangerous
modules) was tried and fails: frames cannot show a lock held by somebody's ``with self._lock``, and a third module's
counter of that shape deadlocked the loop. The frames below the handler's own need no check: the handler is a
coroutine, so each of them is at an ``await`` (or drives coroutines, as a worker does) and prepared for that.

**Interrupted C code.** The interpreter looks for signals where a function starts (RESUME), where a loop goes round
(JUMP_BACKWARD) and after a call to C (CALL). At the first two the frame has no C code under way. At a call it may: C
code that waits, or works long, looks for signals by itself. It is prepared for a signal handler that comes and goes,
but a buffered file keeps its lock meanwhile, and refuses whoever writes to it while the first writer is suspended. So
what is being called is looked up; a file, and what cannot be identified, is not left.

**Callbacks.** C code may call Python in the middle of something: a list is empty while it is being sorted. Then the
calling frame is at a call whose callee is not the Python function that runs above it. That is harmless where the callee
is a function of the interpreter's own modules (``sum``, ``map``, ``sorted``: what they build is nobody else's yet) or a
method of an immutable object (``str.join``, ``re.Pattern.sub``, ``Context.run``). A method of anything else
(``list.sort``), another module's C function, and what cannot be identified, is not left. Nor is a trace or profile
function: the interpreter calls it between two instructions of somebody else's, with tracing switched off.

**Identifying a callee.** The interrupted instruction has a source position; the expression that stands there is
parsed, and its names are looked up in the frame, statically: nothing is executed. Without the source, nothing is
identified.

**Cleanup.** A cancellation raised in the middle of a ``finally`` would cut it short. The compiler emits a ``finally``
twice, for the way of an exception, which the exception table shows, and for the normal way, which nothing shows; but
both copies carry the same source positions. An instruction whose position occurs in an exception handler is cleanup.

Source: CPython's ``Python/bytecodes.c`` (CHECK_EVAL_BREAKER) and ``InternalDocs/exception_handling.md``.
"""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import inspect
import io
import linecache
import re
import sys
import types
from collections.abc import Iterable, Iterator
from contextvars import Context
from types import CodeType, FrameType, ModuleType
from typing import Any

CONTEXT_NAMES = {"__enter__", "__exit__", "__aenter__", "__aexit__", "__del__"}
CONTAINER_NAMES = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}
DENIED_NAMES = CONTEXT_NAMES | CONTAINER_NAMES

SEAMS = {"RESUME", "JUMP_BACKWARD"} | {f"POP_JUMP_BACKWARD_IF_{x}" for x in ("TRUE", "FALSE", "NONE", "NOT_NONE")}
OPERATORS = {
    "BINARY_OP",
    "COMPARE_OP",
    "BEFORE_WITH",
}  # long arithmetic, and waiting for a lock, look for signals
CALLS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "PRECALL"}

FILES = (io.RawIOBase, io.BufferedIOBase, io.TextIOBase)
FILE_NAMES = {name for kind in FILES for name in dir(kind) if not name.startswith("_")} | {
    "print",
    "input",
    "open",
}
IMMUTABLE = (str, bytes, int, float, complex, tuple, frozenset, range, re.Pattern, re.Match, Context)
OWN_MODULES = {"builtins", "itertools", "functools", "_functools", "_operator", "math", "time"}
PYTHON = (types.FunctionType, types.MethodType, type, functools.partial, type(functools.lru_cache(len)))

UNKNOWN: Any = object()


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


def _own_function(handler: Any) -> Any:
    """What is behind partials, methods, objects that can be called, and decorators."""
    while True:
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif inspect.ismethod(handler):
            handler = handler.__func__
        elif inspect.isfunction(handler) or hasattr(handler, "__wrapped__"):
            return inspect.unwrap(handler)
        elif inspect.isfunction(call := getattr(type(handler), "__call__", None)):  # noqa: B004
            handler = call
        else:
            return handler


def own_code(handler: Any, coroutine: Any = None) -> CodeType | None:
    """Return the code of the handler's own frame; None where it cannot be told.

    A plain function that returns a coroutine has no frame while that runs; then the coroutine tells, if there is one.
    """
    function = _own_function(handler)
    code: CodeType | None = getattr(function, "__code__", None)
    if code is not None and code.co_flags & inspect.CO_COROUTINE:
        return code
    return getattr(coroutine, "cr_code", None)


def frames_up_to(frame: FrameType | None, code: CodeType | None) -> list[FrameType]:
    """Return the frames from the interrupted one to the handler's own; none where that is not on the stack.

    The handler's own is the outermost with its code: a handler that a library calls back recursively is still inside
    of that library.
    """
    frames: list[FrameType] = []
    end = 0
    while frame is not None:
        frames.append(frame)
        if frame.f_code is code:
            end = len(frames)
        frame = frame.f_back
    return frames[:end]


def judge(frames: list[FrameType], preemptible: tuple[str, ...]) -> tuple[str, FrameType | None]:
    """Judge whether a handler may be stopped.

    Args:
        frames: From the interrupted one to the handler's own.
        preemptible: Names of modules and packages that are allowed besides the handler's own.

    Returns:
        The name of what it must not be stopped in, empty where it may be stopped at a seam; and the frame in which it
        may be stopped next, the interrupted one if there is nothing against it, None if there is none.
    """
    if not frames:
        return "code that is not the handler's", None
    module = frames[-1].f_globals
    tracers = {_code_of(sys.gettrace()), _code_of(sys.getprofile())}
    caller: FrameType | None = None
    for frame in reversed(frames):
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name in DENIED_NAMES or not (
            frame.f_globals is module or any(name == one or name.startswith(one + ".") for one in preemptible)
        ):
            return f"{name}.{frame.f_code.co_qualname}", caller
        if caller is not None and (frame.f_code in tracers or frame.f_code is _code_of(caller.f_trace)):
            return f"the trace function {frame.f_code.co_qualname}", caller
        if caller is not None and not _calls_directly(caller, frame.f_code):
            return f"C code between {caller.f_code.co_qualname} and {frame.f_code.co_qualname}", caller
        caller = frame
    return "", caller


def _code_of(tracer: Any) -> CodeType | None:
    return None if tracer is None else getattr(getattr(tracer, "__func__", tracer), "__code__", None)


# C code.


def _operation(frame: FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] if frame.f_lasti >= 0 else "RESUME"


def is_at_a_seam(frame: FrameType) -> bool:
    """Whether an interrupted frame has no C code under way, or only such as may be left."""
    operation = _operation(frame)
    if operation not in CALLS:
        return operation in SEAMS or operation in OPERATORS
    name, target, owner = _callee(frame)
    if target is UNKNOWN:
        return name is not None and name not in FILE_NAMES
    return not isinstance(owner, FILES) and target not in (print, input, open)


def _calls_directly(caller: FrameType, callee: CodeType) -> bool:
    """Whether no C code that could be harmed lies between two frames."""
    if _operation(caller) not in CALLS:
        # An operator, an attribute, an iterator, an await: nothing is under way but this one step. Or, up to 3.12, a
        # call of a Python function without C in between: that is the only one found behind its instruction, at CACHE.
        return True
    name, target, owner = _callee(caller)
    if target is UNKNOWN:
        return name == callee.co_name
    if isinstance(target, PYTHON) or inspect.isfunction(getattr(type(target), "__call__", None)):  # noqa: B004
        return True
    if owner is None or isinstance(owner, ModuleType):
        return getattr(target, "__module__", None) in OWN_MODULES
    return isinstance(owner, IMMUTABLE)


@functools.lru_cache(maxsize=4096)
def _expression(code: CodeType, lasti: int) -> ast.expr | None:
    """The expression that is being evaluated at an instruction, from the source; None where that is not to be had."""
    line, last, start, end = _positions(code)[lasti // 2]
    if line is None or last is None or start is None or end is None:
        return None
    lines = [linecache.getline(code.co_filename, number).encode() for number in range(line, last + 1)]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    try:
        return ast.parse(b"(" + b"".join(lines) + b"\n)", mode="eval").body
    except SyntaxError:
        return None


def _callee(frame: FrameType) -> tuple[str | None, Any, Any]:
    """The name of what a frame is calling, the object (or `UNKNOWN`), and what it is an attribute of (or None)."""
    expression = _expression(frame.f_code, frame.f_lasti)
    if isinstance(expression, ast.Call):
        expression = expression.func
    name = getattr(expression, "attr", None) or getattr(expression, "id", None)
    if isinstance(expression, ast.Attribute):
        owner = _value(expression.value, frame)
        target = UNKNOWN if owner is UNKNOWN else _attribute(owner, expression.attr)
        return name, target, owner
    target = UNKNOWN if expression is None else _value(expression, frame)
    owner = getattr(target, "__self__", None)  # `write = file.write`
    return name, target, target if isinstance(target, FILES) else owner


def _value(expression: ast.expr, frame: FrameType) -> Any:
    match expression:
        case ast.Constant(value):
            return value
        case ast.JoinedStr():
            return ""
        case ast.Name(name):
            for names in (frame.f_locals, frame.f_globals, vars(builtins)):
                if name in names:
                    return names[name]
            return UNKNOWN
        case ast.Attribute(base, attribute):
            owner = _value(base, frame)
            return UNKNOWN if owner is UNKNOWN else _attribute(owner, attribute)
    return UNKNOWN


def _attribute(owner: Any, name: str) -> Any:
    value = inspect.getattr_static(owner, name, UNKNOWN)
    if isinstance(value, types.MemberDescriptorType):
        return value.__get__(owner)  # a slot: C code without consequences
    if isinstance(value, property):
        return UNKNOWN
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


# Cleanup.


@functools.lru_cache(maxsize=1024)
def _positions(code: CodeType) -> list[tuple[int | None, int | None, int | None, int | None]]:
    return list(code.co_positions())


def _exception_table(code: CodeType) -> Iterator[tuple[int, int, int, int]]:
    """The entries ``(start, end, target, depth of the stack)``; the first three in bytes of code."""
    data = iter(code.co_exceptiontable)

    def number(first: int) -> int:
        value = first & 63
        while first & 64:
            first = next(data)
            value = value << 6 | first & 63
        return value

    for first in data:
        start = number(first) * 2
        length, target = number(next(data)) * 2, number(next(data)) * 2
        yield start, start + length, target, number(next(data)) >> 1


@functools.lru_cache(maxsize=1024)
def _cleanup_positions(code: CodeType) -> frozenset[tuple[int | None, int | None, int | None, int | None]]:
    entries = list(_exception_table(code))
    positions = _positions(code)
    found = set()
    for handler in {target for _, _, target, _ in entries}:
        # A handler's body is itself protected, so that the state can be restored, by an entry that begins with it.
        # What follows after the state is restored is covered only by entries of lesser depth, or by none.
        for start, end, restore, depth in entries:
            if start <= handler + 2 < end and dis.opname[code.co_code[handler]] == "PUSH_EXC_INFO":
                for inner, inner_end, _, inner_depth in entries:
                    if handler <= inner < restore and inner_depth >= depth:
                        found.update(positions[inner // 2 : inner_end // 2])
    return frozenset(position for position in found if position[0] is not None)


def in_cleanup(frames: list[FrameType]) -> bool:
    """Whether one of the frames is in an ``except`` or a ``finally`` block, whatever way it got there."""
    return any(
        frame.f_lasti >= 0 and _positions(frame.f_code)[frame.f_lasti // 2] in _cleanup_positions(frame.f_code)
        for frame in frames
    )
