"""Checks come when they are due, a tick late at most, and only as long as they ask for it."""

from __future__ import annotations

from math import inf
from weakref import ref

import pytest
import trio
from trio.testing import MockClock

from stagetrio.reaper import FEW, TICK, Reaper


@pytest.mark.parametrize("times", [[1.0, 0.3, 2.5, 0.3], [5.0, 1.0], [0.0]])
async def test_checks_come_in_order_and_in_time(autojump_clock: MockClock, times: list[float]) -> None:
    """Each check is called once, not before its time and at most a tick after it."""
    reaper = Reaper()
    called: list[tuple[float, float]] = []

    def check_for(when: float, now: float) -> float:
        called.append((when, now))
        return inf

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        for when in times:
            reaper.at(start + when, lambda now, when=when: check_for(when, now - start))
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert [when for when, _ in called] == sorted(times)
    assert all(when <= now <= when + 2 * TICK for when, now in called)


async def test_a_check_says_when_it_comes_next(autojump_clock: MockClock) -> None:
    """A check is repeated as long as it returns a time, also after the reaper had nothing to do."""
    reaper = Reaper()
    left = [3, 2]

    def check(now: float) -> float:
        left[0] -= 1
        return now + 1 if left[0] else inf

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await trio.sleep(5)
        reaper.at(trio.current_time() + 1, check)
        await trio.sleep(10)
        assert left[0] == 0
        left[0] = 1
        reaper.at(inf, check)
        await trio.sleep(10)
        assert left[0] == 1
        reaper.at(trio.current_time(), check)
        await trio.sleep(1)
        assert left[0] == 0
        nursery.cancel_scope.cancel()


async def test_checks_of_what_is_gone_are_not_kept_until_they_are_due() -> None:
    """Under a churn of things with checks far ahead, what is held is proportional to those that are there."""

    class Thing:
        def check(self, now: float) -> float:
            return inf

    reaper = Reaper()
    there = [Thing() for _ in range(100)]
    for thing in there:
        reaper.watch(1e9, thing.check)
    for _ in range(10_000):
        reaper.watch(1e9, Thing().check)
        assert reaper.pending <= 2 * len(there) + FEW + 2


async def test_those_left_come_in_order_and_are_not_kept_for_another_look(autojump_clock: MockClock) -> None:
    """A pass over all that throws out the dead leaves a heap; a check that has been made holds nothing either."""

    class Thing:
        def __init__(self, when: float) -> None:
            self.when = when

        def check(self, now: float) -> float:
            called.append((self.when, now))
            return now + 1e6

    called: list[tuple[float, float]] = []
    reaper = Reaper()
    start = trio.current_time()
    things = [Thing(start + 1 + number * 7 % 100) for number in range(500)]
    for thing in things:
        reaper.watch(thing.when, thing.check)
    del things[::2], things[::3], thing  # a third is left
    reaper.watch(start + 300, things[0].check)
    assert reaper.pending < 200
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await trio.sleep(150)
        assert len(called) == len(things)
        assert all(when <= now <= when + 2 * TICK for when, now in called)
        gone = ref(things.pop())
        assert gone() is None
        nursery.cancel_scope.cancel()


async def test_what_is_there_is_checked_and_what_is_gone_is_not(autojump_clock: MockClock) -> None:
    """Also after those that were gone have been thrown out."""
    checked: list[int] = []

    class Thing:
        def __init__(self, number: int) -> None:
            self.number = number

        def check(self, now: float) -> float:
            checked.append(self.number)
            return inf if checked.count(self.number) >= 2 else now + 1

    reaper = Reaper()
    things = {number: Thing(number) for number in range(1000)}
    for number, thing in things.items():
        reaper.watch(trio.current_time() + 1 + number % 7, thing.check)
    del thing
    for number in range(1000):
        if number % 10:
            del things[number]
    reaper.watch(trio.current_time() + 1, things[0].check)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reaper.run)
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert set(checked) == set(things)
    assert reaper.pending == 0
