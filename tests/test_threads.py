"""A pool of worker threads: results, turns, keys, repetition, batches, progress. Real threads, no timings."""

from __future__ import annotations

import contextvars
import math
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.jobs import Again, blocking, check_cancelled, give_way, report
from stagetrio.limiter import Overloaded
from stagetrio.threads import ThreadPool, open_thread_pool

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def reached(event: threading.Event) -> None:
    """Wait in a thread of Trio's own, not of a pool's, until a job has set an event."""
    assert await trio.to_thread.run_sync(event.wait, 20)


class Door:
    """Holds up jobs: each notes that it has come and waits until it is opened."""

    def __init__(self) -> None:
        self.come = threading.Event()
        self.open = threading.Event()

    def wait(self) -> None:
        self.come.set()
        assert self.open.wait(20)


async def test_a_call_returns_what_the_function_returns() -> None:
    """It runs in another thread, with the arguments given."""
    async with open_thread_pool(2) as pool:
        assert await pool.call(divmod, 17, 5) == (3, 2)
        assert await pool.call(threading.get_ident) != threading.get_ident()


async def test_a_call_raises_what_the_function_raises() -> None:
    """The traceback leads into the function; the thread goes on."""

    def fails() -> None:
        raise KeyError("broken")

    async with open_thread_pool(1) as pool:
        with pytest.raises(KeyError, match="broken") as caught:
            await pool.call(fails)
        assert traceback.extract_tb(caught.tb)[-1].name == "fails"
        assert await pool.call(len, "ok") == 2
        assert (pool.statistics().ended, pool.statistics().failed) == (2, 1)


async def test_a_call_is_a_checkpoint() -> None:
    """A call in a cancelled scope submits nothing."""
    async with open_thread_pool(1) as pool:
        ran: list[int] = []
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.call(ran.append, 1)
        assert scope.cancelled_caught
        with trio.testing.assert_checkpoints():
            await pool.call(ran.append, 2)
        assert ran == [2]


async def test_a_job_sees_the_callers_context_and_keeps_its_changes_to_itself() -> None:
    """Context variables go along, and nothing comes back by them."""

    def look_and_change() -> str:
        seen = variable.get()
        variable.set("changed")
        return seen

    async with open_thread_pool(1) as pool:
        variable.set("callers")
        assert await pool.call(look_and_change) == "callers"
        assert variable.get() == "callers"
        assert await pool.call(variable.get) == "callers"


async def test_trios_from_thread_functions_work_in_a_job() -> None:
    """A job can call back into the loop that awaits it."""

    async def double(n: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * n

    async with open_thread_pool(1) as pool:
        assert await pool.call(lambda: trio.from_thread.run(double, 21)) == 42
        assert await pool.call(lambda: trio.from_thread.run_sync(trio.current_time)) <= trio.current_time()


async def test_no_more_threads_than_asked_for_and_idle_ones_first() -> None:
    """Calls in turn share one thread; calls at once get threads up to the bound."""
    async with open_thread_pool(3) as pool:
        assert len({await pool.call(threading.get_ident) for _ in range(20)}) == 1
        assert pool.statistics().crew.threads == 1
        everyone = threading.Barrier(3)
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(pool.call, everyone.wait, 20)
        assert pool.statistics().crew.threads == 3


async def order_of_service(pool: ThreadPool, submissions: list[tuple[str, Any]]) -> list[str]:
    """Names in the order in which a pool of one thread ran them, all submitted while it was busy."""
    door, ran = Door(), list[str]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, door.wait)
        await reached(door.come)
        for name, flow in submissions:
            nursery.start_soon(partial(pool.call, ran.append, name, flow=flow))
            await wait_all_tasks_blocked()
        door.open.set()
    return ran


