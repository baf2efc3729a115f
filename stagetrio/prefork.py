"""A server in several processes: an arbiter that holds the sockets, and workers that serve them.

::

    # game.py: what each worker runs
    async def serve(worker: Worker) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, play, worker.listeners)
            worker.ready()
            await worker.wait_drain()
            nursery.cancel_scope.cancel()          # or finish what is in hand first, within worker.grace seconds

    # what the arbiter runs
    trio.run(partial(prefork.serve, "game:serve", ["tcp://0.0.0.0:8800"], processes=4))

The arbiter never imports what it serves: it cannot be broken by it, and a reload gets the code as it is then. What the
workers do stands in ``arbiter.py`` (which of them there are), ``worker_process.py`` (how one is watched and ended),
``prefork_sockets.py`` (what they listen on) and ``prefork_worker.py`` (their inside).

Signals to the arbiter, as gunicorn has them:

================ =====================================================================================================
SIGTERM, SIGINT  drain all workers within the grace, then end; a second one kills what is left
SIGQUIT          end at once
SIGHUP           rolling reload: every worker is replaced by one that is ready before it drains
SIGTTIN, SIGTTOU one worker more, one less
================ =====================================================================================================

When a worker dies or hangs, its connections end with it. What its clients open next goes to the workers that are ready,
at once, and to its replacement when that is ready. Only what was in its queue when it died waits for the replacement,
for as long as one takes to start, and so does everything while no worker is ready. None of these is refused or reset.
A slot that is closed, by SIGTTOU or `Arbiter.scale`, gets no more connections, and its worker accepts what it got
before it drains.

Needs POSIX. On Linux each worker of a TCP address has a listening socket of its own, and connections are spread evenly
over those that are ready. (Where the kernel does not allow the program that does this, as in some sandboxes, they are
spread over all slots, and those of a slot without a worker wait for its next one.) Elsewhere, and on Unix sockets,
workers share one.
"""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypedDict, Unpack

import trio

from stagetrio.amounts import check_above_zero, check_amount, check_count
from stagetrio.arbiter import Arbiter, ArbiterStatistics, CannotStart, WorkerStatistics
from stagetrio.prefork_sockets import open_worker_sockets
from stagetrio.prefork_worker import Worker
from stagetrio.service import notify, pid_file
from stagetrio.sockets import Address
from stagetrio.worker_process import Timing, check_timing

__all__ = ["Arbiter", "ArbiterStatistics", "CannotStart", "Worker", "WorkerStatistics", "open_arbiter", "serve"]

logger = logging.getLogger("stagetrio.prefork")

_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGTTIN", "SIGTTOU")


@asynccontextmanager
async def open_arbiter(
    target: str,
    addresses: Sequence[str | Address],
    *,
    processes: int,
    arguments: Sequence[Any] = (),
    grace: float = 10.0,
    heartbeat: float = 1.0,
    hang_after: float = 30.0,
    start_within: float = 60.0,
    max_age: float = math.inf,
    max_memory_bytes: float = math.inf,
    jitter: float = 0.1,
) -> AsyncIterator[Arbiter]:
    """Open listening sockets and start worker processes on them; leaving the block kills what is left of them.

    Args:
        target: What each worker runs: ``"package.module:function"`` or ``"path/to/script.py:function"``, an async
            function that is called with a `Worker` and the arguments.
        addresses: Where they listen.
        processes: How many there are to be, ≥ 1; `Arbiter.scale` changes it.
        arguments: Passed to the function; whatever JSON can say.
        grace: Seconds for draining, ≥ 0.
        heartbeat: Seconds between two signs of life of a worker.
        hang_after: Seconds without one after which a worker is told to dump its stacks, and killed.
        start_within: Seconds in which a worker must be ready.
        max_age: Seconds after which a worker is replaced.
        max_memory_bytes: Of RAM, beyond which a worker is replaced; on Linux.
        jitter: The share, 0 to 1, by which these two differ from worker to worker.

    Raises:
        CannotStart: The first worker exited by itself before it was ready; in an exception group.
        OSError: An address is in use, or not ours.
        ValueError: An argument makes no sense.

    Checkpoints: throughout; cancelled, workers are killed.
    """
    timing = Timing(heartbeat, hang_after, start_within, grace)
    check_timing(timing)
    for name, value in (("max_age", max_age), ("max_memory_bytes", max_memory_bytes)):
        check_above_zero(name, value)
    if check_amount("jitter", jitter) > 1:
        raise ValueError(f"jitter must be between 0 and 1, not {jitter!r}")
    check_count("processes", processes, 1)
    sockets = await open_worker_sockets(addresses)
    try:
        config = {"target": target, "arguments": list(arguments)}
        arbiter = Arbiter(config, sockets, timing, max_age, max_memory_bytes, jitter)
        async with trio.open_nursery() as arbiter._nursery:
            if max_age < math.inf or max_memory_bytes < math.inf:
                arbiter._nursery.start_soon(arbiter.watch_age_and_memory)
            arbiter.scale(processes)
            yield arbiter
            arbiter._nursery.cancel_scope.cancel("the arbiter's block was left")
    finally:
        with trio.CancelScope(shield=True):
            await sockets.aclose()


