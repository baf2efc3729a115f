"""What interrupts a handler at the end of its slice: a timer, a thread that sends a signal, or events.

Theory of operation
===================

An alarm calls `Interruptions.ring` in the middle of whatever it interrupts, which finds out whether a handler is due
and may be stopped there. Which alarm there is depends on what the process has to offer; in order:

``"timer"``
    An interval timer (SIGALRM). The kernel's, so it rings while C code holds the GIL, and the system call that C code
    waits in is interrupted. Needs the main thread, and that nobody else owns the signal or the timer. It rings again
    every quantum until it is armed anew or finds nobody: a signal that comes just before a handler begins to wait, for
    a lock, say, is noticed only when the wait is over, and if it was the only one, that is never.
``"thread"``
    A thread looks four times per quantum and sends a signal to the main thread. It cannot look while C code holds the
    GIL, and the interpreter hands it the GIL only every switch interval (5 ms), so slices are longer by that much.
``"monitoring"``
    The same thread switches on events of ``sys.monitoring`` (3.12 and later) for as long as a handler is overdue; the
    next function that starts, loop that goes round, or C function that returns, rings. Works in any thread and on any
    system; a call into C is not interrupted.
``"none"``
    Nothing rings. Handlers are reported, and cancelled past their budget at their next own checkpoint.
``"steps"``
    `StepClock`: the same events, counted, stand for time. For tests: the same program is stopped at the same places
    each time.

``rings_at`` is when the alarm will ring of its own accord: `math.inf` while it is not armed, `-math.inf` where arming
it has no meaning. Switching away inside of an event's callback leaves events off for everyone, unless it is done
through ``sys.call_tracing``.
"""

from __future__ import annotations

import dis
import math
import signal
import sys
import threading
from collections.abc import Callable
from time import perf_counter
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import greenlet
from trio.lowlevel import enable_ki_protection

from stagetrio.events import MACHINERY, Events, free_tool

SIGALRM: int = getattr(signal, "SIGALRM", 0)
SIGURG: int = getattr(signal, "SIGURG", 0)  # ignored by default: one that comes late does no harm
LOOKS_PER_QUANTUM = 4
SHORTEST = 1e-6  # seconds for which a timer can be armed
RETRY_SECONDS = (
    1e-4  # after which a switch that was put off is tried again; then twice that, up to a quarter of a quantum
)


class Interruptible(Protocol):
    """A handler in hand: `stagetrio.lane.Lane`."""

    stack: Any
    put_off: int  # attempts to stop it in this slice

    def end_of_slice(self) -> float:
        """When it is to be interrupted."""

    def may_stop(self, frame: FrameType, *, at_a_seam: bool) -> tuple[bool, FrameType | None]:
        """Whether it may be stopped in ``frame``; ``at_a_seam``: certainly not inside of C code.

        And, if not, the frame in which that may next be had, as far as it is known.
        """


L = TypeVar("L", bound=Interruptible)


class Interruptions(Generic[L]):
    """What alarms and handlers share: who holds the loop now, and until when.

    Args:
        alarm: What interrupts.
        quantum: Seconds of opted-in work per pass.

    Attributes:
        active: Who holds the loop.
        forced: Handlers stopped so far.
        put_off: Attempts to stop one where it was not allowed.
    """

    def __init__(self, alarm: Alarm, quantum: float) -> None:
        self.alarm = alarm
        self.quantum = quantum
        self.active: L | None = None
        self.forced = self.put_off = 0
        self._judging = False

    def overdue(self) -> bool:
        """Whether a handler holds the loop that should be interrupted now. For any thread."""
        lane = self.active
        return lane is not None and self.alarm.clock() >= lane.end_of_slice()

    def running(self) -> bool:
        """Whether what is being executed, in the loop's thread, is a handler."""
        return self.active is not None and greenlet.getcurrent() is self.active.stack

    @enable_ki_protection
    def ring(self, frame: FrameType | None, *, at_a_seam: bool) -> None:
        """The alarm has rung in ``frame``. What this raises is raised in the handler that was interrupted there.

        Args:
            frame: The frame that was being executed.
            at_a_seam: It is known that no C code is under way in the frame.
        """
        try:
            lane = self._to_be_stopped(frame, at_a_seam)
        except RecursionError:  # the handler is about to meet it too; the alarm rings again
            self._judging = False
            return
        if lane is None:
            return
        self.forced += 1
        try:
            self.alarm.enter(lane.stack.stop)
        except BaseException as error:
            assert frame is not None
            if not self.alarm.raise_later(frame, error):
                raise

    def _to_be_stopped(self, frame: FrameType | None, at_a_seam: bool) -> L | None:
        lane = self.active
        if lane is None:
            self.alarm.disarm()
            return None
        if self._judging or frame is None:
            return None
        now = self.alarm.clock()
        end = lane.end_of_slice()
        if now < end:
            self.alarm.arm(end, now)
            return None
        if frame.f_globals.get("__name__") in MACHINERY:
            self.alarm.arm(now + RETRY_SECONDS, now)  # not the handler's doing, and over in a moment
            return None
        self._judging = True  # until this is decided, another ring has nothing to add
        stops, next_chance = lane.may_stop(frame, at_a_seam=at_a_seam)
        self._judging = False
        if stops:
            return lane
        self.put_off += 1
        lane.put_off += 1
        if next_chance is not None:
            self.alarm.ring_in(next_chance)
        self.alarm.arm(now + min(RETRY_SECONDS * 2.0 ** min(lane.put_off, 32), self.quantum / 4), now)
        return None


