"""The fair queue against a simple model, over random programs; and what two backlogged flows may differ by."""

from __future__ import annotations

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.fair_queue import CoDel, Delivery, FairQueue, PriorityClass
from stagetrio.limiter import Overloaded

PROGRAMS = settings(max_examples=int(os.environ.get("STAGETRIO_PROGRAMS", "60")), deadline=None)
FLOWS = 4
BOUND = 6
FLOW_BOUND = 3

Item = tuple[int, int]  # (flow, number), numbers rising within a flow


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "evict": {"overflow": "evict"},
    "codel": {"codel": CoDel(target=0.5, interval=1.0)},
    "classes": {
        "classes": (PriorityClass("even"), PriorityClass("odd", reserve=0.3, codel=CoDel(target=1.0, interval=2.0))),
        "class_of": lambda flow: "odd" if flow % 2 else "even",
    },
    "classes that evict": {
        "overflow": "evict",
        "classes": (PriorityClass("even"), PriorityClass("odd")),
        "class_of": lambda flow: "odd" if flow % 2 else "even",
    },
}

FLOW = st.integers(0, FLOWS - 1)
COST = st.sampled_from([1.0, 1.0, 0.25, 7.0])
DEADLINE = st.sampled_from([math.inf, math.inf, 0.7, 3.0])
NUMBER = st.integers(0, 9)
STEP = st.one_of(
    st.tuples(st.sampled_from(["send", "send", "offer", "channel"]), FLOW, COST, DEADLINE),
    st.tuples(st.sampled_from(["receive", "take", "deliver"]), st.integers(1, 4)),
    st.tuples(st.sampled_from(["cancel sender", "cancel receiver", "settle", "forget"]), NUMBER),
    st.tuples(st.sampled_from(["discard", "hold", "resume", "weigh", "charge"]), FLOW),
    st.tuples(st.just("sleep"), st.sampled_from([0.3, 1.1])),
)


@attrs.define
class Task:
    """Somebody who waits, or waited, at one of the ends."""

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    item: Item | None = None
    got: list[Item] | None = None
    done: bool = False


def check_order(items: list[Item]) -> None:
    """Each flow's are in order."""
    for flow in range(FLOWS):
        numbers = [number for each, number in items if each == flow]
        assert numbers == sorted(numbers)


