"""An exception raised in another thread, at a place from which it gets somewhere; and one taken back.

Theory of operation. The interpreter raises what is pending for a thread at that thread's next look, wherever that is:
at a jump back, at the start of a function, after a call. Not everywhere does an exception get on from there. A garbage
collection may begin in any line, and what runs then (``__del__``, the callback of a weak reference, a generator that
is closed, ``gc.callbacks``) has nobody to raise to: the exception is printed and dropped, and the job goes on as if
nothing had been said. So who raises looks first: it holds the GIL, hence the other thread stands still, almost always
at the very place where it would be raised. It is held back there, and while the thread handles the last one, since a
second one would break off the cleaning up after the first.

What is held back is to be tried again, and so is what was raised: a thread that was waiting in C code, without the GIL,
may come to a finalizer before it comes to look, and no list of places is complete (a callback of a weak reference has
any name). Trying again never hurts where the first one has arrived, as long as the job, and it alone, is in reach: that
is for the caller to know (``thread_worker.py``).
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from types import FrameType

_WEAK_REFERENCES = {weakref.finalize.__call__.__code__.co_filename, weakref.WeakSet.add.__code__.co_filename}


def interrupt(ident: int, kind: type[BaseException], own_file: str) -> None:
    """Have an exception raised in a thread, unless it would be lost or do harm there now.

    Args:
        ident: of the thread.
        kind: what is raised, and by nobody else.
        own_file: of code that is not to be broken off: it is held back where that is on top of the stack.
    """
    if not _is_occupied(_active(ident), kind) and not _is_out_of_place(sys._current_frames().get(ident), own_file):
        _raise_in(ident, kind)


def _is_out_of_place(frame: FrameType | None, own_file: str) -> bool:
    if frame is None or frame.f_code.co_filename == own_file:
        return True
    told = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename in _WEAK_REFERENCES or code in told:
            return True
        frame = frame.f_back
    return False


def _active(ident: int) -> BaseException | None:
    """The exception that a thread handles: in an ``except`` or ``finally`` block, or an ``__exit__``."""
    active: object = sys._current_exceptions().get(ident)
    if isinstance(active, tuple):  # before Python 3.12
        active = active[1]
    return active if isinstance(active, BaseException) else None


def _is_occupied(active: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether that is, or was raised while handling, an interruption or the closing of a generator."""
    seen: set[int] = set()
    while active is not None and id(active) not in seen:
        if isinstance(active, (kind, GeneratorExit)):
            return True
        seen.add(id(active))
        active = active.__context__
    return False


def _raise_in(ident: int, kind: type[BaseException]) -> None:
    """Have it raised in a thread at its next look, in the place of one that was not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind))


def take_back(ident: int, kind: type[BaseException]) -> None:
    """Leave no exception pending in the calling thread, whose id is given.

    The interpreter's own way, to set none, leaves up to 3.12 the mark that one is pending on all threads for good:
    every loop and every call looks for it from then on, and on 3.11 a function that is traced never gets beyond that.
    So the one that may be pending is replaced by one that certainly is, and that is caught here; or, where a finalizer
    has come between, by one more.
    """
    while True:
        try:
            _raise_in(ident, kind)
            for _ in range(3):
                _look()
        except kind:
            return


def _look() -> None:
    """Return; where a function starts the interpreter looks for exceptions to be raised."""