async def test_producers_take_turns() -> None:
    """Three jobs of a polite flow do not wait for the forty a hog has submitted before."""
    async with open_thread_pool(1) as pool:
        hog = [(f"hog {n}", "hog") for n in range(40)]
        polite = [(f"polite {n}", "polite") for n in range(3)]
        ran = await order_of_service(pool, hog + polite)
        assert len(ran) == 43
        assert [name for name in ran if name.startswith("polite")] == ["polite 0", "polite 1", "polite 2"]
        assert ran.index("polite 0") <= 3
        assert ran.index("polite 2") < 40  # where it would stand if first come were first served


async def test_a_flow_without_rivals_is_served_in_order() -> None:
    """First come, first served, where nobody else asks."""
    async with open_thread_pool(1) as pool:
        names = [str(n) for n in range(20)]
        assert await order_of_service(pool, [(name, None) for name in names]) == names


async def test_too_many_waiting_jobs_are_refused() -> None:
    """Overloaded names the bound, and what waits is served all the same."""
    door, ran = Door(), list[int]()
    async with open_thread_pool(1, max_waiting=2) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, door.wait)
        await reached(door.come)
        for n in range(3):  # one more is in hand
            nursery.start_soon(pool.call, ran.append, n)
            await wait_all_tasks_blocked()
        with pytest.raises(Overloaded) as refusal:
            await pool.call(ran.append, 99)
        assert refusal.value.reason == "queue"
        assert pool.statistics().waiting == 2
        door.open.set()
    assert ran == [0, 1, 2]


async def test_jobs_of_one_key_never_overlap_and_hold_no_thread_while_they_wait() -> None:
    """With two threads and one key in hand, nine of that key leave the second thread to others; order is kept."""
    door, ran = Door(), list[int]()
    inside = 0
    most = 0

    def keyed(n: int) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if n == 0:
            door.wait()
        ran.append(n)
        inside -= 1

    async with open_thread_pool(2) as pool, trio.open_nursery() as nursery:
        for n in range(10):
            nursery.start_soon(partial(pool.call, keyed, n, key="k"))
            await wait_all_tasks_blocked()
        await reached(door.come)
        assert await pool.call(len, "free") == 4
        assert await pool.call(len, "other key", key="other") == 9
        assert pool.statistics().parked == 9
        assert ran == []
        door.open.set()
    assert ran == list(range(10))
    assert most == 1


async def test_many_jobs_of_one_key_leave_room_for_the_others_in_the_queue() -> None:
    """However many of one key wait, what is parked is bounded, and every one of them runs in the end, in order."""
    door, ran = Door(), list[int]()

    def keyed(n: int) -> None:
        if n == 0:
            door.wait()
        ran.append(n)

    async with open_thread_pool(2) as pool, trio.open_nursery() as nursery:
        for n in range(300):
            nursery.start_soon(partial(pool.call, keyed, n, key="k", flow="keyed"))
            await wait_all_tasks_blocked()
        await reached(door.come)
        assert pool.statistics().parked < 100
        assert await pool.call(len, "free") == 4
        door.open.set()
    assert ran == list(range(300))
    assert pool.statistics().parked == pool.statistics().waiting == 0


async def test_a_failing_job_hands_its_key_on() -> None:
    """The next job of the key runs after an exception, too."""

    def fails() -> None:
        raise ValueError

    async with open_thread_pool(2) as pool:
        for _ in range(3):
            with pytest.raises(ValueError):
                await pool.call(fails, key="k")
        assert await pool.call(len, "abc", key="k") == 3


async def test_again_runs_the_job_again_when_its_time_has_come(mock_clock: MockClock) -> None:
    """By Trio's clock; it holds its key but no thread meanwhile."""
    runs = 0
    log: list[str] = []

    def twice() -> str | Again:
        nonlocal runs
        runs += 1
        log.append(f"run {runs}")
        return "done" if runs == 2 else Again(10)

    async with open_thread_pool(1) as pool, trio.open_nursery() as nursery:
        results: list[object] = []

        async def call() -> None:
            results.append(await pool.call(twice, key="k"))

        nursery.start_soon(call)
        while pool.statistics().ended < 1:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(lambda: pool.call(log.append, "same key", key="k"))
        await wait_all_tasks_blocked()
        assert await pool.call(len, "free") == 4
        mock_clock.jump(9.9)
        await wait_all_tasks_blocked()
        assert (runs, results) == (1, [])
        mock_clock.jump(0.2)
    assert results == ["done"]
    assert log == ["run 1", "run 2", "same key"]


