"""Scenario 13, late reply: a call times out, the worker answers late, and no later caller gets that answer.

The control matches answers to callers by their order, as pools of workers behind a pipe do: after one timeout,
everybody gets the answer of the caller before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import trio
import trio.testing
from remote_pairs import PAIRS, Pair, serving

from stagetrio.remote import Procedures

CALLS = 10_000
CALLERS = 20
TIMEOUTS = 5


def stubborn() -> Procedures:
    """A procedure that answers when it is through, whoever has stopped waiting."""
    procedures = Procedures()

    @procedures.procedure
    async def double(x: int, seconds: float) -> int:
        if seconds:
            with trio.CancelScope(shield=True):
                await trio.sleep(seconds)
        return 2 * x

    return procedures


@pytest.mark.parametrize("make_pair", PAIRS)
async def test_late_replies_reach_nobody(
    make_pair: Callable[[], Pair], autojump_clock: trio.testing.MockClock
) -> None:
    """Calls time out, their answers come in the middle of 10,000 others, and each of those gets its own."""
    procedures = stubborn()
    matched = 0

    async def impatient(n: int) -> None:
        with trio.move_on_after(1) as scope:
            await remote.call("double", -1 - n, 2.0 + n)
        assert scope.cancelled_caught

    async def caller(first: int) -> None:
        nonlocal matched
        for x in range(first, CALLS, CALLERS):
            # Spread over 10 virtual seconds, so that the late answers come in between.
            answer = await remote.call("double", x, 0.02 if x % 2 else 0.0)
            assert answer == 2 * x
            matched += 1

    async with serving(procedures, make_pair()) as remote:
        async with trio.open_nursery() as nursery:
            for n in range(TIMEOUTS):
                nursery.start_soon(impatient, n)
        assert remote.statistics().in_flight == TIMEOUTS
        assert remote.statistics().late == 0
        async with trio.open_nursery() as nursery:
            for first in range(CALLERS):
                nursery.start_soon(caller, first)
        assert matched == CALLS
        assert remote.statistics().late == TIMEOUTS
        assert remote.statistics().in_flight == 0


class MatchedByOrder:
    """The naive way: the next answer is for whoever asked first."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._waiting: deque[tuple[trio.Event, list[int]]] = deque()

    async def run(self) -> None:
        rest = b""
        async for data in self._stream:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if self._waiting:
                    event, box = self._waiting.popleft()
                    box.append(int(line))
                    event.set()

    async def call(self, x: int) -> int:
        entry: tuple[trio.Event, list[int]] = (trio.Event(), [])
        self._waiting.append(entry)
        try:
            await self._stream.send_all(b"%d\n" % x)
            await entry[0].wait()
        except trio.Cancelled:
            self._waiting.remove(entry)  # nobody waits for it any longer
            raise
        return entry[1][0]


async def test_control_order_gives_everybody_somebody_elses_answer(autojump_clock: trio.testing.MockClock) -> None:
    """Matched by order, one timeout shifts every later answer to the wrong caller."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def worker() -> None:
        rest = b""
        async for data in ours:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                await trio.sleep(2 if int(line) < 0 else 0)
                await ours.send_all(b"%d\n" % (2 * int(line)))

    async with trio.open_nursery() as nursery:
        naive = MatchedByOrder(theirs)
        nursery.start_soon(worker)
        nursery.start_soon(naive.run)
        assert await naive.call(21) == 42
        with trio.move_on_after(1):
            await naive.call(-1)
        right = 0
        for x in range(1, 101):
            right += await naive.call(x) == 2 * x
        assert right == 0
        nursery.cancel_scope.cancel()
