"""Tickets: who gets one, in which order, for how long, and what happens when it is taken away."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.limiter import Overloaded
from stagetrio.ticket import LeaseLost, Ticket, TicketStage

Make = Callable[..., TicketStage]


@pytest.fixture(params=["int", "limiter"])
def make(request: pytest.FixtureRequest) -> Make:
    """A stage of its own count and one over a limiter keep the same contract."""

    def make(tickets: int, **kwargs: float) -> TicketStage:
        source = tickets if request.param == "int" else trio.CapacityLimiter(tickets)
        return TicketStage("db", source, **kwargs)  # type: ignore[arg-type]

    return make


async def loses(work: Callable[[], Awaitable[None]], reason: str) -> None:
    """Run `work`, which ends in a `LeaseLost` with `reason`."""
    with pytest.raises(LeaseLost) as caught:
        await work()
    assert caught.value.reason == reason


async def hold(stage: TicketStage, cost: int = 1, seconds: float = 0) -> None:
    async with stage.ticket(cost=cost):
        await trio.sleep(seconds)


async def test_holders_never_exceed_the_tickets(make: Make, autojump_clock: MockClock) -> None:
    """However many come, no more than the tickets are held at any moment, and all are served."""
    stage = make(3)
    held = 0
    most = 0
    served = 0

    async def work(number: int) -> None:
        nonlocal held, most, served
        await trio.sleep(number % 5 / 10)
        async with stage.ticket():
            held += 1
            most = max(most, held)
            await trio.sleep(0.1 + number % 3 / 10)
            held -= 1
        served += 1

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(work, number)
    assert (most, served) == (3, 50)
    figures = stage.statistics()
    assert (figures.held, figures.holders, figures.waiting, figures.granted) == (0, 0, 0, 50)
    assert figures.tickets == 3


async def test_hand_over_is_immediate_and_in_order(make: Make, autojump_clock: MockClock) -> None:
    """Waiters of one flow are served in the order they came, each at the instant a ticket is given back."""
    stage = make(1)
    served: list[tuple[int, float]] = []

    async def work(number: int) -> None:
        async with stage.ticket():
            served.append((number, trio.current_time() - start))
            await trio.sleep(0.5)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(work, number)
            await wait_all_tasks_blocked()
    assert [number for number, _ in served] == list(range(5))
    assert [moment for _, moment in served] == pytest.approx([0, 0.5, 1, 1.5, 2])


async def test_flows_are_served_in_turn(make: Make, autojump_clock: MockClock) -> None:
    """A flow that queued a hundred requests does not keep one that comes later waiting for all of them."""
    stage = make(1)
    order: list[str] = []

    async def work(flow: str) -> None:
        async with stage.ticket(flow):
            order.append(flow)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(work, "hog")
        await wait_all_tasks_blocked()
        for _ in range(3):
            nursery.start_soon(work, "polite")
    turns = [turn for turn, flow in enumerate(order) if flow == "polite"]
    assert turns[0] <= 3  # one holds, one may be on its way, one that came earlier
    assert [turns[1] - turns[0], turns[2] - turns[1]] == [2, 2]
    assert len(order) == 103


async def test_weights_share_what_is_granted(autojump_clock: MockClock) -> None:
    """A flow of weight 3 is granted three times as often as one of weight 1 while both wait."""
    weights = {"heavy": 3.0, "light": 1.0}
    stage = TicketStage("db", 1, weight=lambda flow: weights[str(flow)])
    order: list[str] = []

    async def work(flow: str) -> None:
        async with stage.ticket(flow):
            order.append(flow)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(work, "heavy")
            nursery.start_soon(work, "light")
    assert 29 <= order[:40].count("heavy") <= 31


async def test_a_large_ticket_waits_one_refill_and_no_longer(make: Make, autojump_clock: MockClock) -> None:
    """Endless small tickets do not starve a large one, and it is not granted before it fits."""
    stage = make(10)
    held = 0

    async def small() -> None:
        nonlocal held
        while True:
            async with stage.ticket():
                held += 1
                await trio.sleep(1)
                held -= 1

    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(small)
            await trio.sleep(number % 3 / 10)
        start = trio.current_time()
        async with stage.ticket("large", cost=10):
            waited = trio.current_time() - start
            assert held == 0
            await trio.sleep(1)
            assert held == 0
        nursery.cancel_scope.cancel()
    assert waited <= 3.0


async def test_ticket_nowait_grants_or_refuses_at_once(make: Make, autojump_clock: MockClock) -> None:
    """A free ticket is granted synchronously; when none is free, or somebody waits, the refusal is immediate."""
    stage = make(2)
    with stage.ticket_nowait() as first, stage.ticket_nowait(cost=1):
        assert first.fence == 1
        with pytest.raises(Overloaded) as caught:
            stage.ticket_nowait()
        assert caught.value.reason == "tickets"
        assert caught.value.retry_after >= 0
    assert stage.statistics().held == 0
    assert stage.statistics().refused == 1
    async with trio.open_nursery() as nursery:
        with stage.ticket_nowait():
            nursery.start_soon(hold, stage, 2)
            await wait_all_tasks_blocked()
            with pytest.raises(Overloaded):  # one is free, but the one that waits for two comes first
                stage.ticket_nowait()


async def test_refusals_say_when_to_come_back(make: Make, autojump_clock: MockClock) -> None:
    """`retry_after` follows the pace at which tickets come back: here ten a second, and ten stand before."""
    stage = make(1)
    asked: list[float] = []

    async def ask() -> None:
        while True:
            await trio.sleep(0.25)
            try:
                stage.ticket_nowait()
            except Overloaded as refusal:
                asked.append(refusal.retry_after)

    async def work() -> None:
        while True:
            await hold(stage, 1, 0.1)

    async with trio.open_nursery() as nursery:
        for _ in range(11):
            nursery.start_soon(work)
        nursery.start_soon(ask)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert 39 <= len(asked) <= 40
    assert asked[8:39] == [pytest.approx(1.1, rel=0.2)] * 31


async def test_a_full_line_refuses(make: Make, autojump_clock: MockClock) -> None:
    """`max_waiting` bounds the line; with 0 it is a room that says it is full."""
    for bound in (0, 2):
        stage = make(1, max_waiting=bound)
        async with trio.open_nursery() as nursery:
            for _ in range(1 + bound):
                nursery.start_soon(hold, stage, 1, 1)
            await wait_all_tasks_blocked()
            with pytest.raises(Overloaded) as caught:
                async with stage.ticket():
                    raise AssertionError
            assert caught.value.reason == "waiting"
            assert stage.statistics().waiting == bound


async def test_max_wait_bounds_the_wait(make: Make, autojump_clock: MockClock) -> None:
    """A request that waited `max_wait` is refused then, and those behind it move up."""
    stage = make(1, max_wait=0.5)
    outcomes: list[tuple[float, str]] = []

    async def work(seconds: float) -> None:
        try:
            async with stage.ticket():
                outcomes.append((trio.current_time() - start, "granted"))
                await trio.sleep(seconds)
        except Overloaded as refusal:
            outcomes.append((trio.current_time() - start, refusal.reason))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work, 0.8)
        await wait_all_tasks_blocked()
        nursery.start_soon(work, 1)
        await trio.sleep(0.4)
        nursery.start_soon(work, 1)
    assert outcomes == [(0, "granted"), (pytest.approx(0.5), "waiting"), (pytest.approx(0.8), "granted")]
    assert stage.statistics().refused == 1


async def test_fences_rise_with_each_grant(make: Make, autojump_clock: MockClock) -> None:
    """A later grant has a greater fence than every earlier one, whoever gets it and however."""
    stage = make(1)
    fences: list[int] = []

    async def work(number: int) -> None:
        async with stage.ticket(number) as ticket:
            fences.append(ticket.fence)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(work, number)
    with stage.ticket_nowait() as last:
        fences.append(last.fence)
    assert sorted(fences) == fences
    assert len(set(fences)) == 11


async def test_a_lease_that_ends_cancels_the_work_and_says_so(make: Make, autojump_clock: MockClock) -> None:
    """The work is cancelled when the lease ends, only then is the ticket handed on, and the block raises LeaseLost."""
    stage = make(1, lease=2)
    log: list[tuple[float, str]] = []

    async def slow() -> None:
        async with stage.ticket() as ticket:
            assert ticket.deadline == start + 2
            try:
                await trio.sleep(10)
            finally:
                log.append((trio.current_time() - start, "unwound"))

    async def next_one() -> None:
        async with stage.ticket(lease=math.inf) as ticket:
            assert ticket.deadline == math.inf
            log.append((trio.current_time() - start, "granted"))
            await trio.sleep(5)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loses, slow, "lease expired")
        await wait_all_tasks_blocked()
        nursery.start_soon(next_one)
    assert log == [(2, "unwound"), (2, "granted")]
    assert stage.statistics().lost == 1
    assert stage.statistics().overrun_seconds == 0


async def test_a_shielded_holder_keeps_its_place_until_it_leaves(make: Make, autojump_clock: MockClock) -> None:
    """A holder that cannot be cancelled overruns its lease: nothing is handed on before, and statistics show it."""
    stage = make(1, lease=1)
    granted_at = math.nan

    async def stubborn() -> None:
        async with stage.ticket() as ticket:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
            assert ticket.lost == "lease expired"

    async def next_one() -> None:
        nonlocal granted_at
        async with stage.ticket():
            granted_at = trio.current_time() - start

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loses, stubborn, "lease expired")
        await wait_all_tasks_blocked()
        nursery.start_soon(next_one)
        await trio.sleep(2)
        during = stage.statistics()
    after = stage.statistics()
    assert granted_at == 3
    assert (during.held, during.overrun, during.lost) == (1, 1, 1)
    assert (after.held, after.overrun, after.lost) == (0, 0, 1)
    assert [during.overrun_seconds, after.overrun_seconds] == pytest.approx([1, 2])


async def test_work_that_ends_after_its_lease_is_not_taken_for_done(autojump_clock: MockClock) -> None:
    """A block that never looked up and ran to its end past its lease raises LeaseLost all the same."""
    stage = TicketStage("db", 1, lease=1)
    with pytest.raises(LeaseLost):
        async with stage.ticket():
            autojump_clock.jump(2)
    with pytest.raises(LeaseLost), stage.ticket_nowait():
        autojump_clock.jump(2)
    assert stage.statistics().held == 0


async def test_revocation_carries_its_reason(make: Make, autojump_clock: MockClock) -> None:
    """A revoked holder is cancelled, can read why, and its block raises LeaseLost with that reason."""
    stage = make(1, revocable=True)
    tickets: list[Ticket] = []
    seen: list[str | None] = []

    async def holder() -> None:
        async with stage.ticket() as ticket:
            tickets.append(ticket)
            try:
                await trio.sleep_forever()
            finally:
                seen.append(ticket.lost)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(loses, holder, "maintenance")
        await wait_all_tasks_blocked()
        assert tickets[0].lost is None
        stage.revoke(tickets[0], "maintenance")
        stage.revoke(tickets[0], "a second reason")
    assert seen == ["maintenance"]
    stage.revoke(tickets[0], "given back already")
    assert stage.statistics().lost == 1


async def test_a_ticket_without_a_scope_cannot_be_revoked() -> None:
    """Revoking what nothing could cancel is an error, and so is revoking another stage's ticket."""
    stage = TicketStage("db", 1)
    other = TicketStage("other", 1, revocable=True)
    with stage.ticket_nowait() as ticket:
        with pytest.raises(RuntimeError, match="revocable"):
            stage.revoke(ticket, "why")
        with pytest.raises(ValueError, match="other"):
            other.revoke(ticket, "why")


