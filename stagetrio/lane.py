"""What the handlers of one event loop share when they may be stopped, and the lane on which each of them runs.

Theory of operation
===================

A handler runs on a stack of its own (`stagetrio.preempt`), driven by its task. While it holds the loop a one-shot
timer is armed for the end of its slice. The timer's signal handler runs on the handler's stack, in the middle of
whatever the handler does, and switches to the driver, which waits for a turn (`stagetrio.turns`) as an ordinary
blocked task: other tasks run; a cancellation is delivered there, raised by the signal handler, and so inside of the
handler; when its turn comes the signal handler returns, and the handler goes on as if nothing had happened.

**What is armed when.** Arming is a system call, so it is not done per handler: a timer that will ring no later than
the end of the slice is left as it is. When it rings, and the slice is not at its end, it is armed for the rest; when
nobody is active it is not armed again. The invariant: *while a handler is active, the timer is armed for its deadline
or earlier*. It holds because ``active`` and the deadline are set before the timer is looked at: a signal before that
finds nobody and disarms, and the look arms; a signal after it finds the handler, and arms.

**What is charged** is the time for which the loop was held (``perf_counter``), not processor time: ``time.sleep`` burns
nothing and delays everyone. The tags of flows are kept only while somebody has had to wait: without contention a
handler costs two readings of the clock.

**Nesting.** A handler that awaits ``watchdog.run`` has its own slice suspended while the inner handler has the loop;
the inner driver runs on the outer stack, and what it yields passes through the outer one's driver.

A system task keeps the loop turning while somebody waits for a turn; turns are given at the start of a pass, by the
instrument that counts passes.
"""

from __future__ import annotations

import math
import signal
import types
from collections.abc import Awaitable, Callable, Generator, Hashable
from time import perf_counter
from types import FrameType
from typing import Any, TypeVar

import greenlet
import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    cancel_shielded_checkpoint,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from stagetrio.preempt import FINISHED, FORCED, Stack, Thrown, may_stop, own_code
from stagetrio.turns import Turns

T = TypeVar("T")

RETRY_SHARE = (
    0.01  # of a quantum: when a switch that was put off is first tried again; then twice that, and so on
)
SLACK_SHARE = 0.05  # of a quantum: the least slice worth a switch


class Loop(trio.abc.Instrument):
    """What all lanes of one event loop share: the turns, the timer, and who holds the loop now.

    Args:
        quantum: Seconds of opted-in work per pass.
        preemptible: Names of modules in which handlers may be stopped besides their own.
        weight: Maps a flow to its weight.
    """

    def __init__(
        self, quantum: float, preemptible: tuple[str, ...], weight: Callable[[Hashable], float] | None
    ) -> None:
        self.turns: Turns[Lane] = Turns(quantum, weight)
        self.active: Lane | None = None
        self.contended = 0  # handlers in hand that have waited behind others
        self.passes = 0
        self.forced = self.put_off = self.budgets_exceeded = 0
        self.rings_at = -math.inf  # when the timer rings; inf: it is not armed; -inf: there is none to arm
        self._preemptible = preemptible
        self._turner: Task | None = None

    # Turns.

    def after_io_wait(self, timeout: float) -> None:
        """Count a pass, and let those go whose turn it is."""
        self.passes += 1
        turns = self.turns
        if turns.used or turns.waiting:
            for lane in turns.next_pass():
                assert lane.task is not None
                reschedule(lane.task)

    def keep_turning(self) -> None:
        """Do not let the loop sleep: somebody waits for a turn."""
        if self._turner is not None:
            turner, self._turner = self._turner, None
            reschedule(turner)

    async def turn(self) -> None:
        """Keep the loop turning while somebody waits for a turn; runs as a task of its own until it is cancelled."""

        def abort(_: RaiseCancelT) -> Abort:
            self._turner = None
            return Abort.SUCCEEDED

        while True:
            if self.turns.waiting:
                await cancel_shielded_checkpoint()
            else:
                self._turner = current_task()
                await wait_task_rescheduled(abort)

    # The timer.

    def arm(self, deadline: float, now: float) -> None:
        """Let the timer ring at ``deadline``."""
        # In this order: a signal between the two lines leaves `rings_at` too late, and the timer is armed once more.
        self.rings_at = deadline
        signal.setitimer(signal.ITIMER_REAL, max(deadline - now, 1e-6))

    @enable_ki_protection
    def ring(self, signum: int, frame: FrameType | None) -> None:
        """Handle the timer's signal; what this raises is raised in the handler that was interrupted."""
        self.rings_at = math.inf
        lane = self.active
        if lane is None:
            return
        now = perf_counter()
        if now < lane.deadline:
            self.arm(lane.deadline, now)
        elif self._may_stop(lane, frame):
            self.forced += 1
            lane.stack.stop()
        else:
            self.put_off += 1
            lane.put_off += 1
            quantum = self.turns.quantum
            self.arm(now + quantum * min(RETRY_SHARE * 2.0**lane.put_off, 1.0), now)

    def _may_stop(self, lane: Lane, frame: FrameType | None) -> bool:
        stack = lane.stack
        if greenlet.getcurrent() is not stack or stack.masked:
            return False
        assert lane.handler is not None
        code, module = own_code(lane.handler, lane.coroutine)
        return code is not None and may_stop(frame, code, module, self._preemptible)


