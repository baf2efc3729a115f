"""A pool of worker processes. Real processes; times are bounds, never conditions."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import process_jobs as jobs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stagetrio.limiter import Overloaded
from stagetrio.processes import ProcessPool, open_process_pool
from stagetrio.remote_wire import RemoteError, WorkerLost

ROOT = Path(__file__).parent.parent


async def until(condition: Callable[[], object]) -> None:
    """Wait for something to have happened in other processes."""
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - other processes set no event of ours
            await trio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether there is such a process, not only its remains."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_a_call_runs_in_another_process() -> None:
    """Importable functions, plain and attrs arguments and results; one worker serves many calls."""
    async with open_process_pool(2) as pool:
        assert await pool.call(divmod, 17, 5) == (3, 2)
        assert await pool.call(jobs.mirrored, jobs.Point(1, 2)) == jobs.Point(2, 1)
        pids = {await pool.call(jobs.pid) for _ in range(5)}
        assert len(pids) == 1
        assert os.getpid() not in pids
        assert (pool.statistics().ended, pool.statistics().processes) == (7, 1)
    assert not any(alive(pid) for pid in pids)


async def test_large_arguments_and_results_cross_whole() -> None:
    """Megabytes, both ways."""
    data = os.urandom(3_000_000)
    async with open_process_pool(1) as pool:
        assert await pool.call(bytes.__add__, data, b"!") == data + b"!"


async def test_an_exception_comes_back_as_itself() -> None:
    """With the traceback of the worker as a note; the worker goes on."""
    async with open_process_pool(1) as pool:
        with pytest.raises(KeyError, match="broken") as caught:
            await pool.call(jobs.fails, "broken")
        assert "in fails" in caught.value.__notes__[0]
        assert "process_worker" not in caught.value.__notes__[0]
        assert await pool.call(len, "abc") == 3
        assert (pool.statistics().failed, pool.statistics().lost) == (1, 0)


async def test_an_exception_that_cannot_cross_is_described() -> None:
    """Its type, message and traceback come as a RemoteError; what would end a program ends nothing."""
    async with open_process_pool(1) as pool:
        with pytest.raises(RemoteError, match=r"process_jobs.Picky: 1 and 2") as caught:
            await pool.call(jobs.fails_pickily)
        assert "in fails_pickily" in caught.value.remote_traceback
        with pytest.raises(RemoteError, match="SystemExit: 3"):
            await pool.call(jobs.exits)
        with pytest.raises(Exception, match=r"pickle|local"):
            await pool.call(jobs.unpicklable)
        assert await pool.call(len, "abc") == 3
        assert pool.statistics().processes == 1


async def test_what_cannot_be_sent_is_refused_before_it_waits() -> None:
    """A lambda has no name to be imported by."""
    async with open_process_pool(1) as pool:
        with pytest.raises(TypeError, match=r"<lambda> and its arguments must be picklable: .*(pickle|local)"):
            await pool.call(lambda: None)
        assert pool.statistics().starting == 0


class Landmine:
    """Sent, it becomes the call of a function in whoever unpacks it."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.what = function, args

    def __reduce__(self) -> Any:
        return self.what


@pytest.mark.parametrize(
    ("what", "says"), [((jobs.fails, "there"), "KeyError: 'there'"), ((jobs.exits,), "SystemExit: 3")]
)
async def test_what_a_worker_cannot_unpack_is_an_answer(what: Any, says: str) -> None:
    """Also where it is long, or one of many: the function is named, it has not run, and the worker stays."""
    async with open_process_pool(1) as pool:
        worker = await pool.call(jobs.pid)
        for mine in (Landmine(*what), [bytes(1_000_000), Landmine(*what)]):
            with pytest.raises(TypeError, match=f"^builtins.len and its arguments must be importable .*: {says}"):
                await pool.call(len, mine, key="k")
            with pytest.raises(TypeError, match=says):
                await pool.call_batch(len, ["abc", mine])
        assert await pool.call(jobs.pid, key="k") == worker
        statistics = pool.statistics()
    assert (statistics.failed, statistics.lost, statistics.failed_starts) == (4, 0, 0)


