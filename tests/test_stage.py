"""A stage serves fairly, keeps the order of each key, and is never busier than it may be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.fair_queue import FairQueue
from stagetrio.limiter import Overloaded
from stagetrio.stage import MAX_PARKED, Stage
from stagetrio.ticket import TicketStage
from stagetrio.watchdog import BudgetExceeded, open_watchdog


@asynccontextmanager
async def running(handler: Any, *, max_items: int = 10_000, **options: Any) -> AsyncIterator[tuple[Any, Stage[Any]]]:
    """Run a stage with a queue of its own until the block ends and the queue has been served."""
    queue: FairQueue[Any, Any] = FairQueue(max_items)
    stage: Stage[Any] = Stage(handler, queue=queue, **{"workers": 10, **options})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        yield queue, stage
        queue.close()


async def test_everything_sent_is_served_and_the_stage_ends_with_its_queue() -> None:
    """Closing the queue lets the stage finish what is queued, and then it returns."""
    served = []

    async def handler(item: int) -> None:
        if item % 3 == 0:
            await trio.lowlevel.checkpoint()
        served.append(item)

    async with running(handler) as (queue, stage):
        for item in range(1000):
            queue.send_nowait(item % 7, item)
    assert sorted(served) == list(range(1000))
    statistics = stage.statistics()
    assert (statistics.handled, statistics.workers, statistics.occupied, statistics.parked) == (1000, 0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("keyed", [False, True])
async def test_one_keys_items_never_overlap_and_keep_their_order(seed: int, keyed: bool) -> None:
    """Whatever waits for how long, each key's items run one after the other in the order in which they were sent."""
    rng = random.Random(seed)
    in_hand: Counter[int] = Counter()
    order: dict[int, list[int]] = {}

    async def handler(item: tuple[int, int, int]) -> None:
        key, number, waits = item
        in_hand[key] += 1
        assert in_hand[key] == 1
        for _ in range(waits):
            await trio.lowlevel.checkpoint()
        order.setdefault(key, []).append(number)
        in_hand[key] -= 1

    options: dict[str, Any] = {"order_key": lambda item: item[0]} if keyed else {}
    async with running(handler, workers=4, **options) as (queue, _stage):
        for number in range(2000):
            key = rng.randrange(10)
            flow = rng.randrange(3) * 10 + key if keyed else key
            # Order across flows is the queue's to choose, so with several flows per key only overlap is checked.
            await queue.send(flow, (key, number, rng.choice([0, 0, 1, 3])))
            if number % 50 == 0:
                await trio.lowlevel.checkpoint()
    assert sum(len(numbers) for numbers in order.values()) == 2000
    if not keyed:
        assert all(numbers == sorted(numbers) for numbers in order.values())


@pytest.mark.parametrize("seed", range(5))
async def test_as_many_handlers_of_a_key_overlap_as_may(seed: int) -> None:
    """Three at a time and never more, the others of the key wait parked, and everything is served once."""
    rng = random.Random(seed)
    in_hand: Counter[int] = Counter()
    most: Counter[int] = Counter()
    served: list[tuple[int, int]] = []

    async def handler(item: tuple[int, int]) -> None:
        key, _number = item
        in_hand[key] += 1
        most[key] = max(most[key], in_hand[key])
        for _ in range(rng.randrange(4)):
            await trio.lowlevel.checkpoint()
        in_hand[key] -= 1
        served.append(item)

    items = [(key, number) for number in range(200) for key in range(4)]
    async with running(handler, order_key=lambda item: item[0], overlap=3, workers=20) as (queue, stage):
        for item in items:
            queue.send_nowait(item[0], item)
    assert sorted(served) == sorted(items)
    assert set(most.values()) == {3}
    assert stage.statistics().parked == 0


async def test_what_is_parked_goes_to_whichever_handler_ends_first(autojump_clock: MockClock) -> None:
    """One that never ends keeps its own place, and nothing behind it."""
    served: list[int] = []
    most = 0
    items = 20 * MAX_PARKED  # more than one batch, so that the flow is held, and must be let go while the one stays

    async def handler(item: int) -> None:
        await trio.sleep(1 if item else 10_000)
        served.append(item)

    async def look() -> None:
        nonlocal most
        while True:
            statistics = stage.statistics()
            most = max(most, statistics.parked)
            assert statistics.parked + len(served) + statistics.queue.items <= items
            await trio.sleep(1)

    async with running(handler, overlap=2) as (queue, stage):
        start = trio.current_time()
        for item in range(items):
            queue.send_nowait("flow", item)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await trio.sleep(items + 1)
            nursery.cancel_scope.cancel()
        assert most >= MAX_PARKED
        assert served == list(range(1, items))
        assert stage.statistics().occupied == 1
        assert stage.cancel("flow")
        assert not stage.cancel("flow")
    assert trio.current_time() - start < items + 2
    assert stage.statistics().cancelled == 1


