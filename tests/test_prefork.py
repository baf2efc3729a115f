"""An arbiter and its worker processes: real processes, real signals, seconds. Times are bounds, never conditions."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import attrs
import prefork_targets
import pytest
import trio
import trio.testing

from stagetrio.arbiter import Arbiter, CannotStart
from stagetrio.prefork import open_arbiter
from stagetrio.prefork_sockets import open_worker_sockets
from stagetrio.prefork_worker import resolve
from stagetrio.sockets import TcpAddress, connect

LOCAL = "tcp://127.0.0.1:0"
QUICK: dict[str, Any] = {"heartbeat": 0.1, "hang_after": 10, "grace": 5}


@contextlib.asynccontextmanager
async def arbiter_of(function: str, processes: int, *arguments: object, **options: Any) -> AsyncIterator[Arbiter]:
    """An arbiter on a port of its own; whatever happens, no process is left."""
    target = f"{prefork_targets.__file__}:{function}"
    with trio.fail_after(60):
        async with open_arbiter(
            target, [LOCAL], processes=processes, arguments=arguments, **(QUICK | options)
        ) as arbiter:
            yield arbiter
            pids = [worker.pid for worker in arbiter.statistics().workers if worker.pid is not None]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def ask(arbiter: Arbiter, said: bytes = b"?") -> int:
    """The process id of a worker that answers a new connection."""
    async with await connect(arbiter.addresses[0]) as stream:
        await stream.send_all(said)
        return int((await stream.receive_some()).split()[0])


def serving(arbiter: Arbiter) -> dict[int, int]:
    """{slot: process id} of the workers that are ready and do not drain."""
    return {w.number: w.pid for w in arbiter.statistics().workers if w.state == "ready" and w.pid is not None}


async def until(condition: Any) -> None:
    """Wait for something to have happened in other processes."""
    while not condition():  # noqa: ASYNC110 - other processes set no event of ours
        await trio.sleep(0.02)


async def test_workers_serve_and_end_when_told() -> None:
    """Each is a process of its own; after stop() none is left, and nothing was killed."""
    async with arbiter_of("pids", 2) as arbiter:
        await arbiter.wait_ready()
        pids = set(serving(arbiter).values())
        assert len(pids) == 2
        assert os.getpid() not in pids
        assert {await ask(arbiter) for _ in range(20)} <= pids
        await arbiter.stop()
        assert arbiter.statistics().workers == ()
        assert (arbiter.statistics().crashed, arbiter.statistics().hung) == (0, 0)


async def test_a_killed_worker_is_replaced_and_no_connection_is_refused() -> None:
    """Connections made while a slot has no worker wait for its next one."""
    async with arbiter_of("pids", 2) as arbiter:
        await arbiter.wait_ready()
        before = serving(arbiter)
        os.kill(before[0], signal.SIGKILL)
        answers = [await ask(arbiter) for _ in range(20)]
        await until(lambda: len(serving(arbiter)) == 2)
        after = serving(arbiter)
        assert after[1] == before[1]
        assert after[0] != before[0]
        assert set(answers) <= {before[1], after[0]}
        assert (arbiter.statistics().crashed, arbiter.statistics().started) == (1, 3)


async def test_a_worker_that_hangs_dumps_its_stacks_and_is_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    """The heartbeat is the loop's: a stuck function is found, named on stderr, and ended."""
    async with arbiter_of("hangs_when_asked", 1, hang_after=0.5) as arbiter:
        await arbiter.wait_ready()
        stuck = await ask(arbiter)
        async with await connect(arbiter.addresses[0]) as stream:
            await stream.send_all(b"hang")
            await until(lambda: arbiter.statistics().hung == 1)
        assert await ask(arbiter) != stuck
    assert "in stuck_here" in capfd.readouterr().err


async def test_a_stopped_process_is_replaced_all_the_same() -> None:
    """SIGSTOP keeps it from dumping anything; SIGKILL ends it."""
    async with arbiter_of("pids", 1, hang_after=0.5) as arbiter:
        await arbiter.wait_ready()
        stopped = await ask(arbiter)
        os.kill(stopped, signal.SIGSTOP)
        assert await ask(arbiter) != stopped
        assert arbiter.statistics().hung == 1


async def test_an_arbiter_that_was_asleep_itself_accuses_nobody() -> None:
    """Where a machine or a container is frozen and goes on, workers go on, too."""
    async with arbiter_of("pids", 1, hang_after=2) as arbiter:
        await arbiter.wait_ready()
        pid = await ask(arbiter)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # noqa: ASYNC251 - this is the frozen arbiter
        os.kill(pid, signal.SIGCONT)
        assert await ask(arbiter) == pid
        assert arbiter.statistics().hung == 0