async def test_a_ticket_revoked_before_its_block_is_entered(autojump_clock: MockClock) -> None:
    """A ticket taken at once and revoked before `with` cancels the block at its first checkpoint."""
    stage = TicketStage("db", 1, revocable=True)
    ticket = stage.ticket_nowait()
    stage.revoke(ticket, "too late")
    with pytest.raises(LeaseLost, match="too late"), ticket:
        await trio.sleep_forever()
    assert stage.statistics().held == 0


async def test_a_cancellation_from_outside_passes_unchanged(make: Make, autojump_clock: MockClock) -> None:
    """Cancelling the holder from outside is no lost lease, also when the lease ends at the same time."""
    for lease in (math.inf, 10, 1):
        stage = make(1, lease=lease, revocable=True)
        with trio.move_on_after(1) as scope:
            async with stage.ticket():
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert stage.statistics().held == 0


async def fail_late(stage: TicketStage) -> None:
    async with stage.ticket():
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        raise KeyError


async def test_an_exception_of_the_block_passes_and_gives_the_ticket_back(
    make: Make, autojump_clock: MockClock
) -> None:
    """An exception in the block comes out as it is, with and without a lease, in time or late."""
    for lease in (math.inf, 10, 1):
        stage = make(1, lease=lease)
        with pytest.raises(KeyError):
            await fail_late(stage)
        with pytest.raises(KeyError), stage.ticket_nowait():
            raise KeyError
        assert stage.statistics().held == 0