async def test_handlers_that_wait_run_at_once_up_to_the_bound(autojump_clock: MockClock) -> None:
    """64 handlers that wait 0.2 s each end after 0.2 s with 64 workers, and after 0.8 s with 16."""
    now = most = 0

    async def handler(item: int) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await trio.sleep(0.2)
        now -= 1

    for workers, seconds in [(64, 0.2), (16, 0.8)]:
        start, most = trio.current_time(), 0
        async with running(handler, workers=workers) as (queue, stage):
            for item in range(64):
                queue.send_nowait(item, item)
            await wait_all_tasks_blocked()
            assert stage.statistics().occupied == most == workers
        assert trio.current_time() - start == pytest.approx(seconds)


async def test_handlers_that_do_not_wait_need_one_worker() -> None:
    """No task is started per message, nor per batch."""

    async def handler(item: int) -> None:
        pass

    async with running(handler) as (queue, stage):
        for item in range(500):
            queue.send_nowait(item, item)
        await wait_all_tasks_blocked()
        assert stage.statistics().workers == 1


async def test_a_key_in_hand_holds_one_worker_and_a_bounded_number_of_items() -> None:
    """However much is sent to a busy key, other keys are served, and the rest of its items stays in the queue."""
    proceed = trio.Event()
    served: Counter[Any] = Counter()

    async def handler(item: str) -> None:
        if item == "stuck":
            await proceed.wait()
        served[item] += 1

    async with running(handler, workers=3) as (queue, stage):
        for _ in range(1000):
            queue.send_nowait("a", "stuck")
        await wait_all_tasks_blocked()
        for _ in range(50):
            queue.send_nowait("b", "free")
        await wait_all_tasks_blocked()
        statistics = stage.statistics()
        assert served == {"free": 50}
        assert statistics.occupied == 1
        assert statistics.parked <= 2 * MAX_PARKED
        assert statistics.queue.items + statistics.parked == 999
        proceed.set()
    assert served == {"free": 50, "stuck": 1000}


async def test_flows_share_by_declared_cost_and_no_clock_is_read() -> None:
    """With costs declared, two flows of dear and cheap items get equal work, the same in every run."""

    async def handler(item: tuple[str, float]) -> None:
        served.append(item)

    runs = []
    for _ in range(2):
        served: list[tuple[str, float]] = []
        async with running(handler, cost=lambda item: item[1]) as (queue, _stage):
            for _ in range(400):
                queue.send_nowait("dear", ("dear", 4.0))
                queue.send_nowait("cheap", ("cheap", 1.0))
        runs.append(served)
        until = [i for i, (name, _) in enumerate(served) if name == "cheap"][-1]
        work = Counter[str]()
        for name, cost in served[150:until]:
            work[name] += int(cost)
        assert work["dear"] == pytest.approx(work["cheap"], rel=0.25)
    assert runs[0] == runs[1]


async def test_everyone_else_gets_a_turn_between_slices() -> None:
    """A leader that never runs out of messages still lets other tasks run, and says when a slice ends."""
    slices = 0

    def after_slice() -> None:
        nonlocal slices
        slices += 1

    again = True

    async def handler(item: int) -> None:
        if again:
            queue.send_nowait(0, item)

    async with running(handler, after_slice=after_slice) as (queue, stage):
        for item in range(100):
            queue.send_nowait(0, item)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert stage.statistics().handled > 100
        assert slices >= 10
        again = False


async def test_an_error_ends_the_stage_unless_its_owner_asked_for_it() -> None:
    """Without ``on_error`` it propagates; with it, it is handed over with the item, and the stage goes on."""

    async def handler(item: str) -> None:
        if item.startswith("late"):
            await trio.lowlevel.checkpoint()
        if item.endswith("boom"):
            raise ValueError(item)

    for item in ("boom", "late boom"):
        with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match=item), flatten_subgroups=True):
            async with running(handler) as (queue, stage):
                queue.send_nowait(1, item)

    errors: list[tuple[str, Exception]] = []
    async with running(handler, on_error=lambda *args: errors.append(args)) as (queue, stage):
        for item in ("boom", "fine", "late boom", "late"):
            queue.send_nowait(1, item)
    assert [(item, str(error)) for item, error in errors] == [("boom", "boom"), ("late boom", "late boom")]
    assert (stage.statistics().failed, stage.statistics().handled) == (2, 2)


