"""What becomes of threads whose job nobody wants any more. Real threads; leases and graces on a mock clock."""

from __future__ import annotations

import gc
import itertools
import math
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.jobs import JobInterrupted, blocking, check_cancelled, give_way, report
from stagetrio.remote_wire import WorkerLost
from stagetrio.threads import ThreadPool, open_thread_pool


async def reached(event: threading.Event) -> None:
    """Wait in a thread of Trio's own, not of a pool's, until a job has set an event."""
    assert await trio.to_thread.run_sync(event.wait, 20)


async def until_ended(pool: ThreadPool, calls: int) -> None:
    """Wait until so many calls have come to an end in the pool's threads."""
    while pool.statistics().ended < calls:
        await trio.lowlevel.checkpoint()


class Deaf:
    """A job that does not listen: it ends when it is let go, and not before."""

    def __init__(self) -> None:
        self.come = threading.Event()
        self.go = threading.Event()

    def job(self) -> str:
        self.come.set()
        assert self.go.wait(20)
        return "too late"


async def abandon(pool: ThreadPool, clock: MockClock, deaf: Deaf, key: str | None = None) -> None:
    """Have a job begin, cancel its caller, and wait until the grace is over."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.call, deaf.job, key=key))
        await reached(deaf.come)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
            clock.jump(1)


async def test_a_job_cancelled_before_it_began_never_runs() -> None:
    """Neither one that is next, nor one in the queue, nor one behind its key; the others keep their turns."""
    busy, ran = Deaf(), list[str]()
    async with open_thread_pool(1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.call, busy.job, key="k"))
        await reached(busy.come)
        scopes = []

        async def call(name: str, key: str | None) -> None:
            with trio.CancelScope() as scope:
                scopes.append(scope)
                await pool.call(ran.append, name, key=key)

        for name, key in (("next", None), ("queued", None), ("behind", "k"), ("kept", None), ("kept behind", "k")):
            nursery.start_soon(call, name, key)
            await wait_all_tasks_blocked()
        for scope in scopes[:3]:
            scope.cancel()
        await wait_all_tasks_blocked()
        assert pool.statistics().cancelled == 3
        busy.go.set()
    assert sorted(ran) == ["kept", "kept behind"]
    assert pool.statistics().stopped == 0
    assert pool.statistics().in_hand == pool.statistics().waiting == pool.statistics().parked == 0


@pytest.mark.parametrize("check", [check_cancelled, trio.from_thread.check_cancelled])
async def test_a_job_that_polls_stops_when_its_caller_is_cancelled(check: object) -> None:
    """Its finally blocks run, the caller is back when it has stopped, and no thread is lost."""
    begun, cleaned_up = threading.Event(), threading.Event()

    def polling() -> None:
        try:
            while True:
                begun.set()
                check()  # type: ignore[operator]
        finally:
            cleaned_up.set()

    async with open_thread_pool(1) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.call, polling)
            await reached(begun)
            nursery.cancel_scope.cancel()
        assert cleaned_up.is_set()
        assert await pool.call(len, "abc") == 3
        await pool.call(check_cancelled)  # the mark does not stick to later jobs
        assert (pool.statistics().stopped, pool.statistics().crew.abandoned) == (1, 0)


async def test_a_deaf_job_is_abandoned_and_its_thread_replaced(mock_clock: MockClock) -> None:
    """The caller gets away after the grace, the pool keeps its size, and the lost thread is taken off the list."""
    deaf = Deaf()
    async with open_thread_pool(1, grace=0.5) as pool:
        await abandon(pool, mock_clock, deaf)
        assert (pool.statistics().crew.unable, pool.statistics().crew.abandoned) == (1, 1)
        assert await pool.call(len, "abc") == 3
        assert pool.statistics().crew.threads == 2
        deaf.go.set()
        await until_ended(pool, 2)
        assert (pool.statistics().crew.unable, pool.statistics().crew.threads) == (0, 1)
        assert await pool.call(len, "abc") == 3


async def test_a_lost_thread_keeps_no_run_slot(mock_clock: MockClock) -> None:
    """Where one thread runs at a time, one that never ends does not keep all others from running."""
    computing, waiting = Deaf(), Deaf()

    def waits() -> str:
        with blocking():
            return waiting.job()

    async with open_thread_pool(2, max_running=1, grace=0.5) as pool:
        await abandon(pool, mock_clock, computing)
        assert await pool.call(len, "abc") == 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.call, waits)
            await reached(waiting.come)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                mock_clock.jump(1)
        assert await pool.call(len, "abcd") == 4
        computing.go.set()
        waiting.go.set()
        await until_ended(pool, 4)
        assert await pool.call(len, "abcde") == 5


async def test_the_caller_waits_for_the_grace(mock_clock: MockClock) -> None:
    """Until then a job may still stop, and its caller knows that it has."""
    deaf = Deaf()
    async with open_thread_pool(1, grace=0.5) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, deaf.job)
        await reached(deaf.come)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
            mock_clock.jump(0.4)
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            deaf.go.set()
            await until_ended(pool, 1)
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 0
    assert pool.statistics().crew.abandoned == 0


async def test_no_more_than_max_lost_threads_are_replaced(mock_clock: MockClock) -> None:
    """Then the pool has fewer, and none at last; what waits is served when one of them comes back."""
    first, second = Deaf(), Deaf()
    async with open_thread_pool(1, max_lost=1, grace=0.5) as pool, trio.open_nursery() as nursery:
        await abandon(pool, mock_clock, first)
        await abandon(pool, mock_clock, second)
        results: list[int] = []

        async def call() -> None:
            results.append(await pool.call(len, "abc"))

        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        assert (results, pool.statistics().crew.threads, pool.statistics().crew.unable) == ([], 2, 2)
        second.go.set()
        while not results:
            await trio.lowlevel.checkpoint()
        assert results == [3]
        first.go.set()


async def test_an_abandoned_job_keeps_its_key_until_it_has_ended(mock_clock: MockClock) -> None:
    """Jobs of one key never overlap, not even with one nobody waits for."""
    deaf = Deaf()
    async with open_thread_pool(2, grace=0.5) as pool, trio.open_nursery() as nursery:
        await abandon(pool, mock_clock, deaf, key="k")
        ran: list[str] = []
        nursery.start_soon(partial(pool.call, ran.append, "after", key="k"))
        assert await pool.call(len, "abc") == 3
        assert ran == []
        deaf.go.set()
    assert ran == ["after"]


async def test_a_computation_is_interrupted_where_its_caller_allowed_it() -> None:
    """An exception is raised between two of its lines, finally blocks run, and except Exception does not stop it."""
    begun, cleaned_up = threading.Event(), threading.Event()

    def endless() -> None:
        try:
            while True:
                try:
                    begun.set()
                    sum(range(10))
                except Exception:
                    pass
        finally:
            cleaned_up.set()

    async with open_thread_pool(1, grace=20) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(pool.call, endless, interrupt=True))
            await reached(begun)
            nursery.cancel_scope.cancel()
        assert cleaned_up.is_set()
        assert (pool.statistics().stopped, pool.statistics().crew.abandoned) == (1, 0)
        assert await pool.call(len, "abc") == 3


class Stay:
    """A place in a job: it sets ``begun`` when it may be cancelled, ``there`` when it is to be interrupted again, and
    computes until it is let go."""

    def __init__(self) -> None:
        self.begun, self.there, self.go = threading.Event(), threading.Event(), threading.Event()

    def compute(self) -> None:
        self.begun.set()
        self.there.set()
        while not self.go.is_set():
            pass


class Finalized:
    """Its finalizer takes as long as its owner wants."""

    def __init__(self, stay: Stay) -> None:
        self._stay = stay

    def __del__(self) -> None:
        self._stay.compute()


def endless() -> None:
    """Compute, and nothing else."""
    for _ in itertools.count():
        pass


async def interrupted_at(place: Callable[[Stay], object], clock: MockClock) -> None:
    """Cancel an endless job while it is at a place, and see that it goes on until it is let go, and no longer."""
    stay, ended = Stay(), threading.Event()

    def job() -> None:
        try:
            place(stay)
            endless()
        finally:
            ended.set()

    async with open_thread_pool(1, grace=math.inf) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.call, job, interrupt=True))
        await reached(stay.begun)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await reached(stay.there)
            for _ in range(5):
                await wait_all_tasks_blocked()
                clock.jump(2)
            assert not ended.is_set()
            stay.go.set()
            while not ended.is_set():
                clock.jump(2)
                await trio.lowlevel.checkpoint()


async def test_an_interruption_is_not_lost_in_a_finalizer(mock_clock: MockClock) -> None:
    """It is held back there, where it would be printed and dropped (a warning is an error here), and comes later."""
    await interrupted_at(lambda stay: Finalized(stay) and None, mock_clock)


async def test_an_interruption_is_not_lost_while_a_weak_reference_goes(mock_clock: MockClock) -> None:
    """Nor in what is to be done when an object is gone."""

    def place(stay: Stay) -> None:
        weakref.finalize(Deaf(), stay.compute)

    await interrupted_at(place, mock_clock)


async def test_an_interruption_is_not_lost_in_what_is_told_of_collections(mock_clock: MockClock) -> None:
    """A tool that times the collections of garbage, say, is called in the middle of a job's lines."""

    def place(stay: Stay) -> None:
        def told(phase: str, info: object) -> None:
            if phase == "start":
                stay.compute()

        gc.callbacks.append(told)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(told)

    await interrupted_at(place, mock_clock)


