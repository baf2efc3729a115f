"""A ticket beside `trio.CapacityLimiter`: alone, with a hundred tasks contending, with a lease, without waiting."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from time import perf_counter

import trio

from benchmarks.case import Case
from stagetrio.ticket import TicketStage

ALONE = 20_000
TASKS = 100
ROUNDS = 100

Enter = Callable[[], AbstractAsyncContextManager[object]]


def _seconds(work: Callable[[], Awaitable[None]], operations: int) -> float:
    async def timed() -> float:
        start = perf_counter()
        await work()
        return perf_counter() - start

    return trio.run(timed) / operations


def _alone(enter: Enter) -> float:
    async def work() -> None:
        for _ in range(ALONE):
            async with enter():
                pass

    return _seconds(work, ALONE)


def _contended(enter: Enter) -> float:
    """Each holder looks away once, so that everybody else is in line by then."""

    async def task() -> None:
        for _ in range(ROUNDS):
            async with enter():
                await trio.lowlevel.checkpoint()

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(task)

    return _seconds(work, TASKS * ROUNDS)


def _limiter(tokens: int) -> Enter:
    limiter = trio.CapacityLimiter(tokens)
    return lambda: limiter


def _stage(tickets: int, lease: float = math.inf) -> Enter:
    return TicketStage("benchmark", tickets, lease=lease).ticket


def _nowait() -> float:
    stage = TicketStage("benchmark", 10)

    async def work() -> None:
        for _ in range(ALONE):
            with stage.ticket_nowait():
                pass

    return _seconds(work, ALONE)


def _flows() -> float:
    stage = TicketStage("benchmark", 10)

    async def task(flow: int) -> None:
        for _ in range(ROUNDS):
            async with stage.ticket(flow):
                await trio.lowlevel.checkpoint()

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for flow in range(TASKS):
                nursery.start_soon(task, flow)

    return _seconds(work, TASKS * ROUNDS)


CASES = [
    Case(
        "ticket.alone",
        ours=lambda: _alone(_stage(10)),
        plain=lambda: _alone(_limiter(10)),
        target=1.0,
        note="async with, nobody waits; peer trio.CapacityLimiter",
    ),
    Case(
        "ticket.contended",
        ours=lambda: _contended(_stage(10)),
        plain=lambda: _contended(_limiter(10)),
        target=1.25,
        note="100 tasks, 10 tickets, one flow, one checkpoint inside; peer trio.CapacityLimiter",
    ),
    Case(
        "ticket.contended_flows",
        ours=_flows,
        plain=lambda: _contended(_limiter(10)),
        note="the same with 100 flows of one task each",
    ),
    Case(
        "ticket.leased",
        ours=lambda: _alone(_stage(10, lease=60)),
        plain=lambda: _alone(_limiter(10)),
        target=0.5,
        note="async with, nobody waits, a lease of 60 s; the peer has none",
    ),
    Case(
        "ticket.nowait",
        ours=_nowait,
        plain=lambda: _alone(_limiter(10)),
        target=4.0,
        note="with ticket_nowait(), which does not checkpoint; peer async with trio.CapacityLimiter",
    ),
]