async def test_cancel_ends_the_handler_of_one_key_only() -> None:
    """The handler is cancelled, what is parked behind it is served, and other handlers notice nothing."""
    done: list[str] = []

    async def handler(item: str) -> None:
        if item.startswith("stuck"):
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        done.append(item)

    async with running(handler) as (queue, stage):
        for flow, item in [("a", "stuck a"), ("b", "stuck b"), ("a", "after a"), ("c", "c")]:
            queue.send_nowait(flow, item)
        await wait_all_tasks_blocked()
        assert done == ["c"]
        assert stage.cancel("a")
        assert not stage.cancel("a")
        assert not stage.cancel("nobody")
        await wait_all_tasks_blocked()
        assert done == ["c", "after a"]
        assert stage.cancel("b")
        for item in ("one", "two"):
            queue.send_nowait("a", item)
    assert done == ["c", "after a", "one", "two"]
    assert stage.statistics().cancelled == 2


async def test_an_overdue_handler_is_cancelled_and_the_rest_served(autojump_clock: MockClock) -> None:
    """Each handler has its own deadline, counted from its first wait."""
    errors: list[tuple[Any, Exception]] = []
    done: list[tuple[str, float]] = []

    async def handler(item: tuple[str, float]) -> None:
        await trio.sleep(item[1])
        done.append((item[0], trio.current_time() - start))

    start = trio.current_time()
    async with running(handler, max_handling=1.0, on_error=lambda *args: errors.append(args)) as (queue, stage):
        for item in [("a", 0.9), ("b", 5.0), ("c", 0.9)]:
            queue.send_nowait("flow", item)
        queue.send_nowait("other", ("d", 0.5))
    assert done == [("d", pytest.approx(0.5)), ("a", pytest.approx(0.9)), ("c", pytest.approx(2.8))]
    assert [(item, type(error)) for item, error in errors] == [(("b", 5.0), trio.TooSlowError)]
    assert stage.statistics().overdue == 1


async def test_a_handler_that_ends_in_spite_of_a_cancellation_is_not_cancelled(autojump_clock: MockClock) -> None:
    """It counts as handled, what is parked behind it is served, and the next deadline is a deadline."""
    errors: list[tuple[Any, Exception]] = []

    async def handler(item: str) -> None:
        if item == "shielded":
            with trio.CancelScope(shield=True):
                await trio.sleep(0.5)
        if item == "slow":
            await trio.sleep(10)

    async with running(handler, max_handling=1.0, on_error=lambda *args: errors.append(args)) as (queue, stage):
        for item in ("shielded", "quick", "slow", "quick"):
            queue.send_nowait("flow", item)
        await wait_all_tasks_blocked()
        assert stage.cancel("flow")
    assert [(item, type(error)) for item, error in errors] == [("slow", trio.TooSlowError)]
    statistics = stage.statistics()
    assert (statistics.handled, statistics.cancelled, statistics.overdue) == (3, 0, 1)


async def test_a_parked_item_that_ends_as_it_is_cancelled_is_counted_once(autojump_clock: MockClock) -> None:
    """It has ended, so neither a cancellation nor a deadline that comes too late is told of it."""
    errors: list[Any] = []
    begun = trio.Event()
    proceed = trio.Event()

    async def handler(item: str) -> None:
        await trio.sleep(0.1)
        if item == "late":
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
        if item == "raced":
            begun.set()
            await proceed.wait()

    async with running(handler, max_handling=0.5, on_error=lambda *args: errors.append(args)) as (queue, stage):
        for item in ("first", "late", "raced", "last"):
            queue.send_nowait("flow", item)
        await begun.wait()
        proceed.set()
        stage.cancel("flow")
    statistics = stage.statistics()
    assert (statistics.handled, statistics.cancelled, statistics.overdue, errors) == (4, 0, 0, [])
    assert statistics.queue.in_hand == 0


async def test_every_message_gets_a_ticket(autojump_clock: MockClock) -> None:
    """Handlers run under the ticket's limit, and a refusal of the ticket is the item's error."""
    now = most = 0
    errors: list[tuple[Any, Exception]] = []

    async def handler(item: int) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await trio.sleep(1)
        now -= 1

    ticket = TicketStage("three", 3, max_waiting=4)
    async with running(handler, ticket=ticket, on_error=lambda *args: errors.append(args)) as (queue, stage):
        for item in range(10):
            queue.send_nowait(item, item)
        await wait_all_tasks_blocked()
        assert most == 3
    assert stage.statistics().handled == 7
    assert len(errors) == 3
    assert all(isinstance(error, Overloaded) and error.reason == "waiting" for _, error in errors)