async def test_an_interruption_is_not_lost_in_a_generator_that_is_closed(mock_clock: MockClock) -> None:
    """The garbage collector closes it, and drops what is raised there."""

    def generator(stay: Stay) -> Iterator[None]:
        try:
            yield
        finally:
            stay.compute()

    await interrupted_at(lambda stay: next(generator(stay)), mock_clock)


async def test_an_interruption_that_was_swallowed_comes_again(mock_clock: MockClock) -> None:
    """As long as the job goes on."""
    begun, swallowed, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        try:
            try:
                begun.set()
                endless()
            except JobInterrupted:
                swallowed.set()
            endless()
        finally:
            ended.set()

    async with open_thread_pool(1, grace=math.inf) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.call, job, interrupt=True))
        await reached(begun)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await reached(swallowed)
            while not ended.is_set():
                mock_clock.jump(2)
                await trio.lowlevel.checkpoint()


async def test_cleaning_up_after_an_interruption_is_not_interrupted(mock_clock: MockClock) -> None:
    """However long it takes, and whatever it calls and catches."""
    cleaned_up = threading.Event()

    def place(stay: Stay) -> None:
        try:
            stay.begun.set()
            endless()
        finally:
            try:
                raise ValueError
            except ValueError:
                stay.compute()
            cleaned_up.set()

    await interrupted_at(place, mock_clock)
    assert cleaned_up.is_set()


