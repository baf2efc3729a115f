"""``stagetrio run --processes``: an arbiter, its workers and their clients. Real processes, sockets and signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from stagetrio.client import open_client
from stagetrio.codec import Codec

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONWARNINGS": "error"}
RUN = [sys.executable, "-m", "stagetrio", "run"]

SCRIPT = """
import os
import attrs
import trio
from stagetrio.app import App

app = App("who")
with open("loaded", "a") as file:
    file.write(f"{os.getpid()}\\n")

@attrs.frozen
class Who:
    seconds: float

@attrs.frozen
class Me:
    pid: int
    version: int

@app.on(Who)
async def who(peer, message) -> Me:
    await trio.sleep(message.seconds)
    return Me(os.getpid(), VERSION)
"""


@attrs.frozen
class Who:
    """As in the script."""

    seconds: float = 0


@attrs.frozen
class Me:
    pid: int
    version: int


CODEC: Codec[Any] = Codec([Who, Me])


class Operated:
    """An arbiter, what it and its workers write, and where they serve."""

    def __init__(self, process: trio.Process, home: Path) -> None:
        self.process = process
        self.log = ""
        self.address = ""
        self._home = home

    async def says(self, what: str) -> str:
        """Wait for a line with this in it, and return the line."""
        while True:
            for line in self.log.splitlines(keepends=True):
                if what in line and line.endswith("\n"):
                    return line.strip()
            await trio.sleep(0.02)

    def loaded_by(self) -> list[int]:
        """The process ids that have loaded the script, in order."""
        return [int(line) for line in (self._home / "loaded").read_text().split()]

    async def ask(self) -> Me:
        async with open_client(self.address, CODEC) as client:
            reply: Me = await client.ask(Who())
            return reply


def write_version(home: Path, version: int) -> None:
    (home / "who.py").write_text(SCRIPT.replace("VERSION", str(version)))


@asynccontextmanager
async def operated(home: Path, *arguments: str) -> AsyncIterator[Operated]:
    """Serve the script in two processes; none is left afterwards."""
    command = [*RUN, "who.py", "--bind", "tcp://127.0.0.1:0", "--processes", "2", *arguments]
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(command, env=ENVIRONMENT, cwd=home, stderr=pipe)
    assert process.stderr is not None
    arbiter = Operated(process, home)

    async def collect(stream: trio.abc.ReceiveStream) -> None:
        async for data in stream:
            arbiter.log += data.decode()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, process.stderr)
            try:
                line = await arbiter.says(" serving on ")
                arbiter.address = line.split(" serving on ")[1].split(";")[0]
                yield arbiter
                assert await process.wait() == 0  # told to end by the test
                assert "Traceback" not in arbiter.log
            finally:
                process.kill()  # its workers notice
                with trio.CancelScope(shield=True):
                    await process.wait()
                nursery.cancel_scope.cancel()


async def test_a_script_is_served_in_processes_and_never_loaded_by_the_arbiter(tmp_path: Path) -> None:
    """Each worker loads it once; the PID file holds the arbiter's id; SIGTERM finishes what is in hand."""
    write_version(tmp_path, 1)
    async with operated(tmp_path, "--pid", "pid", "--grace", "30") as arbiter:
        workers = arbiter.loaded_by()
        assert len(set(workers)) == len(workers) == 2
        assert arbiter.process.pid not in workers
        assert (tmp_path / "pid").read_text() == f"{arbiter.process.pid}\n"
        assert (await arbiter.ask()).pid in workers
        async with open_client(arbiter.address, CODEC) as client, trio.open_nursery() as nursery:

            async def in_hand() -> None:
                assert (await client.ask(Who(seconds=1))).pid in workers

            nursery.start_soon(in_hand)
            await client.ask(Who())  # so the other one has arrived, too
            arbiter.process.terminate()
    assert not (tmp_path / "pid").exists()


async def test_a_reload_under_load_refuses_and_resets_nobody(tmp_path: Path) -> None:
    """Every connection is answered or told farewell, and the script as it is then is served in the end."""
    write_version(tmp_path, 1)
    async with operated(tmp_path) as arbiter:
        versions: set[int] = set()
        ends: set[str] = set()
        reloaded = False

        async def once() -> None:
            try:
                versions.add((await arbiter.ask()).version)
            except trio.BrokenResourceError as error:
                ends.add(str(error))

        async def come_and_go() -> None:
            while not reloaded:
                await once()

        async def stay() -> None:
            while not reloaded:
                try:
                    async with open_client(arbiter.address, CODEC) as client:
                        while not reloaded:
                            versions.add((await client.ask(Who())).version)
                except trio.BrokenResourceError as error:
                    ends.add(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(come_and_go)
                nursery.start_soon(stay)
            write_version(tmp_path, 2)
            arbiter.process.send_signal(signal.SIGHUP)
            await arbiter.says("reload complete")
            while 2 not in versions or len(set(arbiter.loaded_by())) < 4:  # noqa: ASYNC110 - in other processes
                await trio.sleep(0.02)
            reloaded = True
        assert (await arbiter.ask()).version == 2
        assert versions == {1, 2}
        assert ends == {"the server shuts down"}
        arbiter.process.terminate()


async def test_a_reload_to_a_broken_script_leaves_the_old_one(tmp_path: Path) -> None:
    """The worker says in one line what is wrong, and the arbiter that the reload stops."""
    write_version(tmp_path, 1)
    async with operated(tmp_path) as arbiter:
        (tmp_path / "who.py").write_text("app = 1 +")
        arbiter.process.send_signal(signal.SIGHUP)
        await arbiter.says("the reload stops")
        assert (await arbiter.says("stagetrio run: ")).startswith("stagetrio run: who.py:1: SyntaxError")
        assert (await arbiter.ask()).version == 1
        arbiter.process.terminate()


async def complaint(home: Path, *arguments: str) -> str:
    """The only line of a command that ends with status 2."""
    done = await trio.run_process(
        [*RUN, *arguments], env=ENVIRONMENT, cwd=home, capture_stdout=True, capture_stderr=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode().splitlines()
    return line.removeprefix("stagetrio run: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none.py", "--processes", "2"], "none.py: no such file; give the path of the script that makes the App"),
        (
            ["who.py", "--processes", "2", "--hang-after", "0.5"],
            "hang_after must be more than the heartbeat of 1.0 s, not 0.5; give another value",
        ),
        (["who.py", "--max-age", "60"], "--max-age is about worker processes; add --processes N"),
        (
            ["who.py", "--processes", "2", "--pid", "no/pid"],
            "no/pid: No such file or directory; choose another PID file with --pid",
        ),
    ],
)
async def test_what_cannot_be_served_is_told_once(tmp_path: Path, arguments: list[str], told: str) -> None:
    """In one line, with status 2, however many workers there were to be."""
    write_version(tmp_path, 1)
    assert await complaint(tmp_path, "--bind", "tcp://127.0.0.1:0", *arguments) == told


async def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    """By the arbiter, before any worker is started."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        write_version(tmp_path, 1)
        told = await complaint(tmp_path, "who.py", "--processes", "2", "--bind", address)
    assert told.startswith(f"cannot listen on {address}: Address already in use; stop the server")
    assert not (tmp_path / "loaded").exists()
