"""Worker threads beside ``trio.to_thread``, worker processes beside trio-parallel, two server processes beside one.

``python -m benchmarks.run workers`` measures the cases; trio-parallel's are left out where it is not installed.
``python -m benchmarks.workers`` prints what CPU-bound threads do to the loop, in a table: the figures of
``docs/parallelism.rst``.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from benchmarks.case import Case
from benchmarks.echo import _load
from stagetrio.peer import Peer
from stagetrio.prefork import open_arbiter
from stagetrio.prefork_worker import Worker
from stagetrio.processes import open_process_pool
from stagetrio.server import serve_stage
from stagetrio.sockets import TcpAddress
from stagetrio.threads import open_thread_pool

CALLS = 1000
ITEMS = 10_000
COMPUTING = 16  # jobs at once
ROUNDS = 400_000  # of the loop in one of them


def nothing() -> None:
    """A trivial job."""


def compute(rounds: int) -> int:
    """A job that computes, in pure Python."""
    total = 0
    for n in range(rounds):
        total += n
    return total


async def _calls(call: Callable[[], Awaitable[object]], tasks: int) -> float:
    """Seconds per call, by so many tasks at once."""

    async def caller() -> None:
        for _ in range(CALLS // tasks):
            await call()

    await caller()  # threads and processes are started
    begun = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(caller)
    return (time.perf_counter() - begun) / (CALLS // tasks * tasks)


def _threads(tasks: int) -> float:
    async def main() -> float:
        async with open_thread_pool(8) as pool:
            return await _calls(lambda: pool.call(nothing), tasks)

    return trio.run(main)


def _to_thread(tasks: int) -> float:
    async def main() -> float:
        limiter = trio.CapacityLimiter(8)
        return await _calls(lambda: trio.to_thread.run_sync(nothing, limiter=limiter), tasks)

    return trio.run(main)


def _thread_batch() -> float:
    async def main() -> float:
        async with open_thread_pool(1) as pool:
            await pool.call(nothing)
            begun = time.perf_counter()
            await pool.call_batch(abs, range(ITEMS))
            return (time.perf_counter() - begun) / ITEMS

    return trio.run(main)


def _processes(tasks: int) -> float:
    async def main() -> float:
        async with open_process_pool(2, warm=2) as pool:
            await pool.call_batch(abs, range(100))
            return await _calls(lambda: pool.call(nothing), tasks)

    return trio.run(main)


def _trio_parallel(tasks: int) -> float:
    import trio_parallel  # type: ignore[import-not-found, unused-ignore]

    async def main() -> float:
        async with trio_parallel.open_worker_context() as context:
            limiter = trio.CapacityLimiter(2)
            return await _calls(lambda: context.run_sync(nothing, limiter=limiter), tasks)

    return trio.run(main)


async def _beside(job: Callable[[], Awaitable[object]]) -> tuple[float, float, float]:
    """Run the computing jobs at once beside a 1 ms sleeper: seconds in all, its lateness (median, 99th percentile)."""
    late: list[float] = []

    async def sleeper() -> None:
        while True:
            begun = time.perf_counter()
            await trio.sleep(0.001)
            late.append(time.perf_counter() - begun - 0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper)
        begun = time.perf_counter()
        async with trio.open_nursery() as jobs:
            for _ in range(COMPUTING):
                jobs.start_soon(job)
        took = time.perf_counter() - begun
        nursery.cancel_scope.cancel()
    late.sort()
    return took, late[len(late) // 2], late[len(late) * 99 // 100]


def pooled(max_running: float, threads: int = COMPUTING) -> tuple[float, float, float]:
    """`_beside` for a pool of threads."""

    async def main() -> tuple[float, float, float]:
        async with open_thread_pool(threads, max_running=max_running) as pool:
            return await _beside(lambda: pool.call(compute, ROUNDS))

    return trio.run(main)


def plainly() -> tuple[float, float, float]:
    """`_beside` for ``trio.to_thread``."""
    return trio.run(_beside, lambda: trio.to_thread.run_sync(compute, ROUNDS))


def processor(way: Callable[[], object]) -> float:
    """The processor time that one way takes, in seconds."""
    begun = time.process_time()
    way()
    return time.process_time() - begun


def in_processes() -> tuple[float, float, float]:
    """`_beside` for a pool of two processes."""

    async def main() -> tuple[float, float, float]:
        async with open_process_pool(2, warm=2) as pool:
            await pool.call_batch(abs, range(1000))
            return await _beside(lambda: pool.call(compute, ROUNDS))

    return trio.run(main)


_burn_rounds = 0


async def _burn(peer: Peer[bytes], message: bytes) -> bytes:
    compute(_burn_rounds)
    return message


async def serve_burning(worker: Worker) -> None:
    """An echo server whose handler computes for 50 µs; what each worker process runs."""
    global _burn_rounds
    begun = time.thread_time()
    compute(1_000_000)
    _burn_rounds = int(50e-6 / (time.thread_time() - begun) * 1_000_000)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_stage, _burn, worker.listeners)
        worker.ready()
        await worker.wait_drain()
        nursery.cancel_scope.cancel()


def served(processes: int) -> float:
    """Seconds per message of a burning echo server in so many processes, 100 connections x 8 in flight."""

    async def main() -> float:
        async with open_arbiter(
            "benchmarks.workers:serve_burning", ["tcp://127.0.0.1:0"], processes=processes
        ) as arbiter:
            await arbiter.wait_ready()
            address = arbiter.addresses[0]
            assert isinstance(address, TcpAddress)
            _load(address.port, 100, 8, 0.5)
            messages = _load(address.port, 100, 8, 2.0)
            await arbiter.stop()
            return 2.0 / messages

    return trio.run(main)


def _peers_cases() -> list[Case]:
    if importlib.util.find_spec("trio_parallel") is None:
        return []
    note = "plain is trio-parallel; two processes, trivial jobs"
    return [
        Case("process round trip", lambda: _processes(1), lambda: _trio_parallel(1), 1.0, note),
        Case("process calls by 16 tasks", lambda: _processes(16), lambda: _trio_parallel(16), 1.0, note),
    ]


CASES = [
    Case("thread round trip", lambda: _threads(1), lambda: _to_thread(1), 1 / 0.9, "plain is to_thread.run_sync"),
    Case("thread calls by 40 tasks", lambda: _threads(40), lambda: _to_thread(40), None, "8 threads, trivial jobs"),
    Case("thread batch, per item", _thread_batch, lambda: _to_thread(1), None, f"{ITEMS} items, against a call each"),
    Case(
        "lateness p99 beside 16 computing jobs",
        lambda: pooled(1)[2],
        lambda: plainly()[2],
        None,
        "a 1 ms sleeper; ours is a pool of 16 threads of which one runs at a time; at most 15 ms is promised",
    ),
    Case("16 computing jobs, time in all", lambda: pooled(1)[0], lambda: plainly()[0], 0.9, "the same jobs"),
    Case(
        "16 computing jobs, processor time in all",
        lambda: processor(lambda: pooled(1)),
        lambda: processor(plainly),
        0.9,
        "the same jobs; what counts where others want the cores as well, of whom sixteen threads are given more",
    ),
    *_peers_cases(),
    Case(
        "two server processes, time per message",
        lambda: served(2),
        lambda: served(1),
        1.6,
        "plain is one process; echo with a handler that computes for 50 µs; the load generator shares the cores",
    ),
]


def main() -> None:
    """Print seconds in all and the loop's lateness beside 16 computing jobs, for each way of running them."""
    interval = sys.getswitchinterval()
    ways: list[tuple[str, float, Callable[[], tuple[float, float, float]]]] = [
        ("to_thread.run_sync", interval, plainly),
        ("to_thread.run_sync, switch interval 0.5 ms", 0.0005, plainly),
        ("pool of 16 threads", interval, lambda: pooled(float("inf"))),
        ("pool of 16 threads, max_running=2", interval, lambda: pooled(2)),
        ("pool of 16 threads, max_running=1", interval, lambda: pooled(1)),
        ("the same, switch interval 0.5 ms", 0.0005, lambda: pooled(1)),
        ("pool of 2 processes", interval, in_processes),
    ]
    print(f"{'':44} {'in all':>8} {'late p50':>10} {'late p99':>10}   (medians of 5)")
    for name, switch, way in ways:
        sys.setswitchinterval(switch)
        results: list[Any] = sorted(way() for _ in range(5))
        took, middle, worst = (sorted(column)[2] for column in zip(*results, strict=True))
        print(f"{name:<44} {took:>6.2f} s {middle * 1e3:>7.1f} ms {worst * 1e3:>7.1f} ms", flush=True)
    sys.setswitchinterval(interval)


if __name__ == "__main__":
    main()
