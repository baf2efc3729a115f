"""Each example runs as its first lines say, its client gets what it came for, and SIGTERM ends it in order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

EXAMPLES = Path(__file__).parent.parent / "examples"


class Lines:
    """Reads a process's output line by line."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def next(self) -> str:
        while b"\n" not in self._buffer:
            data = await self._stream.receive_some()
            if not data:
                raise EOFError(self._buffer.decode())
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()


@asynccontextmanager
async def served(example: str) -> AsyncIterator[tuple[str, trio.Process]]:
    """Run an example on a free port, and end it by SIGTERM."""
    command = [sys.executable, "-m", "stagetrio", "run", str(EXAMPLES / example), "--bind", "tcp://127.0.0.1:0"]
    process = await trio.lowlevel.open_process(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        with trio.fail_after(30):
            line = await Lines(process.stderr).next()
            match = re.search(r"tcp://127\.0\.0\.1:\d+", line)
            assert match, line
            yield match[0], process
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await process.stderr.aclose()


async def client(script: str, *arguments: str, at: str, stdin: bytes = b"") -> list[str]:
    command = [sys.executable, str(EXAMPLES / script), *arguments, "--at", at]
    with trio.fail_after(30):
        done = await trio.run_process(command, capture_stdout=True, stdin=stdin)
    return done.stdout.decode().splitlines()


async def test_echo() -> None:
    """What is said comes back, word by word."""
    async with served("echo.py") as (address, _process):
        assert await client("echo_client.py", "hello", "world", at=address) == ["hello", "world"]


async def test_chat() -> None:
    """What one says reaches those in the same room only, arrivals and departures included."""
    async with served("chat.py") as (address, _process):
        command = [sys.executable, str(EXAMPLES / "chat_client.py"), "--room", "tea", "--name", "ada", "--at", address]
        ada = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert ada.stdin is not None
        assert ada.stdout is not None
        heard = Lines(ada.stdout)
        assert await heard.next() == "in tea: ada"
        assert (await client("chat_client.py", "--room", "coffee", "--name", "eve", at=address, stdin=b"psst\n"))[
            0
        ] == "in coffee: eve"
        lines = await client("chat_client.py", "--room", "tea", "--name", "bob", at=address, stdin=b"hello\nbye\n")
        assert lines[0] == "in tea: ada, bob"
        expected = ["bob: (joins)", "bob: hello", "bob: bye", "bob: (leaves)"]
        assert [await heard.next() for _ in expected] == expected
        await ada.stdin.aclose()
        assert await ada.wait() == 0
        await ada.stdout.aclose()


async def test_arena() -> None:
    """Players log in, move and strike, the judge's process answers, and it ends with the server."""
    async with served("arena.py") as (address, process):
        children = [pid for f in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in f.read_text().split()]
        assert len(children) == 1
        outputs: dict[str, list[str]] = {}

        async def play(name: str) -> None:
            outputs[name] = await client("arena_client.py", "--name", name, "--steps", "3", at=address)

        async with trio.open_nursery() as nursery:
            for name in ("ada", "bob"):
                nursery.start_soon(play, name)
        for name in ("ada", "bob"):
            assert re.fullmatch(rf"{name} begins at [01], 0", outputs[name][0])
            assert re.fullmatch(rf"{name} stands at [34], 3", outputs[name][1])
    with pytest.raises(ProcessLookupError):
        os.kill(int(children[0]), 0)


async def test_arena_drains_when_its_terminal_is_interrupted() -> None:
    """Ctrl-C reaches every process of the terminal's group; the judge is not among them, and the server drains."""
    command = [sys.executable, "-m", "stagetrio", "run", str(EXAMPLES / "arena.py"), "--bind", "tcp://127.0.0.1:0"]
    process = await trio.lowlevel.open_process(command, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    with trio.fail_after(30):
        lines = Lines(process.stderr)
        assert "serving" in await lines.next()
        os.killpg(process.pid, signal.SIGINT)
        assert await process.wait() == 0
        assert "draining" in await lines.next()
        assert await process.stderr.receive_some() == b""
    await process.stderr.aclose()


async def test_clients_say_in_a_line_that_nobody_is_there() -> None:
    """Without a server a client ends with one line that says how to start it."""
    for example, arguments in (("echo", ["x"]), ("chat", ["--name", "ada"]), ("arena", ["--name", "ada"])):
        command = [sys.executable, str(EXAMPLES / f"{example}_client.py"), *arguments, "--at", "tcp://127.0.0.1:1"]
        with trio.fail_after(30):
            done = await trio.run_process(command, capture_stderr=True, check=False)
        assert done.returncode == 1
        assert done.stderr.decode().count("\n") == 1
        assert f"stagetrio run examples/{example}.py" in done.stderr.decode()


async def test_arena_judges_strikes() -> None:
    """A strike is judged by distance: two players on the same board, one near and one far."""
    async with served("arena.py") as (address, _process), trio.open_nursery() as nursery:
        # A second player who stays, so that the first one always meets somebody.
        sys.path.insert(0, str(EXAMPLES))
        try:
            from arena import Login, Move, Strike, Verdict, app  # type: ignore[import-not-found]
        finally:
            sys.path.remove(str(EXAMPLES))
        from stagetrio.client import open_client

        async with open_client(address, app.codec) as ada, open_client(address, app.codec) as bob:
            await ada.ask(Login("ada"))
            await bob.ask(Login("bob"))
            assert await ada.ask(Strike("bob")) == Verdict(True, "close enough")
            for _ in range(7):
                await bob.ask(Move(1, 1))
            assert await ada.ask(Strike("bob")) == Verdict(False, "too far away")
            assert await ada.ask(Strike("eve")) == Verdict(False, "nobody is called eve")
        nursery.cancel_scope.cancel()


async def test_datagrams() -> None:
    """Who shows where it is gets the long answer, each its own count; SIGTERM drains the server."""
    script = [sys.executable, "-W", "error", str(EXAMPLES / "datagrams.py")]
    process = await trio.lowlevel.open_process([*script, "udp://127.0.0.1:0"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        with trio.fail_after(60):
            address = (await Lines(process.stdout).next()).removeprefix("receiving at ")
            for name in ("ada", "bob"):
                done = await trio.run_process([*script, address, "--ping", name], capture_stdout=True)
                words = rf"Hello {name}, you are at udp://127\.0\.0\.1:\d+, and I have heard you\. \(1\)\n"
                assert re.fullmatch(words, done.stdout.decode())
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            late = await trio.run_process([*script, address, "--ping", "eve"], capture_stderr=True, check=False)
            assert late.stderr.decode() == f"nobody is at {address}: python examples/datagrams.py {address}\n"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await process.stdout.aclose()