async def test_a_call_is_a_checkpoint() -> None:
    """A call in a cancelled scope submits nothing."""
    async with open_process_pool(1, warm=1) as pool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.call(len, "abc")
        assert scope.cancelled_caught
        assert pool.statistics().queue.sent == 0
        with trio.testing.assert_checkpoints():
            await pool.call(len, "abc")


async def test_a_dead_worker_is_lost_to_its_caller_and_to_nobody_else(tmp_path: Path) -> None:
    """WorkerLost says how it ended; other calls come to their end, and a new worker takes the place."""
    async with open_process_pool(2) as pool, trio.open_nursery() as nursery:
        other: list[int] = []

        async def call_other() -> None:
            other.append(await pool.call(jobs.wait_for, str(tmp_path / "go")))

        nursery.start_soon(call_other)
        await until((tmp_path / "go.begun").exists)
        with pytest.raises(WorkerLost, match="SIGKILL") as lost:
            await pool.call(jobs.dies)
        assert lost.value.may_have_run
        with pytest.raises(WorkerLost, match="SIGSEGV"):
            await pool.call(jobs.dies, signal.SIGSEGV)
        assert await pool.call(len, "abc") == 3
        (tmp_path / "go").touch()
    assert len(other) == 1
    assert pool.statistics().lost == 2


async def test_a_child_of_a_dead_worker_hides_nothing(tmp_path: Path) -> None:
    """It inherited the worker's end of the socket, so no end of it is seen; that of the process is."""
    async with open_process_pool(1) as pool:
        with pytest.raises(WorkerLost, match="SIGKILL") as lost:
            await pool.call(jobs.forks_and_dies, str(tmp_path / "go"))
        assert lost.value.may_have_run
        assert await pool.call(len, "abc") == 3
        (tmp_path / "go").touch()


async def test_a_worker_that_died_while_idle_is_replaced() -> None:
    """Nobody notices."""
    async with open_process_pool(1) as pool:
        first = await pool.call(jobs.pid)
        os.kill(first, signal.SIGKILL)
        await until(lambda: pool.statistics().processes == 0)
        assert await pool.call(jobs.pid) != first
        assert pool.statistics().lost == 0


async def test_cancelling_a_call_kills_its_worker(tmp_path: Path) -> None:
    """Whatever it computes; it is gone when the caller is back, and its key is free."""
    path = tmp_path / "pid"
    async with open_process_pool(1) as pool:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(pool.call, jobs.forever, str(path), key="k"))
                await until(lambda: path.exists() and path.read_text())
                scope.cancel()
        assert not alive(int(path.read_text()))
        assert await pool.call(len, "abc", key="k") == 3
        assert (pool.statistics().killed, pool.statistics().lost) == (1, 0)


async def test_a_call_cancelled_before_it_began_never_runs(tmp_path: Path) -> None:
    """No worker is killed for it; the calls behind it keep their turns."""
    log = tmp_path / "log"
    async with open_process_pool(1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, jobs.wait_for, str(tmp_path / "go"))
        await until((tmp_path / "go.begun").exists)
        async with trio.open_nursery() as cancelled:
            cancelled.start_soon(pool.call, jobs.note, str(log), "never")
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.call, jobs.note, str(log), "kept")
            await wait_all_tasks_blocked()
            cancelled.cancel_scope.cancel()
        assert pool.statistics().cancelled == 1
        (tmp_path / "go").touch()
    assert log.read_text() == "kept\n"
    assert pool.statistics().killed == 0