async def test_extend_moves_the_end_of_the_lease(make: Make, autojump_clock: MockClock) -> None:
    """A lease extended by `seconds` ends that long after now; when it is over it cannot be extended."""
    stage = make(1, lease=1)
    start = trio.current_time()

    async def extend() -> None:
        async with stage.ticket() as ticket:
            for _ in range(5):
                await trio.sleep(0.9)
                ticket.extend(1)
            assert ticket.deadline == pytest.approx(start + 5.5)
            try:
                await trio.sleep_forever()
            finally:
                assert trio.current_time() - start == pytest.approx(5.5)
                with pytest.raises(LeaseLost):
                    ticket.extend(1)

    await loses(extend, "lease expired")
    async with stage.ticket(lease=math.inf) as ticket:
        ticket.extend(0)
        await trio.sleep(100)


async def test_early_release_hands_on_and_ends_the_lease(make: Make, autojump_clock: MockClock) -> None:
    """After `release` another may hold the ticket, and the rest of the block goes on without a lease."""
    stage = make(1, lease=1)
    async with stage.ticket() as first:
        await trio.sleep(0.5)
        first.release()
        first.release()
        assert not first.held
        async with stage.ticket() as second:
            assert second.held
            assert stage.statistics().held == 1
        await trio.sleep(5)
    assert stage.statistics().held == 0
    assert stage.statistics().lost == 0