async def test_a_cancelled_wait_for_the_next_run_ends_the_job_and_frees_its_key() -> None:
    """Between two runs nothing runs, so nothing has to be stopped."""
    async with open_thread_pool(1) as pool:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: pool.call(Again, 1e6, key="k"))
                while pool.statistics().ended < 1:
                    await trio.lowlevel.checkpoint()
                await wait_all_tasks_blocked()
                scope.cancel()
        assert await pool.call(len, "abc", key="k") == 3
        assert pool.statistics().stopped == 0


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan])
def test_again_needs_a_time(seconds: float) -> None:
    """Negative and endless times are refused by name and value."""
    with pytest.raises(ValueError, match=rf"seconds must .* not {seconds}"):
        Again(seconds)


async def test_a_batch_comes_back_in_order() -> None:
    """One result per item, whichever thread made it, and an empty batch is an empty list."""
    async with open_thread_pool(3) as pool:
        assert await pool.call_batch(str, range(1000)) == [str(n) for n in range(1000)]
        with trio.testing.assert_checkpoints():
            assert await pool.call_batch(str, []) == []


async def test_a_batch_crosses_once_not_once_per_item() -> None:
    """A thousand quick items are a handful of jobs."""
    async with open_thread_pool(2) as pool:
        await pool.call_batch(abs, range(1000))
        assert pool.statistics().ended < 100


async def test_a_batch_uses_the_threads_there_are() -> None:
    """Items that wait for each other all get a thread."""
    together = threading.Barrier(3)
    async with open_thread_pool(3) as pool:
        assert sorted(await pool.call_batch(lambda _: together.wait(20), range(3))) == [0, 1, 2]


async def test_a_batch_ends_with_its_first_error() -> None:
    """What had not begun is left out, and the pool goes on."""
    seen: list[int] = []

    def fails_at_three(n: int) -> None:
        seen.append(n)
        if n == 3:
            raise ValueError("three")

    async with open_thread_pool(1) as pool:
        with pytest.raises(ValueError, match="three"):
            await pool.call_batch(fails_at_three, range(100))
        assert seen == [0, 1, 2, 3]
        assert await pool.call(len, "abc") == 3


async def test_a_long_batch_lets_others_have_their_turn() -> None:
    """A batch that has had the thread for a while asks who is next."""
    async with open_thread_pool(1) as pool, trio.open_nursery() as nursery:
        begun = threading.Event()
        other_ran = threading.Event()

        def item(_: int) -> bool:
            begun.set()
            return other_ran.wait(0.001)  # each takes at least a millisecond, until the other job has run

        async def batch() -> None:
            results = await pool.call_batch(item, range(100_000), flow="batch")
            assert results[-1]

        nursery.start_soon(batch)
        await reached(begun)
        await pool.call(other_ran.set, flow="other")


async def test_progress_values_come_in_order_and_then_the_result() -> None:
    """What the job reports is iterated over; its value follows."""

    def job(n: int) -> str:
        for i in range(n):
            report(i)
        return "result"

    async with open_thread_pool(1) as pool:
        async with pool.run(job, 100) as progress:
            assert [value async for value in progress] == list(range(100))
            assert await progress.result() == "result"
        async with pool.run(job, 100) as progress:
            assert await progress.result() == "result"


async def test_a_job_far_ahead_of_its_caller_waits() -> None:
    """What is on its way is bounded; nothing is lost."""
    reported = 0

    def job() -> None:
        nonlocal reported
        for i in range(50):
            report(i)
            reported += 1

    async with open_thread_pool(1) as pool:
        async with pool.run(job) as progress:
            for expected in range(50):
                assert await anext(progress) == expected
                assert reported <= expected + 1 + 17


