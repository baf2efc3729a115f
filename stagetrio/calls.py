"""One call of a job as its caller sees it: it waits, it gives up, it gets a value or an error.

The caller waits in its own task, so there is at most one waiter per call and no future, queue or event per call: a
`Wakeup` is the waiting task and one bit, so that a wake-up that comes before the wait is not lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

MAX_PROGRESS = 16  # progress values on their way to the caller; a job that is further ahead waits


class Wakeup:
    """Something one task waits for, again and again; whoever wakes it does so in Trio's thread."""

    __slots__ = ("_come", "_task")

    def __init__(self) -> None:
        self._task: Task | None = None
        self._come = False

    def wake(self) -> None:
        """Wake the task that waits, or let the next wait return at once."""
        task = self._task
        if task is None:
            self._come = True
        else:
            self._task = None
            reschedule(task)

    async def wait(self) -> None:
        """Wait until woken.

        Checkpoints: Always. A cancelled wait has consumed nothing.
        """
        if self._come:
            await trio.lowlevel.checkpoint()
            self._come = False
            return
        self._task = current_task()

        def leave(_: RaiseCancelT) -> Abort:
            self._task = None
            return Abort.SUCCEEDED

        await wait_task_rescheduled(leave)


class Call:
    """A function to be called elsewhere, its place in the order of service, and what came of it.

    Args:
        fn: what to call.
        args: with what.
        flow: whose call it is.
        key: calls of one key never overlap; None: overlaps with anything.
        cost: what it is expected to cost beside the flow's other calls, > 0.
    """

    __slots__ = (
        "answered",
        "args",
        "asleep",
        "cost",
        "delivery",
        "dropped",
        "error",
        "flow",
        "fn",
        "handed",
        "holds_key",
        "key",
        "lost",
        "progress",
        "took_progress",
        "value",
        "wakeup",
    )

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], flow: Hashable, key: Hashable, cost: float
    ) -> None:
        self.fn = fn
        self.args = args
        self.flow = flow
        self.key = key
        self.cost = cost
        self.delivery: Any = None  # its place in the fair queue, to be settled
        self.holds_key = False
        self.handed = False  # taken from the backlog, for a worker
        self.dropped = False  # nobody wants it any more
        self.answered = False  # what came of it is known
        self.asleep = False  # ended, and waits to be called again
        self.value: Any = None
        self.error: BaseException | None = None
        self.lost: Exception | None = None  # why it is answered though its worker goes on
        self.wakeup = Wakeup()
        self.progress: deque[Any] | None = None  # None: nobody listens
        self.took_progress: Callable[[], object] = _nothing  # called when the caller has taken a progress value

    async def wait(self) -> None:
        """Wait until it is answered.

        Checkpoints: Always; a cancelled wait changes nothing.
        """
        wakeup = self.wakeup
        await wakeup.wait()
        while not self.answered:
            await wakeup.wait()

    def answer(self) -> None:
        """Tell the caller that ``value``, ``error`` or ``lost`` is there."""
        self.answered = True
        self.wakeup.wake()

    def unwrap(self) -> Any:
        """The value; raises what the function raised, or why its answer is not awaited."""
        if self.lost is not None:
            raise self.lost
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # or the traceback would keep this call, and it the traceback
        return self.value


def _nothing() -> None:
    pass


class OpenCalls:
    """The calls of one pool that somebody waits for, from their acceptance to the caller's leaving.

    Args:
        what: what is closed at the end, for messages: "this pool of threads".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._calls: dict[Call, None] = {}
        self._emptied = Wakeup()
        self.draining = False  # no new ones
        self.closed = False  # no more at all

    def __bool__(self) -> bool:
        return bool(self._calls)

    def check_open(self) -> None:
        """Raise `trio.ClosedResourceError` where no new ones are taken."""
        if self.draining:
            raise trio.ClosedResourceError(f"{self._what} is closed")

    def add(self, call: Call) -> None:
        """Somebody waits for this call."""
        self._calls[call] = None

    def forget(self, call: Call) -> None:
        """Nobody does any more."""
        self._calls.pop(call, None)
        if self.draining and not self._calls:
            self._emptied.wake()

    async def sleep(self, call: Call, seconds: float) -> None:
        """Wait until a call that asked for it shall be made again.

        Raises:
            trio.ClosedResourceError: The pool takes nothing more.

        Checkpoints: Always.
        """
        if not self.draining:
            call.asleep = True
            with trio.move_on_after(seconds):
                await call.wakeup.wait()
            call.asleep = False
        self.check_open()

    async def drain(self) -> None:
        """Take no new ones, and wait until nobody waits for any; those asleep are not made again.

        Checkpoints: If there are any.
        """
        self.draining = True
        self._wake_sleepers()
        while self._calls:
            await self._emptied.wait()

    def close(self) -> list[Call]:
        """Take nothing at all, and return those that are still without an answer."""
        self.draining = self.closed = True
        self._wake_sleepers()
        return [call for call in self._calls if not call.answered and not call.asleep]

    def _wake_sleepers(self) -> None:
        for call in self._calls:
            if call.asleep:
                call.wakeup.wake()
