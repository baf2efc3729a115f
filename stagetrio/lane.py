"""What the handlers of one event loop share when they may be stopped, and the lane on which each of them runs.

Theory of operation
===================

A handler runs on a stack of its own (`stagetrio.preempt`), driven by its task. While it holds the loop an alarm
(`stagetrio.alarm`) is set for the end of its slice. It rings on the handler's stack, in the middle of whatever the
handler does, and, where that is allowed (`stagetrio.stopping`), switches to the driver, which waits for a turn
(`stagetrio.turns`) as an ordinary blocked task: other tasks run; a cancellation is delivered there, raised where the
alarm rang, and so inside of the handler; when its turn comes the handler goes on as if nothing had happened.

**What is armed when.** Arming is a system call, so it is not done per handler: an alarm that will ring no later than
the end of the slice is left as it is. When it rings and the slice is not at its end, it is armed for the rest; when
nobody is active it is not armed again. The invariant: *while a handler is active, the alarm is armed for its end or
earlier*. It holds because ``active`` and the end are set before the alarm is looked at: a ring before that finds nobody
and disarms, and the look arms; a ring after it finds the handler, and arms.

**What is charged** is the time for which the loop was held, not processor time: ``time.sleep`` burns nothing and
delays everyone. Flows are charged only while somebody has had to wait: else a handler costs two readings of the clock.

**A cancellation** is withheld at a forced checkpoint in a ``finally`` or ``except`` block, so that what is begun there
is ended, for up to ``cleanup`` seconds of holding the loop.

**Nesting.** A handler that awaits ``watchdog.run`` is paused while the inner handler has the loop; the inner driver
runs on the outer stack, and what it yields passes through the outer one's driver.
"""

from __future__ import annotations

import math
import types
from collections.abc import Awaitable, Callable, Generator, Hashable
from types import FrameType
from typing import Any, TypeVar

import greenlet
import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from stagetrio.alarm import Alarm, Interruptions
from stagetrio.passes import Passes
from stagetrio.preempt import FINISHED, FORCED, Stack, Thrown
from stagetrio.stall import LateHandlers
from stagetrio.stopping import frames_up_to, in_cleanup, is_at_a_seam, judge, own_code
from stagetrio.turns import Turns

T = TypeVar("T")

SLACK_SHARE = 0.05  # of a quantum: the least slice worth a switch


class Loop(Interruptions["Lane"]):
    """What all lanes of one event loop share.

    Args:
        alarm: What interrupts.
        quantum: Seconds of opted-in work per pass.
        preemptible, weight, cleanup: As of `stagetrio.watchdog.open_watchdog`.
    """

    def __init__(
        self,
        alarm: Alarm,
        quantum: float,
        preemptible: tuple[str, ...],
        weight: Callable[[Hashable], float] | None,
        cleanup: float,
    ) -> None:
        super().__init__(alarm, quantum)
        self.turns: Turns[Lane] = Turns(quantum, weight)
        self.passes = Passes(self.turns)
        self.preemptible = preemptible
        self.cleanup = cleanup
        self.contended = 0  # handlers in hand that have waited behind others
        self.budgets_exceeded = 0
        self.late = LateHandlers()