@pytest.mark.parametrize("revocable", [False, True])
async def test_an_endless_lease_can_be_given_an_end(revocable: bool, autojump_clock: MockClock) -> None:
    """`extend` means now + seconds wherever there is a scope, also after an extension by ``math.inf``."""
    stage = TicketStage("db", 1, revocable=revocable)
    start = trio.current_time()

    async def extend() -> None:
        async with stage.ticket(lease=None if revocable else 1) as ticket:
            ticket.extend(math.inf)
            assert ticket.deadline == math.inf
            await trio.sleep(10)
            ticket.extend(2)
            assert ticket.deadline == start + 12
            await trio.sleep_forever()

    await loses(extend, "lease expired")
    assert trio.current_time() == start + 12


async def test_a_ticket_released_before_its_block_has_no_lease_there(autojump_clock: MockClock) -> None:
    """What was given back before the block began, or before the waiter woke with it, cancels nothing in the block."""
    stage = TicketStage("db", 1, lease=1)
    start = trio.current_time()
    early = stage.ticket_nowait()
    early.release()
    with early:
        await trio.sleep(5)
    assert trio.current_time() == start + 5
    request = stage.ticket()
    ended = []

    async def wait() -> None:
        async with request:
            await trio.sleep(5)
        ended.append(trio.current_time() - start)

    async with trio.open_nursery() as nursery:
        with stage.ticket_nowait() as first:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
        assert not first.held
        request.release()
    assert ended == [10]
    assert stage.statistics().held == 0
    assert stage.statistics().lost == 0