async def test_a_worker_that_does_not_get_ready_in_time_is_taken_for_hung(tmp_path: Path) -> None:
    """It is killed, and its slot tries again."""
    version = tmp_path / "version"
    version.write_text("slow")
    async with arbiter_of("versioned", 1, str(version), start_within=1.5) as arbiter:
        await until(lambda: arbiter.statistics().hung == 1)
        version.write_text("1")
        await arbiter.wait_ready()
        assert await ask(arbiter) in serving(arbiter).values()


async def test_the_replacement_gets_traffic_only_when_it_is_ready() -> None:
    """A reload starts the successor beside its predecessor, and lets the predecessor go when the successor is ready."""
    async with arbiter_of("pids", 2) as arbiter:
        await arbiter.wait_ready()
        before = serving(arbiter)
        least = 2
        answered: set[int] = set()
        reloaded = False

        async def reload() -> None:
            nonlocal reloaded
            assert await arbiter.reload()
            reloaded = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reload)
            while not reloaded:
                answered.add(await ask(arbiter))  # neither refused nor reset, from the first to the last
                least = min(least, len(serving(arbiter)))
        after = serving(arbiter)
        assert least == 2
        assert set(before.values()).isdisjoint(after.values())
        assert answered <= {*before.values(), *after.values()}
        assert arbiter.statistics().reloads == 1
        assert arbiter.statistics().crashed == 0


async def test_open_connections_are_finished_by_their_worker_during_a_reload() -> None:
    """What has begun on the old version ends there, within the grace."""
    async with arbiter_of("pids", 1) as arbiter:
        await arbiter.wait_ready()
        async with await connect(arbiter.addresses[0]) as stream:
            await stream.send_all(b"?")
            old = int((await stream.receive_some()).split()[0])
            assert await arbiter.reload()
            while await ask(arbiter) == old:
                pass  # told to drain, it may not have heard yet
            await stream.send_all(b"?")
            assert int((await stream.receive_some()).split()[0]) == old
        await until(lambda: len(arbiter.statistics().workers) == 1)
        assert arbiter.statistics().crashed == 0


async def test_a_reload_to_a_broken_version_leaves_the_working_one(tmp_path: Path) -> None:
    """It stops at the first successor that fails; the next reload, mended, goes through."""
    version = tmp_path / "version"
    version.write_text("1")
    async with arbiter_of("versioned", 2, str(version)) as arbiter:
        await arbiter.wait_ready()
        before = serving(arbiter)
        version.write_text("broken")
        assert not await arbiter.reload()
        assert serving(arbiter) == before
        assert arbiter.statistics().reloads == 0
        version.write_text("2")
        assert await arbiter.reload()
        assert set(before.values()).isdisjoint(serving(arbiter).values())


async def test_scaling_up_and_down() -> None:
    """More workers get ready, and the youngest slots drain and close."""
    async with arbiter_of("pids", 1) as arbiter:
        await arbiter.wait_ready()
        (first,) = serving(arbiter).values()
        arbiter.scale(3)
        await arbiter.wait_ready()
        assert len(serving(arbiter)) == 3
        arbiter.scale(1)
        await until(lambda: len(arbiter.statistics().workers) == 1)
        assert set(serving(arbiter).values()) == {first}
        assert {await ask(arbiter) for _ in range(10)} == {first}
        assert arbiter.statistics().crashed == 0
        with pytest.raises(ValueError, match="processes must be 1 or more, not 0"):
            arbiter.scale(0)


async def test_a_slot_that_comes_back_keeps_its_sockets() -> None:
    """Scaled down and up again before its worker has drained: the old worker's end closes nothing of the new one's."""
    async with arbiter_of("pids", 2) as arbiter:
        await arbiter.wait_ready()
        descriptors = len(os.listdir("/proc/self/fd"))
        old = serving(arbiter)[1]
        arbiter.scale(1)
        arbiter.scale(2)
        await until(lambda: len(arbiter.statistics().workers) == 2 and serving(arbiter).get(1, old) != old)
        assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_reload_passes_over_slots_that_have_gone() -> None:
    """Scaled down in the middle of a reload, which ends all the same, and so does the next one."""
    async with arbiter_of("pids", 3) as arbiter:
        await arbiter.wait_ready()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(arbiter.reload)
            await until(lambda: arbiter.statistics().started == 4)
            arbiter.scale(1)
        assert await arbiter.reload()
        assert arbiter.statistics().reloads == 2