@attrs.define
class Program:
    """Runs steps on a queue, each wait in a task of its own, and keeps account of every item."""

    queue: FairQueue[int, Item]
    nursery: trio.Nursery
    shed: list[Item]
    numbers: dict[int, int] = attrs.field(factory=lambda: defaultdict(int))
    sent: list[Item] = attrs.field(factory=list)  # accepted
    received: list[Item] = attrs.field(factory=list)
    discarded: list[Item] = attrs.field(factory=list)
    senders: list[Task] = attrs.field(factory=list)
    receivers: list[Task] = attrs.field(factory=list)
    in_hand: list[Delivery[int, Item]] = attrs.field(factory=list)
    held: dict[int, int] = attrs.field(factory=lambda: defaultdict(int))
    before: int = 0  # of those received: they were when the step began

    def item(self, flow: int) -> Item:
        self.numbers[flow] += 1
        return flow, self.numbers[flow]

    async def send(self, task: Task, flow: int, cost: float, deadline: float, *, by_channel: bool) -> None:
        assert task.item is not None
        with task.scope:
            if by_channel:
                async with self.queue.open_flow(flow) as channel:
                    await channel.send(task.item, cost)
            else:
                await self.queue.send(flow, task.item, cost=cost, deadline=deadline)
            self.sent.append(task.item)
        task.done = True

    async def receive(self, task: Task, count: int) -> None:
        with task.scope:
            if count == 3:
                deliveries = await self.queue.receive_deliveries(count)
                self.in_hand += deliveries
                task.got = [delivery.item for delivery in deliveries]
            else:
                task.got = [await self.queue.receive()] if count == 1 else await self.queue.receive_batch(count)
            check_order(task.got)
            self.received += task.got
        task.done = True

    def step(self, step: tuple[Any, ...]) -> None:
        queue = self.queue
        match step:
            case ("send" | "channel", flow, cost, wait):
                self.senders.append(task := Task(item=self.item(flow)))
                deadline = trio.current_time() + wait
                self.nursery.start_soon(self._send, task, flow, cost, deadline, step[0] == "channel")
            case ("offer", flow, cost, wait):
                item = self.item(flow)
                try:
                    queue.send_nowait(flow, item, cost=cost, deadline=trio.current_time() + wait)
                except Overloaded as full:
                    assert full.reason in ("queue", "flow")
                    assert full.retry_after >= 0
                else:
                    self.sent.append(item)
            case ("receive", count):
                self.receivers.append(task := Task())
                self.nursery.start_soon(self.receive, task, count)
            case ("take", count):
                try:
                    batch = queue.receive_batch_nowait(count)
                except trio.WouldBlock:
                    return
                check_order(batch)
                self.received += batch
            case ("deliver", count):
                try:
                    deliveries = queue.receive_deliveries_nowait(count)
                except trio.WouldBlock:
                    return
                self.received += [delivery.item for delivery in deliveries]
                self.in_hand += deliveries
            case ("settle", number) if self.in_hand:
                self.in_hand.pop(number % len(self.in_hand)).settle(number / 3)
            case ("forget", number) if self.in_hand:
                del self.in_hand[number % len(self.in_hand)]
            case ("cancel sender", number) if waiting := [task for task in self.senders if not task.done]:
                waiting[number % len(waiting)].scope.cancel()
            case ("cancel receiver", number) if waiting := [task for task in self.receivers if not task.done]:
                waiting[number % len(waiting)].scope.cancel()
            case ("discard", flow):
                self.discarded += queue.discard(flow)
            case ("hold", flow):
                queue.hold(flow)
                self.held[flow] += 1
            case ("resume", flow):
                queue.resume(flow)
                self.held[flow] = max(0, self.held[flow] - 1)
            case ("weigh", flow):
                queue.open_flow(flow, weight=1.0 + len(self.sent) % 3)
            case ("charge", flow):
                queue.charge(flow, 5.0 - len(self.sent) % 11)

    async def _send(self, task: Task, flow: int, cost: float, deadline: float, by_channel: bool) -> None:
        await self.send(task, flow, cost, deadline, by_channel=by_channel)

    def check(self) -> None:
        """What holds whenever nothing can happen by itself."""
        # Receivers that were served in one step run in any order.
        self.received[self.before :] = sorted(self.received[self.before :])
        self.before = len(self.received)
        figures = self.queue.statistics()
        gone = [*self.received, *self.shed, *self.discarded]
        assert len(gone) == len(set(gone))
        assert set(gone) <= set(self.sent)
        queued = [item for item in self.sent if item not in set(gone)]
        assert figures.items == len(queued) <= BOUND
        assert (figures.received, figures.shed, figures.discarded) == tuple(
            map(len, (self.received, self.shed, self.discarded))
        )
        assert figures.in_hand == len(self.in_hand)
        waiting_to_send = [task for task in self.senders if not task.done]
        assert figures.tasks_waiting_send == len(waiting_to_send)
        assert figures.tasks_waiting_receive == sum(not task.done for task in self.receivers)
        backlog = {flow: sum(item[0] == flow for item in queued) for flow in range(FLOWS)}
        assert max(backlog.values()) <= FLOW_BOUND
        # Work is conserved: nobody waits for what is there.
        if any(backlog[flow] and not self.held[flow] for flow in range(FLOWS)):
            assert figures.tasks_waiting_receive == 0
        if figures.items < BOUND:
            assert all(task.item and backlog[task.item[0]] == FLOW_BOUND for task in waiting_to_send)

    async def drain(self) -> None:
        """Let everybody in and take all there is."""
        for flow, count in list(self.held.items()):
            for _ in range(count):
                self.queue.resume(flow)
                self.held[flow] -= 1
        for task in self.receivers:
            task.scope.cancel()
        await wait_all_tasks_blocked()
        self.check()
        while True:
            try:
                self.received.append(self.queue.receive_nowait())
            except trio.WouldBlock:
                break
            await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert all(task.done for task in self.senders)
        assert self.queue.statistics().items == 0
        assert sorted(self.sent) == sorted([*self.received, *self.shed, *self.discarded])


@pytest.mark.parametrize("name", SETTINGS)
@PROGRAMS
@given(steps=st.lists(STEP, min_size=20, max_size=60))
def test_nothing_is_lost_and_nobody_waits_in_vain(name: str, steps: list[tuple[Any, ...]]) -> None:
    """In = out + shed + discarded + queued, within the bounds, in order, and no wake-up is lost, after each step."""

    async def main() -> None:
        shed: list[Item] = []
        queue: FairQueue[int, Item] = FairQueue(
            BOUND, max_items_per_flow=FLOW_BOUND, on_shed=lambda item, _: shed.append(item), **SETTINGS[name]
        )
        async with trio.open_nursery() as nursery:
            program = Program(queue, nursery, shed)
            for step in steps:
                if step[0] == "sleep":
                    await trio.sleep(step[1])
                program.step(step)
                await wait_all_tasks_blocked()
                program.check()
            await program.drain()
            check_order(program.received)

    run(main)