async def test_reports_nobody_listens_to_are_dropped() -> None:
    """The same function works in a plain call, and outside any pool."""

    def job() -> int:
        for i in range(1000):
            report(i)
            check_cancelled()
            give_way()
            with blocking():
                pass
        return 7

    async with open_thread_pool(1) as pool:
        assert await pool.call(job) == 7
    assert job() == 7


async def test_an_error_ends_the_progress() -> None:
    """It is raised where the end would be seen: after the values, by result(), or by leaving the block."""

    def job() -> None:
        report(1)
        raise ValueError("midway")

    async with open_thread_pool(1) as pool:
        async with pool.run(job) as progress:
            assert await anext(progress) == 1
            with pytest.raises(ValueError, match="midway"):
                await anext(progress)
        async with pool.run(job) as progress:
            with pytest.raises(ValueError, match="midway"):
                await progress.result()

        async def look_away() -> None:
            async with pool.run(job) as progress:
                assert await anext(progress) == 1
                while pool.statistics().ended < 3:
                    await trio.lowlevel.checkpoint()

        with pytest.raises(ValueError, match="midway"):
            await look_away()


async def test_leaving_the_progress_early_stops_the_job() -> None:
    """A job that waits for its caller to take a value is let go, and told to stop."""
    stopped = threading.Event()

    def endless() -> None:
        try:
            while True:
                report("more")
        except trio.Cancelled:
            stopped.set()
            raise

    async with open_thread_pool(1) as pool:
        async with pool.run(endless) as progress:
            assert await anext(progress) == "more"
        await reached(stopped)
        assert await pool.call(len, "abc") == 3
        assert pool.statistics().crew.abandoned == 0


async def test_leaving_the_pool_waits_for_what_it_has_accepted() -> None:
    """Jobs in hand and jobs that wait come to their end; then it takes nothing."""
    door, ran = Door(), list[int]()
    async with trio.open_nursery() as nursery:
        async with open_thread_pool(1) as pool:
            nursery.start_soon(pool.call, door.wait)
            await reached(door.come)
            nursery.start_soon(pool.call, ran.append, 1)
            nursery.start_soon(lambda: pool.call_batch(ran.append, [2, 3]))
            await wait_all_tasks_blocked()
            door.open.set()
    assert sorted(ran) == [1, 2, 3]
    with pytest.raises(trio.ClosedResourceError):
        await pool.call(ran.append, 4)


async def test_leaving_the_pool_ends_jobs_that_sleep_until_their_next_run() -> None:
    """They would keep it open for ever; whoever waits for them is told."""
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await pool.call(Again, 1e6)

        async with open_thread_pool(1) as pool:
            nursery.start_soon(call)
            while pool.statistics().ended < 1:
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()


@pytest.mark.parametrize("held", [False, True])
async def test_at_most_max_running_jobs_run_at_once(held: bool) -> None:
    """However many threads there are; a job that says it blocks lets another one run meanwhile."""
    running = most = 0
    everyone = threading.Barrier(6)
    lock = threading.Lock()

    def count(change: int) -> None:
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    def job() -> None:
        count(+1)
        sum(range(20_000))
        if held:
            count(-1)
            with blocking():
                everyone.wait(20)  # reached only if all six are let in
            count(+1)
        sum(range(20_000))
        count(-1)

    async with open_thread_pool(6, max_running=2) as pool, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(pool.call, job)
    assert most <= 2


async def test_jobs_that_could_not_run_stay_in_their_fair_order() -> None:
    """Where one runs at a time, a newcomer does not stand behind as many jobs as there are threads."""
    door, ran = Door(), list[str]()
    async with open_thread_pool(16, max_running=1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, door.wait)
        await reached(door.come)
        for n in range(16):
            nursery.start_soon(partial(pool.call, ran.append, f"hog {n}", flow="hog"))
            await wait_all_tasks_blocked()
        nursery.start_soon(partial(pool.call, ran.append, "polite", flow="polite"))
        await wait_all_tasks_blocked()
        assert pool.statistics().crew.threads == 1
        door.open.set()
    assert ran.index("polite") <= 3