class Alarm:
    """No alarm at all, and what all of them have.

    Attributes:
        mechanism: Its name, as above.
        rings_at: When it rings, by ``clock``.
        clock: Returns the time that slices are measured in, in seconds.
    """

    mechanism = "none"

    def __init__(self) -> None:
        self.rings_at = -math.inf
        self.clock: Callable[[], float] = perf_counter

    def arm(self, deadline: float, now: float) -> None:
        """Let it ring at ``deadline``."""

    def disarm(self) -> None:
        """It has rung, and found nobody: let it not ring again."""

    def open(self, loop: Interruptions[Any]) -> None:
        """Begin to ring for ``loop``, in the calling thread."""

    def close(self) -> None:
        """Leave no trace: the signal handler, the timer, the events, the thread."""

    def enter(self, function: Callable[[], None]) -> None:
        """Call a function from which the stack may be switched away."""
        function()

    def raise_later(self, frame: FrameType, error: BaseException) -> bool:
        """Whether ``error`` will be raised in ``frame`` a moment later, because here it would be misplaced."""
        return False

    def ring_in(self, frame: FrameType) -> None:
        """Ring, if that can be had, as soon as ``frame`` goes on and has no C code under way."""


class _SignalAlarm(Alarm):
    """What rings by a signal in the main thread."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self._signum = signum

    def open(self, loop: Interruptions[Any]) -> None:
        self._loop = loop
        self._events = None if free_tool() is None else Events(self._handle_event)
        self._before = signal.signal(self._signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._loop.ring(frame, at_a_seam=False)

    def raise_later(self, frame: FrameType, error: BaseException) -> bool:
        if self._events is None or not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("JUMP_BACKWARD"):
            return False
        self._events.raise_later(frame, error)
        return True

    def ring_in(self, frame: FrameType) -> None:
        if self._events is not None:
            self._events.switch_on_in(frame)

    def _handle_event(self, frame: FrameType) -> None:
        assert self._events is not None
        if self._events.only_in is frame:
            self._events.switch_off()
            self._loop.ring(frame, at_a_seam=True)
        elif not self._loop.overdue():
            self._events.switch_off()

    def enter(self, function: Callable[[], None]) -> None:
        sys.call_tracing(function, ())

    def close(self) -> None:
        signal.signal(self._signum, self._before)
        if self._events is not None:
            self._events.close()


class TimerAlarm(_SignalAlarm):
    """An interval timer, armed once for many slices."""

    mechanism = "timer"

    def open(self, loop: Interruptions[Any]) -> None:
        super().open(loop)
        self.rings_at = math.inf
        self._interval = max(loop.quantum, SHORTEST)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.rings_at = math.inf
        self._loop.ring(frame, at_a_seam=False)

    def arm(self, deadline: float, now: float) -> None:
        # In this order: a signal between the two lines leaves `rings_at` too late, and the timer is armed once more.
        self.rings_at = deadline
        signal.setitimer(signal.ITIMER_REAL, max(deadline - now, SHORTEST), self._interval)

    def disarm(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def close(self) -> None:
        self.rings_at = -math.inf
        signal.setitimer(signal.ITIMER_REAL, 0)
        super().close()


class _Thread:
    """Looks, and kicks when somebody is overdue."""

    def __init__(self, loop: Interruptions[Any], kick: Callable[[], object]) -> None:
        self._loop = loop
        self._kick = kick
        self._interval = loop.quantum / LOOKS_PER_QUANTUM
        self._until_ended = threading.Lock()  # held until then
        self._until_ended.acquire()
        self._thread = threading.Thread(target=self._run, name="stagetrio alarm", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._until_ended.acquire(timeout=self._interval):
            if self._loop.overdue():
                self._kick()

    def end(self) -> None:
        self._until_ended.release()
        self._thread.join()


class ThreadAlarm(_SignalAlarm):
    """A thread that sends a signal to the main thread."""

    mechanism = "thread"

    def open(self, loop: Interruptions[Any]) -> None:
        super().open(loop)
        target = threading.get_ident()
        self._thread = _Thread(loop, lambda: signal.pthread_kill(target, self._signum))

    def close(self) -> None:
        self._thread.end()
        super().close()


class _EventsAlarm(Alarm):
    """What rings by events."""

    _events: Events

    def enter(self, function: Callable[[], None]) -> None:
        sys.call_tracing(function, ())

    def close(self) -> None:
        self._events.close()


class EventAlarm(_EventsAlarm):
    """Events that are switched on, by a thread, for as long as a handler is overdue."""

    mechanism = "monitoring"

    def open(self, loop: Interruptions[Any]) -> None:
        self._loop = loop
        self._events = Events(self._handle)
        self._thread = _Thread(loop, self._events.switch_on)

    def _handle(self, frame: FrameType) -> None:
        if self._loop.overdue():
            self._loop.ring(frame, at_a_seam=True)
        else:
            self._events.switch_off()

    def close(self) -> None:
        self._thread.end()
        super().close()


class StepClock(_EventsAlarm):
    """A clock that counts what handlers do instead of reading the time, and so stops them at the same places each time.

    A step is a function that starts, a loop that goes round, or a C function that returns, in a handler under
    ``watchdog.run``: the places where the interpreter looks for signals. Each counts as ``seconds``; quantum and
    budgets are in the same unit::

        async with open_watchdog(quantum=1e-6, clock=StepClock(1e-6)) as watchdog:
            await watchdog.run(handler)  # a forced checkpoint at every step

    For one watchdog; for tests: every event in the process is looked at, which slows everything down many times. There
    are no stall reports then, for they would depend on the time.

    Args:
        seconds: What one step counts as, > 0.

    Raises:
        ValueError: ``seconds`` is out of range.
        RuntimeError: There is no ``sys.monitoring``: Python 3.11; or, when it is used, no free tool id in it.
    """

    mechanism = "steps"

    def __init__(self, seconds: float) -> None:
        super().__init__()
        if not (seconds > 0 and seconds < math.inf):
            raise ValueError(f"seconds must be finite and above 0, not {seconds!r}")
        if not hasattr(sys, "monitoring"):
            raise RuntimeError("StepClock needs sys.monitoring: Python 3.12 or later")
        self._steps = 0
        self.clock = lambda: self._steps * seconds

    def open(self, loop: Interruptions[Any]) -> None:
        self._loop = loop
        self._events = Events(self._handle)
        self._events.switch_on()

    def _handle(self, frame: FrameType) -> None:
        if self._loop.running():
            self._steps += 1
            if self._loop.overdue():
                self._loop.ring(frame, at_a_seam=True)


def choose_alarm(signum: int) -> Alarm:
    """Return the best alarm that this thread, system and process have to offer.

    Args:
        signum: The signal to use; SIGALRM for the timer, another one for the thread, 0 for none.

    Raises:
        ValueError: Another signal than SIGALRM was asked for, and it has a handler.
        RuntimeError: The signal is an alarm's already.
    """
    if signum and isinstance(getattr(signal.getsignal(signum), "__self__", None), Alarm):
        raise RuntimeError("a watchdog is open already in this process")
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill") and signum:
        if signum == SIGALRM and _is_free(SIGALRM) and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            return TimerAlarm(SIGALRM)
        if signum != SIGALRM and not _is_free(signum):
            raise ValueError(f"signum must be a signal without a handler, not {signal.Signals(signum)!r}")
        signum = SIGURG if signum == SIGALRM else signum
        if _is_free(signum):
            return ThreadAlarm(signum)
    return Alarm() if free_tool() is None else EventAlarm()


def _is_free(signum: int) -> bool:
    return signal.getsignal(signum) in (signal.SIG_DFL, signal.SIG_IGN)
