"""Scenario 19, login storm: 10,000 logins in one second, 50 tickets, a database of 20 ms, a lease of 1 s.

The database never sees more than 50 at a time, every login is served, each flow in its order, and the 99th percentile
is within a tenth of the ideal drain, which is 2,500 a second. The control lets everybody at the database, which gets
slower for each the more there are, as databases do. ``STAGETRIO_LOGINS=10000`` runs every seed at full size.
"""

from __future__ import annotations

import os
import random

import attrs
import pytest
import trio
from trio.testing import MockClock

from stagetrio.ticket import TicketStage

LOGINS = 10_000
FEWER = int(os.environ.get("STAGETRIO_LOGINS", "1000"))  # for all seeds but the first
FLOWS = 40  # front ends that pass logins on, each of which wants its order kept
TICKETS = 50
QUERY = 0.02
GRID = 100  # arrivals fall on hundredths of a second


@attrs.define
class Database:
    """Answers 50 at a time in 20 ms each; beyond that all are slower in proportion, and then some for the thrashing."""

    inside: int = 0
    most: int = 0
    thrash: float = 0.002  # what each one too many costs all of them

    async def query(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        excess = max(0, self.inside - TICKETS)
        await trio.sleep(QUERY * (1 + excess / TICKETS) * (1 + self.thrash * excess))
        self.inside -= 1


def arrivals(chance: random.Random, logins: int) -> list[int]:
    """How many logins come in each hundredth of the second."""
    counts = [0] * GRID
    for _ in range(logins):
        counts[chance.randrange(GRID)] += 1
    return counts


@pytest.mark.parametrize("seed", range(20))
async def test_a_login_storm_drains_at_the_ideal_pace(seed: int, autojump_clock: MockClock) -> None:
    """Everybody is served, in order, at the pace of the database, which never sees more than it can do."""
    chance = random.Random(seed)
    logins = FEWER if seed else LOGINS
    tickets = TICKETS * logins // LOGINS
    stage = TicketStage("login", tickets, lease=1, max_waiting=logins)
    database = Database()
    waited: list[float] = []
    order: dict[int, list[tuple[int, int]]] = {flow: [] for flow in range(FLOWS)}  # {flow: [(fence, number)]}
    numbers = dict.fromkeys(range(FLOWS), 0)

    async def login(flow: int) -> None:
        came = trio.current_time()
        numbers[flow] = number = numbers[flow] + 1
        async with stage.ticket(flow) as ticket:
            order[flow].append((ticket.fence, number))
            await database.query()
        waited.append(trio.current_time() - came)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for tick, count in enumerate(arrivals(chance, logins)):
            await trio.sleep_until(start + tick / GRID)
            for _ in range(count):
                nursery.start_soon(login, chance.randrange(FLOWS))
    drained = trio.current_time() - start
    # Ideal: all come at an even pace within the second, and are served at 2,500 (or 250) a second, first come first.
    pace = tickets / QUERY
    ideal = sorted(number / pace - number / logins for number in range(logins))[int(0.99 * logins)]
    p99 = sorted(waited)[int(0.99 * logins)]
    print(
        f"seed {seed}: {logins} logins, most {database.most}, drained in {drained:.2f} s of {logins / pace:.2f}, "
        f"p99 {p99:.3f} s, ideal {ideal:.3f} s"
    )
    assert len(waited) == logins
    assert database.most == tickets
    assert stage.statistics().lost == 0
    for served in order.values():
        assert [number for _, number in sorted(served)] == list(range(1, len(served) + 1))
    assert p99 <= 1.1 * ideal
    assert drained <= 1.1 * logins / pace


async def test_without_tickets_the_database_drowns(autojump_clock: MockClock) -> None:
    """The control: everybody at once. The database sees hundreds of times what it can do, and half would give up."""
    chance = random.Random(0)
    database = Database()
    waited: list[float] = []

    async def login() -> None:
        came = trio.current_time()
        await database.query()
        waited.append(trio.current_time() - came)

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for tick, count in enumerate(arrivals(chance, LOGINS)):
            await trio.sleep_until(start + tick / GRID)
            for _ in range(count):
                nursery.start_soon(login)
    median = sorted(waited)[LOGINS // 2]
    print(f"control: most {database.most}, median {median:.1f} s")
    assert database.most > 10 * TICKETS
    assert median > 10
