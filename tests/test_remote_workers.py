"""Procedures in worker processes: who gets a call, who loses it, what is left. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import remote_procedures as there
import trio
from remote_procedures import procedures

from stagetrio.remote import Procedures, RemoteWorkers, WorkerLost, open_remote_workers


async def until(condition: Callable[[], object]) -> None:
    """Wait, on the real clock, for something that another process does."""
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - other processes set no event of ours
            await trio.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def pids(workers: RemoteWorkers, processes: int) -> list[int]:
    """One call for each worker, one after the other."""
    return [await workers.call(there.pid) for _ in range(processes)]


async def test_calls_go_round_the_workers() -> None:
    """Each runs in a process of its own, is typed as the procedure is, and comes back as what it is."""
    async with open_remote_workers(procedures, 3) as workers:
        sums = [await workers.call(there.add, n, 1) for n in range(6)]
        assert [one.total for one in sums] == [1, 2, 3, 4, 5, 6]
        assert sorted(Counter(one.pid for one in sums).values()) == [2, 2, 2]
        assert os.getpid() not in {one.pid for one in sums}
        statistics = workers.statistics()
        assert (statistics.ready, statistics.starting, statistics.lost, statistics.sent) == (3, 0, 0, 6)


async def test_a_worker_whose_loop_is_held_gets_no_more_than_the_others(tmp_path: Path) -> None:
    """A request goes to whoever has the fewest in hand."""
    go = tmp_path / "go"
    async with open_remote_workers(procedures, 2) as workers:
        held: list[int] = []

        async def hold() -> None:
            held.append(await workers.call(there.hold_the_loop, str(go)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            await until(lambda: workers.statistics().in_flight)
            others = {await workers.call(there.pid) for _ in range(20)}
            go.touch()
        assert len(others) == 1
        assert others.isdisjoint(held)


async def test_a_killed_worker_is_lost_to_its_own_callers_only(tmp_path: Path) -> None:
    """Of 100 calls outstanding, those of the killed one raise WorkerLost, none hangs; it is replaced."""
    log = tmp_path / "log"
    lost: list[WorkerLost] = []
    async with open_remote_workers(procedures, 2) as workers, trio.open_nursery() as nursery:

        async def call() -> None:
            try:
                await workers.call(there.note_and_hang, str(log))
            except WorkerLost as error:
                lost.append(error)

        for _ in range(100):
            nursery.start_soon(call)
        await until(lambda: len(there.lines(log)) == 100)
        begun = Counter(map(int, there.lines(log)))
        victim, survivor = begun
        assert begun[victim] == begun[survivor] == 50
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(lost) == 50)
        assert {error.may_have_run for error in lost} == {True}
        assert {error.reason for error in lost} == {"the worker process was ended by SIGKILL"}
        await until(lambda: workers.statistics().ready == 2)
        assert workers.statistics().lost == 1
        assert workers.statistics().in_flight == 50
        fresh = set(await pids(workers, 2)) - {survivor}
        assert len(fresh) == 1
        assert victim not in fresh
        assert len(there.lines(log)) == 100  # none ran twice
        nursery.cancel_scope.cancel()
    assert len(lost) == 50


@pytest.mark.parametrize(("idempotent", "runs"), [(True, 2), (False, 1)])
async def test_only_what_is_idempotent_is_tried_again(tmp_path: Path, idempotent: bool, runs: int) -> None:
    """Once, in another worker; anything else may have run, and its caller is told."""
    log = str(tmp_path / "log")
    async with open_remote_workers(procedures, 2) as workers:
        call = partial(workers.with_options(idempotent=idempotent).call, there.note_and_die_once, log)
        if idempotent:
            assert await call() == runs
        else:
            with pytest.raises(WorkerLost, match="exited with status 3") as lost:
                await call()
            assert lost.value.may_have_run
    assert len(there.lines(log)) == runs


async def test_a_call_waits_for_a_worker_that_is_ready() -> None:
    """While the only worker is being replaced, nothing is refused, and nothing is sent to one that is not ready."""
    async with open_remote_workers(procedures, 1) as workers:
        victim = await workers.call(there.pid)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: not workers.statistics().ready)
        async with trio.open_nursery() as nursery:
            answers: list[int] = []

            async def call() -> None:
                answers.append(await workers.call(there.pid))

            for _ in range(5):
                nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert workers.statistics().waiting == 5
        assert len(answers) == 5
        assert victim not in answers


async def test_a_worker_that_is_dying_is_called_no_more(tmp_path: Path) -> None:
    """Its connection has ended but its process has not: whoever calls now certainly has not called that one."""
    gone = tmp_path / "gone"
    async with open_remote_workers(procedures, 1) as workers, trio.open_nursery() as nursery:

        async def last_call() -> None:
            with pytest.raises(WorkerLost) as lost:
                await workers.call(there.leave_slowly, str(gone))
            assert lost.value.may_have_run

        dying = await workers.call(there.pid)
        nursery.start_soon(last_call)
        await until(lambda: not workers.statistics().ready)
        assert is_alive(dying)
        async with trio.open_nursery() as callers:
            answers: list[int] = []

            async def call() -> None:
                answers.append(await workers.call(there.pid))

            for _ in range(5):
                callers.start_soon(call)
            await trio.testing.wait_all_tasks_blocked(0.01)
            gone.touch()
        assert len(answers) == 5
        assert dying not in answers


async def test_who_has_certainly_not_called_a_dying_worker_waits_for_another(tmp_path: Path) -> None:
    """Only what had been sent to it is lost; nobody is told to try again what could be tried here."""
    gone = tmp_path / "gone"
    async with open_remote_workers(procedures, 1) as workers:
        dying = fresh = await workers.call(there.pid)
        with pytest.raises(WorkerLost):
            await workers.call(there.leave_slowly, str(gone))
        while fresh == dying:
            try:
                fresh = await workers.call(there.pid)
            except WorkerLost as error:
                assert error.may_have_run
        gone.touch()


async def test_who_waits_for_a_worker_when_the_block_is_left_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There will be none any more."""
    held = tmp_path / "held"
    monkeypatch.setenv(there.HELD, str(held))

    async def call() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await workers.call(there.pid)

    async with trio.open_nursery() as nursery:
        async with open_remote_workers(procedures, 1) as workers:
            held.touch()
            os.kill(await workers.call(there.pid), signal.SIGKILL)
            await until(lambda: not workers.statistics().ready)
            nursery.start_soon(call)
            await until(lambda: workers.statistics().waiting)