async def test_a_pool_left_by_an_exception_insists_too() -> None:
    """A job that is in a finalizer when its pool is left does not compute for ever."""
    stay, ended = Stay(), threading.Event()

    def job() -> None:
        try:
            Finalized(stay)
            endless()
        finally:
            ended.set()

    async def call(pool: ThreadPool) -> None:
        with pytest.raises(WorkerLost):
            await pool.call(job, interrupt=True)
        stay.go.set()

    async def leave_by_exception(nursery: trio.Nursery) -> None:
        async with open_thread_pool(1, grace=20) as pool:
            nursery.start_soon(call, pool)
            await reached(stay.begun)
            raise ValueError("owner")

    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="owner"):
            await leave_by_exception(nursery)
    assert ended.is_set()


def test_an_interruption_leaves_no_mark_on_the_interpreter() -> None:
    """A function that is traced ends, on every version. In a process of its own, which would not end otherwise."""
    code = textwrap.dedent("""
        import itertools, sys, threading
        from functools import partial
        import trio
        from stagetrio.threads import open_thread_pool

        begun = threading.Event()

        def endless():
            for _ in itertools.count():
                begun.set()

        async def main():
            async with open_thread_pool(1, grace=20) as pool, trio.open_nursery() as nursery:
                nursery.start_soon(partial(pool.call, endless, interrupt=True))
                assert await trio.to_thread.run_sync(begun.wait, 20)
                nursery.cancel_scope.cancel()

        def traced():
            print("ended")

        def trace(*_):
            return trace

        trio.run(main)
        sys.settrace(trace)
        traced()
        sys.settrace(None)
    """)
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, stdout=subprocess.PIPE, text=True, check=True)
    assert ended.stdout == "ended\n"


