"""What happens in a worker thread: it takes jobs, runs them, and reports back in as few crossings as it can.

Theory of operation. Waking the other side costs more than most jobs: some 20 µs for a thread, some 40 µs for the
loop. So the two sides share two deques, whose operations are atomic, and wake each other only when needed:

- ``ready``: jobs for whichever thread comes first. A thread that has finished one takes the next without asking.
  A thread that finds it empty reports that it is idle and sleeps on a lock of its own, until the loop wakes it.
- ``news``: what threads have to report. The first report wakes the loop (``run_sync_soon``) and leaves a mark; while
  the mark stands, further reports are only appended. The loop takes the mark away *before* it empties the deque,
  so a report is either seen by this emptying or finds no mark and wakes the loop again.

*Who has a job.* A job may be taken by a thread and dropped by its caller at the same time; ``ThreadJob.claim`` is a
lock that one of them gets.

*Cancelling a running job* must hit this job and no later one of the same thread. ``Thread.lock`` guards ``current``
and ``retired``: whoever cancels sets ``retired`` while ``current`` still is the job, and a retired thread takes no
other job. So whatever the cancellation has set in motion, a pending `JobInterrupted` or Trio's mark for
``check_cancelled``, ends with the thread. A pending exception is cleared, under the lock, before the job is reported:
the lines after that are out of its reach. So are those in which the job calls upon its worker (`Thread._mask`), since
an exception between "took a run slot" and "noted it" would lose the slot for good: there it is owed, and raised at
the end. Not every exception arrives (``interruption.py``), so the task that hosts the thread insists (`Thread.insist`)
while the job is ``current``.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from time import perf_counter
from typing import Any, Generic, TypeVar

import trio

from stagetrio.calls import MAX_PROGRESS, Call
from stagetrio.interruption import interrupt, take_back
from stagetrio.jobs import JobInterrupted, bind
from stagetrio.run_slots import RunSlots

R = TypeVar("R")
T = TypeVar("T")

SLICE = 0.005  # seconds of a batch after which its thread asks who is next


class ThreadJob(Call):
    """A call of a function in a thread."""

    __slots__ = ("claim", "context", "interrupt", "room", "thread")

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], flow: Hashable, key: Hashable, cost: float, interrupt: bool
    ) -> None:
        super().__init__(fn, args, flow, key, cost)
        self.interrupt = interrupt
        self.context = contextvars.copy_context()
        self.claim = threading.Lock()  # locked by who takes the job: a thread, or the caller who gives it up
        self.thread: Thread | None = None
        self.room: threading.Semaphore | None = None  # for progress values; None: nobody ever listened

    def listen(self) -> None:
        """Have progress values kept for the caller."""
        self.progress = deque()
        self.room = threading.Semaphore(MAX_PROGRESS)
        self.took_progress = self.room.release

    def leave(self) -> None:
        """Keep no more progress values, and let a job that waits for the caller to take one go on."""
        self.progress = None
        if self.room is not None:
            self.room.release()

    def again(self) -> None:
        """Be ready for another run."""
        self.claim = threading.Lock()
        self.answered = self.handed = False
        self.value = self.thread = None


class Batch(Generic[T, R]):
    """Items that several threads take from, and their results."""

    def __init__(self, fn: Callable[[T], R], items: Iterable[T]) -> None:
        self.todo = deque(enumerate(items))
        self.results: list[Any] = [None] * len(self.todo)
        self._fn = fn

    def work(self) -> None:
        """Take items and call the function, until there are none or others may want this thread."""
        fn, todo, results = self._fn, self.todo, self.results
        until = perf_counter() + SLICE
        while perf_counter() < until:
            try:
                index, item = todo.popleft()
            except IndexError:
                return
            try:
                results[index] = fn(item)
            except BaseException:
                todo.clear()
                raise


class Next(enum.Enum):
    """What a thread does after what it reports."""

    JOB = enum.auto()  # it goes on
    SLEEP = enum.auto()  # there was nothing to do
    END = enum.auto()  # it was retired
    PAUSE = enum.auto()  # its job waits, or gives way: another thread may run
    RESUME = enum.auto()  # its job goes on after that


class Mailbox:
    """What the threads of one pool and the loop share.

    Args:
        on_news: called in the loop's thread when there is news; it must empty ``news`` and not raise.
        slots: bounds the threads that run at once; None: nothing does.
    """

    def __init__(self, on_news: Callable[[], None], slots: RunSlots | None) -> None:
        self.ready: deque[ThreadJob] = deque()
        # (thread, job it finished, seconds that took, what it does next), or (None, job with progress, 0, Next.JOB)
        self.news: deque[tuple[Thread | None, ThreadJob | None, float, Next]] = deque()
        self.slots = slots
        self._on_news = on_news
        self._token = trio.lowlevel.current_trio_token()
        self._told = False

    def tell(self, thread: Thread | None, job: ThreadJob | None, seconds: float, then: Next) -> None:
        """Report to the loop; from any thread."""
        self.news.append((thread, job, seconds, then))
        if not self._told:
            self._told = True
            with contextlib.suppress(trio.RunFinishedError):  # nobody is left to be told
                self._token.run_sync_soon(self._read)

    def _read(self) -> None:
        self._told = False
        self._on_news()


class Thread:
    """One worker thread: `run` is its life, the rest is called by the loop."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.scope = trio.CancelScope()  # of the task that hosts the thread; cancelling it marks the thread for Trio
        self.lock = threading.Lock()
        self.current: ThreadJob | None = None
        self.runs = 0  # jobs begun
        self.retired = False  # takes no further job
        self.able = True  # False: given up on, since its job goes on though nobody wants it
        self.dismissed = False
        self._mailbox = mailbox
        self._slots = mailbox.slots
        self._awake = threading.Lock()  # unlocked: there may be something to do
        self._ident = 0
        self._in_slot = False
        self._away = False  # has told the loop that another thread may run
        self._masked = False  # JobInterrupted must not be raised now,
        self._owed = False  # and is to be raised when it may

    def wake(self) -> None:
        """Have an idle thread look for jobs."""
        self._awake.release()

    def dismiss(self) -> None:
        """Have an idle thread end."""
        self.dismissed = True
        self._awake.release()

    def cancel(self, job: ThreadJob) -> bool:
        """Tell the running job to stop, in the ways it allows; the thread ends after it. False: it runs no more."""
        with self.lock:
            if self.current is not job:
                return False
            if not self.retired:
                self.retired = True
                self.scope.cancel("nobody waits for this job any more")
                self._interrupt(job)
            return True

    def insist(self) -> bool:
        """Interrupt the job again that was told to stop, in case it has not heard; False: there is none, or no more."""
        with self.lock:
            job = self.current
            if job is None or not self.retired or not job.interrupt:
                return False
            self._interrupt(job)
            return True

    def give_up(self) -> None:
        """Count it as unable: it goes on beside the others, without a slot, and ends after its job."""
        self.able = False
        self._leave_slot()

    def _interrupt(self, job: ThreadJob) -> None:
        if not job.interrupt:
            return
        if self._masked:
            self._owed = True
        else:
            interrupt(self._ident, JobInterrupted, __file__)

    # All below runs in the thread.

    def run(self) -> None:
        """Take jobs until dismissed or retired."""
        self._ident = threading.get_ident()
        bind(self)
        try:
            self._awake.acquire(blocking=False)
            while not self.dismissed:
                if self._work():
                    return
                self._awake.acquire()
        finally:
            bind(None)

    def _work(self) -> bool:
        """Run jobs until there are none; whether the thread is retired."""
        mailbox, slots = self._mailbox, self._slots
        self._enter_slot()
        job = self._take()
        if job is None:
            mailbox.tell(self, None, 0, Next.SLEEP)
        while job is not None:
            started = perf_counter()
            self._perform(job)
            if self.current is not None:  # an interruption has come in the place of the last lines
                self._out_of_reach(job)
            seconds = perf_counter() - started
            finished, job = job, None
            if slots is not None:
                if self._in_slot:
                    slots.give_way()
                else:
                    self._enter_slot()
                self._come_back()
            if self.retired:
                mailbox.tell(self, finished, seconds, Next.END)
            else:
                job = self._take()
                mailbox.tell(self, finished, seconds, Next.SLEEP if job is None else Next.JOB)
            del finished  # the loop's now, and not to be kept alive by an idle thread
        self._leave_slot()
        return self.retired

    def _take(self) -> ThreadJob | None:
        ready = self._mailbox.ready
        while True:
            try:
                job = ready.popleft()
            except IndexError:
                return None
            job.thread = self
            with self.lock:  # whoever finds the job claimed finds it here, too
                if job.claim.acquire(blocking=False):
                    self.runs += 1
                    self.current = job
                    self._masked = True
                    return job

    def _perform(self, job: ThreadJob) -> None:
        try:
            try:
                self._unmask()
                job.value = job.context.run(job.fn, *job.args)
            finally:
                self._out_of_reach(job)
        except BaseException as error:
            job.error = error.with_traceback(_below(error))

    def _out_of_reach(self, job: ThreadJob) -> None:
        with self.lock:
            self.current = None
            if self.retired and job.interrupt:
                take_back(self._ident, JobInterrupted)

    def _mask(self) -> None:
        with self.lock:
            self._masked = True
            if self.retired and self.current is not None and self.current.interrupt:
                take_back(self._ident, JobInterrupted)
                self._owed = True

    def _unmask(self) -> None:
        with self.lock:
            self._masked = False
            owed, self._owed = self._owed, False
        if owed:
            raise JobInterrupted

    # jobs.Worker

    def report(self, value: object) -> None:
        job = self.current
        if job is None or job.room is None:
            return
        self._mask()
        try:
            self._send_progress(job, job.room, value)
        finally:
            self._unmask()

    def _send_progress(self, job: ThreadJob, room: threading.Semaphore, value: object) -> None:
        if not room.acquire(blocking=False):
            self._pause()
            room.acquire()
            self._resume()
        progress = job.progress
        if progress is None:  # who listened has left
            room.release()
            self.check_cancelled()
            return
        progress.append(value)
        self._mailbox.tell(None, job, 0, Next.JOB)

    def check_cancelled(self) -> None:
        trio.from_thread.check_cancelled()

    def give_way(self) -> None:
        if self._slots is None:
            return
        self._mask()
        if self._slots.waiting:
            self._slots.give_way()
            self._come_back()
        elif self._mailbox.ready:
            self._go_away()  # in name only: a thread that is woken for it will wait in line at the next call
        self._unmask()

    def pause(self) -> None:
        if self._slots is not None:
            self._mask()
            self._pause()
            self._unmask()

    def resume(self) -> None:
        if self._slots is not None:
            self._mask()
            self._resume()
            self._unmask()

    def _pause(self) -> None:
        if self._slots is not None:
            self._leave_slot()
            self._go_away()

    def _resume(self) -> None:
        if self._slots is not None:
            self._come_back()
            self._enter_slot()

    def _go_away(self) -> None:
        if not self._away:
            self._away = True
            self._mailbox.tell(self, None, 0, Next.PAUSE)

    def _come_back(self) -> None:
        if self._away:
            self._away = False
            self._mailbox.tell(self, None, 0, Next.RESUME)

    def _enter_slot(self) -> None:
        if self._slots is None or not self.able:
            return
        self._slots.enter()
        with self.lock:
            self._in_slot = self.able
            given_up = not self.able
        if given_up:  # meanwhile
            self._slots.leave()

    def _leave_slot(self) -> None:
        with self.lock:
            had_one, self._in_slot = self._in_slot, False
        if had_one and self._slots is not None:
            self._slots.leave()


def _below(error: BaseException) -> Any:
    """The traceback from the job's function on, without the frames of this module."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback or error.__traceback__