@attrs.define
class Rivals:
    """Flows that always have items, passers-by that have one each, and what each rival has had per unit of weight."""

    queue: FairQueue[int, tuple[int, float]]
    weights: list[float]
    costs: list[list[float]]  # of each rival, in turn
    declared: bool
    passers_by: list[bool]
    sent: list[int] = attrs.field(factory=list)
    service: list[list[float]] = attrs.field(factory=list)
    steps: int = 0

    def begin(self, backlog: int) -> None:
        self.sent = [0] * len(self.weights)
        self.service = [[0.0] for _ in self.weights]
        for flow in range(len(self.weights)):
            for _ in range(backlog):
                self.send(flow)

    def send(self, flow: int) -> None:
        cost = self.costs[flow][self.sent[flow] % len(self.costs[flow])]
        self.sent[flow] += 1
        self.queue.send_nowait(flow, (flow, cost), cost=cost if self.declared else 1.0)

    def step(self) -> None:
        self.steps += 1
        if self.passers_by[self.steps % len(self.passers_by)]:
            flow = 1000 + self.steps % 7
            self.queue.send_nowait(flow, (flow, 0.5), cost=0.5 if self.declared else 1.0)

    def served(self, flow: int, cost: float) -> None:
        if flow < 1000:
            for each, had in enumerate(self.service):
                had.append(had[-1] + (cost / self.weights[flow] if each == flow else 0.0))

    def unfairness(self) -> float:
        """In any stretch of time: what one had more than another, in units of one dearest item of both."""
        worst = 0.0
        for a, b in itertools.combinations(range(len(self.weights)), 2):
            ahead = [x - y for x, y in zip(self.service[a], self.service[b], strict=True)]
            unit = sum(max(self.costs[flow]) / self.weights[flow] for flow in (a, b))
            worst = max(worst, (max(ahead) - min(ahead)) / unit)
        return worst


RIVALS = st.integers(2, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=count, max_size=count),
        st.lists(
            st.lists(st.sampled_from([0.1, 0.9, 1.0, 3.0, 30.0]), min_size=1, max_size=5),
            min_size=count,
            max_size=count,
        ),
        st.lists(st.booleans(), min_size=1, max_size=10),
    )
)


def rivals(drawn: tuple[list[float], list[list[float]], list[bool]], *, declared: bool, backlog: int) -> Rivals:
    weights, costs, passers_by = drawn
    queue: FairQueue[int, tuple[int, float]] = FairQueue(
        math.inf, weight=lambda flow: weights[flow] if flow < len(weights) else 1.0
    )
    made = Rivals(queue, weights, costs, declared, passers_by)
    made.begin(backlog)
    return made


@PROGRAMS
@given(drawn=RIVALS)
def test_declared_costs_are_shared_to_within_one_item_of_each(
    drawn: tuple[list[float], list[list[float]], list[bool]],
) -> None:
    """Two flows that have items get, per unit of weight, the same work in any stretch of time, to within one item."""
    program = rivals(drawn, declared=True, backlog=2)
    for _ in range(150):
        program.step()
        flow, cost = program.queue.receive_nowait()
        if flow < 1000:
            program.send(flow)
            program.served(flow, cost)
    assert program.unfairness() <= 1.0 + 1e-9


@PROGRAMS
@given(drawn=RIVALS, workers=st.sampled_from([1, 2, 4, 8]), turns=st.lists(NUMBER, min_size=1, max_size=20))
def test_unknown_costs_are_shared_to_within_the_items_in_hand(
    drawn: tuple[list[float], list[list[float]], list[bool]], workers: int, turns: list[int]
) -> None:
    """With n items in hand, settled in any order, it is to within 2 + 2n items of each; nothing is known beforehand."""
    program = rivals(drawn, declared=False, backlog=3 * workers)
    in_hand: list[Delivery[int, tuple[int, float]]] = []
    for step in range(150):
        program.step()
        while len(in_hand) < workers:
            in_hand.append(program.queue.receive_delivery_nowait())
            if in_hand[-1].flow < 1000:
                program.send(in_hand[-1].flow)
        turn = turns[step % len(turns)] if step % workers else 0  # nobody works for ever
        delivery = in_hand.pop(turn % workers)
        delivery.settle(delivery.item[1])
        program.served(*delivery.item)
    assert program.unfairness() <= 2 + 2 * workers
