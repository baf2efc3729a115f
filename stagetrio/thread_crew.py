"""The threads of a pool: who is idle, who is able, and who takes the place of those who are not.

A thread cannot be stopped from outside. One whose job goes on though it was told to stop is *unable*: it does not count
among the pool's threads any more, and another takes its place. It ends when its job does, if ever. There are never more
than ``max_lost`` threads beyond ``max_threads``: from then on an unable one is not replaced, and the crew is smaller
until one of them ends.

Where only so many threads may run at once (``max_running``), no more than these are woken, and one more for each whose
job waits: a thread that could not run would only take a job out of its fair order, and its start would hold up the loop
(which waits for a new thread to get hold of the GIL, behind one that computes).

Each thread is hosted by a task in ``to_thread.run_sync``, since that is what makes Trio's ``from_thread`` functions
work in its jobs. The host is cancelled to tell the thread's job to stop; that marks the thread, for good, as
cancelled, so it ends with this job, and the next one gets a fresh thread (from Trio's cache: cheap). A host whose
thread may be interrupted stays until that has come through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import trio

from stagetrio.thread_worker import Mailbox, Thread, ThreadJob

FIRST_INSIST = 0.005  # seconds until a job that was interrupted, and goes on, is interrupted again,
MAX_INSIST = 1.0  # and then twice as long each time


@attrs.frozen
class CrewStatistics:
    """The threads of a pool now, and since it was opened.

    Args:
        threads: Threads there are, unable ones included.
        idle: Those of them that have nothing to do.
        unable: Those of them that go on with a job nobody waits for.
        started: Threads started since the pool was opened.
        abandoned: Threads that have become unable since.
    """

    threads: int
    idle: int
    unable: int
    started: int
    abandoned: int


class Crew:
    """Threads that take from one mailbox.

    Args:
        max_threads: Able threads, ≥ 1.
        max_lost: Unable threads that are replaced, ≥ 0.
        max_running: Able threads that are awake at once and do not wait, ≥ 1.
        mailbox: What the threads take from and report to.
        grace: Seconds for which jobs that may be interrupted are when the crew's nursery is cancelled, ≥ 0.
        on_cancelled: called when the nursery is cancelled from outside, so that nobody is there to host threads.
    """

    nursery: trio.Nursery  # for the hosts; set by the owner before anything is started

    def __init__(
        self,
        max_threads: int,
        max_lost: float,
        max_running: float,
        mailbox: Mailbox,
        grace: float,
        on_cancelled: Callable[[], object],
    ) -> None:
        self._max_running = max_running
        self._on_cancelled = on_cancelled
        self._max_threads = max_threads
        self._max_lost = max_lost
        self._mailbox = mailbox
        self._grace = grace
        self._threads: dict[Thread, None] = {}  # in the order in which they were started
        self._idle: list[Thread] = []  # the last to have worked is the first to work again
        self._seen: dict[Thread, tuple[int, float]] = {}  # at the last look: who was at its how-manieth job, since when
        self._waiting: set[Thread] = set()  # whose job waits, so that another thread may run
        self._able = self._unable = self._started = self._abandoned = 0
        self._limit: float = max_threads  # able threads there may be

    @property
    def limit(self) -> float:
        """Threads that may be at work at once."""
        return min(self._limit, self._max_running + len(self._waiting))

    @property
    def spare(self) -> float:
        """How many more could be."""
        return self.limit - (self._able - len(self._idle))

    def rouse(self, threads: int) -> None:
        """Have up to so many more threads look for jobs: idle ones, or new ones."""
        for _ in range(threads):
            if self.spare <= 0:
                return
            if self._idle:
                self._idle.pop().wake()
            elif self._able < self._limit:
                self._able += 1
                self._started += 1
                thread = Thread(self._mailbox)
                self._threads[thread] = None
                self.nursery.start_soon(self._host, thread, self._started)
            else:
                return

    async def _host(self, thread: Thread, number: int) -> None:
        try:
            with thread.scope:
                await trio.to_thread.run_sync(
                    thread.run, thread_name=f"stagetrio {number}", abandon_on_cancel=True, limiter=_no_limit
                )
            await self._insist(thread)
        except BaseException:
            self._on_cancelled()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._grace):
                if thread.able:
                    await self._insist(thread)
            raise

    async def _insist(self, thread: Thread) -> None:
        seconds = FIRST_INSIST
        while thread.insist():
            await trio.sleep(seconds)
            seconds = min(MAX_INSIST, 2 * seconds)

    def rest(self, thread: Thread) -> None:
        """Note that a thread found nothing to do."""
        self._idle.append(thread)

    def pause(self, thread: Thread) -> None:
        """Note that a thread's job waits, or gives way."""
        if thread.able:
            self._waiting.add(thread)

    def resume(self, thread: Thread) -> None:
        """Note that it goes on."""
        self._waiting.discard(thread)

    def remove(self, thread: Thread) -> None:
        """Note that a retired thread has ended."""
        del self._threads[thread]
        self._waiting.discard(thread)
        if thread.able:
            self._able -= 1
        else:
            self._unable -= 1
            self._relimit()

    def abandon(self, thread: Thread) -> bool:
        """Count a thread among the lost; False: it is one already, or has ended."""
        if not thread.able or thread not in self._threads:
            return False
        thread.give_up()
        self._waiting.discard(thread)
        self._able -= 1
        self._unable += 1
        self._abandoned += 1
        self._relimit()
        return True

    def _relimit(self) -> None:
        self._limit = min(self._max_threads, self._max_threads + self._max_lost - self._unable)

    def busy(self, now: float) -> Iterator[tuple[Thread, ThreadJob, float]]:
        """The able threads that run a job, the job, and for how many seconds they have been seen to.

        Args:
            now: the time of this look; how long a job runs is counted from the first look that saw it.
        """
        before, self._seen = self._seen, {}
        for thread in tuple(self._threads):
            runs, job = thread.runs, thread.current
            if job is not None and thread.able:
                last = before.get(thread)
                since = last[1] if last is not None and last[0] == runs else now
                self._seen[thread] = runs, since
                yield thread, job, now - since

    def dismiss(self) -> None:
        """Have every thread end, the busy ones after their job, and start no more."""
        self._max_threads = 0
        self._relimit()
        for thread in self._threads:
            thread.dismissed = True
        for thread in self._idle:
            thread.wake()
        self._idle.clear()

    def statistics(self) -> CrewStatistics:
        """The threads now, and since the pool was opened."""
        return CrewStatistics(
            threads=len(self._threads),
            idle=len(self._idle),
            unable=self._unable,
            started=self._started,
            abandoned=self._abandoned,
        )


class _NoLimit:
    """For ``to_thread``: the crew itself bounds its threads."""

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await trio.lowlevel.checkpoint()

    def release_on_behalf_of(self, borrower: object) -> None:
        pass


_no_limit: Any = _NoLimit()
