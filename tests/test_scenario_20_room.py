"""Scenario 20, room: a category that refuses when full, closes by itself, and sends a message to its members.

Members are never more than the limit, those of a closed room finish, and each message reaches each member exactly once.
The control is a set of members with a check before an await, and a task per member to deliver messages.
"""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.limiter import Overloaded
from stagetrio.ticket import Ticket, TicketStage

SEATS = 20
VISITORS = 200
CLOSING = 10.0


@pytest.mark.parametrize("seed", range(20))
async def test_a_room(seed: int, autojump_clock: MockClock) -> None:
    """Visitors come, are refused or stay; the room closes in the midst of it; messages go out all the time."""
    chance = random.Random(seed)
    room = TicketStage("room", SEATS, max_waiting=0)
    inside: set[int] = set()
    most = refused = closed_out = 0
    heard: dict[int, list[int]] = {}
    due: dict[int, list[int]] = {}
    stayed: list[bool] = []

    async def listen(number: int, ticket: Ticket) -> None:
        async for message in ticket.messages:
            heard[number].append(message)

    async def visitor(number: int) -> None:
        nonlocal most, refused, closed_out
        await trio.sleep(chance.uniform(0, 1.5 * CLOSING))
        stay = chance.uniform(0.5, 4)
        try:
            async with room.ticket() as ticket, trio.open_nursery() as nursery:
                inside.add(number)
                most = max(most, len(inside))
                heard[number], due[number] = [], []
                nursery.start_soon(listen, number, ticket)
                start = trio.current_time()
                await trio.sleep(stay)
                stayed.append(trio.current_time() - start == pytest.approx(stay))
                inside.remove(number)
                ticket.release()  # ends `listen`, when it has read what was sent before
        except Overloaded as refusal:
            assert refusal.reason == "waiting"
            assert len(inside) == SEATS
            refused += 1
        except trio.ClosedResourceError:
            assert trio.current_time() - opened >= CLOSING
            closed_out += 1

    async def speaker() -> None:
        for message in range(150):
            await trio.sleep(chance.uniform(0, 0.2))
            await wait_all_tasks_blocked()
            for member in inside:
                due[member].append(message)
            room.broadcast(message)

    opened = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(VISITORS):
            nursery.start_soon(visitor, number)
        nursery.start_soon(speaker)
        room.close_after(CLOSING)
    print(
        f"seed {seed}: most {most}/{SEATS}, {len(heard)} were in, {refused} refused, {closed_out} came too late, "
        f"{sum(map(len, heard.values()))} messages heard"
    )
    assert most == SEATS
    assert refused > 0
    assert closed_out > 0
    assert all(stayed)
    assert len(stayed) == len(heard) == VISITORS - refused - closed_out
    assert heard == due
    assert room.statistics().held == 0
    assert room.statistics().closed


async def test_a_room_of_ones_own_making_is_overfilled(autojump_clock: MockClock) -> None:
    """The control: between the check and the entry there is an await, and more come in than there are seats."""
    chance = random.Random(0)
    inside: set[int] = set()
    most = 0

    async def greet() -> None:
        await trio.sleep(0.01)  # the session is looked up

    async def visitor(number: int) -> None:
        nonlocal most
        await trio.sleep(chance.uniform(0, 2))
        if len(inside) < SEATS:
            await greet()
            inside.add(number)
            most = max(most, len(inside))
            await trio.sleep(chance.uniform(0.5, 4))
            inside.discard(number)

    async with trio.open_nursery() as nursery:
        for number in range(VISITORS):
            nursery.start_soon(visitor, number)
    print(f"control: most {most}/{SEATS}")
    assert most > SEATS