class Lane:
    """A stack on which a worker runs for its whole life, and may be stopped while it runs a handler.

    ``await lane.run(worker)`` runs the worker in the calling task, as ``await worker()`` would. The worker drives its
    handlers inline, between `begin` and `end`, and separates one from the next by `lap`. Only there, and only in frames
    from the handler's own upwards, are checkpoints forced. The worker itself is never stopped::

        async def worker() -> None:
            async for batch in batches:
                lane.begin(handler, batch[0].flow)
                for message in batch:
                    lane.flow = message.flow
                    await handler(message)
                    message.charge(lane.lap())
                lane.end()

    Made by `stagetrio.watchdog.Watchdog.open_lane`. One worker at a time; for Trio's thread only.

    Attributes:
        flow: On whose account the handler in hand runs; None: on its own.
        budget: Seconds for which each handler may hold the loop in all.
        scope: The cancel scope that is cancelled when the handler in hand exceeds its budget, open around it in the
            worker's task; None: no budget is enforced. The worker replaces it when it has been used up.
        exceeded: Whether the handler in hand has exceeded its budget; stays until `begin` or the next `lap`.
        on_preempt: Called without arguments when the handler in hand is first made to wait for a turn behind others:
            once per handler, in the worker's task, outside of its stack. It may start tasks and wake them; what it
            raises is raised in the handler.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._turns = loop.turns
        self._alarm = loop.alarm
        self._clock = loop.alarm.clock
        self._slack = loop.quantum * SLACK_SHARE
        self.stack = Stack(self)
        self.task: Task | None = None
        self.handler: Callable[..., Any] | None = None
        self.coroutine: Any = None  # what the stack runs
        self.flow: Hashable = None
        self.budget = math.inf
        self._started = 0.0  # when the handler last got the loop; what the pass is charged from
        self.since = 0.0  # the same or when the handler in hand began, if that is later; what the flow is charged from
        self._before = 0.0  # seconds for which the handler in hand had held the loop before `since`
        self.end_at = 0.0  # of the slice
        self._forced = False  # whether the handler in hand has waited behind others
        self._cleaning = False  # whether it was stopped in cleanup
        self._withheld = 0.0  # seconds for which cleanup has held the loop although cancelled
        self.put_off = 0  # attempts to stop it in this slice
        self._denied = ""  # where the last of them was made
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
        self.stack.begin()
        try:
            result: T = await self.go_on(self.enter(None, worker(*args)))
            return result
        finally:
            self.handler = self.task = None
            self.renew()

    def renew(self) -> None:
        """Replace the stack by one that has not begun."""
        self.stack.discard()
        self.stack = Stack(self)
        self.coroutine = None

    # What the worker says, on the lane's stack.

    @enable_ki_protection
    def begin(self, handler: Callable[..., Any], flow: Hashable = None, budget: float = math.inf) -> None:
        """Say that a handler starts.

        Where nothing is left to spend in this pass, the worker is suspended here until there is. A cancellation that
        comes meanwhile ends the wait and is left to the next checkpoint.

        Args:
            handler: The async function whose frame bounds what may be stopped; partials, methods and decorated
                functions are looked through.
            flow: On whose account it runs; None: on its own.
            budget: Seconds for which it may hold the loop in all, > 0.

        Cost: 0.2 µs.
        """
        self.handler = handler
        self.flow = flow
        self.budget = budget
        self.exceeded = False
        self._before = 0.0
        turns = self._turns
        left = turns.quantum - turns.used
        if left <= 0 or turns.overdue:
            left = self._wait_to_begin(left)
        self._started = self.since = now = self._clock()
        self.end_at = end = now + left
        if budget < left:
            end = now + budget
        self._loop.active = self
        if self._alarm.rings_at > end:
            self._alarm.arm(end, now)

    def _wait_to_begin(self, left: float) -> float:
        if left <= 0 or self._turns.owes(self.account()):
            self.stack.stop()
        return max(self._turns.quantum - self._turns.used, self._slack)

    @enable_ki_protection
    def lap(self) -> float:
        """Say that the handler in hand has ended and the next one starts; return for how long it held the loop.

        The next one is the same function with the same budget; its ``flow`` is set by the worker. Where the slice is
        at its end the worker is suspended here, as by `begin`.

        Cost: 0.1 µs.
        """
        now = self._clock()
        spent = now - self.since
        held = self._before + spent
        self.since = now
        self._before = 0.0
        if now >= self.end_at or self._loop.contended or self.exceeded:
            self._lap_slowly(spent)
        return held

    def _lap_slowly(self, spent: float) -> None:
        if self._loop.contended:
            self._turns.charge(self.account(), spent)
            self.settle()
        self.exceeded = False
        if self.since >= self.end_at:
            handler, _ = self.handler, self.end()
            assert handler is not None
            self.begin(handler, self.flow, self.budget)

    @enable_ki_protection
    def end(self) -> float:
        """Say that the handler in hand has ended, whatever way; return for how long it held the loop, in seconds.

        Cost: 0.2 µs.
        """
        loop = self._loop
        held = self._before
        if loop.active is self:
            now = self._clock()
            loop.active = None
            self._turns.used += now - self._started
            held += now - self.since
            if loop.contended:
                self._turns.charge(self.account(), now - self.since)
        self.handler = None
        if loop.contended:
            self.settle()
        return held

    def discount(self, seconds: float) -> None:
        """Say that the handler in hand has held the loop for so much less: others were served since it was to begin."""
        self._before -= seconds

    @property
    def clock(self) -> Callable[[], float]:
        """What the loop is metered by."""
        return self._clock

    # What the loop asks.

    def end_of_slice(self) -> float:
        """When the handler in hand is to be interrupted: at the end of its slice or of its budget."""
        if self.budget == math.inf or self.exceeded:
            return self.end_at
        return min(self.end_at, self.since + self.budget - self._before)

    def may_stop(self, frame: FrameType, *, at_a_seam: bool) -> tuple[bool, FrameType | None]:
        """Whether the handler in hand may be stopped in ``frame``; remembers whether it is in cleanup there.

        And, if not, the frame in which it may next be.
        """
        if greenlet.getcurrent() is not self.stack:
            return False, None
        if self.stack.masked:
            self._denied = "no_preempt()"
            self.stack.on_unmasked = self._unmasked
            return False, None
        frames = frames_up_to(frame, own_code(self.handler, self.coroutine))
        denied, next_chance = judge(frames, self._loop.preemptible)
        if denied or not (at_a_seam or is_at_a_seam(frame)):
            self._denied = denied or f"C code called by {frame.f_code.co_qualname}"
            return False, next_chance
        self._cleaning = in_cleanup(frames)
        return True, None

    def _unmasked(self, frame: FrameType) -> None:
        if self._loop.active is self:
            self._loop.ring(frame, at_a_seam=True)

    def account(self) -> Hashable:
        """The flow that is charged."""
        return self if self.flow is None else self.flow

    def settle(self) -> None:
        """Leave the contention that the handler in hand was part of."""
        if self.flow is None:
            self._turns.forget(self)
        if self._forced:
            self._forced = False
            self._loop.contended -= 1
            if not self._loop.contended:
                self._turns.forget_all()

    # The driver, in the worker's task.

    def start(self) -> None:
        """The handler in hand gets the loop (back)."""
        turns = self._turns
        left = turns.quantum - turns.used
        if left < self._slack:
            left = self._slack
        self._started = self.since = now = self._clock()
        self.end_at = end = now + left
        self.put_off = 0
        self._loop.active = self
        if self.budget != math.inf:
            end = self.end_of_slice()
        if self._alarm.rings_at > end:
            self._alarm.arm(end, now)

    def pause(self) -> None:
        """The handler in hand has given up the loop, or has ended."""
        loop = self._loop
        now = self._clock()
        loop.active = None
        self._turns.used += now - self._started
        held = now - self.since
        self._before += held
        if loop.contended:
            self._turns.charge(self.account(), held)
        if self._before >= self.budget and not self.exceeded:
            self._exceed()
        if self.put_off and now - self.end_at > self._turns.quantum and self.handler is not None:
            loop.late.count(self.handler, self._denied)

    def _exceed(self) -> None:
        self.exceeded = True
        self._loop.budgets_exceeded += 1
        if self.scope is not None:
            self.scope.cancel(reason=f"held the loop for longer than {self.budget:.3g} s")

    async def wait_to_run(self, handler: Callable[..., Any]) -> None:
        """Wait, where nothing is left to spend in this pass, until a handler may start."""
        self.handler = handler
        self.task = current_task()
        self._before = 0.0
        self.exceeded = False
        if self._turns.used >= self._turns.quantum or self._turns.owes(self.account()):
            await self.wait_turn(begun=False, raises=True)

    @enable_ki_protection
    def enter(self, handler: Callable[..., Any] | None, coroutine: Any) -> Any:
        """Start a handler, or a worker (None), on this lane's stack; return what `go_on` is to be told."""
        self._attach(handler, coroutine)
        return self._switch(coroutine)

    def _attach(self, handler: Callable[..., Any] | None, coroutine: Any) -> None:
        self.handler = handler
        self.coroutine = None if handler is None else coroutine
        self.task = task = current_task()
        self._before = 0.0
        stack = self.stack
        stack.back = greenlet.getcurrent()
        stack.gr_context = task.context
        stack.protected = getattr(task, "_ki_protected", True)

    @enable_ki_protection
    def run_through(self, handler: Callable[..., Any], coroutine: Any, flow: Hashable, here: greenlet.greenlet) -> Any:
        """Do what `enter` does, and, if the handler has ended by then, `leave`: the short way of a short handler.

        For a handler without a budget, of a task that is not on a lane, in a pass in which something is left to spend.

        Args:
            handler, coroutine: As of `enter`.
            flow: As of `begin`.
            here: The current stack.
        """
        loop, turns, stack = self._loop, self._turns, self.stack
        self.handler = handler
        self.coroutine = coroutine
        self.flow = flow
        self.task = task = current_task()
        self._before = 0.0
        self.put_off = 0
        stack.back = here
        stack.gr_context = task.context
        try:
            stack.protected = task._ki_protected
        except AttributeError:  # another Trio's: where nothing is known, nothing is interrupted
            stack.protected = True
        self._started = self.since = now = self._clock()
        self.end_at = end = now + turns.quantum - turns.used
        loop.active = self
        if self._alarm.rings_at > end:
            self._alarm.arm(end, now)
        trap = stack.switch(coroutine)
        if trap is not FINISHED or self.put_off or loop.contended:
            return self._switched(trap)
        turns.used += self._clock() - now
        self.coroutine = self.handler = self.task = loop.active = stack.gr_context = None
        return trap

    @types.coroutine
    def go_on(self, trap: Any) -> Generator[Any, Any, Any]:
        """Drive what was entered until it ends; return its value, or raise its error."""
        while trap is not FINISHED:
            trap = self._switch((yield from self._answer(trap)))
        return self.stack.result()

    @enable_ki_protection
    def _switch(self, answer: Any) -> Any:
        loop = self._loop
        outer = loop.active  # the handler that awaits this, if it is under the watchdog too
        if outer is not None:
            outer.pause()
        if self.handler is not None:
            self.start()
        trap = self._switched(self.stack.switch(answer))
        if outer is not None:
            outer.start()
        return trap

    def _switched(self, trap: Any) -> Any:
        if trap is FINISHED:
            self.coroutine = None
        if self._loop.active is self:
            self.pause()
        return trap

    @enable_ki_protection
    def leave(self) -> None:
        """Let go of whoever was entered."""
        self.handler = self.task = self.scope = self.stack.gr_context = None
        self.budget = math.inf
        if self._loop.contended:
            self.settle()
        if self.coroutine is not None:  # Ctrl-C came between two steps: what it ran is unwound
            self.renew()
            self.stack.begin()

    def _answer(self, trap: Any) -> Generator[Any, Any, Any]:
        """Do what the stack waits for; return what it is to be told."""
        if trap is FORCED:
            try:
                begun = self._before > 0
                yield from self.wait_turn(begun=begun, raises=begun and not self._withholds()).__await__()
            except BaseException as error:
                return error
            return None
        try:
            answer = yield trap
        except BaseException as error:
            answer = Thrown(error)
        if self.handler is not None and self._turns.used >= self._turns.quantum:
            yield from self.wait_turn(begun=False, raises=False).__await__()
        return answer

    def _withholds(self) -> bool:
        """Whether a cancellation is to wait until the handler has cleaned up."""
        if not self._cleaning:
            self._withheld = 0.0
            return False
        if trio.current_effective_deadline() == -math.inf:
            self._withheld += self._clock() - self._started
        return self._withheld < self._loop.cleanup

    async def wait_turn(self, *, begun: bool, raises: bool) -> None:
        """Wait, in the driving task, until this lane's handler may go on, or start.

        Args:
            begun: It was stopped in mid-work.
            raises: A cancellation is raised; else it ends the wait, and is left to the next checkpoint.
        """
        loop, turns, task = self._loop, self._turns, self.task
        if begun and not self._forced:
            self._overrun()
        cancelled = False

        def abort(_: RaiseCancelT) -> Abort:
            nonlocal cancelled
            turns.leave(self)
            if raises:
                return Abort.SUCCEEDED
            cancelled = True
            assert task is not None
            reschedule(task)
            return Abort.FAILED

        again = False
        while not cancelled:
            overdue = turns.wait(self, self.account(), begun=begun, again=again)
            if overdue and not self._forced:
                self._overrun()
            loop.passes.keep_turning()
            await wait_task_rescheduled(abort)
            if turns.used < turns.quantum:
                return
            again = True

    def _overrun(self) -> None:
        if not self._loop.contended:
            self._turns.charge(self.account(), self._before)
        self._forced = True
        self._loop.contended += 1
        if self.on_preempt is not None:
            self.on_preempt()