async def test_a_weight_that_is_gone_harms_nobody_who_waits(make: Make, autojump_clock: MockClock) -> None:
    """A flow's weight is asked when it comes: one that cannot be told later keeps no key busy and fails no holder."""
    weights = {"a": 1.0, "b": 1.0}
    stage = make(1, weight=weights.__getitem__)
    served = []

    async def hold_key(flow: str) -> None:
        async with stage.ticket(flow, key="k"):
            served.append(flow)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for flow in "ab":
            nursery.start_soon(hold_key, flow)
            await wait_all_tasks_blocked()
        weights.clear()
    assert served == ["a", "b"]
    with stage.ticket_nowait("c", key="k"):
        pass


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
async def test_a_weight_out_of_range_is_refused(weight: float, autojump_clock: MockClock) -> None:
    """An infinite weight would leave no share for anybody else, now or later."""
    stage = TicketStage("db", 1, weight=lambda flow: weight)
    with stage.ticket_nowait(), trio.fail_after(1), pytest.raises(ValueError, match="weight of flow 'x'"):
        await stage.ticket("x").__aenter__()


async def test_giving_up_before_a_limiter_saves_no_credit(autojump_clock: MockClock) -> None:
    """Waiters of one flow that give up as the front of the line, one after the other, gain the flow no turns."""
    limiter = trio.CapacityLimiter(1)
    stage = TicketStage("db", limiter)
    log: list[str] = []

    async def once(flow: str, scope: trio.CancelScope) -> None:
        with scope:
            async with stage.ticket(flow):
                log.append(flow)
                await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        await limiter.acquire()
        scopes = [trio.CancelScope() for _ in range(20)]
        for scope in scopes:
            nursery.start_soon(once, "a", scope)
            await wait_all_tasks_blocked()
        for scope in scopes[:10]:  # each the front of the line by then
            scope.cancel()
            await wait_all_tasks_blocked()
        for _ in range(10):
            nursery.start_soon(once, "b", trio.CancelScope())
        await wait_all_tasks_blocked()
        limiter.release()
    assert len(log) == 20
    assert all(abs(log[:n].count("a") - log[:n].count("b")) <= 2 for n in range(len(log)))


async def test_a_waiter_that_is_cancelled_leaves_no_trace(make: Make, autojump_clock: MockClock) -> None:
    """When the large head gives up, those behind it that fit are granted at once."""
    stage = make(2)
    granted: list[float] = []

    async def small() -> None:
        async with stage.ticket():
            granted.append(trio.current_time() - start)
            await trio.sleep(1)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, stage, 1, 10)
        await wait_all_tasks_blocked()
        with trio.move_on_after(1):
            nursery.start_soon(small_later, small)
            await hold(stage, 2)
    assert granted == [1]
    figures = stage.statistics()
    assert (figures.held, figures.waiting, figures.gave_up) == (0, 0, 1)


async def small_later(small: Callable[[], object]) -> None:
    await trio.sleep(0.5)
    await small()  # type: ignore[misc]


async def test_a_cancel_at_the_instant_of_the_grant_loses_no_ticket(make: Make, autojump_clock: MockClock) -> None:
    """A waiter granted and cancelled in the same step holds the ticket or not, and gives it back either way."""
    for cancel_first in (True, False):
        stage = make(1)
        ticket = stage.ticket_nowait()
        scope = trio.CancelScope()

        async def waiter(scope: trio.CancelScope, stage: TicketStage) -> None:
            with scope:
                async with stage.ticket():
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter, scope, stage)
            await wait_all_tasks_blocked()
            if cancel_first:
                scope.cancel()
            ticket.release()
            scope.cancel()
        assert stage.statistics().held == 0
        with stage.ticket_nowait():
            pass


async def test_keys_exclude_each_other_and_nobody_else(make: Make, autojump_clock: MockClock) -> None:
    """Requests of one key run one at a time in order; those of other keys, or none, pass them."""
    stage = make(3)
    log: list[tuple[str, int, float]] = []

    async def work(key: str | None, number: int) -> None:
        async with stage.ticket(key=key):
            log.append((str(key), number, trio.current_time() - start))
            await trio.sleep(1)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for key, number in (("a", 1), ("a", 2), ("a", 3), ("b", 1), (None, 1)):
            nursery.start_soon(work, key, number)
            await wait_all_tasks_blocked()
        with pytest.raises(Overloaded):
            stage.ticket_nowait(key="a")
    assert log == [("a", 1, 0), ("b", 1, 0), ("None", 1, 0), ("a", 2, 1), ("a", 3, 2)]
    with stage.ticket_nowait(key="a"):
        pass


