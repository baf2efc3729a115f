"""Shedding by priority: who is refused, how many, and for how long."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock

from stagetrio.limiter import Overloaded
from stagetrio.shed import Shedder, priority_of
from stagetrio.ticket import TicketStage


def test_priorities_are_the_same_everywhere_and_evenly_spread() -> None:
    """A priority depends on who asks and on the salt, not on the process, and takes all values alike."""
    assert priority_of("alice") == priority_of("alice") == pytest.approx(0.662407, abs=1e-6)
    assert priority_of("alice", "next hour") != priority_of("alice")
    values = [priority_of(number) for number in range(2000)]
    assert min(values) >= 0
    assert max(values) < 1
    for tenth in range(10):
        assert 140 <= sum(tenth / 10 <= value < (tenth + 1) / 10 for value in values) <= 260


async def serve(shedder: Shedder, rate: float, seconds: float, priorities: list[float] | None = None) -> list[float]:
    """Offer `rate` requests a second to 5 servers of 50 ms each, that is 100 a second; return what was served."""
    stage = TicketStage("server", 5, max_waiting=math.inf)
    served: list[float] = []

    async def request(priority: float) -> None:
        try:
            shedder.admit(priority)
        except Overloaded:
            return
        came = trio.current_time()
        async with stage.ticket():
            shedder.begun(trio.current_time() - came)
            await trio.sleep(0.05)
            served.append(priority)

    async with trio.open_nursery() as nursery:
        for number in range(round(rate * seconds)):
            nursery.start_soon(request, priority_of((number, rate)))
            await trio.sleep(1 / rate)
    return served


async def test_nothing_is_shed_without_overload(autojump_clock: MockClock) -> None:
    """A server that keeps up admits everybody."""
    shedder = Shedder()
    assert len(await serve(shedder, 90, 10)) == 900
    figures = shedder.statistics()
    assert (figures.level, figures.admitted, figures.shed) == (1, 900, 0)


async def test_an_overloaded_server_sheds_one_end_and_serves_the_other(autojump_clock: MockClock) -> None:
    """At twice the load about half are served, those of low numbers, with a short queue."""
    shedder = Shedder()
    await serve(shedder, 200, 10)
    served = await serve(shedder, 200, 20)
    assert 1700 <= len(served) <= 2060
    assert sum(priority < 0.4 for priority in served) >= 0.4 * 4000 * 0.95
    assert max(served) <= 0.65
    assert shedder.statistics().waited_seconds <= 0.2
    assert 0.4 <= shedder.level <= 0.6


async def test_a_server_that_is_well_again_admits_everybody_again(autojump_clock: MockClock) -> None:
    """After an overload the level rises to the top, also when nothing at all comes for a while."""
    shedder = Shedder(window=0.2)
    await serve(shedder, 300, 10)
    assert shedder.level < 0.5
    await serve(shedder, 50, 20)
    assert shedder.level == 1


async def test_admitting_without_serving_lowers_the_level(autojump_clock: MockClock) -> None:
    """A server that begins nothing of what it admits lets in less and less, but never nothing."""
    shedder = Shedder()
    for _ in range(30):
        shedder.admit(0)
        await trio.sleep(1)
    assert shedder.level == pytest.approx(0.01)
    with pytest.raises(Overloaded) as caught:
        shedder.admit(0.5)
    assert caught.value.retry_after == 1


async def test_wrong_arguments_are_refused_by_name() -> None:
    """A wrong argument is named in the error."""
    for argument in ("target", "window"):
        with pytest.raises(ValueError, match=argument):
            Shedder(**{argument: 0})
    with pytest.raises(ValueError, match="priority"):
        Shedder().admit(1)


@pytest.mark.parametrize("waited", [-0.1, float("nan"), float("inf")])
async def test_a_time_that_is_none_is_refused(waited: float) -> None:
    """What was not waited for would spoil the mean, and with it the level, for good."""
    with pytest.raises(ValueError, match="waited"):
        Shedder().begun(waited)
