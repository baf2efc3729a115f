"""What forced switching costs, and what it buys: lateness beside hogs, shares, and how soon a handler is cancelled.

Cases are ratios of times. What is not a ratio is printed by ``python -m benchmarks.watchdog``: median of five, with
the least and the most.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Awaitable, Callable
from time import perf_counter, process_time
from typing import Any

import trio

from benchmarks.case import Case
from stagetrio.watchdog import BudgetExceeded, Watchdog, open_watchdog

QUANTUM = 0.005
RUNS = 20_000
CHECKPOINTS = 3_000
HOGS = 16
ROUNDS = 400_000


async def _nothing() -> None:
    pass


async def _compute() -> None:
    total = 0
    for number in range(ROUNDS):
        total += number


def _timed(main: Callable[[], Awaitable[float]]) -> float:
    return trio.run(main)


async def _time_runs(call: Callable[[], Awaitable[None]]) -> float:
    start = perf_counter()
    for _ in range(RUNS // 100):
        for _ in range(100):
            await call()
        await trio.lowlevel.checkpoint()  # as a server's loop would: there is a quantum per pass
    return (perf_counter() - start) / RUNS


def run_ours() -> float:
    """Seconds per ``watchdog.run`` of a handler that does nothing, each on a stack of its own."""

    async def main() -> float:
        async with open_watchdog(quantum=QUANTUM) as watchdog:
            return await _time_runs(lambda: watchdog.run(_nothing))

    return _timed(main)


def run_on_lane() -> float:
    """The same in a task that runs on a lane."""

    async def main() -> float:
        async with open_watchdog(quantum=QUANTUM) as watchdog:
            return await watchdog.open_lane().run(_time_runs, lambda: watchdog.run(_nothing))

    return _timed(main)


def run_plain() -> float:
    """Seconds per ``await`` of a handler that does nothing."""

    async def main() -> float:
        return await _time_runs(_nothing)

    return _timed(main)


async def _time_checkpoints() -> float:
    start = perf_counter()
    for _ in range(CHECKPOINTS):
        await trio.lowlevel.checkpoint()
        sum(range(1000))  # a pass in which something is done: some 10 µs
    return (perf_counter() - start) / CHECKPOINTS


def monitor_ours() -> float:
    """Seconds per pass of a loop that is watched and does a little in each pass."""

    async def main() -> float:
        async with open_watchdog(quantum=QUANTUM):
            return await _time_checkpoints()

    return _timed(main)


def monitor_plain() -> float:
    """The same, unwatched."""

    async def main() -> float:
        return await _time_checkpoints()

    return _timed(main)


def total_ours() -> float:
    """Processor seconds per hog, of hogs that take turns."""

    async def main() -> float:
        async with open_watchdog(quantum=QUANTUM) as watchdog:
            start = process_time()
            async with trio.open_nursery() as nursery:
                for _ in range(HOGS):
                    watchdog.start_soon(nursery, _compute)
            return (process_time() - start) / HOGS

    return _timed(main)


def total_plain() -> float:
    """Processor seconds per hog, of hogs that run one after the other."""

    async def main() -> float:
        start = process_time()
        async with trio.open_nursery() as nursery:
            for _ in range(HOGS):
                nursery.start_soon(_compute)
        return (process_time() - start) / HOGS

    return _timed(main)


CASES = [
    Case(
        "watchdog run", run_ours, run_plain, note="an empty handler on a stack of its own; plain: an awaited coroutine"
    ),
    Case("watchdog run on a lane", run_on_lane, run_plain, note="an empty handler, in a task that is on a lane"),
    Case("watchdog monitor", monitor_ours, monitor_plain, 1 / 1.03, note="passes of some 10 µs"),
    Case("watchdog total", total_ours, total_plain, 1 / 1.05, note="processor time of 16 hogs that take turns"),
]


async def _lateness(stop: trio.Event, late: list[float]) -> None:
    while not stop.is_set():
        due = trio.current_time() + 0.001
        await trio.sleep_until(due)
        late.append(trio.current_time() - due)


def lateness(hogs: int, seconds: float, *, watched: bool) -> tuple[float, float]:
    """Run hogs of some processor time each beside a 1 ms sleeper; return its 99th percentile and its worst."""
    late: list[float] = []
    rounds = int(ROUNDS * seconds / _seconds_of_rounds())

    async def hog() -> None:
        total = 0
        for number in range(rounds):
            total += number

    async def main() -> None:
        stop = trio.Event()
        async with open_watchdog(quantum=QUANTUM) as watchdog, trio.open_nursery() as nursery:
            nursery.start_soon(_lateness, stop, late)
            await trio.sleep(0.01)
            async with trio.open_nursery() as burning:
                for _ in range(hogs):
                    if watched:
                        watchdog.start_soon(burning, hog)
                    else:
                        burning.start_soon(hog)
            stop.set()

    trio.run(main)
    late.sort()
    return late[int(len(late) * 0.99)], late[-1]


def _seconds_of_rounds() -> float:
    def once() -> float:
        start = perf_counter()
        total = 0
        for number in range(ROUNDS):
            total += number
        return perf_counter() - start

    return min(once() for _ in range(3))


def shares() -> float:
    """Run hogs of four flows with weights 1, 1, 2 and 4 for two seconds; return the largest relative error."""
    weights: dict[Any, float] = {"a": 1, "b": 1, "c": 2, "d": 4}
    had = dict.fromkeys(weights, 0)

    async def hog(flow: str) -> None:
        while True:
            for _ in range(100):
                pass
            had[flow] += 1

    async def main() -> None:
        async with open_watchdog(quantum=QUANTUM, weight=weights.__getitem__) as watchdog:
            with trio.move_on_after(2):
                async with trio.open_nursery() as nursery:
                    for flow in weights:
                        watchdog.start_soon(nursery, hog, flow, flow=flow)

    trio.run(main)
    total = sum(had.values())
    return max(abs(had[flow] / total * sum(weights.values()) / weight - 1) for flow, weight in weights.items())


def cancelled_after(budget: float) -> float:
    """Seconds past its budget after which ``while True: pass`` has been cancelled."""

    async def spin() -> None:
        while True:
            pass

    async def main() -> float:
        async with open_watchdog(quantum=QUANTUM) as watchdog:
            return await _past(watchdog, spin, budget)

    return trio.run(main)


async def _past(watchdog: Watchdog, handler: Callable[[], Awaitable[None]], budget: float) -> float:
    start = perf_counter()
    try:
        await watchdog.run(handler, budget=budget)
    except BudgetExceeded:
        return perf_counter() - start - budget
    raise AssertionError("the handler ended by itself")


def main() -> None:
    """Print the figures that are not ratios."""

    def show(name: str, values: list[float], unit: str, scale: float) -> None:
        least, middle, most = (f(values) * scale for f in (min, statistics.median, max))
        sys.stdout.write(f"{name:48} {least:8.2f} {middle:8.2f} {most:8.2f} {unit}\n")

    sys.stdout.write(f"{'CPython ' + sys.version.split()[0]:48} {'least':>8} {'median':>8} {'most':>8}\n")
    for hogs, seconds in ((16, 0.1), (24, 0.002)):
        for watched in (True, False):
            found = [lateness(hogs, seconds, watched=watched) for _ in range(5)]
            name = f"{hogs} hogs of {seconds * 1000:.0f} ms, {'watched' if watched else 'plain'}"
            show(f"{name}: lateness p99", [p99 for p99, _ in found], "ms", 1e3)
            show(f"{name}: lateness worst", [worst for _, worst in found], "ms", 1e3)
    show("shares 1, 1, 2, 4: largest error", [shares() for _ in range(5)], "%", 1e2)
    show("while True: pass, cancelled past its budget by", [cancelled_after(0.1) for _ in range(5)], "ms", 1e3)


if __name__ == "__main__":
    main()