async def test_a_worker_too_old_is_replaced() -> None:
    """By one that is ready before it drains; nothing counts as a crash."""
    async with arbiter_of("pids", 1, max_age=0.5) as arbiter:
        await arbiter.wait_ready()
        first = await ask(arbiter)
        await until(lambda: first not in serving(arbiter).values())
        assert len(serving(arbiter)) == 1
        assert arbiter.statistics().recycled >= 1
        assert arbiter.statistics().crashed == 0


async def test_a_worker_may_ask_for_a_replacement() -> None:
    """It goes on until that is ready, then drains."""
    async with arbiter_of("asks_replacement", 1) as arbiter:
        await arbiter.wait_ready()
        first = serving(arbiter)[0]
        assert await ask(arbiter) == first
        await until(lambda: serving(arbiter).get(0, first) != first)
        assert (arbiter.statistics().recycled, arbiter.statistics().crashed) == (1, 0)


async def test_what_never_starts_ends_the_arbiter() -> None:
    """A first worker that exits by itself says that what it serves is broken; its status comes along."""
    with pytest.RaisesGroup(pytest.RaisesExc(CannotStart, match="status 7"), flatten_subgroups=True) as caught:
        async with arbiter_of("exits", 1, 7) as arbiter:
            await arbiter.wait_ready()
    group: Any = caught.value
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    assert group.status == 7


