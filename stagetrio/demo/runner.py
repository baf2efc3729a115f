"""Starts the processes of a storm, gives them one beginning, brings their figures home, and leaves none behind.

Each side of the comparison is one server process and two of clients: the hogs have their own, so that their haste does
not delay the clock by which the others are measured. Every child runs in a session of its own (a Ctrl-C in the terminal
is ours to handle), is killed and reaped on every way out, and ends by itself when its input closes, should we be
killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from stagetrio.demo.measure import Tally
from stagetrio.demo.storm import GROUPS, Storm

_CLIENT_GROUPS = (("polite", "burners", "slow", "silent"), ("hogs",))
_START_SECONDS = 30.0  # for an interpreter to come up and import, on a busy machine
_REPORT_SECONDS = 30.0
_HEAD_START = 0.25  # between the order to start and the start, so that every process knows it in time


class ChildFailed(Exception):
    """A process of the storm did not do its part; the message is one line."""


@attrs.frozen
class Progress:
    """How far the storm against one server has come.

    Args:
        side: ``"control"`` or ``"staged"``.
        fraction: 0 to 1.
        replies: Replies so far, of all groups.
        polite_p99: The 99th percentile so far of the latency of the polite who do not need the database, in seconds;
            None before the first reply.
    """

    side: str
    fraction: float
    replies: int = 0
    polite_p99: float | None = None


@attrs.frozen
class Figures:
    """What came out of one storm against one server.

    Args:
        side: ``"control"`` or ``"staged"``.
        seconds: How long the storm lasted.
        tallies: As the clients counted them: ``{group: tally}`` of those who send and read, and the polite ones' also
            apart, as ``asks`` (which do not need the database) and ``queries`` (which do).
        worst_stall: The longest the server's loop was held, in seconds.
        client_stalls: The same of the clients' loops, of all but the hogs and of the hogs: what their measurements may
            be off by.
        memory_before: Peak resident memory of the server's process before the first client came, in bytes.
        memory_peak: The same when the storm was over.
        disposed: ``{group: clients}`` that the server held no connection of any more when the storm was over.
        database_queries: Queries that reached the database.
        database_most_at_once: The most of them at once.
    """

    side: str
    seconds: float
    tallies: dict[str, Tally]
    worst_stall: float
    client_stalls: tuple[float, float]
    memory_before: int
    memory_peak: int
    disposed: dict[str, int]
    database_queries: int
    database_most_at_once: int


class _Child:
    """A process that speaks JSON lines."""

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self._process = process
        self._pending = b""
        self._said = b""  # the end of what it wrote to stderr

    async def listen_to_stderr(self) -> None:
        assert self._process.stderr is not None
        async for data in self._process.stderr:
            self._said = (self._said + data)[-8192:]

    async def order(self, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            await self._process.stdin.send_all(json.dumps(command).encode() + b"\n")
        except trio.BrokenResourceError:
            raise self._failure() from None

    async def event(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self._process.stdout is not None
        while b"\n" not in self._pending:
            data = await self._process.stdout.receive_some(65536)
            if not data:
                await self._process.wait()
                raise self._failure()
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    async def expect(self, name: str, within: float) -> dict[str, Any]:
        """The next thing it says, which has to be this."""
        with trio.move_on_after(within):
            event = await self.event()
            if event["event"] != name:
                raise ChildFailed(f"{self.name} said {event['event']!r}, not {name!r}")
            return event
        raise ChildFailed(f"{self.name} did not say {name!r} within {within:g} s")

    def _failure(self) -> ChildFailed:
        # The last line of a traceback says what happened; that of a group's is below its frame of dashes.
        lines = [line.strip("+-| ") for line in self._said.decode(errors="replace").splitlines()]
        said = next(filter(None, reversed(lines)), "it did not say why")
        return ChildFailed(f"{self.name} ended early: {said}")


@asynccontextmanager
async def _open_child(name: str, module: str, *arguments: str) -> AsyncIterator[_Child]:
    # The children import what we import, from where we do, wherever we were started.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    process = await trio.lowlevel.open_process(
        [sys.executable, "-P", "-m", f"stagetrio.demo.{module}", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        **apart,
    )
    try:
        async with trio.open_nursery() as nursery:
            child = _Child(name, process)
            nursery.start_soon(child.listen_to_stderr)
            yield child
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                assert pipe is not None
                await pipe.aclose()


class _Watch:
    """Merges what the client processes say on their way into the progress of the storm."""

    def __init__(self, side: str, storm: Storm, begin: float, on_progress: Callable[[Progress], None]) -> None:
        self._side = side
        self._storm = storm
        self._begin = begin
        self._on_progress = on_progress
        self._replies: dict[str, int] = {}
        self._polite_p99: float | None = None

    async def follow(self, child: _Child) -> dict[str, Any]:
        """Go on until its result; return that."""
        while (event := await child.event())["event"] != "result":
            self._replies.update(event["replies"])
            self._polite_p99 = event["p99"].get("asks", self._polite_p99)
            done = (time.monotonic() - self._begin) / self._storm.seconds
            self._tell(min(0.99, max(0.01, done)))
        return event

    def finish(self) -> None:
        self._tell(1.0)

    def _tell(self, fraction: float) -> None:
        self._on_progress(Progress(self._side, fraction, sum(self._replies.values()), self._polite_p99))


async def run_storm(side: str, storm: Storm, on_progress: Callable[[Progress], None]) -> Figures:
    """Let the storm loose on one server, in processes of their own.

    Args:
        side: ``"control"``, the plain Trio server, or ``"staged"``, the one on stagetrio.
        storm: What is sent and when.
        on_progress: Called a few times a second.

    Raises:
        ChildFailed: A process did not come up, or did not stay.

    Checkpoints: often. When this is cancelled, all processes are dead and reaped before it ends.
    """
    on_progress(Progress(side, 0.0))
    try:
        return await _run_storm(side, storm, on_progress)
    except BaseExceptionGroup as group:
        failures, others = group.split(ChildFailed)
        if others is not None:  # a cancellation, or a mistake of ours, outweighs what came of it
            raise others from None
    # Where one process fails, others may in consequence; the first that was noticed has the reason.
    failure: BaseException | None = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    assert failure is not None
    raise failure


async def _run_storm(side: str, storm: Storm, on_progress: Callable[[Progress], None]) -> Figures:
    name = {"control": "the plain Trio server", "staged": "the stagetrio server"}[side]
    plain_storm = json.dumps(attrs.asdict(storm))
    async with _open_child(name, "process", side, plain_storm) as server:
        port = str((await server.expect("listening", _START_SECONDS))["port"])
        many, few = (",".join(groups) for groups in _CLIENT_GROUPS)
        async with (
            _open_child("the process of the clients", "load", many, port, plain_storm) as crowd,
            _open_child("the process of the hogs", "load", few, port, plain_storm) as hogs,
        ):
            for child in (crowd, hogs):
                await child.expect("ready", _START_SECONDS)
            begin = time.monotonic() + _HEAD_START
            for child in (server, crowd, hogs):
                await child.order(do="start", at=begin)
            watch = _Watch(side, storm, begin, on_progress)
            results: list[dict[str, Any]] = [{}, {}]

            async def follow(index: int, child: _Child) -> None:
                results[index] = await watch.follow(child)

            async with trio.open_nursery() as nursery:
                for index, child in enumerate((crowd, hogs)):
                    nursery.start_soon(follow, index, child)
            await server.order(do="report")
            report = await server.expect("report", _REPORT_SECONDS)
    watch.finish()
    return _figures(side, storm, results, report)


def _figures(side: str, storm: Storm, results: list[dict[str, Any]], report: dict[str, Any]) -> Figures:
    ports: dict[str, list[int]] = {}
    tallies: defaultdict[str, Tally] = defaultdict(Tally)
    for result in results:
        ports |= result["ports"]
        for name, slots in result["tallies"].items():
            tallies[name].add(Tally.from_plain(slots))
    for kind in ("asks", "queries"):
        tallies["polite"].add(tallies[kind])
    open_ports = set(report["open_ports"])
    return Figures(
        side=side,
        seconds=storm.seconds,
        tallies={name: tallies[name] for name in ("polite", "asks", "queries", "hogs", "burners")},
        worst_stall=report["worst_stall"],
        client_stalls=(results[0]["worst_stall"], results[1]["worst_stall"]),
        memory_before=report["memory_before"],
        memory_peak=report["memory_peak"],
        disposed={group: len(set(ports[group]) - open_ports) for group in GROUPS},
        database_queries=report["database_queries"],
        database_most_at_once=report["database_most_at_once"],
    )
