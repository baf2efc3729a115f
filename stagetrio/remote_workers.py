"""Procedures in worker processes of this one: started here, called as anything remote is, replaced when they are lost.

Theory of operation. Each worker has a task that keeps it (`Workers.keep`): it starts the process, connects to it over
the socket the process has inherited, and, when that connection ends, makes sure that the process has ended too and
begins anew. A worker is called only between these: it is *ready* when it has imported its procedures and said welcome.

A request goes to the ready worker that has the fewest in hand, among equals to the one whose turn is the longest ago:
so one whose procedure holds its loop gets nothing more before the others have as much. There is no queue in front: what
is more than ``max_in_flight`` waits in its caller's task.

Where none is ready, requests go to the connection that was lost last, which refuses them as certainly not run, and
that is the case in which `stagetrio.remote_link.Remote` asks for another one and waits for it. A worker that cannot be
started, or is lost before it has answered anything, is tried again after a while, longer each time; from the third
failure in a row on, those who wait are told.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from stagetrio.backoff import backoff
from stagetrio.backstage import open_backstage
from stagetrio.procedures import Procedures
from stagetrio.process_link import DYING_SECONDS, ProcessLink, ending, start_worker
from stagetrio.process_worker import ORPHAN_SECONDS, preparation
from stagetrio.remote_calling import CLOSED_HERE, CallingConnection, CallingTally
from stagetrio.remote_hello import introduce
from stagetrio.remote_link import KnownProcedures, Remote, RemoteStatistics
from stagetrio.remote_wire import WorkerLost, check_bounds

TRIES = 3  # lives of no use in a row after which those who wait are told

_logger = logging.getLogger("stagetrio.remote")


@attrs.frozen
class RemoteWorkersStatistics(RemoteStatistics):
    """What all workers have in hand together, and what has become of them.

    Args:
        ready: Worker processes that can be called.
        starting: Those that cannot, yet.
        lost: Workers that ended while they were wanted.
        failed_starts: Workers that did not get ready.
    """

    ready: int
    starting: int
    lost: int
    failed_starts: int


class Workers:
    """The processes behind a `RemoteWorkers`.

    Args:
        setup: What each process is told first.
        processes: How many there shall be.
        start_within: Seconds in which each must be ready.
        max_frame_bytes: The longest answer.
        max_buffered_bytes: Requests collected for a worker that does not fetch them.
    """

    reopens = True

    def __init__(
        self, setup: dict[str, Any], processes: int, start_within: float, max_frame_bytes: int, max_buffered_bytes: int
    ) -> None:
        self.known = KnownProcedures()
        self.farewell = ORPHAN_SECONDS + DYING_SECONDS  # given to a worker that is no longer wanted
        self._setup, self._processes, self._start_within = setup, processes, start_within
        self._max_frame_bytes, self._max_buffered_bytes = max_frame_bytes, max_buffered_bytes
        self._tally = CallingTally()
        self._ready: list[CallingConnection] = []  # who was chosen the longest ago first
        self._last_lost: CallingConnection
        self._changed = trio.lowlevel.ParkingLot()
        self._opened = self._closed = False
        self._failed_starts = self._lost = 0
        self._failure: WorkerLost | None = None  # why those who wait for a worker wait in vain

    # stagetrio.remote_link.Way

    @property
    def connection(self) -> CallingConnection:
        """Where the next request goes."""
        ready = self._ready
        if not ready:
            return self._last_lost
        chosen = ready[0] if len(ready) == 1 else min(ready, key=_load)
        if len(ready) > 1:
            ready.remove(chosen)
            ready.append(chosen)
        return chosen

    async def reopened(self, lost: CallingConnection) -> CallingConnection:
        """Wait for a worker that is ready.

        Raises:
            WorkerLost: There is none, and none can be started.
            trio.ClosedResourceError: None is wanted any more.

        Checkpoints: where it has to wait.
        """
        while not self._ready:
            if self._closed:
                raise trio.ClosedResourceError(CLOSED_HERE)
            if self._failure is not None:
                raise WorkerLost(self._failure.reason, may_have_run=False) from self._failure
            await self._changed.park()
        return self.connection

    def statistics(self) -> RemoteWorkersStatistics:
        """See `RemoteWorkers.statistics`."""
        ready = self._ready
        return RemoteWorkersStatistics(
            in_flight=sum(connection.in_flight for connection in ready),
            waiting=sum(connection.waiting for connection in ready) + len(self._changed),
            max_in_flight=sum(connection.max_in_flight for connection in ready),
            ready=len(ready),
            starting=0 if self._closed else self._processes - len(ready),
            lost=self._lost,
            failed_starts=self._failed_starts,
            **attrs.asdict(self._tally),
        )

    # The life of the workers

    async def opened(self) -> None:
        """Wait until all workers are ready.

        Raises:
            WorkerLost: One of them cannot be started.
        """
        while len(self._ready) < self._processes:
            if self._failure is not None:
                raise self._failure
            await self._changed.park()
        self._opened = True

    async def say_the_rest(self) -> None:
        """Hand over to the workers what has been said to them."""
        async with trio.open_nursery() as nursery:
            for connection in self._ready:
                nursery.start_soon(connection.say_the_rest)

    def close(self) -> None:
        """Want no worker any more."""
        self._closed = True
        for connection in self._ready:
            connection.close()
        self._changed.unpark_all()

    async def keep(self) -> None:
        """Keep one worker process alive, until it is wanted no more."""
        failures = 0  # in a row
        while not self._closed:
            failure = await self._one_life()
            if failure is None:
                failures = 0
                continue
            failures += 1
            if failures == 1:
                _logger.error("%s: tried again until it succeeds", failure)
            if failures >= TRIES or not self._opened:
                self._failure = failure
                self._changed.unpark_all()
            await trio.sleep(backoff(failures))

    async def _one_life(self) -> WorkerLost | None:
        """Start a worker and have it called until its end; why it was of no use, if it was of none."""
        try:
            link = await start_worker(self._setup, self._start_within, "stagetrio.remote_worker_process")
            return await self._have(link)
        except WorkerLost as error:
            failure = error
        except OSError as error:
            failure = WorkerLost(f"no worker process can be started: {error}", may_have_run=False)
        self._failed_starts += 1
        return failure

    async def _have(self, link: ProcessLink) -> WorkerLost | None:
        async def why(seen: str) -> str:
            self._discard(connection)
            with trio.move_on_after(DYING_SECONDS):
                return f"the worker process {ending(await link.process.wait())}"
            return seen

        stream = link.stream()
        try:
            welcome = await introduce(stream, None, self._max_frame_bytes)
            connection = CallingConnection(
                stream,
                welcome,
                self._tally,
                max_frame_bytes=self._max_frame_bytes,
                max_buffered_bytes=self._max_buffered_bytes,
                why=why,
            )
            self._add(connection)
            try:
                await connection.run()
            finally:
                self._discard(connection)
            if self._closed:
                return None
            self._lost += 1
            _logger.error("%s, and is replaced", connection.lost)
            # Or one that dies of being started would be started as fast as it dies.
            return None if connection.heard else WorkerLost(f"{connection.lost}", may_have_run=False)
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
                with trio.move_on_after(self.farewell if self._closed else 0):
                    await link.process.wait()
                await link.end()

    def _add(self, connection: CallingConnection) -> None:
        self._ready.append(connection)
        self._tally.connections += 1
        self._failure = None
        self._changed.unpark_all()

    def _discard(self, connection: CallingConnection) -> None:
        if connection in self._ready:
            self._ready.remove(connection)
            self._last_lost = connection


def _load(connection: CallingConnection) -> int:
    return connection.in_flight + connection.waiting


class RemoteWorkers(Remote):
    """Worker processes, as something to call: each request goes to the one with the fewest in hand.

    Made by `open_remote_workers`. What is said of `stagetrio.remote_link.Remote` holds here, with these differences: a
    request that finds no worker ready waits for one; and one that loses its worker, if it certainly has not run or is
    ``idempotent``, is tried again, once, in another.
    """

    def __init__(self, way: Workers) -> None:
        super().__init__(way)
        self._workers = way

    def statistics(self) -> RemoteWorkersStatistics:
        """Return what the workers have in hand, and what has become of them."""
        return self._workers.statistics()


@asynccontextmanager
async def open_remote_workers(
    procedures: Procedures,
    processes: int,
    *,
    preload: Sequence[str] = (),
    max_in_flight: int = 1000,
    max_frame_bytes: int = 2**20,
    max_buffered_bytes: int = 2**20,
    start_within: float = 30.0,
) -> AsyncIterator[RemoteWorkers]:
    """Run procedures in worker processes: ``async with open_remote_workers(procedures, 4) as workers: …``.

    The block is entered when all workers are ready. A worker that ends is replaced; calls in flight to it, and no
    others, raise `WorkerLost`. Workers import the modules of the procedures, as `multiprocessing` does: those of the
    program's own main module are found only where that can be imported without doing its work. Needs POSIX.

    When the block is left, what was posted is finished within two seconds. If this process dies, however it does, the
    workers end within two seconds.

    Args:
        procedures: What each worker runs: functions that can be imported by their names.
        processes: How many workers there shall be, ≥ 1.
        preload: Modules a worker imports before it counts as ready.
        max_in_flight: Requests in hand of each worker; more wait.
        max_frame_bytes: The longest request, and the longest answer; ≥ 1024.
        max_buffered_bytes: Requests collected for a worker that does not fetch them, and answers not fetched here.
        start_within: Seconds in which a worker must be ready, > 0.

    Raises:
        WorkerLost: A worker could not be started, or does not find a procedure of a notebook's cell or of a script that
            cannot be imported; its traceback is a note.
        TypeError: A procedure cannot be found by its name in this process.
        ValueError: A bound makes no sense.

    Checkpoints: on entry and on exit. Whoever still calls when the block is left gets ``trio.ClosedResourceError``.
    Cost: 0.3 s and 40 MB per worker.
    """
    check_bounds(
        processes=processes,
        max_in_flight=max_in_flight,
        max_frame_bytes=max_frame_bytes,
        max_buffered_bytes=max_buffered_bytes,
    )
    if not start_within > 0:
        raise ValueError(f"start_within must be above 0, not {start_within!r}")
    bounds = {
        "max_in_flight": max_in_flight,
        "max_frame_bytes": max_frame_bytes,
        "max_buffered_bytes": max_buffered_bytes,
    }
    setup = {"main": preparation(), "preload": list(preload), "procedures": _pickled(procedures), "bounds": bounds}
    workers = Workers(setup, processes, start_within, max_frame_bytes, max_buffered_bytes)
    async with open_backstage() as nursery:
        for _ in range(processes):
            nursery.start_soon(workers.keep)
        try:
            await workers.opened()
            yield RemoteWorkers(workers)
            await workers.say_the_rest()
        except BaseException:
            workers.farewell = 0
            raise
        finally:
            workers.close()


def _pickled(procedures: Procedures) -> bytes:
    try:
        return pickle.dumps(procedures)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"procedures must be functions that can be imported by their names: {error}") from error
