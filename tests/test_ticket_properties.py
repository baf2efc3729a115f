"""Tickets and limits against simple models, over random programs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.limiter import Overloaded, Rate, RateLimiter
from stagetrio.ticket import LeaseLost, Ticket, TicketRequest, TicketStage

TICKETS = 4
PROGRAMS = settings(max_examples=150, deadline=None)


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


# A model: what a stage should do, in the plainest words.


@attrs.define
class Asked:
    """One request, in the model."""

    name: int
    flow: int
    cost: int
    key: str | None
    ticket: Ticket | None = None


@attrs.define
class Model:
    """Who holds and who waits, oldest first; with one flow that is all there is to say."""

    tickets: int
    holding: list[Asked] = attrs.field(factory=list)
    waiting: list[Asked] = attrs.field(factory=list)

    def free(self) -> int:
        return self.tickets - sum(asked.cost for asked in self.holding)

    def eligible(self) -> Asked | None:
        """The oldest whose key neither a holder nor an older one has."""
        taken = {asked.key for asked in self.holding if asked.key}
        for asked in self.waiting:
            if asked.key not in taken:
                return asked
            taken.add(asked.key)
        return None

    def grant(self) -> None:
        while (asked := self.eligible()) is not None and asked.cost <= self.free():
            self.waiting.remove(asked)
            self.holding.append(asked)

    def would_grant_now(self, asked: Asked) -> bool:
        busy = {other.key for other in (*self.holding, *self.waiting) if other.key}
        return self.eligible() is None and asked.cost <= self.free() and asked.key not in busy


ASK = st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, TICKETS), st.sampled_from([None, None, "x", "y"]))
STEP = st.one_of(
    ASK,
    ASK.map(lambda step: ("now", *step[1:])),
    st.tuples(st.sampled_from(["leave", "cancel", "release", "revoke"]), st.integers(0, 9)),
    st.tuples(st.just("resize"), st.integers(0, TICKETS)),
)


class Program:
    """Runs the steps of a program on a stage, each request in a task of its own."""

    def __init__(self, stage: TicketStage, nursery: trio.Nursery) -> None:
        self.stage = stage
        self.nursery = nursery
        self.holding: dict[int, Ticket] = {}  # {name: ticket}, in the order of the grants
        self.ends: dict[int, trio.Event] = {}
        self.scopes: dict[int, trio.CancelScope] = {}
        self.requests: dict[int, TicketRequest] = {}
        self.cleanly = 0

    def ask(self, asked: Asked) -> None:
        self.ends[asked.name] = trio.Event()
        self.scopes[asked.name] = trio.CancelScope()
        self.requests[asked.name] = self.stage.ticket(asked.flow, cost=asked.cost, key=asked.key)
        self.nursery.start_soon(self.hold, asked)

    async def hold(self, asked: Asked) -> None:
        with self.scopes[asked.name], contextlib.suppress(LeaseLost):
            async with self.requests[asked.name] as ticket:
                self.holding[asked.name] = ticket
                try:
                    await self.ends[asked.name].wait()
                finally:
                    self.holding.pop(asked.name, None)


def step_model(program: Program, model: Model, step: tuple[Any, ...], name: int) -> None:
    """Do one step in both."""
    if step[0] in ("ask", "now"):
        asked = Asked(name, *step[1:])
        if step[0] == "ask":
            program.ask(asked)
            model.waiting.append(asked)
        else:
            expected = model.would_grant_now(asked) and asked.cost <= model.tickets
            try:
                asked.ticket = program.stage.ticket_nowait(asked.flow, cost=asked.cost, key=asked.key)
            except (Overloaded, ValueError):
                assert not expected
            else:
                assert expected
                model.holding.append(asked)
    elif step[0] == "resize":
        program.stage.tickets = model.tickets = step[1]
    elif step[0] == "cancel" and model.waiting:
        asked = model.waiting.pop(step[1] % len(model.waiting))
        program.scopes[asked.name].cancel()
    elif step[0] != "cancel" and model.holding:
        asked = model.holding.pop(step[1] % len(model.holding))
        if asked.ticket is not None:
            asked.ticket.release()
        elif step[0] == "release":
            program.holding.pop(asked.name).release()
        elif step[0] == "revoke":
            program.stage.revoke(program.holding[asked.name], "model")
        else:
            program.ends[asked.name].set()


@PROGRAMS
@given(st.lists(STEP, max_size=40))
def test_a_stage_does_what_the_model_does(steps: list[tuple[Any, ...]]) -> None:
    """With one flow the holders, the waiters and every refusal are those of the model, after each step."""

    async def main() -> None:
        stage = TicketStage("model", TICKETS, revocable=True)
        model = Model(TICKETS)
        async with trio.open_nursery() as nursery:
            program = Program(stage, nursery)
            for name, step in enumerate(steps):
                if len(step) > 2:
                    if step[2] > model.tickets:  # never to be had, and said so at once
                        continue
                    step = (step[0], 0, *step[2:])
                step_model(program, model, step, name)
                model.grant()
                await wait_all_tasks_blocked()
                held = {asked.name for asked in model.holding if asked.ticket is None}
                assert set(program.holding) == held
                figures = stage.statistics()
                assert figures.waiting == len(model.waiting)
                assert figures.held == model.tickets - model.free()
                positions = [program.requests[asked.name].position for asked in model.waiting if asked.key is None]
                assert positions == sorted(positions)
                assert all(position >= 1 for position in positions)
            nursery.cancel_scope.cancel()

    run(main)


@pytest.mark.parametrize("shared", [False, True])
@PROGRAMS
@given(steps=st.lists(STEP, max_size=40))
def test_a_stage_keeps_its_bounds_with_many_flows(shared: bool, steps: list[tuple[Any, ...]]) -> None:
    """Whatever the flows: never over-granted, nobody lost, nothing left free that the head of the line could have."""

    async def main() -> None:
        stage = TicketStage("bounds", trio.CapacityLimiter(TICKETS) if shared else TICKETS, revocable=True)
        asked_for: dict[int, Asked] = {}
        alive: set[int] = set()
        async with trio.open_nursery() as nursery:
            program = Program(stage, nursery)
            for name, step in enumerate(steps):
                waiting = sorted(alive - set(program.holding))
                held = list(program.holding)
                if step[0] == "ask":
                    asked_for[name] = Asked(name, *step[1:])
                    alive.add(name)
                    program.ask(asked_for[name])
                elif step[0] == "cancel" and waiting:
                    gone = waiting[step[1] % len(waiting)]
                    program.scopes[gone].cancel()
                    alive.discard(gone)
                elif step[0] in ("leave", "revoke") and held:
                    gone = held[step[1] % len(held)]
                    if step[0] == "leave":
                        program.ends[gone].set()
                    else:
                        stage.revoke(program.holding[gone], "bounds")
                    alive.discard(gone)
                await wait_all_tasks_blocked()
                used = sum(asked_for[name].cost for name in program.holding)
                waiting = sorted(alive - set(program.holding))
                figures = stage.statistics()
                assert set(program.holding) <= alive
                assert figures.waiting == len(waiting)
                assert used <= TICKETS
                assert shared or used == figures.held
                keys = [asked_for[name].key for name in program.holding if asked_for[name].key]
                assert len(keys) == len(set(keys))
                free_keys = [name for name in waiting if asked_for[name].key not in keys]
                if free_keys:  # one of them is the head, and does not fit
                    assert TICKETS - used < max(asked_for[name].cost for name in free_keys)
            nursery.cancel_scope.cancel()
        assert stage.statistics().held == 0

    run(main)


@PROGRAMS
@given(
    weights=st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=2, max_size=5),
    tickets=st.integers(1, 3),
    costs=st.lists(st.integers(1, 3), min_size=1, max_size=5),
)
def test_backlogged_flows_share_by_weight(weights: list[float], tickets: int, costs: list[int]) -> None:
    """The normalised service of two flows that always wait differs by one largest cost for each at most."""

    async def main() -> None:
        stage = TicketStage("fair", 3, weight=lambda flow: weights[int(str(flow))])
        stage.tickets = max(tickets, *costs)
        service = [0.0] * len(weights)
        most = 0.0

        async def task(flow: int, number: int) -> None:
            while True:
                cost = costs[(flow + number) % len(costs)]
                async with stage.ticket(flow, cost=cost):
                    service[flow] += cost / weights[flow]
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for flow in range(len(weights)):
                for number in range(6):
                    nursery.start_soon(task, flow, number)
            await wait_all_tasks_blocked()
            begin = list(service)
            for _ in range(60):
                await trio.sleep(1)
                await wait_all_tasks_blocked()
                had = [now - before for now, before in zip(service, begin, strict=True)]
                most = max(most, max(had) - min(had))
            nursery.cancel_scope.cancel()
        # What was granted before the watch began may be paid back in it: twice the bound of start-time fair queueing.
        assert most <= 2 * 2 * max(costs) / min(weights)

    run(main)


@PROGRAMS
@given(
    steps=st.lists(
        st.tuples(st.floats(0, 2), st.floats(0, 5), st.booleans(), st.one_of(st.none(), st.floats(0, 3))), max_size=25
    ),
    rate=st.sampled_from([1.0, 3.0, 10.0]),
)
def test_a_rate_is_never_exceeded_and_never_wasted(
    steps: list[tuple[float, float, bool, float | None]], rate: float
) -> None:
    """In every span at most burst + rate × span passes; waiters pass in order, each as early as that allows."""
    burst = 5.0

    async def main() -> None:
        limiter = RateLimiter(Rate(rate), burst=burst)
        passed: list[tuple[float, float]] = []
        order: list[int] = []
        gave_up: set[int] = set()

        async def wait(number: int, cost: float, patience: float | None) -> None:
            with trio.move_on_after(math.inf if patience is None else patience) as scope:
                await limiter.acquire(cost)
                passed.append((trio.current_time(), cost))
                order.append(number)
            if scope.cancelled_caught:
                gave_up.add(number)

        asked: list[int] = []
        async with trio.open_nursery() as nursery:
            for number, (pause, cost, at_once, patience) in enumerate(steps):
                await trio.sleep(pause)
                if at_once:
                    expected = limiter.delay(cost)
                    try:
                        limiter.acquire_nowait(cost)
                    except Overloaded as refusal:
                        assert refusal.retry_after == pytest.approx(expected)
                    else:
                        assert expected <= 1e-9
                        passed.append((trio.current_time(), cost))
                else:
                    asked.append(number)
                    nursery.start_soon(wait, number, cost, patience)
                    await wait_all_tasks_blocked()
        assert order == [number for number in asked if number not in gave_up]
        assert limiter.statistics().waiting == 0
        for first, (begin, _) in enumerate(passed):
            total = 0.0
            for end, cost in passed[first:]:
                total += cost
                assert total <= burst + rate * (end - begin) + 1e-6
        rest = limiter.delay(burst)
        await trio.sleep(rest)
        limiter.acquire_nowait(burst)

    run(main)