async def test_producers_take_turns(tmp_path: Path) -> None:
    """Three calls of a polite flow do not wait for the thirty a hog has submitted before."""
    log = tmp_path / "log"
    async with open_process_pool(1) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, jobs.wait_for, str(tmp_path / "go"))
        await until((tmp_path / "go.begun").exists)
        for n in range(30):
            nursery.start_soon(partial(pool.call, jobs.note, str(log), f"hog {n}", flow="hog"))
            await wait_all_tasks_blocked()
        for n in range(3):
            nursery.start_soon(partial(pool.call, jobs.note, str(log), f"polite {n}", flow="polite"))
            await wait_all_tasks_blocked()
        (tmp_path / "go").touch()
    ran = log.read_text().splitlines()
    assert len(ran) == 33
    assert [name for name in ran if name.startswith("polite")] == ["polite 0", "polite 1", "polite 2"]
    assert ran.index("polite 0") <= 2
    assert ran.index("polite 2") < 30  # where it would stand if first come were first served


async def test_calls_of_one_key_never_overlap(tmp_path: Path) -> None:
    """While one waits, others of its key do too, and other keys have the second worker."""
    log = tmp_path / "log"
    async with open_process_pool(2) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(partial(pool.call, jobs.wait_for, str(tmp_path / "go"), key="k"))
        await until((tmp_path / "go.begun").exists)
        for n in range(5):
            nursery.start_soon(partial(pool.call, jobs.note, str(log), str(n), key="k"))
            await wait_all_tasks_blocked()
        assert await pool.call(len, "abc", key="other") == 3
        assert not log.exists()
        (tmp_path / "go").touch()
    assert log.read_text().split() == ["0", "1", "2", "3", "4"]


async def test_too_many_waiting_calls_are_refused(tmp_path: Path) -> None:
    """Overloaded names the bound, and what waits is served all the same."""
    async with open_process_pool(1, max_waiting=2) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.call, jobs.wait_for, str(tmp_path / "go"))
        await until((tmp_path / "go.begun").exists)
        for n in range(2):
            nursery.start_soon(pool.call, jobs.note, str(tmp_path / "log"), str(n))
            await wait_all_tasks_blocked()
        with pytest.raises(Overloaded) as refusal:
            await pool.call(len, "abc")
        assert refusal.value.reason == "queue"
        (tmp_path / "go").touch()
    assert (tmp_path / "log").read_text().split() == ["0", "1"]


async def test_again_calls_the_function_again(tmp_path: Path) -> None:
    """Until it returns something else."""
    async with open_process_pool(1) as pool:
        assert await pool.call(jobs.until_third, str(tmp_path / "runs"), key="k") == "done"
        assert await pool.call(len, "abc", key="k") == 3
    assert (tmp_path / "runs").read_text().split() == ["run"] * 3


async def test_what_a_job_may_say_it_may_say_in_a_process(tmp_path: Path) -> None:
    """The same function runs in a thread and in a process."""
    async with open_process_pool(1) as pool:
        assert await pool.call(jobs.asks_politely) == "fine"
        assert await pool.call(jobs.counts, 100) == "counted"


async def test_a_batch_comes_back_in_order_from_several_workers(tmp_path: Path) -> None:
    """However many items travel together; an empty batch is an empty list."""
    async with open_process_pool(2) as pool:
        assert await pool.call_batch(str, range(5000)) == [str(n) for n in range(5000)]
        meet = partial(jobs.meet, str(tmp_path), others=2)
        assert len(set(await pool.call_batch(meet, ["a", "b"]))) == 2
        with trio.testing.assert_checkpoints():
            assert await pool.call_batch(str, []) == []
        assert pool.statistics().ended < 500


async def test_a_batch_ends_with_its_first_error() -> None:
    """As the exception itself, and the pool goes on."""
    async with open_process_pool(2) as pool:
        with pytest.raises(ValueError, match="seven"):
            await pool.call_batch(jobs.odd_fails, range(1000))
        assert await pool.call_batch(jobs.odd_fails, range(6)) == [0, 1, 2, 3, 4, 5]


