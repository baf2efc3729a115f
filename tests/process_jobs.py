"""What the jobs of the process pools' tests do; imported by the worker processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import attrs

from stagetrio.jobs import Again, blocking, check_cancelled, give_way, report


@attrs.frozen
class Point:
    """An attrs value that crosses."""

    x: int
    y: int


class Picky(Exception):
    """An exception that cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def mirrored(point: Point) -> Point:
    """An attrs value in, an attrs value out."""
    return Point(point.y, point.x)


def pid() -> int:
    """Where it runs."""
    return os.getpid()


def fails(message: str) -> None:
    """Raise something ordinary."""
    raise KeyError(message)


def fails_pickily() -> None:
    """Raise something that cannot be unpickled."""
    raise Picky(1, 2)


def exits() -> None:
    """Raise what would end a program."""
    sys.exit(3)


def unpicklable() -> object:
    """Return what cannot be sent."""
    return lambda: None


def dies(number: int = signal.SIGKILL) -> None:
    """End this process in the middle of a call."""
    os.kill(os.getpid(), number)
    time.sleep(60)


def forks_and_dies(path: str) -> None:
    """Leave a child that holds what this process held, until a file is there, and end."""
    if os.fork() == 0:
        until = time.monotonic() + 60
        while not Path(path).exists() and time.monotonic() < until:
            time.sleep(0.02)
        os._exit(0)
    dies()


def meet(directory: str, name: str, others: int) -> int:
    """Leave a mark, and wait until so many have."""
    (Path(directory) / name).touch()
    while len(list(Path(directory).iterdir())) < others:
        time.sleep(0.005)
    return os.getpid()


def wait_for(path: str) -> int:
    """Say that it has begun, and wait for a file to appear."""
    Path(path + ".begun").touch()
    while not Path(path).exists():
        time.sleep(0.005)
    return os.getpid()


def forever(path: str) -> None:
    """Say where it runs, and never end."""
    Path(path).write_text(str(os.getpid()))
    while True:
        pass


def note(path: str, text: str) -> None:
    """Append a line to a file."""
    with open(path, "a") as file:
        file.write(text + "\n")


def until_third(path: str) -> str | Again:
    """Ask to be called again until the third time."""
    note(path, "run")
    runs = len(Path(path).read_text().splitlines())
    return "done" if runs == 3 else Again(0.0)


def counts(n: int) -> str:
    """Report numbers, then return."""
    for i in range(n):
        report(i)
    return "counted"


def counts_and_fails(n: int) -> None:
    """Report numbers, then fail."""
    counts(n)
    raise ValueError("counted out")


def counts_and_notes(path: str, n: int) -> None:
    """Report big values, and leave their number in a file."""
    for i in range(n):
        report(bytes(100_000))
        Path(path).write_text(str(i))


def asks_politely() -> str:
    """Use everything a job may say, as in a thread."""
    check_cancelled()
    give_way()
    with blocking():
        return "fine"


def grow(size: int) -> int:
    """Keep memory for good."""
    kept.append(bytearray(os.urandom(1024)) * (size // 1024))
    return os.getpid()


kept: list[bytearray] = []


def odd_fails(n: int) -> int:
    """Return even numbers; fail for 7."""
    if n == 7:
        raise ValueError("seven")
    return n