class Lane:
    """A stack on which a worker runs for its whole life, and may be stopped while it runs a handler.

    ``await lane.run(worker)`` runs the worker in the calling task, as ``await worker()`` would. The worker brackets
    each handler it drives, inline, by `begin` and `end`; only between them, and only in frames from the handler's own
    upwards, are checkpoints forced. The worker itself is never stopped.

    Made by `stagetrio.watchdog.Watchdog.open_lane`. One worker at a time.

    Attributes:
        on_preempt: Called without arguments when the handler in hand is first made to wait for a turn behind others:
            once per handler, in the worker's task, outside of its stack. It may start tasks and wake them; what it
            raises is raised in the handler.
        scope: The cancel scope that is cancelled when a handler exceeds its budget, open around the handler in the
            worker's task. The worker replaces it when it has been used up.
        exceeded: Whether the handler in hand, or the one that ended last, exceeded its budget.
        held: Seconds for which the handler in hand had held the loop when it last gave it up; after `end`, in all.
    """

    __slots__ = (
        "_forced",
        "_loop",
        "_turns",
        "budget",
        "coroutine",
        "deadline",
        "exceeded",
        "flow",
        "handler",
        "held",
        "on_preempt",
        "put_off",
        "scope",
        "stack",
        "started",
        "task",
    )

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._turns = loop.turns
        self.stack = Stack()
        self.task: Task | None = None
        self.handler: Callable[..., Any] | None = None
        self.coroutine: Any = None
        self.flow: Hashable = None
        self.budget = math.inf
        self.started = 0.0
        self.deadline = 0.0
        self._forced = False  # has waited behind others
        self.put_off = 0  # attempts in this slice
        self.held = 0.0
        self.exceeded = False
        self.scope: trio.CancelScope | None = None
        self.on_preempt: Callable[[], object] | None = None

    async def run(self, worker: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run ``await worker(*args)`` on this lane's stack, in the calling task.

        Raises:
            RuntimeError: The lane is in use.

        Checkpoints: as ``worker`` does, and inside of its handlers where they are forced.
        """
        if self.task is not None:
            raise RuntimeError("the lane is in use")
        self.task = task = current_task()
        try:
            result: T = await self.drive(worker(*args), task)
            return result
        finally:
            self.task = None
            self.discard_stack()
            self.stack = Stack()

    def discard_stack(self) -> None:
        """Free the stack, on which nothing runs any more."""
        self.stack.parent = greenlet.getcurrent()  # where a greenlet that ends goes
        self.stack.throw()

    @enable_ki_protection
    def begin(self, handler: Callable[..., Any], flow: Hashable = None, budget: float = math.inf) -> None:
        """Say that a handler starts. Called by the worker, on this lane.

        Where there is nothing left to spend in this pass, the worker is suspended here until there is.

        Args:
            handler: The async function whose frame bounds what may be stopped; partials and decorated ones are
                looked through.
            flow: On whose account it runs; None: on its own.
            budget: Seconds for which it may hold the loop in all, > 0.

        Raises:
            trio.Cancelled: While it waited; the handler must not be started, and `end` is called all the same.

        Cost: 0.2 µs.
        """
        self.handler = handler
        self.flow = flow
        self.budget = budget
        self.held = 0.0
        self.exceeded = False
        turns = self._turns
        left = turns.quantum - turns.used
        if left <= 0 or turns.overdue:
            left = self._wait_to_begin(left)
        self.started = now = perf_counter()
        self.deadline = deadline = now + (left if left < budget else budget)
        loop = self._loop
        loop.active = self
        if loop.rings_at > deadline:
            loop.arm(deadline, now)

    def _wait_to_begin(self, left: float) -> float:
        turns = self._turns
        if left <= 0 or turns.owes(self.account()):
            self.stack.stop()
        return max(turns.quantum - turns.used, turns.quantum * SLACK_SHARE)

    @enable_ki_protection
    def end(self) -> float:
        """Say that the handler has ended, whatever way; return the seconds for which it held the loop.

        Cost: 0.2 µs.
        """
        loop = self._loop
        if loop.active is self:
            held = perf_counter() - self.started
            loop.active = None
            self._turns.used += held
            self.held += held
            if loop.contended:
                self._turns.charge(self.account(), held)
        self.handler = None
        if loop.contended:
            self.settle()
        return self.held

    def settle(self) -> None:
        """Leave the contention that the handler was part of."""
        if self.flow is None:
            self._turns.forget(self)
        if self._forced:
            self._forced = False
            self._loop.contended -= 1
            if not self._loop.contended:
                self._turns.forget_all()

    def account(self) -> Hashable:
        """The flow that is charged."""
        return self if self.flow is None else self.flow

    def _resume(self) -> None:
        """The handler in hand gets the loop (back)."""
        loop = self._loop
        turns = self._turns
        left = max(turns.quantum - turns.used, turns.quantum * SLACK_SHARE)
        if self.budget - self.held < left and not self.exceeded:
            left = self.budget - self.held
        self.put_off = 0
        self.started = now = perf_counter()
        self.deadline = deadline = now + left
        loop.active = self
        if loop.rings_at > deadline:
            loop.arm(deadline, now)

    def _pause(self) -> None:
        """The handler in hand has given up the loop, or has ended."""
        loop = self._loop
        held = perf_counter() - self.started
        loop.active = None
        self.held += held
        self._turns.used += held
        if loop.contended:
            self._turns.charge(self.account(), held)
        if self.held >= self.budget and not self.exceeded:
            self.exceeded = True
            loop.budgets_exceeded += 1
            if self.scope is not None:
                self.scope.cancel(reason=f"budget of {self.budget:.3g} s exceeded")

    @types.coroutine
    def drive(self, coroutine: Any, task: Task) -> Generator[Any, Any, Any]:
        """Drive a coroutine on this lane's stack until it ends; the other end of `Stack.run`."""
        loop = self._loop
        stack = self.stack
        stack.back = greenlet.getcurrent()
        stack.protected = getattr(task, "_ki_protected", True)
        stack.gr_context = task.context
        outer = loop.active  # the handler that awaits this, if it is under the watchdog too
        if outer is not None:
            outer._pause()
        if self.handler is not None:
            self._resume()
        trap = stack.switch(coroutine)
        while trap is not FINISHED:
            if loop.active is self:
                self._pause()
            if outer is not None:
                outer._resume()
            answer: Any
            try:
                if trap is FORCED:
                    answer = None
                    yield from self.wait_turn().__await__()
                else:
                    answer = yield trap
            except BaseException as error:
                answer = error if trap is FORCED else Thrown(error)
            if self.handler is not None:
                if trap is not FORCED and self._turns.used >= self._turns.quantum:
                    yield from self.wait_turn(shielded=True).__await__()
                if outer is not None:
                    outer._pause()
                self._resume()
            elif outer is not None:
                outer._pause()
            trap = stack.switch(answer)
        if loop.active is self:
            self._pause()
        if outer is not None:
            outer._resume()
        return self._result()

    def _result(self) -> Any:
        stack = self.stack
        error, value = stack.error, stack.value
        stack.error = stack.value = None
        if error is None:
            return value
        try:
            raise error
        finally:
            del error

    async def wait_turn(self, *, shielded: bool = False) -> None:
        """Wait, in the driving task, until this lane's handler may go on, or start.

        ``shielded``: what the handler waited for has happened, so a cancellation is left to its next checkpoint.
        """
        loop, turns = self._loop, self._turns
        begun = self.held > 0 and not shielded
        if begun and not self._forced:
            self._overrun()

        def abort(_: RaiseCancelT) -> Abort:
            if shielded:
                return Abort.FAILED
            turns.leave(self)
            return Abort.SUCCEEDED

        again = False
        while True:
            overdue = turns.wait(self, self.account(), begun=begun, again=again)
            if overdue and not self._forced:
                self._overrun()
            loop.keep_turning()
            await wait_task_rescheduled(abort)
            if turns.used < turns.quantum:
                return
            again = True

    def _overrun(self) -> None:
        if not self._loop.contended:
            self._turns.charge(self.account(), self.held)
        self._forced = True
        self._loop.contended += 1
        if self.on_preempt is not None:
            self.on_preempt()