async def test_workers_that_cannot_be_started_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those who wait are told after three failures; when it can be started again, calls are served again."""
    broken = tmp_path / "broken"
    monkeypatch.setenv(there.BROKEN, str(broken))
    async with open_remote_workers(procedures, 1) as workers:
        for failed in (3, 6):
            broken.touch()
            os.kill(await workers.call(there.pid), signal.SIGKILL)
            await until(lambda: not workers.statistics().ready)
            with pytest.raises(WorkerLost, match="broken today") as lost:
                await workers.call(there.pid)
            assert not lost.value.may_have_run
            assert workers.statistics().failed_starts == failed
            broken.unlink()
            await until(lambda: workers.statistics().ready)
        assert await workers.call(there.add, 1, 2) == there.Sum(3, await workers.call(there.pid))
    assert "ended by SIGKILL, and is replaced" in caplog.text


async def test_a_worker_that_cannot_be_started_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block is not entered, and the error tells what went wrong over there."""
    (tmp_path / "broken").touch()
    monkeypatch.setenv(there.BROKEN, str(tmp_path / "broken"))
    with pytest.raises(WorkerLost, match="broken today") as lost:
        async with open_remote_workers(procedures, 2):
            raise AssertionError("entered")
    assert "remote_procedures.py" in lost.value.__notes__[0]


async def test_a_worker_that_dies_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been called, and the error says so."""
    monkeypatch.setenv(there.DYING, "1")
    with pytest.raises(WorkerLost, match="exited with status 9") as lost:
        async with open_remote_workers(procedures, 1):
            raise AssertionError("entered")
    assert not lost.value.may_have_run


async def test_workers_that_die_of_being_started_are_started_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or they would be started as fast as they die; and it is logged once."""
    doomed = tmp_path / "doomed"
    monkeypatch.setenv(there.DOOMED, str(doomed))
    async with open_remote_workers(procedures, 1) as workers:
        doomed.touch()
        os.kill(await workers.call(there.pid), signal.SIGKILL)
        await until(lambda: workers.statistics().lost + workers.statistics().failed_starts >= 4)
        doomed.unlink()
        births = [float(line) for line in there.lines(f"{doomed}.births")]
        assert births[1] - births[0] >= 0.25
        assert births[2] - births[1] >= 0.5
        await until(lambda: workers.statistics().ready)
        assert await workers.call(there.pid)
    assert caplog.text.count("tried again until it succeeds") == 1