async def test_cancelling_the_stage_cancels_its_handlers() -> None:
    """No handler survives the stage."""
    ended = 0

    async def handler(item: int) -> None:
        nonlocal ended
        try:
            await trio.sleep_forever()
        finally:
            ended += 1

    queue: FairQueue[int, int] = FairQueue(100)
    stage = Stage(handler, queue=queue, workers=5)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stage.run)
        for item in range(20):
            queue.send_nowait(item % 10, item)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ended == 5


async def test_a_stage_runs_once() -> None:
    """A second run is a mistake and says so."""

    async def handler(item: int) -> None:
        pass

    async with running(handler) as (_queue, stage):
        await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="runs once"):
            await stage.run()


async def test_forced_handlers_keep_the_order_of_their_key_and_are_charged() -> None:
    """Under a watchdog, items of one flow do not overlap though each is forced off, and other flows get in between."""
    log: list[str] = []
    others = 0

    async def spin(item: str) -> None:
        nonlocal others
        log.append(f"{item} begins")
        if item == "quick":
            others += 1
        else:
            target = others + 1
            while others < target:
                pass
        log.append(f"{item} ends")

    async with open_watchdog(quantum=0.002) as watchdog:
        async with running(spin, watchdog=watchdog) as (queue, _stage):
            for item in ("one", "two"):
                queue.send_nowait("slow", item)
            while "two ends" not in log:
                await trio.lowlevel.checkpoint()
                if log[-1:] and log[-1].endswith("begins"):
                    queue.send_nowait("fast", "quick")
        slow = [entry for entry in log if not entry.startswith("quick")]
        assert slow == ["one begins", "one ends", "two begins", "two ends"]
        assert watchdog.statistics().forced >= 2


@pytest.mark.parametrize(("overlap", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
async def test_an_overlap_is_a_number_of_handlers(overlap: Any, error: type[Exception]) -> None:
    """At least one."""
    with pytest.raises(error, match=f"overlap must be .*, not {overlap!r}"):
        Stage(trio.sleep, queue=FairQueue(1), workers=1, overlap=overlap)


async def test_a_budget_needs_a_watchdog_and_bounds() -> None:
    """Wrong arguments are named."""

    async def handler(item: int) -> None:
        pass

    queue: FairQueue[int, int] = FairQueue(1)
    for options, words in [
        ({"workers": 0}, "workers must be >= 1, not 0"),
        ({"workers": 1, "max_handling": 0}, "max_handling must be > 0, not 0"),
        ({"workers": 1, "budget": -1}, "budget must be > 0, not -1"),
        ({"workers": 1, "budget": 1}, "budget needs a watchdog"),
    ]:
        with pytest.raises(ValueError, match=words):
            Stage(handler, queue=queue, **options)  # type: ignore[arg-type]


async def test_past_its_budget_a_handler_gets_cancelled_and_the_item_an_error() -> None:
    """`BudgetExceeded` names the handler, its ``finally`` has run, and the next item of the key is served."""
    errors: list[tuple[str, Exception]] = []
    log: list[str] = []

    async def spin_forever(item: str) -> None:
        try:
            for _ in iter(int, 1 if item == "spin" else 0):
                pass
        finally:
            log.append(item)

    async with open_watchdog(quantum=0.002) as watchdog:
        options = {"watchdog": watchdog, "budget": 0.02, "on_error": lambda *args: errors.append(args)}
        async with running(spin_forever, **options) as (queue, stage):
            for item in ("spin", "fine"):
                queue.send_nowait("flow", item)
    assert log == ["spin", "fine"]
    assert [(item, type(error)) for item, error in errors] == [("spin", BudgetExceeded)]
    assert "spin_forever" in str(errors[0][1])
    assert (stage.statistics().handled, stage.statistics().overdue) == (1, 1)


async def test_a_handler_that_fails_after_it_was_forced_books_itself_alone() -> None:
    """What was taken with it, and parked behind it meanwhile, is settled once, when it has been served."""
    items = [*range(2000), "late", "a", "b", "c"]  # so many that they are known to be cheap, and come in runs
    served: list[Any] = []
    errors: list[Any] = []
    begun = let_go = False

    async def fail_late(item: Any) -> None:
        nonlocal begun
        if item == "late":
            begun = True
            while not let_go:
                pass
            raise ValueError(item)
        served.append(item)

    async with open_watchdog(quantum=0.002) as watchdog:
        options = {"watchdog": watchdog, "on_error": lambda *args: errors.append(args)}
        async with running(fail_late, **options) as (queue, stage):
            for item in items:
                queue.send_nowait("flow", item)
            while not begun or stage.statistics().parked < 3:
                await trio.lowlevel.checkpoint()
            let_go = True
    items.remove("late")
    assert served == items
    assert [item for item, _ in errors] == ["late"]
    statistics = stage.statistics()
    assert (statistics.handled, statistics.failed, statistics.queue.in_hand) == (len(items), 1, 0)