class Options(TypedDict, total=False):
    """What `serve` takes besides, as `open_arbiter` does."""

    arguments: Sequence[Any]
    grace: float
    heartbeat: float
    hang_after: float
    start_within: float
    max_age: float
    max_memory_bytes: float
    jitter: float


async def serve(
    target: str,
    addresses: Sequence[str | Address],
    *,
    processes: int,
    pid_path: str | os.PathLike[str] | None = None,
    task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
    **options: Unpack[Options],
) -> int:
    """Serve in worker processes until a signal ends it; for the main thread of a process of its own.

    systemd is told of it by ``sd_notify`` (``Type=notify`` or ``notify-reload``).

    Args:
        target: As for `open_arbiter`, whose other arguments are taken as well.
        addresses: Where to listen.
        processes: How many workers, ≥ 1.
        pid_path: A file to keep the process id in.
        task_status: Gets the addresses listened on when all workers are ready.

    Returns:
        0 after an orderly end, 128 and the number of the signal that cut it short.

    Raises:
        CannotStart: The first worker exited by itself before it was ready.
        FileExistsError: The PID file belongs to a process that is alive.
        OSError: An address is in use, or not ours.

    Checkpoints: throughout; cancelled, workers are killed.
    """
    watched = [getattr(signal, name) for name in _SIGNALS]
    with pid_file(pid_path), trio.open_signal_receiver(*watched) as signals:
        try:
            async with open_arbiter(target, addresses, processes=processes, **options) as arbiter:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_announce, arbiter, task_status)
                    nursery.start_soon(_feed_watchdog)
                    status = await _obey(arbiter, signals, nursery)
                    nursery.cancel_scope.cancel()
                return status
        except BaseExceptionGroup as group:
            broken = group.subgroup(CannotStart)
            if broken is None:
                raise
            raise _first(broken) from None


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def _announce(arbiter: Arbiter, task_status: trio.TaskStatus[list[Address]]) -> None:
    await arbiter.wait_ready()
    task_status.started(arbiter.addresses)
    where = ", ".join(map(str, arbiter.addresses))
    logger.info("%s serving on %s; SIGTERM or Ctrl-C drains, SIGHUP reloads", _workers(arbiter), where)
    notify(READY=1, STATUS=f"{_workers(arbiter)} on {where}", MAINPID=os.getpid())


def _workers(arbiter: Arbiter) -> str:
    return "1 worker" if arbiter.processes == 1 else f"{arbiter.processes} workers"


async def _feed_watchdog() -> None:
    """Tell systemd that this process lives, twice in the time it asks for (``WatchdogSec=``)."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit():
        return
    while True:
        notify(WATCHDOG=1)
        await trio.sleep(int(microseconds) / 2e6)


async def _obey(arbiter: Arbiter, signals: AsyncIterator[int], nursery: trio.Nursery) -> int:
    """Do what signals say until one has ended all workers; return the exit status."""
    status = 0
    stopping = False

    async def stop() -> None:
        await arbiter.stop()
        ended.cancel()

    with trio.CancelScope() as ended:
        async for number in signals:
            if number == signal.SIGQUIT or (stopping and number in (signal.SIGTERM, signal.SIGINT)):
                status = 128 + number
                arbiter.kill()
                return status
            if stopping:
                logger.info("%s: comes too late", signal.Signals(number).name)
            elif number == signal.SIGHUP:
                notify(RELOADING=1)
                nursery.start_soon(_reload, arbiter)
            elif number in (signal.SIGTTIN, signal.SIGTTOU):
                _scale(arbiter, signal.Signals(number))
            else:
                stopping = True
                logger.info("%s: draining %s", signal.Signals(number).name, _workers(arbiter))
                notify(STOPPING=1)
                nursery.start_soon(stop)
    return status


def _scale(arbiter: Arbiter, number: signal.Signals) -> None:
    try:
        arbiter.scale(max(1, arbiter.processes + (1 if number == signal.SIGTTIN else -1)))
    except OSError as error:
        logger.error("%s: no worker more: %s", number.name, error)
    else:
        logger.info("%s: %s from now on", number.name, _workers(arbiter))


async def _reload(arbiter: Arbiter) -> None:
    went_well = await arbiter.reload()
    notify(READY=1, STATUS="reloaded" if went_well else "the reload failed; the old workers serve on")
