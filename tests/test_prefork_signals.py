"""The arbiter as its operator sees it: a process of its own, steered by signals."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import prefork_targets
import pytest
import trio

from stagetrio.sockets import connect

ROOT = Path(__file__).parent.parent


class Operated:
    """An arbiter process, where it listens, and what it says."""

    def __init__(self, process: trio.Process, address: str) -> None:
        self.process = process
        self.address = address
        self.log = b""

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ask(self) -> int:
        """The process id of a worker that answers a new connection."""
        async with await connect(self.address) as stream:
            await stream.send_all(b"?")
            return int((await stream.receive_some()).split()[0])

    def workers(self) -> set[int]:
        """The process ids of its children."""
        found = set()
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):  # threads come and go
                found |= {int(pid) for pid in (thread / "children").read_text().split()}
        return found

    async def says(self, what: str, times: int = 1) -> None:
        """Wait until this stands in its log."""
        await until(lambda: self.log.count(what.encode()) >= times)


async def until(condition: Callable[[], object]) -> None:
    """Wait for something to have happened in other processes."""
    while not condition():  # noqa: ASYNC110 - other processes set no event of ours
        await trio.sleep(0.02)


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "(zombie)" in status.read_text()
    except OSError:
        return True


@contextlib.asynccontextmanager
async def operated(
    function: str,
    processes: int,
    *,
    grace: float = 5,
    pid_path: Path | str = "",
    environment: dict[str, str] | None = None,
) -> AsyncIterator[Operated]:
    """Start an arbiter, wait until its workers are ready, and leave no process behind."""
    command = [sys.executable, prefork_targets.__file__, f"prefork_targets:{function}"]
    command += [str(processes), str(grace), str(pid_path)]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            process = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            )
            assert process.stdout is not None
            assert process.stderr is not None
            arbiter = Operated(process, "")

            async def collect(stream: trio.abc.ReceiveStream) -> None:
                async for data in stream:
                    arbiter.log += data

            nursery.start_soon(collect, process.stderr)
            try:
                arbiter.address = (await process.stdout.receive_some()).decode().strip()
                yield arbiter
            finally:
                left = arbiter.workers() if process.returncode is None else set()
                process.kill()
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with trio.CancelScope(shield=True):
                    await process.wait()
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_in_order(number: signal.Signals) -> None:
    """Workers finish open connections, then all is over with status 0 and no traceback."""
    async with operated("pids", 2) as arbiter:
        async with await connect(arbiter.address) as stream:
            await stream.send_all(b"?")
            first = await stream.receive_some()
            arbiter.signal(number)
            await arbiter.says("draining")
            await stream.send_all(b"?")
            assert await stream.receive_some() == first
        assert await arbiter.process.wait() == 0
        assert b"Traceback" not in arbiter.log


async def test_a_second_signal_ends_at_once() -> None:
    """Whoever is in a hurry says so twice; the status tells which signal it was."""
    async with operated("ignores_drain", 1, grace=600) as arbiter:
        arbiter.signal(signal.SIGTERM)
        await arbiter.says("draining")
        arbiter.signal(signal.SIGTERM)
        assert await arbiter.process.wait() == 128 + signal.SIGTERM


async def test_sigquit_ends_at_once() -> None:
    """Without a drain."""
    async with operated("ignores_drain", 1, grace=600) as arbiter:
        arbiter.signal(signal.SIGQUIT)
        assert await arbiter.process.wait() == 128 + signal.SIGQUIT


async def test_sighup_replaces_every_worker_and_drops_nobody() -> None:
    """Connections made all the while are answered, and both workers are new in the end."""
    async with operated("pids", 2) as arbiter:
        before = arbiter.workers()
        arbiter.signal(signal.SIGHUP)
        while b"reload complete" not in arbiter.log:
            await arbiter.ask()
        while arbiter.workers() & before:
            await arbiter.ask()
        assert len(arbiter.workers()) == 2


async def test_sigttin_and_sigttou_change_the_number_of_workers() -> None:
    """One more, one less, and never less than one."""
    async with operated("pids", 1) as arbiter:
        arbiter.signal(signal.SIGTTIN)
        await arbiter.says("2 workers")
        await until(lambda: len(arbiter.workers()) == 2)
        for times in (1, 2):
            arbiter.signal(signal.SIGTTOU)
            await arbiter.says("SIGTTOU: 1 worker", times)
        await until(lambda: len(arbiter.workers()) == 1)
        assert await arbiter.ask() in arbiter.workers()


async def test_signals_that_come_while_it_drains_start_nothing() -> None:
    """Neither one worker more nor one less, which would be a first one again: what it does is to end."""
    async with operated("pids", 1) as arbiter:
        async with await connect(arbiter.address) as stream:
            await stream.send_all(b"?")
            await stream.receive_some()
            arbiter.signal(signal.SIGTERM)
            await arbiter.says("draining")
            for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
                arbiter.signal(number)
            await arbiter.says("SIGTTOU: comes too late")
        assert await arbiter.process.wait() == 0
        assert arbiter.log.count(b"is ready") == 1


async def test_an_arbiter_that_may_open_nothing_more_serves_on() -> None:
    """It has a worker less for as long, and starts one when it can; nor does a signal to have more end it."""
    async with operated("pids", 2) as arbiter:
        limits = resource.prlimit(arbiter.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(arbiter.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        arbiter.signal(signal.SIGTTIN)
        await arbiter.says("SIGTTIN: no worker more")
        os.kill(await arbiter.ask(), signal.SIGKILL)
        await arbiter.says("cannot be started")
        await arbiter.ask()
        resource.prlimit(arbiter.process.pid, resource.RLIMIT_NOFILE, limits)
        await until(lambda: len(arbiter.workers()) == 2)
        arbiter.signal(signal.SIGTTIN)
        await until(lambda: len(arbiter.workers()) == 3)


async def test_a_worker_ends_when_its_arbiter_was_killed() -> None:
    """It drains first: an open connection is finished, no new one is taken, no process is left."""
    async with operated("pids", 2) as arbiter:
        workers = arbiter.workers()
        assert len(workers) == 2
        async with await connect(arbiter.address) as stream:
            await stream.send_all(b"?")
            await stream.receive_some()
            arbiter.signal(signal.SIGKILL)
            await arbiter.process.wait()
            await stream.send_all(b"?")
            assert int((await stream.receive_some()).split()[0]) in workers
        await until(lambda: all(ended(pid) for pid in workers))
        with pytest.raises(OSError, match="connect"):
            await connect(arbiter.address)


async def test_a_hung_worker_ends_when_its_arbiter_was_killed() -> None:
    """Nobody watches its heartbeat any more, so it watches itself, in a thread."""
    async with operated("hangs_when_asked", 1, grace=0) as arbiter:
        (worker,) = arbiter.workers()
        async with await connect(arbiter.address) as stream:
            await stream.send_all(b"hang")
            await arbiter.says("stuck")
            arbiter.signal(signal.SIGKILL)
            await arbiter.process.wait()
            await until(lambda: ended(worker))


async def test_a_ctrl_c_in_the_terminal_reaches_the_arbiter_alone() -> None:
    """Workers are in process groups of their own, so they drain when they are told, and not before."""
    async with operated("pids", 1) as arbiter:
        (worker,) = arbiter.workers()
        assert os.getpgid(worker) == worker
        assert os.getpgid(worker) != os.getpgid(arbiter.process.pid)


async def test_the_pid_file_is_there_while_it_runs(tmp_path: Path) -> None:
    """With the arbiter's id; a second arbiter with that file does not start."""
    path = tmp_path / "pid"
    async with operated("pids", 1, pid_path=path) as arbiter:
        assert path.read_text() == f"{arbiter.process.pid}\n"
        async with operated("pids", 1, pid_path=path) as second:
            assert second.address == ""
            await second.process.wait()
            assert str(arbiter.process.pid).encode() in second.log
        assert path.read_text() == f"{arbiter.process.pid}\n"
        arbiter.signal(signal.SIGTERM)
        assert await arbiter.process.wait() == 0
    assert not path.exists()


