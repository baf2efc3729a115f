"""Which job gets a thread, and when; and what becomes of jobs that are not wanted any more.

Theory of operation. The loop hands jobs out, the threads (``thread_worker.py``) only take. A job is *waiting* in the
backlog (fair among flows, one at a time per key), then *in hand* in the deque that all threads take from, then
*running*, then *ended*. The loop keeps in hand as many jobs as there are threads, and a few more, so that a thread
which is done has something to go on with while the loop does not even know: the shorter the jobs, the more, so that
they are worth about `AHEAD` seconds; of long jobs one, so that a newcomer waits for one job at most beyond its fair
turn.

A job that is not wanted any more (its caller is cancelled), or has outlived its lease, is told to stop, as far as it
listens: ``check_cancelled()`` raises in it, and, where the caller opted in, so does any line. If it goes on after
``grace`` seconds, its thread counts as lost (``thread_crew.py``). Its key stays in hand until it has really ended: jobs
of one key never overlap, not even with a lost one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import attrs
import trio

from stagetrio.backlog import Backlog
from stagetrio.calls import OpenCalls, Wakeup
from stagetrio.fair_queue import FairQueue, FairQueueStatistics
from stagetrio.jobs import Again, JobInterrupted
from stagetrio.remote_wire import WorkerLost
from stagetrio.run_slots import RunSlots
from stagetrio.thread_crew import Crew, CrewStatistics
from stagetrio.thread_worker import Mailbox, Next, Thread, ThreadJob

AHEAD = 0.001  # seconds of work the threads are given beyond what they are doing,
MAX_AHEAD = 64  # and jobs


@attrs.frozen
class ThreadPoolStatistics:
    """What a pool of threads holds now, and what it has done.

    Args:
        crew: The threads.
        waiting: Jobs that wait for their turn.
        parked: Jobs whose turn has come, but not that of their key.
        in_hand: Jobs given to the threads: running, or next.
        ended: Calls of functions that came to an end in a thread.
        failed: Those of them that raised.
        cancelled: Jobs whose caller was cancelled before they had begun: they never ran.
        stopped: Running jobs that were told to stop.
        expired: Those of them whose lease had expired.
        queue: The statistics of the queue in front.
    """

    crew: CrewStatistics
    waiting: int
    parked: int
    in_hand: int
    ended: int
    failed: int
    cancelled: int
    stopped: int
    expired: int
    queue: FairQueueStatistics


class Dispatch:
    """Gives jobs to the threads of one pool.

    Args:
        max_threads: able threads.
        max_lost: unable threads that are replaced.
        max_running: threads that run at once.
        queue: where jobs wait.
        lease: seconds a job may keep a thread.
        grace: seconds a job that is told to stop is given.
    """

    def __init__(
        self,
        max_threads: int,
        max_lost: float,
        max_running: float,
        queue: FairQueue[Hashable, ThreadJob],
        lease: float,
        grace: float,
    ) -> None:
        self._lease = lease
        self._grace = grace
        self._backlog: Backlog[ThreadJob] = Backlog(queue)
        slots = RunSlots(int(max_running)) if max_running < max_threads else None
        self._mailbox = Mailbox(self._read_news, slots)
        self.crew = Crew(max_threads, max_lost, max_running, self._mailbox, grace, self.close)
        self.calls = OpenCalls("this pool of threads")
        self._in_hand = 0
        self._typical = AHEAD  # seconds, a running mean of what jobs take
        self._busy = Wakeup()  # wakes watch_leases()
        self._ended = self._failed = self._cancelled = self._stopped = self._expired = 0

    def statistics(self) -> ThreadPoolStatistics:
        """What the pool holds and has done."""
        return ThreadPoolStatistics(
            crew=self.crew.statistics(),
            waiting=self._backlog.queued,
            parked=self._backlog.parked,
            in_hand=self._in_hand,
            ended=self._ended,
            failed=self._failed,
            cancelled=self._cancelled,
            stopped=self._stopped,
            expired=self._expired,
            queue=self._backlog.statistics(),
        )

    # Jobs in: by the caller's task.

    @trio.lowlevel.enable_ki_protection
    def submit(self, job: ThreadJob) -> None:
        """Accept a job; the caller then waits for it, and has it forgotten.

        Raises:
            Overloaded: Too many wait.
            trio.ClosedResourceError: The pool takes nothing more.
            TypeError, ValueError: Its flow, key, cost or weight makes no sense.
        """
        self.calls.check_open()
        self._backlog.check(job)
        if job.key is None and not self._backlog.queued and self._in_hand < self._room:
            self._hand(job)
        else:
            self._backlog.add(job)
            self._pump()
        self.calls.add(job)
        if self._lease < math.inf:
            self._busy.wake()

    async def submit_again(self, job: ThreadJob) -> None:
        """Let a job that has ended, and is not forgotten, run again, when its turn comes."""
        if self.calls.closed:
            raise trio.ClosedResourceError("this pool of threads is closed")
        job.again()
        await self._backlog.add_again(job)
        self._pump()

    async def sleep(self, job: ThreadJob, seconds: float) -> None:
        """Wait until a job that asked for it shall run again; its key stays in hand."""
        try:
            await self.calls.sleep(job, seconds)
            await self.submit_again(job)
        except BaseException:
            self._backlog.release_key(job)
            self._pump()
            raise

    # Jobs on their way.

    @property
    def _room(self) -> float:
        """Jobs that should be in hand."""
        return self.crew.limit + max(1, min(MAX_AHEAD, int(AHEAD / self._typical)))

    def _pump(self) -> None:
        if not self._backlog:
            return
        room = self._room
        while self._in_hand < room:
            job = self._backlog.take()
            if job is None:
                return
            self._hand(job)

    def _hand(self, job: ThreadJob) -> None:
        job.handed = True
        self._in_hand += 1
        self._mailbox.ready.append(job)
        self.crew.rouse(1)

    # Jobs out: in Trio's thread, from the threads' news.

    def _read_news(self) -> None:
        news = self._mailbox.news
        while news:
            thread, job, seconds, then = news.popleft()
            if thread is None:
                assert job is not None
                job.wakeup.wake()
                continue
            if job is not None:
                self._end(thread, job, seconds)
            if then is Next.SLEEP:
                self.crew.rest(thread)
            elif then is Next.END:
                self.crew.remove(thread)
            elif then is Next.PAUSE:
                self.crew.pause(thread)
            elif then is Next.RESUME:
                self.crew.resume(thread)
        self._pump()
        if self._mailbox.ready:
            self.crew.rouse(len(self._mailbox.ready))

    def _end(self, thread: Thread, job: ThreadJob, seconds: float) -> None:
        self._ended += 1
        self._failed += job.error is not None
        self._typical += (seconds - self._typical) / 16
        if thread.able:
            self._in_hand -= 1
        self._backlog.settle(job, seconds)
        if type(job.value) is not Again or job.dropped or job.lost is not None:
            self._backlog.release_key(job)
        if not job.answered:
            if isinstance(job.error, trio.Cancelled | JobInterrupted):
                # told to stop, and not by its caller, who must not get a cancellation that is not its own
                job.lost = WorkerLost("the job was stopped", may_have_run=True)
            job.answer()

    # Jobs given up.

    async def stop(self, jobs: Sequence[ThreadJob]) -> None:
        """Give jobs up: those that have not begun never will; the others are told to stop, and awaited for a while."""
        running = [job for job in jobs if not self._drop(job)]
        self._pump()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._grace):
            for job in running:
                if not job.answered:
                    await job.wait()
        for job in running:
            if not job.answered and job.thread is not None:
                self._abandon(job.thread)

    @trio.lowlevel.enable_ki_protection
    def _drop(self, job: ThreadJob) -> bool:
        """Say that nobody wants this job any more; False: it runs, and has been told to stop."""
        job.dropped = True
        if job.answered:
            return True
        if not job.claim.acquire(blocking=False):
            self._tell_to_stop(job)
            return False
        self._cancelled += 1
        if job.handed:
            self._in_hand -= 1
            self._backlog.settle(job, 0)
            self._backlog.release_key(job)
        return True

    def _tell_to_stop(self, job: ThreadJob) -> None:
        if job.thread is not None and job.thread.cancel(job):  # else it has ended, and the news is on its way
            self._stopped += 1

    def _abandon(self, thread: Thread) -> None:
        if self.crew.abandon(thread):
            self._in_hand -= 1
            self._pump()
            self.crew.rouse(len(self._mailbox.ready))

    async def watch_leases(self) -> None:
        """Look at every thread four times per lease, while there is any job."""
        while True:
            if not self.calls:
                await self._busy.wait()
            await trio.sleep(self._lease / 4)
            for thread, job, seconds in self.crew.busy(trio.current_time()):
                if seconds >= self._lease:
                    self._expire(thread, job, seconds >= self._lease + self._grace)

    def _expire(self, thread: Thread, job: ThreadJob, grace_is_over: bool) -> None:
        if not job.answered:
            self._expired += 1
            job.lost = WorkerLost(f"the job outlived its lease of {self._lease:g} s", may_have_run=True)
            self._tell_to_stop(job)
            job.answer()
        elif grace_is_over:
            self._abandon(thread)

    # The end.

    def close(self) -> None:
        """Take nothing more, let the threads end, and tell everyone who still waits."""
        for call in self.calls.close():
            assert isinstance(call, ThreadJob)
            call.lost = (
                trio.ClosedResourceError("the pool was closed before the job's turn had come")
                if self._drop(call)
                else WorkerLost("the pool was closed while the job ran", may_have_run=True)
            )
            call.answer()
        self.crew.dismiss()
