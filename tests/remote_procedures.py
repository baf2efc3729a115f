"""What the worker processes of `tests/test_remote_workers.py` run. Importing it fails where a file says so."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import trio

from stagetrio.remote import Procedures

DOOMED = "STAGETRIO_TEST_DOOMED"  # names a file; while that is there, a new process dies as soon as it is ready
HELD = "STAGETRIO_TEST_HELD"  # names a file; while that is there, a new process does not get ready
DYING = "STAGETRIO_TEST_DYING"  # where it is set, a new process dies at once
BROKEN = "STAGETRIO_TEST_BROKEN"  # names a file; while that is there, this module cannot be imported in a new process

procedures = Procedures()

if os.environ.get(BROKEN) and Path(os.environ[BROKEN]).exists():
    raise RuntimeError("this module is broken today")

if os.environ.get(DOOMED) and Path(os.environ[DOOMED]).exists():
    born = time.monotonic()

    def die() -> None:
        """End the process soon after it is ready."""
        while "stagetrio parent watch" not in {thread.name for thread in threading.enumerate()}:
            time.sleep(0.001)
        time.sleep(0.2)
        note(f"{os.environ[DOOMED]}.births", str(born))
        os._exit(7)

    threading.Thread(target=die, daemon=True).start()

if os.environ.get(DYING):
    os._exit(9)

while os.environ.get(HELD) and Path(os.environ[HELD]).exists():
    time.sleep(0.005)


@attrs.frozen
class Sum:
    total: int
    pid: int


@procedures.procedure
async def add(a: int, b: int) -> Sum:
    return Sum(a + b, os.getpid())


@procedures.procedure
async def pid() -> int:
    return os.getpid()


@procedures.procedure
async def note_and_hang(path: str) -> None:
    """Write a line, and never return."""
    note(path, str(os.getpid()))
    await trio.sleep_forever()


@procedures.procedure
async def note_and_die_once(path: str) -> int:
    """Write a line; end the whole process the first time; return how often this has run."""
    note(path, "ran")
    runs = len(lines(path))
    if runs == 1:
        os._exit(3)
    return runs


@procedures.procedure
async def leave_slowly(until: str) -> None:
    """End the connection at once, and the process when there is a file."""

    def stay() -> None:
        while not Path(until).exists():
            time.sleep(0.005)

    threading.Thread(target=stay).start()
    raise SystemExit(4)


@procedures.procedure
async def note_the_end(path: str) -> None:
    """Write a line when cancelled."""
    try:
        note(path, "begun")
        await trio.sleep_forever()
    finally:
        note(path, "ended")


@procedures.procedure
async def note_length(path: str, content: str) -> None:
    note(path, str(len(content)))


@procedures.procedure
async def note_later(path: str) -> None:
    await trio.sleep(0.05)
    note(path, "later")


@procedures.procedure
async def hold_the_loop(until: str) -> int:
    """Hold the worker's loop until there is a file."""
    while not Path(until).exists():
        time.sleep(0.001)  # noqa: ASYNC251
    return os.getpid()


@procedures.procedure
async def count_to(last: int) -> AsyncIterator[int]:
    for number in range(last):
        yield number


def note(path: str, line: str) -> None:
    with Path(path).open("a") as file:
        file.write(f"{line}\n")


def lines(path: str | Path) -> list[str]:
    return Path(path).read_text().split() if Path(path).exists() else []
