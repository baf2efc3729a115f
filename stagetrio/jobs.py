"""What the code of a job may say and ask while it runs, in a thread as in a process.

A job is an ordinary synchronous function that some worker calls. It need not know where it runs: these functions find
the worker by the thread they are called in, and outside every worker they do nothing, so that the same function can
be called directly, in a test or a script.
"""

from __future__ import annotations

import contextlib
import math
import threading
from typing import Protocol

import attrs


def _check_seconds(instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"seconds must be 0 or more and finite, not {value!r}")


@attrs.frozen
class Again:
    """What a job returns that wants to be called again: same function, same arguments, ``seconds`` later.

    Until then it holds no worker. Its key, if it has one, stays with it, so that nothing of the same key comes between.

    Args:
        seconds: counted on Trio's clock from the moment at which the caller learns of it, ≥ 0 and finite.
    """

    seconds: float = attrs.field(validator=_check_seconds)


class JobInterrupted(BaseException):
    """Raised inside a job in a thread whose caller allowed it (``interrupt=True``) and has been cancelled.

    It is no ``Exception``, so that ``except Exception`` in the job does not keep it running.
    """


class Worker(Protocol):
    """What stands behind a running job."""

    def report(self, value: object) -> None:
        """See `report`."""

    def check_cancelled(self) -> None:
        """See `check_cancelled`."""

    def give_way(self) -> None:
        """See `give_way`."""

    def pause(self) -> None:
        """Enter `blocking`."""

    def resume(self) -> None:
        """Leave `blocking`."""


class _Here(threading.local):
    worker: Worker | None = None


_here = _Here()


def bind(worker: Worker | None) -> None:
    """Say which worker runs the jobs of this thread; for the authors of workers."""
    _here.worker = worker


def report(value: object) -> None:
    """Send a progress value to whoever iterates over this job; nothing happens where nobody does.

    Values come out in order, and none is lost: where the caller is slow, this waits for it.

    Args:
        value: from a process, it must be picklable.

    Raises:
        trio.Cancelled: Like `check_cancelled`, while it waits.
    """
    worker = _here.worker
    if worker is not None:
        worker.report(value)


def check_cancelled() -> None:
    """Raise if the caller does not want this job any more; the job should let the exception out.

    In a thread this is ``trio.from_thread.check_cancelled``; in a process nothing happens, since its jobs are killed.

    Raises:
        trio.Cancelled: The caller was cancelled, or the job's lease has expired.
    """
    worker = _here.worker
    if worker is not None:
        worker.check_cancelled()


def give_way() -> None:
    """Let another job of this pool run first, where the pool limits how many run at once and one waits.

    A computation of seconds should call it every few milliseconds. Returns when it is this job's turn again.
    """
    worker = _here.worker
    if worker is not None:
        worker.give_way()


class _Blocking:
    # no generator: one that is interrupted before its block begins is finished by the garbage collector, in any thread
    __slots__ = ("_worker",)

    def __init__(self, worker: Worker | None) -> None:
        self._worker = worker

    def __enter__(self) -> None:
        if self._worker is not None:
            self._worker.pause()

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.resume()


def blocking() -> contextlib.AbstractContextManager[None]:
    """A block in which this job waits for something and needs no processor, so that another job may run meanwhile.

    Only a pool that limits how many of its jobs run at once (``max_running``) makes use of it.
    """
    return _Blocking(_here.worker)