async def test_systemd_is_told(tmp_path: Path) -> None:
    """Ready when all workers are, reloading and ready again, stopping; and the watchdog is fed."""
    manager = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM)
    with manager:
        await manager.bind(str(tmp_path / "notify"))
        told: list[str] = []

        async def listen() -> None:
            while True:
                told.append((await manager.recv(4096)).decode())

        async def said(what: str) -> None:
            await until(lambda: any(what in word for word in told))
            told.clear()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
            async with operated("pids", 1, environment=environment) as arbiter:
                await said(f"MAINPID={arbiter.process.pid}")
                await said("WATCHDOG=1")
                arbiter.signal(signal.SIGHUP)
                await said("RELOADING=1\nMONOTONIC_USEC=")
                await said("READY=1\nSTATUS=reloaded")
                arbiter.signal(signal.SIGTERM)
                await said("STOPPING=1")
                assert await arbiter.process.wait() == 0
            nursery.cancel_scope.cancel()


async def test_what_cannot_start_says_so_and_ends() -> None:
    """One error, not a crash loop."""
    async with operated("missing_function", 2) as arbiter:
        assert arbiter.address == ""
        assert await arbiter.process.wait() == 1
        await arbiter.says("CannotStart: the first worker exited with status 1 before it was ready")
        assert arbiter.log.count(b"missing_function") >= 1