async def test_a_key_is_freed_by_a_waiter_that_gives_up(make: Make, autojump_clock: MockClock) -> None:
    """The first waiter of a key and one in its middle can give up; the key goes on to the next."""
    stage = make(1)
    done: list[int] = []

    async def work(number: int, seconds: float) -> None:
        with trio.move_on_after(seconds):
            async with stage.ticket(key="k"):
                done.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, stage, 1, 5)
        await wait_all_tasks_blocked()
        for number, seconds in ((1, 1), (2, 2), (3, 10), (4, 3), (5, 10)):
            nursery.start_soon(work, number, seconds)
            await wait_all_tasks_blocked()
    assert done == [3, 5]
    assert stage.statistics().waiting == 0


async def test_position_counts_down(make: Make, autojump_clock: MockClock) -> None:
    """A login screen can say which number one is: exact within a flow, and 0 for who does not wait."""
    stage = make(1)
    requests = [stage.ticket() for _ in range(5)]

    async def work(number: int) -> None:
        async with requests[number]:
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(work, number)
            await wait_all_tasks_blocked()
        assert [request.position for request in requests] == [0, 1, 2, 3, 4]
        await trio.sleep(2.5)
        assert [request.position for request in requests] == [0, 0, 0, 1, 2]
    assert [request.position for request in requests] == [0] * 5


async def test_broadcasts_reach_holders_and_waiters_once(make: Make, autojump_clock: MockClock) -> None:
    """A message is read once by each that held or waited when it was sent, also when it was granted in between."""
    stage = make(1)
    heard: dict[str, list[object]] = {"holder": [], "waiter": [], "late": []}

    async def member(name: str, seconds: float) -> None:
        request = stage.ticket()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, name, request.messages)
            async with request as ticket:
                assert ticket.messages is request.messages
                await trio.sleep(seconds)

    async def listen(name: str, messages: object) -> None:
        heard[name] += [value async for value in messages]  # type: ignore[attr-defined]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(member, "holder", 2)
        await wait_all_tasks_blocked()
        nursery.start_soon(member, "waiter", 2)
        await wait_all_tasks_blocked()
        stage.broadcast("one")
        await trio.sleep(1)
        stage.broadcast("two")
        await trio.sleep(1.5)
        stage.broadcast("three")
        nursery.start_soon(member, "late", 0)
    assert heard == {"holder": ["one", "two"], "waiter": ["one", "two", "three"], "late": []}
    assert stage.statistics().broadcasts == 3


async def test_messages_are_bounded_and_count_what_was_dropped() -> None:
    """A listener that does not read loses the oldest messages, and knows how many."""
    stage = TicketStage("room", 1, max_messages=3)
    with stage.ticket_nowait() as ticket:
        for number in range(5):
            stage.broadcast(number)
        assert list(ticket.messages) == [2, 3, 4]
        assert len(ticket.messages) == 3
        assert ticket.messages.dropped == 2
        assert ticket.messages.receive_nowait() == 2
        assert await ticket.messages.receive() == 3
    stage.broadcast("after it left")
    assert ticket.messages.receive_nowait() == 4
    with pytest.raises(trio.EndOfChannel):
        ticket.messages.receive_nowait()
    with stage.ticket_nowait() as ticket, pytest.raises(trio.WouldBlock):
        ticket.messages.receive_nowait()


