"""Output on one steady tick."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.pacer import SLICE, Pacer


class Output:
    """Something with output: notes when it was flushed."""

    def __init__(self, name: str = "", log: list[tuple[str, float]] | None = None) -> None:
        self.name = name
        self.log = [] if log is None else log

    def flush(self) -> None:
        self.log.append((self.name, round(trio.current_time(), 6)))

    @property
    def times(self) -> list[float]:
        return [time for _, time in self.log]


async def test_after_idleness_a_touch_is_flushed_at_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A lone answer is not delayed, however long nothing was to be done."""
    pacer, output = Pacer(0.1), Output()
    nursery.start_soon(pacer.run)
    for at in (0.0, 5.03, 7.777):
        await trio.sleep_until(at)
        await wait_all_tasks_blocked()
        pacer.touch(output.flush)
        await wait_all_tasks_blocked()
        assert trio.current_time() == at
    assert output.times == [0.0, 5.03, 7.777]


async def test_within_a_tick_of_the_last_output_touches_are_batched(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """However often it is touched meanwhile, it is flushed once, a tick after the last flush."""
    pacer, output = Pacer(0.1), Output()
    nursery.start_soon(pacer.run)
    pacer.touch(output.flush)
    for n in range(1, 9):
        await trio.sleep_until(n * 0.01)
        pacer.touch(output.flush)
        pacer.touch(output.flush)
    await trio.sleep(1)
    assert output.times == [0.0, 0.1]
    assert (pacer.statistics().rounds, pacer.statistics().flushes) == (2, 2)


async def test_all_users_share_the_tick(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Whoever touched between two ticks is flushed at the same moment, in the order of the first touch."""
    pacer, log = Pacer(1), list[tuple[str, float]]()
    outputs = {name: Output(name, log) for name in "abc"}
    nursery.start_soon(pacer.run)
    pacer.touch(outputs["a"].flush)
    for at, name in ((0.2, "c"), (0.5, "b"), (0.6, "c"), (0.9, "a")):
        await trio.sleep_until(at)
        pacer.touch(outputs[name].flush)
    await trio.sleep(3)
    assert log == [("a", 0.0), ("c", 1.0), ("b", 1.0), ("a", 1.0)]


async def test_the_tick_does_not_drift(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    """While output keeps coming, ticks stay on their grid though the loop is late for each of them."""
    pacer = Pacer(1)
    times: list[float] = []

    def flush() -> None:
        times.append(round(trio.current_time(), 6))
        pacer.touch(flush)

    nursery.start_soon(pacer.run)
    pacer.touch(flush)
    await wait_all_tasks_blocked()
    for jump in (1.25, 0.9, 1.25, 0.6, 1.0, 1.0):
        mock_clock.jump(jump)
        await wait_all_tasks_blocked()
    # the clock stood at 0, 1.25, 2.15, 3.4, 4.0, 5.0, 6.0 for the ticks 0, 1, 2, 3, 4, 5, 6
    assert times == [0.0, 1.25, 2.15, 3.4, 4.0, 5.0, 6.0]
    assert pacer.statistics().missed == 0
    assert pacer.statistics().lateness == pytest.approx(0.4)


async def test_ticks_missed_by_a_late_loop_are_left_out_and_counted(
    nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """A loop that stood still for several ticks gets one flush, and the grid goes on where it was."""
    pacer = Pacer(1)
    times: list[float] = []

    def flush() -> None:
        times.append(trio.current_time())
        pacer.touch(flush)

    nursery.start_soon(pacer.run)
    pacer.touch(flush)
    await wait_all_tasks_blocked()
    for jump in (4.5, 0.5, 1.0):
        mock_clock.jump(jump)
        await wait_all_tasks_blocked()
    assert times == [0.0, 4.5, 5.0, 6.0]
    assert pacer.statistics().missed == 3


async def test_a_round_longer_than_a_tick_is_late_and_not_idle(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    """Output that came during a long round goes out at once, and the grid stays where it was."""
    pacer = Pacer(1)
    times: list[float] = []

    def flush() -> None:
        times.append(trio.current_time())
        if len(times) == 1:
            mock_clock.jump(1.5)
        pacer.touch(flush)

    nursery.start_soon(pacer.run)
    pacer.touch(flush)
    await wait_all_tasks_blocked()
    assert times == [0.0, 1.5]
    mock_clock.jump(0.5)
    await wait_all_tasks_blocked()
    assert times == [0.0, 1.5, 2.0]


async def test_ticks_are_counted_from_the_flush_that_ended_idleness(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Two flushes are never less than a tick apart, whenever the first of them came."""
    pacer, output = Pacer(1), Output()
    nursery.start_soon(pacer.run)
    for at in (0.0, 5.25, 5.5):
        await trio.sleep_until(at)
        pacer.touch(output.flush)
    await trio.sleep(5)
    assert output.times == [0.0, 5.25, 6.25]


async def test_a_flush_that_touches_itself_waits_for_the_next_tick(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """What could not be written in one go is written tick by tick, without a busy loop."""
    pacer = Pacer(0.5)
    left, times = 3, list[float]()

    def flush() -> None:
        nonlocal left
        left -= 1
        times.append(trio.current_time())
        if left:
            pacer.touch(flush)

    nursery.start_soon(pacer.run)
    pacer.touch(flush)
    await trio.sleep(10)
    assert times == [0.0, 0.5, 1.0]


async def test_a_bound_method_is_one_flush(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Memory is bounded by the number of distinct functions, not by the number of touches."""
    pacer, one, two = Pacer(1), Output(), Output()
    for _ in range(100):
        pacer.touch(one.flush)
        pacer.touch(two.flush)
    assert pacer.statistics().touched == 2
    nursery.start_soon(pacer.run)
    await trio.sleep(5)
    assert one.times == two.times == [0.0]


async def test_what_was_touched_before_run_is_flushed_then(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Nothing runs until the owner starts it, and nothing is lost until then."""
    pacer, output = Pacer(1), Output()
    pacer.touch(output.flush)
    await trio.sleep(3)
    assert output.times == []
    nursery.start_soon(pacer.run)
    await trio.sleep(3)
    assert output.times == [3.0]


async def test_a_discarded_touch_is_not_flushed(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A peer that is gone is not written to, not even when it goes during the round that would write to it."""
    pacer, output, other = Pacer(1), Output(), Output()
    nursery.start_soon(pacer.run)

    def closes_output() -> None:
        pacer.discard(output.flush)

    pacer.touch(closes_output)
    pacer.touch(output.flush)
    pacer.touch(other.flush)
    await wait_all_tasks_blocked()
    pacer.touch(output.flush)
    pacer.discard(output.flush)
    pacer.discard(output.flush)
    await trio.sleep(5)
    assert (output.times, other.times) == ([], [0.0])


async def test_a_long_round_lets_other_tasks_run(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Between two slices there is a checkpoint; what is touched there is for the next tick."""
    pacer = Pacer(1)
    log: list[str] = []
    nursery.start_soon(pacer.run)
    for n in range(3 * SLICE):
        pacer.touch(partial(log.append, str(n)))

    async def other() -> None:
        while len(log) < 3 * SLICE:
            if log:
                log.append("other")
                pacer.touch(late)
            await trio.lowlevel.checkpoint()

    def late() -> None:
        log.append("late")

    nursery.start_soon(other)
    await trio.sleep(0.5)
    assert "other" in log
    assert "late" not in log
    assert [entry for entry in log if entry != "other"] == [str(n) for n in range(3 * SLICE)]
    await trio.sleep(1)
    assert log[-1] == "late"


async def test_an_exception_of_a_flush_reaches_the_owner_and_loses_nothing() -> None:
    """run ends with it; the functions behind it stay touched, those before it do not."""
    pacer, before, behind = Pacer(1), Output(), Output()

    def fails() -> None:
        raise OSError("no route")

    for flush in (before.flush, fails, behind.flush):
        pacer.touch(flush)
    with pytest.raises(OSError, match="no route"):
        await pacer.run()
    assert (len(before.times), len(behind.times), pacer.statistics().touched) == (1, 0, 1)
    pacer.flush_all()
    assert (len(before.times), len(behind.times), pacer.statistics().touched) == (1, 1, 0)


async def test_flush_all_writes_now_and_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """The last output before an end does not wait for the tick, and the tick does not write it again."""
    pacer, output = Pacer(1), Output()
    nursery.start_soon(pacer.run)
    pacer.touch(output.flush)
    await trio.sleep(0.25)
    pacer.touch(output.flush)
    pacer.flush_all()
    await trio.sleep(5)
    assert output.times == [0.0, 0.25]


async def test_flush_all_within_a_round_takes_over_the_rest_of_it(nursery: trio.Nursery) -> None:
    """A flush that flushes everything has everything flushed when it returns, and nothing twice."""
    pacer, log = Pacer(1), list[str]()

    def all_now() -> None:
        pacer.flush_all()
        log.append("all")

    for flush in (partial(log.append, "a"), all_now, partial(log.append, "b")):
        pacer.touch(flush)
    nursery.start_soon(pacer.run)
    await wait_all_tasks_blocked()
    assert log == ["a", "b", "all"]


async def test_a_run_after_a_failed_one_flushes_the_rest(nursery: trio.Nursery) -> None:
    """The owner may mend what failed and go on."""
    pacer, behind = Pacer(1), Output()

    def fails() -> None:
        raise OSError

    pacer.touch(fails)
    pacer.touch(behind.flush)
    with pytest.raises(OSError):
        await pacer.run()
    nursery.start_soon(pacer.run)
    await wait_all_tasks_blocked()
    assert len(behind.times) == 1


async def test_a_cancelled_run_leaves_what_is_touched_and_may_be_started_again(autojump_clock: MockClock) -> None:
    """A touch while nothing runs is kept; two runs at a time are refused."""
    pacer, output = Pacer(1), Output()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="runs already"):
            await pacer.run()
        nursery.cancel_scope.cancel()
    pacer.touch(output.flush)
    await trio.sleep(2)
    assert output.times == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pacer.run)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert output.times == [2.0]


@pytest.mark.parametrize("tick", [0, -1, math.inf, math.nan])
def test_a_tick_is_a_time(tick: float) -> None:
    """Zero, negative and endless ticks are refused by name and value."""
    with pytest.raises(ValueError, match=f"tick must .* not {tick}"):
        Pacer(tick)


async def test_what_cannot_be_flushed_is_refused() -> None:
    """What is no function, when it is touched; an async one, when it is first called, and named."""

    async def flush() -> None: ...

    pacer = Pacer(1.0)
    with pytest.raises(TypeError, match="flush must be a synchronous function, not 3"):
        pacer.touch(3)  # type: ignore[arg-type]
    assert pacer.statistics().touched == 0
    pacer.touch(flush)
    with pytest.raises(TypeError, match=r"flush must be a synchronous function, not <function .*flush at"):
        pacer.flush_all()


@pytest.mark.parametrize("tick", ["a", None, True])
def test_a_tick_of_another_kind_is_refused(tick: Any) -> None:
    """By name and value."""
    with pytest.raises(TypeError, match=f"tick must be a number, not {tick!r}"):
        Pacer(tick)
