"""Checks come when they are due, a tick late at most, and only as long as they ask for it."""

from __future__ import annotations

from math import inf

import pytest
import trio
from trio.testing import MockClock

from stagetrio.reaper import TICK, Reaper


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