async def test_a_closed_stage_lets_its_holders_finish(make: Make, autojump_clock: MockClock) -> None:
    """At the moment of closing waiters and newcomers get ClosedResourceError, and holders go on to their end."""
    stage = make(1)
    log: list[tuple[float, str]] = []

    async def member(name: str) -> None:
        try:
            async with stage.ticket():
                await trio.sleep(3)
                log.append((trio.current_time() - start, f"{name} finished"))
        except trio.ClosedResourceError:
            log.append((trio.current_time() - start, f"{name} closed out"))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for name in "ab":
            nursery.start_soon(member, name)
            await wait_all_tasks_blocked()
        stage.close_after(1)
        stage.close_after(2)
        assert not stage.statistics().closed
        nursery.start_soon(member, "c")
    assert sorted(log) == [(1, "b closed out"), (1, "c closed out"), (3, "a finished")]
    assert stage.statistics().closed
    with pytest.raises(trio.ClosedResourceError):
        stage.ticket_nowait()
    with pytest.raises(trio.ClosedResourceError):
        async with stage.ticket():
            raise AssertionError


async def test_a_stage_that_will_close_grants_until_then(make: Make, autojump_clock: MockClock) -> None:
    """Between `close_after` and the moment itself tickets are granted and handed over as before."""
    stage = make(1)
    stage.close_after(10)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(hold, stage, 1, 1)
    with stage.ticket_nowait():
        pass
    assert stage.statistics().granted == 6


async def test_entering_checkpoints_and_leaving_does_not(make: Make) -> None:
    """Waiting for a ticket is a checkpoint when it is free too; giving it back is none."""
    stage = make(1)
    request = stage.ticket()
    with trio.testing.assert_checkpoints():
        await request.__aenter__()
    with trio.testing.assert_no_checkpoints():
        await request.__aexit__(None, None, None)
    with trio.CancelScope() as scope:
        scope.cancel()
        async with stage.ticket():
            raise AssertionError
    assert stage.statistics().granted == 1


async def test_a_request_is_entered_once() -> None:
    """A request that was granted cannot be used again."""
    stage = TicketStage("db", 1)
    request = stage.ticket()
    async with request:
        pass
    with pytest.raises(RuntimeError, match="once"):
        await request.__aenter__()


async def test_stages_may_share_a_limiter(autojump_clock: MockClock) -> None:
    """Two stages over one limiter, and others who use it, hold no more than it allows together."""
    limiter = trio.CapacityLimiter(2)
    stages = [TicketStage("a", limiter), TicketStage("b", limiter)]
    held = most = 0

    async def work(number: int) -> None:
        nonlocal held, most
        context = limiter if number % 3 == 2 else stages[number % 3].ticket()
        async with context:
            held += 1
            most = max(most, held)
            await trio.sleep(1)
            held -= 1

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(30):
            nursery.start_soon(work, number)
    assert most == 2
    assert trio.current_time() - start == 15
    assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [("tickets", -1), ("max_waiting", -1), ("lease", 0), ("max_wait", -0.1), ("max_messages", 0)],
)
def test_wrong_arguments_are_refused_by_name(argument: str, value: float) -> None:
    """A wrong constructor argument is named in the error."""
    with pytest.raises(ValueError, match=argument):
        TicketStage(**{"name": "db", "tickets": 1, argument: value})  # type: ignore[arg-type]


async def test_wrong_requests_are_refused() -> None:
    """A cost that can never be had, or no lease at all, is a ValueError; what is no limiter a TypeError."""
    stage = TicketStage("db", 2)
    for cost in (0, 3):
        with pytest.raises(ValueError, match="cost"):
            stage.ticket_nowait(cost=cost)
    with pytest.raises(ValueError, match="lease"):
        async with stage.ticket(lease=0):
            raise AssertionError
    with pytest.raises(TypeError, match="tickets"):
        TicketStage("db", "2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ticket must be a Ticket, not None"):
        stage.revoke(None, "why")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [{"tickets": True}, {"max_waiting": "1"}, {"lease": "1"}, {"max_wait": None}, {"weight": 3}],
    ids=str,
)
def test_arguments_of_another_kind_are_refused_by_name(arguments: dict[str, Any]) -> None:
    """What is no number, or not callable, is a TypeError that names it."""
    (name,) = arguments
    with pytest.raises(TypeError, match=f"{name} must be"):
        TicketStage(**{"name": "db", "tickets": 1, **arguments})