async def test_a_job_that_gives_way_lets_another_begin() -> None:
    """In a pool that runs one job at a time, a long computation need not keep the others waiting."""
    begun = threading.Event()

    def long_computation() -> None:
        while not begun.is_set():
            give_way()

    async with open_thread_pool(2, max_running=1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, long_computation)
        nursery.start_soon(pool.call, begun.set)
        with trio.fail_after(20):
            while pool.statistics().ended < 2:
                await trio.lowlevel.checkpoint()


def wrong(**arguments: Any) -> Callable[[], Any]:
    async def open_it() -> None:
        async with open_thread_pool(**{"max_threads": 1, **arguments}):
            raise AssertionError("unreachable")

    return open_it


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_threads": 0}, ValueError, "max_threads must be >= 1, not 0"),
        ({"max_threads": math.inf}, TypeError, "max_threads must be an int, not inf"),
        ({"max_waiting": 0}, ValueError, "max_waiting must be at least 1, not 0"),
        ({"max_waiting_per_flow": 1.5}, TypeError, "max_waiting_per_flow must be an int or math.inf, not 1.5"),
        ({"max_running": 0}, ValueError, "max_running must be >= 1, not 0"),
        ({"max_running": 0.5}, TypeError, "max_running must be an int, not 0.5"),
        ({"max_lost": -1}, ValueError, "max_lost must be >= 0, not -1"),
        ({"lease": 0}, ValueError, "lease must be > 0, not 0"),
        ({"lease": "a"}, TypeError, "lease must be a number, not 'a'"),
        ({"grace": "a"}, TypeError, "grace must be a number, not 'a'"),
        ({"grace": -1}, ValueError, "grace must be >= 0, not -1"),
    ],
)
async def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    """Each is refused with its name and value, before anything starts."""
    with pytest.raises(error, match=says):
        await wrong(**arguments)()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"flow": ["x"]}, TypeError, r"flow must be hashable, not \['x'\]"),
        ({"key": ["x"]}, TypeError, r"key must be hashable, not \['x'\]"),
        ({"cost": 0}, ValueError, "cost must be finite and above 0, not 0"),
        ({"cost": math.nan}, ValueError, "cost must be finite and above 0, not nan"),
        ({"cost": "a"}, TypeError, "cost must be a number, not 'a'"),
        ({"flow": "weightless"}, ValueError, "weight must be finite and above 0, not 0"),
    ],
)
async def test_a_call_that_could_not_be_filed_is_refused(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    """At the call, by the argument's name; it never runs, nothing is kept of it, and the pool goes on."""
    ran: list[int] = []
    async with open_thread_pool(1, weight=lambda flow: 0 if flow == "weightless" else 1) as pool:
        with pytest.raises(error, match=says):
            await pool.call(ran.append, 1, **arguments)
        with pytest.raises(error, match=says):
            async with pool.run(ran.append, 1, **arguments):
                raise AssertionError("unreachable")
        if "key" not in arguments:
            with pytest.raises(error, match=says):
                await pool.call_batch(ran.append, [1], **arguments)
        assert await pool.call(len, "abc", flow="x", key="x", cost=2) == 3
        statistics = pool.statistics()
    assert not ran
    assert (statistics.waiting, statistics.in_hand, statistics.ended) == (0, 0, 1)


async def test_an_async_function_is_no_job() -> None:
    """It is refused by its name, and not answered by a coroutine that nobody awaits."""
    async with open_thread_pool(1) as pool:
        with pytest.raises(TypeError, match="fn must be a sync function, not <function sleep"):
            await pool.call(trio.sleep, 1)