async def test_a_job_that_did_not_allow_it_is_not_interrupted(mock_clock: MockClock) -> None:
    """By default nothing is raised where the code does not expect it."""
    caught: list[BaseException] = []
    begun, go = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        try:
            while not go.is_set():
                sum(range(10))
        except BaseException as error:
            caught.append(error)

    async with open_thread_pool(1, grace=0.5) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.call, job)
            await reached(begun)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                mock_clock.jump(1)
        go.set()
        await until_ended(pool, 1)
    assert caught == []


@pytest.mark.parametrize("max_running", [1, 4])
async def test_an_interruption_hits_its_own_job_only(max_running: int) -> None:
    """Hundreds of jobs cancelled at any point of theirs, with every call upon their worker: the others never notice."""
    interrupted = itertools.count()
    begun: set[int] = set()

    def victim(n: int) -> None:
        try:
            begun.add(n)
            for i in itertools.count():  # endless: it ends by the interruption, or has never begun
                if i % 10 < n % 10:
                    give_way()
                    report(i)
                    with blocking():
                        pass
        except JobInterrupted:
            next(interrupted)
            raise

    def innocent(n: int) -> int:
        for i in range(200):
            if i % 50 == 0:
                give_way()
        return n

    chance = random.Random(1)
    async with open_thread_pool(4, max_running=max_running, grace=20) as pool, trio.open_nursery() as nursery:

        async def cancelled(n: int) -> None:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as racers:
                    racers.start_soon(partial(pool.call, victim, n, interrupt=True))
                    while n % 2 and n not in begun:
                        await trio.lowlevel.checkpoint()
                    for _ in range(chance.randrange(40)):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

        async def served(n: int) -> None:
            assert await pool.call(innocent, n) == n

        for n in range(150):
            nursery.start_soon(served, n)
            await cancelled(n)
    statistics = pool.statistics()
    assert statistics.crew.abandoned == 0
    assert statistics.crew.unable == statistics.in_hand == 0
    assert next(interrupted) > 0


async def test_a_job_that_outlives_its_lease_is_lost_to_its_caller(mock_clock: MockClock) -> None:
    """WorkerLost says that it may have run; the thread is given the grace, then replaced; the key stays in hand."""
    deaf = Deaf()
    async with open_thread_pool(1, lease=10, grace=2) as pool, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(WorkerLost, match="lease of 10 s") as lost:
                await pool.call(deaf.job, key="k")
            assert lost.value.may_have_run

        nursery.start_soon(call)
        await reached(deaf.come)
        for _ in range(5):  # looked at four times per lease, from a quarter of it on
            assert pool.statistics().expired == 0
            mock_clock.jump(2.5)
            await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 0
        assert (pool.statistics().expired, pool.statistics().crew.unable) == (1, 0)
        mock_clock.jump(2.5)
        await wait_all_tasks_blocked()
        assert (pool.statistics().expired, pool.statistics().crew.unable) == (1, 1)
        assert await pool.call(len, "abc") == 3
        deaf.go.set()
        assert await pool.call(len, "abcd", key="k") == 4


