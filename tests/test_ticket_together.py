"""Several tickets at once: all or none, in one order, without deadlock."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from stagetrio.all_tickets import all_tickets
from stagetrio.limiter import Overloaded
from stagetrio.ticket import LeaseLost, TicketStage


async def test_tickets_come_in_the_order_they_were_asked_for() -> None:
    """Whatever the names, each ticket is the one of its request, and all are given back."""
    stages = [TicketStage(name, 2) for name in "cab"]
    async with all_tickets(*(stage.ticket(cost=2) for stage in stages)) as tickets:
        assert [stage.statistics().held for stage in stages] == [2, 2, 2]
        for stage, ticket in zip(stages, tickets, strict=True):
            ticket.release()
            assert stage.statistics().held == 0
    assert [stage.statistics().held for stage in stages] == [0, 0, 0]
    async with all_tickets() as none:
        assert none == ()


@pytest.mark.parametrize("seed", range(20))
async def test_no_order_of_asking_deadlocks(seed: int, autojump_clock: MockClock) -> None:
    """Tasks that need the same stages in any order all come through; taken by hand in that order they do not."""
    chance = random.Random(seed)
    stages = [TicketStage(name, 1) for name in "abcd"]
    wanted = [chance.sample(range(4), 2) for _ in range(40)]
    done = 0

    async def together(needs: list[int]) -> None:
        nonlocal done
        async with all_tickets(*(stages[need].ticket() for need in needs)):
            await trio.sleep(1)
        done += 1

    async def by_hand(needs: list[int]) -> None:
        nonlocal done
        async with stages[needs[0]].ticket():
            await trio.sleep(0.1)
            async with stages[needs[1]].ticket():
                await trio.sleep(1)
        done += 1

    async with trio.open_nursery() as nursery:
        for needs in wanted:
            nursery.start_soon(together, needs)
    assert done == 40
    done = 0
    with trio.move_on_after(1000) as scope:
        async with trio.open_nursery() as nursery:
            for needs in wanted:
                nursery.start_soon(by_hand, needs)
    assert scope.cancelled_caught
    assert done < 40
    assert [stage.statistics().held for stage in stages] == [0] * 4


async def test_a_refusal_gives_back_what_is_held(autojump_clock: MockClock) -> None:
    """When one of the stages is full the others' tickets are given back, and so they are by a cancellation."""
    first, full = TicketStage("a", 1), TicketStage("b", 1, max_waiting=0)
    patient = TicketStage("c", 1)
    with full.ticket_nowait(), patient.ticket_nowait():
        with pytest.raises(Overloaded):
            async with all_tickets(full.ticket(), first.ticket()):
                raise AssertionError
        assert first.statistics().held == 0
        with trio.move_on_after(1) as scope:
            async with all_tickets(patient.ticket(), first.ticket()):
                raise AssertionError
        assert scope.cancelled_caught
        assert first.statistics().held == 0


async def test_a_lease_runs_while_the_next_ticket_is_waited_for(autojump_clock: MockClock) -> None:
    """A lease that ends during the wait for the second ticket ends the wait, and says so."""
    leased, busy = TicketStage("a", 1, lease=2), TicketStage("b", 1)
    start = trio.current_time()
    with busy.ticket_nowait():
        with pytest.raises(LeaseLost):
            async with all_tickets(busy.ticket(), leased.ticket()):
                raise AssertionError
        assert trio.current_time() - start == 2
    assert [stage.statistics().held for stage in (leased, busy)] == [0, 0]
    with pytest.raises(LeaseLost):
        async with all_tickets(busy.ticket(), leased.ticket()):
            await trio.sleep(5)
    assert [stage.statistics().held for stage in (leased, busy)] == [0, 0]


async def test_what_could_wait_for_itself_is_refused() -> None:
    """The same stage twice, two of one name, or two over one limiter, are a ValueError before anything is taken."""
    limiter = trio.CapacityLimiter(5)
    pairs = [
        (TicketStage("a", 2),) * 2,
        (TicketStage("a", 2), TicketStage("a", 2)),
        (TicketStage("a", limiter), TicketStage("b", limiter)),
    ]
    for one, other in pairs:
        with pytest.raises(ValueError, match="together"):
            async with all_tickets(one.ticket(), other.ticket()):
                raise AssertionError
        assert one.statistics().granted == other.statistics().granted == 0


async def test_exceptions_pass_through_all_blocks(autojump_clock: MockClock) -> None:
    """An exception of the block comes out as it is, and every ticket is given back."""
    stages = [TicketStage(name, 1, lease=5) for name in "ab"]
    with pytest.raises(KeyError):
        async with all_tickets(*(stage.ticket() for stage in stages)):
            raise KeyError
    assert [stage.statistics().held for stage in stages] == [0, 0]
    fences = []
    for _ in range(3):
        async with all_tickets(*(stage.ticket() for stage in stages)) as (ticket, _):
            fences.append(ticket.fence)
    assert all(earlier < later for earlier, later in pairwise(fences))