async def test_what_is_posted_at_once_is_shared_out(tmp_path: Path) -> None:
    """Each post goes to whoever has the fewest in hand when it is sent, not when its sender began."""
    log = tmp_path / "log"
    async with open_remote_workers(procedures, 2) as workers:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.call, there.note_and_hang, str(log))
            await until(lambda: len(there.lines(log)) == 1)
            async with trio.open_nursery() as senders:
                for _ in range(19):
                    senders.start_soon(workers.post, there.note_and_hang, str(log))
            await until(lambda: len(there.lines(log)) == 20)
            nursery.cancel_scope.cancel()
    assert sorted(Counter(there.lines(log)).values()) == [10, 10]


async def test_values_come_from_a_worker_and_a_cancellation_reaches_it(tmp_path: Path) -> None:
    """Streams and the caller's cancellation cross to a worker as they do to any other side."""
    log = tmp_path / "log"
    async with open_remote_workers(procedures, 2) as workers:
        async with workers.stream(there.count_to, 3) as values:
            assert [value async for value in values] == [0, 1, 2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.call, there.note_the_end, str(log))
            await until(lambda: there.lines(log) == ["begun"])
            nursery.cancel_scope.cancel()
        await until(lambda: there.lines(log) == ["begun", "ended"])


async def test_the_end(tmp_path: Path) -> None:
    """What was posted is finished, whoever still calls is told, and neither a process nor a descriptor is left."""
    log = tmp_path / "log"
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    async with trio.open_nursery() as nursery:
        async with open_remote_workers(procedures, 2) as workers:
            left = await pids(workers, 2)

            async def call() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await workers.call(there.note_the_end, str(log))

            nursery.start_soon(call)
            await until(lambda: there.lines(log) == ["begun"])
            await workers.post(there.note_later, str(log))
            await workers.post(there.note_length, str(log), "x" * 900_000)  # more than the kernel takes at once
    assert sorted(there.lines(log)) == ["900000", "begun", "ended", "later"]
    assert (workers.statistics().ready, workers.statistics().starting) == (0, 0)
    assert not any(map(is_alive, left))
    assert set(os.listdir("/proc/self/fd")) == before if before else True
    with pytest.raises(trio.ClosedResourceError):
        await workers.call(there.pid)


async def test_an_error_in_the_block_comes_out_as_itself() -> None:
    """And the workers end at once."""
    left: list[int] = []

    async def fail() -> None:
        async with open_remote_workers(procedures, 1) as workers:
            left.append(await workers.call(there.pid))
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert not is_alive(left[0])


async def test_what_a_worker_could_not_find() -> None:
    """A procedure that is no module's is refused before anything is started."""
    local = Procedures()

    @local.procedure
    async def nowhere() -> None: ...

    with pytest.raises(TypeError, match=r"can be imported by their names.*nowhere"):
        async with open_remote_workers(local, 1):
            raise AssertionError("entered")


def test_a_main_module_that_cannot_be_imported_without_doing_its_work(tmp_path: Path) -> None:
    """A worker that would start workers of its own does not get ready, and the error says what the program lacks."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import trio\n"
        "from stagetrio.remote import Procedures, open_remote_workers\n"
        "procedures = Procedures()\n"
        "@procedures.procedure\n"
        "async def one() -> int: return 1\n"
        "async def main():\n"
        "    print('begun', flush=True)\n"
        "    async with open_remote_workers(procedures, 1) as workers:\n"
        "        print(await workers.call(one))\n"
        "trio.run(main)\n"
    )
    root = Path(__file__).parent.parent
    command, env = [sys.executable, str(script)], {**os.environ, "PYTHONPATH": str(root)}
    ran = subprocess.run(command, env=env, capture_output=True, timeout=60, text=True)
    assert ran.returncode == 1
    assert ran.stdout.split() == ["begun", "begun"]
    assert "if __name__ == '__main__':" in ran.stderr
    assert "WorkerLost: the worker process could not get ready: RuntimeError: " in ran.stderr


@pytest.mark.parametrize(
    ("processes", "options", "error", "match"),
    [
        (0, {}, ValueError, "processes must be at least 1 .* not 0"),
        (1.5, {}, TypeError, "processes must be an int, not 1.5"),
        (1, {"start_within": 0}, ValueError, "start_within must be above 0, not 0"),
        (1, {"max_in_flight": 0}, ValueError, "max_in_flight must be at least 1 .* not 0"),
    ],
)
async def test_wrong_arguments(processes: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    """They are refused by name and value."""
    with pytest.raises(error, match=match):
        async with open_remote_workers(procedures, processes, **options):
            raise AssertionError("entered")