async def test_a_job_that_polls_ends_with_its_lease(mock_clock: MockClock) -> None:
    """It is told to stop, and its thread is not lost."""
    begun = threading.Event()

    def polling() -> None:
        begun.set()
        while True:
            check_cancelled()

    async with open_thread_pool(1, lease=1, grace=20) as pool, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(WorkerLost):
                await pool.call(polling)

        nursery.start_soon(call)
        await reached(begun)
        for _ in range(6):
            mock_clock.jump(0.25)
            await wait_all_tasks_blocked()
        await until_ended(pool, 1)
        assert await pool.call(len, "abc") == 3
        assert pool.statistics().crew.abandoned == 0


async def test_short_jobs_never_use_up_a_lease(mock_clock: MockClock) -> None:
    """The lease is one job's, not that of the thread that runs many, nor that of the time it waited."""
    async with open_thread_pool(1, lease=1) as pool:
        for _ in range(20):
            assert await pool.call(len, "abc") == 3
            mock_clock.jump(0.3)
            await wait_all_tasks_blocked()
        assert pool.statistics().expired == 0


async def test_a_pool_left_by_an_exception_gives_its_jobs_up() -> None:
    """Whoever waits elsewhere is told whether the job may have run; polling jobs stop."""
    begun, stopped = threading.Event(), threading.Event()
    outcomes: dict[str, Exception] = {}

    def polling() -> None:
        try:
            begun.set()
            while True:
                check_cancelled()
        finally:
            stopped.set()

    async def call(pool: ThreadPool, name: str) -> None:
        try:
            await pool.call(polling)
        except (WorkerLost, trio.ClosedResourceError) as error:
            outcomes[name] = error

    async def leave_by_exception(nursery: trio.Nursery) -> None:
        async with open_thread_pool(1) as pool:
            nursery.start_soon(call, pool, "running")
            await reached(begun)
            for name in ("next", "queued"):
                nursery.start_soon(call, pool, name)
                await wait_all_tasks_blocked()
            raise ValueError("owner")

    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="owner"):
            await leave_by_exception(nursery)
    assert isinstance(outcomes["running"], WorkerLost)
    assert isinstance(outcomes["next"], trio.ClosedResourceError)
    assert isinstance(outcomes["queued"], trio.ClosedResourceError)
    await reached(stopped)


async def test_a_pool_cancelled_from_outside_leaves_nobody_waiting() -> None:
    """A shielded owner that goes on using it is told, since nothing can be hosted any more."""
    with trio.CancelScope() as outer:
        async with open_thread_pool(1) as pool:
            outer.cancel()
            with trio.CancelScope(shield=True):
                with pytest.raises((WorkerLost, trio.ClosedResourceError)):
                    await pool.call(len, "abc")
                with pytest.raises(trio.ClosedResourceError):
                    await pool.call(len, "abc")


async def test_a_cancelled_batch_leaves_out_what_had_not_begun() -> None:
    """Its running items are told to stop."""
    begun = threading.Event()
    seen: list[int] = []

    def item(n: int) -> None:
        seen.append(n)
        begun.set()
        while True:
            check_cancelled()

    async with open_thread_pool(1) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: pool.call_batch(item, range(10)))
            await reached(begun)
            nursery.cancel_scope.cancel()
        assert seen == [0]
        assert pool.statistics().crew.abandoned == 0


def test_a_thread_may_outlive_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    """An abandoned job that ends after its event loop raises nothing and prints nothing; later runs do not mind."""
    deaf = Deaf()

    async def main() -> None:
        async with open_thread_pool(1, grace=0) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.call, deaf.job)
                await reached(deaf.come)
                nursery.cancel_scope.cancel()

    async def later() -> None:
        async with open_thread_pool(1) as pool:
            assert await pool.call(len, "abc") == 3

    trio.run(main)
    deaf.go.set()
    for _ in range(20):
        trio.run(later)
    assert capfd.readouterr() == ("", "")