async def test_a_crash_loop_is_slowed_down(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that dies again and again is tried again later and later, not as fast as it can die."""
    async with arbiter_of("dies_when_ready", 1) as arbiter:
        await until(lambda: arbiter.statistics().crashed >= 3)
        await until(lambda: arbiter.statistics().backing_off == 1)
    waits = [record for record in caplog.records if "next try" in record.getMessage()]
    assert len(waits) >= 2
    assert [record.levelno for record in waits] == [logging.WARNING] * len(waits)


@pytest.mark.parametrize("next_version", ["slow", "broken"])
async def test_new_connections_pass_over_a_slot_without_a_ready_worker(tmp_path: Path, next_version: str) -> None:
    """Its next worker is still starting, or fails again and again: the others serve its share."""
    version = tmp_path / "version"
    version.write_text("1")
    async with arbiter_of("versioned", 2, str(version)) as arbiter:
        await arbiter.wait_ready()
        before = serving(arbiter)
        version.write_text(next_version)
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: serving(arbiter).keys() == {1} and arbiter.statistics().crashed >= 1)
        assert {await ask(arbiter) for _ in range(30)} == {before[1]}


async def test_a_slot_that_is_given_up_loses_no_connection() -> None:
    """Scaled down under a storm of connections: each is answered, none refused or reset."""
    async with arbiter_of("pids", 3) as arbiter:
        await arbiter.wait_ready()
        answers = 0
        async with trio.open_nursery() as nursery:

            async def ask_again_and_again() -> None:
                nonlocal answers
                while True:
                    await ask(arbiter)
                    answers += 1

            for _ in range(10):
                nursery.start_soon(ask_again_and_again)
            await until(lambda: answers > 100)
            arbiter.scale(1)
            await until(lambda: len(arbiter.statistics().workers) == 1)
            so_far = answers
            await until(lambda: answers > so_far + 100)
            nursery.cancel_scope.cancel()
        assert arbiter.statistics().crashed == 0


async def test_a_worker_accepts_what_it_has_been_given_before_it_drains() -> None:
    """It was stopped while connections came, goes on, and is to go at once: those are answered all the same."""
    async with arbiter_of("pids", 2) as arbiter, contextlib.AsyncExitStack() as stack:
        await arbiter.wait_ready()
        os.kill(serving(arbiter)[1], signal.SIGSTOP)
        streams = [await stack.enter_async_context(await connect(arbiter.addresses[0])) for _ in range(300)]
        for stream in streams:
            await stream.send_all(b"?")
        stopped = serving(arbiter)[1]
        arbiter.scale(1)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(stopped, signal.SIGCONT)
        answers = [await stream.receive_some() for stream in streams]
    assert {answer.split()[1] for answer in answers} == {b"0", b"1"}


async def test_a_worker_that_ignores_the_drain_is_killed_after_the_grace() -> None:
    """An orderly end does not depend on the workers' manners."""
    async with arbiter_of("ignores_drain", 1, grace=0.3) as arbiter:
        await arbiter.wait_ready()
        await arbiter.stop()
        assert arbiter.statistics().workers == ()


async def test_leaving_the_block_kills_what_is_left() -> None:
    """Without a stop(), workers go at once; `arbiter_of` checks that they have."""
    async with arbiter_of("ignores_drain", 2) as arbiter:
        await arbiter.wait_ready()


async def test_connections_are_spread_evenly() -> None:
    """No worker has more than 1.3 times the mean of the connections in a storm of them."""
    async with arbiter_of("pids", 3) as arbiter:
        await arbiter.wait_ready()
        counts: collections.Counter[bytes] = collections.Counter()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(600):
                stream = await stack.enter_async_context(await connect(arbiter.addresses[0]))
                await stream.send_all(b"?")
                counts[(await stream.receive_some()).split()[1]] += 1
        assert max(counts.values()) <= 1.3 * 600 / 3
        assert len(counts) == 3


async def test_workers_come_and_go_without_a_trace_in_the_arbiter() -> None:
    """Descriptors are back to where they were after kills, reloads and scaling."""
    async with arbiter_of("pids", 1) as arbiter:
        await arbiter.wait_ready()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            os.kill(serving(arbiter)[0], signal.SIGKILL)
            await until(lambda: not serving(arbiter))
            await arbiter.wait_ready()
        await arbiter.reload()
        arbiter.scale(2)
        await arbiter.wait_ready()
        arbiter.scale(1)
        await until(lambda: len(arbiter.statistics().workers) == 1)
        assert len(os.listdir("/proc/self/fd")) == before


async def test_a_port_in_use_is_noticed() -> None:
    """Though workers share their port, another server on it is an error, with the address."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            await open_worker_sockets([f"tcp://127.0.0.1:{port}"])
    sockets = await open_worker_sockets([f"tcp://127.0.0.1:{port}"])
    assert sockets.addresses == [TcpAddress("127.0.0.1", port)]
    with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
        await open_worker_sockets([f"tcp://127.0.0.1:{port}"])
    await sockets.aclose()


async def test_unix_sockets_are_shared_and_removed(tmp_path: Path) -> None:
    """All workers accept from one socket; its file goes with the arbiter."""
    path = tmp_path / "socket"
    sockets = await open_worker_sockets([f"unix://{path}"])
    assert sockets.of_slot(0) == sockets.of_slot(1)
    assert path.exists()
    await sockets.aclose()
    assert not path.exists()


async def test_where_ports_cannot_be_shared_one_socket_is() -> None:
    """As on systems other than Linux: every slot has the same descriptor."""
    sockets = await open_worker_sockets([LOCAL], per_worker=False)
    assert sockets.of_slot(0) == sockets.of_slot(1)
    await sockets.aclose()


async def test_several_addresses_are_bound_all_or_none() -> None:
    """One that cannot be had leaves none open."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match=str(taken)):
            await open_worker_sockets([LOCAL, LOCAL, f"tcp://127.0.0.1:{taken}"])
        assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="addresses"):
        await open_worker_sockets([])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("processes", 0),
        ("grace", -1),
        ("heartbeat", 0),
        ("hang_after", 0.05),
        ("start_within", 0),
        ("max_age", 0),
        ("max_memory_bytes", -5),
        ("jitter", 1.5),
    ],
)
async def test_wrong_arguments_are_named(option: str, value: float) -> None:
    """Each is refused with its name and value before anything is opened or started, and so is what is no number."""
    options: dict[str, Any] = {"processes": 1, **QUICK}
    with pytest.raises(ValueError, match=rf"{option}.*{value}"):
        async with open_arbiter("a:b", [LOCAL], **{**options, option: value}):
            raise AssertionError("unreachable")
    with pytest.raises(TypeError, match=rf"{option} must be .*, not 'a'"):
        async with open_arbiter("a:b", [LOCAL], **{**options, option: "a"}):
            raise AssertionError("unreachable")


@pytest.mark.parametrize("target", ["", "module", "module:", ":function"])
def test_a_target_names_a_module_and_a_function(target: str) -> None:
    """Anything else is refused, with what was given."""
    with pytest.raises(ValueError, match="target must be"):
        resolve(target)


def test_a_target_is_an_import_path_or_a_script(tmp_path: Path) -> None:
    """A script is imported by its path, and may import what lies beside it."""
    assert resolve("attrs:frozen") is attrs.frozen
    (tmp_path / "beside_it.py").write_text("value = 5")
    (tmp_path / "its_script.py").write_text("from beside_it import value\nasync def serve(worker): return value")
    assert resolve(f"{tmp_path}/its_script.py:serve").__name__ == "serve"
    with pytest.raises(FileNotFoundError):
        resolve(f"{tmp_path}/missing.py:serve")