@pytest.mark.parametrize("arguments", [{"cost": 1.5}, {"cost": True}, {"lease": "1"}, {"key": []}], ids=str)
async def test_a_request_of_another_kind_leaves_no_trace(arguments: dict[str, Any]) -> None:
    """It is refused when it is made, whether tickets are free or others wait, and nobody waits behind it."""
    stage = TicketStage("db", 1)
    for _ in range(2):
        with pytest.raises(TypeError):
            stage.ticket_nowait(**arguments)
        with pytest.raises(TypeError):
            async with stage.ticket(**arguments):
                raise AssertionError
    with stage.ticket_nowait():
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with stage.ticket():
                    pass

            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            with pytest.raises(TypeError):
                async with stage.ticket(**arguments):
                    raise AssertionError
            assert stage.statistics().waiting == 1
            nursery.cancel_scope.cancel()
    assert stage.statistics().waiting == 0


async def test_the_number_of_tickets_can_be_changed(autojump_clock: MockClock) -> None:
    """More tickets are handed on at once; fewer wait for holders to leave, and cut nobody off."""
    stage = TicketStage("db", 1)
    held: list[float] = []

    async def work() -> None:
        async with stage.ticket():
            held.append(stage.statistics().held)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(work)
        await wait_all_tasks_blocked()
        assert len(held) == 1
        stage.tickets = 4
        await wait_all_tasks_blocked()
        assert len(held) == 4
        stage.tickets = 2
        await trio.sleep(1.5)
        assert stage.statistics().held == 2
    assert max(held[4:]) == 2
    assert stage.tickets == 2
    with pytest.raises(ValueError, match="tickets"):
        stage.tickets = -1
    over = TicketStage("db", trio.CapacityLimiter(3))
    assert over.tickets == 3
    with pytest.raises(TypeError, match="limiter"):
        over.tickets = 4


async def test_large_tickets_of_two_stages_share_a_limiter_without_deadlock(autojump_clock: MockClock) -> None:
    """Two stages that each need the whole limiter take turns, and neither holds a part the other waits for."""
    limiter = trio.CapacityLimiter(4)
    stages = [TicketStage("a", limiter), TicketStage("b", limiter)]
    done: list[int] = []

    async def work(number: int, cost: int) -> None:
        for _ in range(5):
            async with stages[number].ticket(cost=cost):
                await trio.sleep(1)
            done.append(number)

    async def other() -> None:
        for _ in range(20):
            async with limiter:
                await trio.sleep(0.3)

    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            for number in (0, 1):
                nursery.start_soon(work, number, 4)
                nursery.start_soon(work, number, 3)
                nursery.start_soon(work, number, 1)
                nursery.start_soon(other)
    assert sorted(done) == [0] * 15 + [1] * 15
    assert limiter.borrowed_tokens == 0


async def test_strangers_in_endless_number_do_not_starve_a_flow(autojump_clock: MockClock) -> None:
    """A flow with a backlog gets its turn also when every other request comes from a flow never seen before."""
    stage = TicketStage("db", 1)
    served = 0

    async def regular() -> None:
        nonlocal served
        while True:
            async with stage.ticket("regular"):
                served += 1
                await trio.sleep(1)

    async def stranger(name: int) -> None:
        async with stage.ticket(name):
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(regular)
        for name in range(300):
            nursery.start_soon(stranger, name)
            await trio.sleep(1 if name > 3 else 0)
        nursery.cancel_scope.cancel()
    assert served >= 15  # of n who wait it is due one in n, and the line grows by each service it gets: √(2 × 300)


async def test_a_bad_weight_refuses_the_request_and_nothing_else(autojump_clock: MockClock) -> None:
    """A weight that is none is a ValueError in the request that asked; the stage goes on."""
    stage = TicketStage("db", 1, weight=lambda flow: 0 if flow == "bad" else 1)
    async with stage.ticket("good"):
        for key in (None, "k"):
            with pytest.raises(ValueError, match="weight"):
                await stage.ticket("bad", key=key).__aenter__()
    assert stage.statistics().waiting == 0
    async with stage.ticket("good", key="k"):
        pass