async def test_progress_values_come_in_order_and_then_the_result() -> None:
    """What the job reports is iterated over; its value, or its error, follows."""
    async with open_process_pool(1) as pool:
        async with pool.run(jobs.counts, 200) as progress:
            assert [value async for value in progress] == list(range(200))
            assert await progress.result() == "counted"
        async with pool.run(jobs.counts_and_fails, 3) as progress:
            assert [await anext(progress) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(ValueError, match="counted out"):
                await anext(progress)
        async with pool.run(jobs.dies) as progress:
            with pytest.raises(WorkerLost, match="SIGKILL"):
                await progress.result()
        assert await pool.call(len, "abc") == 3


async def test_a_job_far_ahead_of_its_caller_waits(tmp_path: Path) -> None:
    """What is on its way is bounded, by 16 values and what a socket holds; leaving early kills the worker."""
    path = tmp_path / "count"
    async with open_process_pool(1) as pool:
        async with pool.run(jobs.counts_and_notes, str(path), 10_000) as progress:
            assert len(await anext(progress)) == 100_000
            await until(lambda: path.exists() and int(path.read_text() or 0) > 16)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert int(path.read_text() or 0) < 100
        assert pool.statistics().killed == 1
        assert await pool.call(len, "abc") == 3


async def test_warm_workers_are_there_before_they_are_needed() -> None:
    """And come back when they are lost."""
    async with open_process_pool(3, warm=2) as pool:
        await until(lambda: pool.statistics().idle == 2)
        os.kill(await pool.call(jobs.pid), signal.SIGKILL)
        await until(lambda: pool.statistics().processes == 1)
        await until(lambda: pool.statistics().idle == 2)


async def test_idle_workers_are_let_go_down_to_the_warm_ones(tmp_path: Path) -> None:
    """Those that have not been needed for a while end by themselves."""
    async with open_process_pool(3, warm=1, max_idle=0.2) as pool:
        await pool.call_batch(partial(jobs.meet, str(tmp_path), others=3), ["a", "b", "c"])
        assert pool.statistics().processes == 3
        await until(lambda: pool.statistics().processes == 1)
        assert pool.statistics().retired == 2
        assert (pool.statistics().killed, pool.statistics().lost) == (0, 0)
        assert await pool.call(len, "abc") == 3


async def test_workers_are_replaced_after_so_many_calls() -> None:
    """Never in the middle of one."""
    async with open_process_pool(1, max_calls=3) as pool:
        pids = [await pool.call(jobs.pid) for _ in range(7)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


async def test_workers_are_replaced_when_they_have_grown() -> None:
    """When their call has ended, whether it failed or not."""
    async with open_process_pool(1, max_memory_bytes=150_000_000) as pool:
        first = await pool.call(jobs.pid)
        assert await pool.call(jobs.grow, 200_000_000) == first
        assert await pool.call(jobs.pid) != first
        assert (pool.statistics().retired, pool.statistics().lost) == (1, 0)


async def test_workers_are_replaced_at_their_age() -> None:
    """An idle one is let go, and a warm pool gets a fresh one."""
    async with open_process_pool(1, warm=1, max_age=0.3) as pool:
        first = await pool.call(jobs.pid)
        await until(lambda: pool.statistics().retired >= 1)
        assert await pool.call(jobs.pid) != first


async def test_modules_may_be_imported_ahead() -> None:
    """A worker is ready when they are; one that is missing is told to those who wait, with its name."""
    async with open_process_pool(1, preload=["process_jobs"]) as pool:
        assert "process_jobs" in await pool.call(eval, "list(__import__('sys').modules)")
        assert "trio" not in await pool.call(eval, "list(__import__('sys').modules)")
    async with open_process_pool(1, preload=["no_such_module"]) as pool:
        with pytest.raises(WorkerLost, match="no_such_module") as lost:
            await pool.call(len, "abc")
        assert not lost.value.may_have_run
        assert pool.statistics().failed_starts == 3


async def test_a_worker_that_does_not_get_ready_in_time_is_given_up() -> None:
    """It is killed, and after the third those who wait are told."""
    async with open_process_pool(1, start_within=0.001) as pool:
        with pytest.raises(WorkerLost, match=r"not ready within 0\.001 s"):
            await pool.call(len, "abc")


async def test_leaving_the_pool_waits_for_what_it_has_accepted(tmp_path: Path) -> None:
    """Calls in hand and calls that wait come to their end; then it takes nothing, and no process is left."""
    async with trio.open_nursery() as nursery:
        async with open_process_pool(1) as pool:
            worker = await pool.call(jobs.pid)
            nursery.start_soon(pool.call, jobs.wait_for, str(tmp_path / "go"))
            await until((tmp_path / "go.begun").exists)
            nursery.start_soon(pool.call, jobs.note, str(tmp_path / "log"), "waited")
            await wait_all_tasks_blocked()
            (tmp_path / "go").touch()
    assert (tmp_path / "log").read_text() == "waited\n"
    assert not alive(worker)
    with pytest.raises(trio.ClosedResourceError):
        await pool.call(len, "abc")


async def test_a_pool_left_by_an_exception_gives_its_calls_up(tmp_path: Path) -> None:
    """Whoever waits elsewhere is told whether the call may have run; the workers are gone."""
    path = tmp_path / "pid"
    outcomes: dict[str, Exception] = {}

    async def call(pool: ProcessPool, name: str) -> None:
        try:
            await pool.call(jobs.forever, str(path))
        except (WorkerLost, trio.ClosedResourceError) as error:
            outcomes[name] = error

    async def leave_by_exception(nursery: trio.Nursery) -> None:
        async with open_process_pool(1) as pool:
            nursery.start_soon(call, pool, "running")
            await until(lambda: path.exists() and path.read_text())
            nursery.start_soon(call, pool, "waiting")
            await wait_all_tasks_blocked()
            raise ValueError("owner")

    async with trio.open_nursery() as nursery:
        with pytest.raises(ValueError, match="owner"):
            await leave_by_exception(nursery)
    assert isinstance(outcomes["running"], WorkerLost)
    assert isinstance(outcomes["waiting"], trio.ClosedResourceError)
    assert not alive(int(path.read_text()))


async def test_nothing_is_left_of_workers_that_come_and_go() -> None:
    """Descriptors are back to where they were after kills, retirements and failures."""
    before = len(os.listdir("/proc/self/fd"))
    async with open_process_pool(2, max_calls=2) as pool:
        for _ in range(3):
            with pytest.raises(WorkerLost):
                await pool.call(jobs.dies)
            await pool.call_batch(abs, range(10))
            with trio.move_on_after(0.01):
                await pool.call(jobs.forever, os.devnull)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_function_of_the_main_module_is_found(tmp_path: Path) -> None:
    """As with multiprocessing: the script is imported, and what stands under its guard is not done."""
    script = tmp_path / "script.py"
    script.write_text(
        "import trio\n"
        "from stagetrio.processes import open_process_pool\n"
        "def double(n): return 2 * n\n"
        "async def main():\n"
        "    async with open_process_pool(1) as pool:\n"
        "        print(await pool.call(double, 21))\n"
        "if __name__ == '__main__':\n"
        "    trio.run(main)\n"
    )
    ran = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60
    )
    assert (ran.stdout, ran.stderr) == (b"42\n", b"")


def test_a_function_that_workers_do_not_find_is_named() -> None:
    """One that was typed, as into a notebook: its caller is told what to do, and the worker says and loses nothing."""
    typed = (
        "import os, trio\n"
        "from stagetrio.processes import open_process_pool\n"
        "def double(n): return 2 * n\n"
        "async def main():\n"
        "    async with open_process_pool(1) as pool:\n"
        "        worker = await pool.call(os.getpid)\n"
        "        try:\n"
        "            await pool.call(double, 21)\n"
        "        except TypeError as error:\n"
        "            print(error)\n"
        "        print(await pool.call(os.getpid) == worker)\n"
        "trio.run(main)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", typed],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=60,
        text=True,
    )
    told, stays = ran.stdout.splitlines()
    assert told.startswith("__main__.double and its arguments must be importable in a worker process: ")
    assert told.endswith("; define them in a module, which the cells of a notebook and a prompt are not")
    assert (stays, ran.stderr) == ("True", "")


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Idle ones at once, and one that computes for ever after its grace: in a thread, it watches its parent."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, trio\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import process_jobs\n"
        "from stagetrio.processes import open_process_pool\n"
        "async def main():\n"
        "    async with open_process_pool(2, warm=2) as pool, trio.open_nursery() as nursery:\n"
        "        nursery.start_soon(pool.call, process_jobs.forever, sys.argv[1])\n"
        "        print(await pool.call(process_jobs.pid), flush=True)\n"
        "        await trio.sleep_forever()\n"
        "if __name__ == '__main__':\n"
        "    trio.run(main)\n"
    )
    path = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, str(script), str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        idle = int(parent.stdout.readline())
        give_up = time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < give_up
            time.sleep(0.01)
        busy = int(path.read_text())
        parent.kill()
        while alive(idle) or alive(busy):
            assert time.monotonic() < give_up
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_processes": 0}, ValueError, "max_processes must be >= 1, not 0"),
        ({"max_processes": 1.5}, TypeError, "max_processes must be an int, not 1.5"),
        ({"max_waiting": 0}, ValueError, "max_waiting must be at least 1, not 0"),
        ({"max_waiting_per_flow": 1.5}, TypeError, "max_waiting_per_flow must be an int or math.inf, not 1.5"),
        ({"warm": 2}, ValueError, "warm must be between 0 and max_processes, not 2"),
        ({"max_calls": 0}, ValueError, "max_calls must be >= 1, not 0"),
        ({"max_age": 0}, ValueError, "max_age must be > 0, not 0"),
        ({"max_idle": math.nan}, ValueError, "max_idle must be > 0, not nan"),
        ({"max_memory_bytes": -1}, ValueError, "max_memory_bytes must be > 0, not -1"),
        ({"start_within": 0}, ValueError, "start_within must be > 0, not 0"),
        ({"start_within": "a"}, TypeError, "start_within must be a number, not 'a'"),
        ({"warm": "a"}, TypeError, "warm must be an int, not 'a'"),
        ({"preload": "json"}, TypeError, "preload must be a sequence of names, not the string 'json'"),
    ],
)
async def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    """Each is refused with its name and value, before anything starts."""
    with pytest.raises(error, match=says):
        async with open_process_pool(**{"max_processes": 1, **arguments}):
            raise AssertionError("unreachable")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"flow": ["x"]}, TypeError, r"flow must be hashable, not \['x'\]"),
        ({"key": ["x"]}, TypeError, r"key must be hashable, not \['x'\]"),
        ({"cost": math.nan}, ValueError, "cost must be finite and above 0, not nan"),
        ({"cost": "a"}, TypeError, "cost must be a number, not 'a'"),
    ],
)
async def test_a_call_that_could_not_be_filed_is_refused(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    """At the call, by the argument's name; nothing is kept of it, no worker is started for it, and the pool goes on."""
    async with open_process_pool(1) as pool:
        with pytest.raises(error, match=says):
            await pool.call(len, "abc", **arguments)
        with pytest.raises(error, match=says):
            async with pool.run(len, "abc", **arguments):
                raise AssertionError("unreachable")
        statistics = pool.statistics()
        assert (statistics.waiting, statistics.starting, statistics.processes) == (0, 0, 0)
        assert await pool.call(len, "abc", flow="x", key="x", cost=2) == 3
