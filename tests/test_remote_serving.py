"""How a worker serves: the leader runs what does not block, and what blocks holds up nobody."""

from __future__ import annotations

import contextvars
import itertools
import math
from collections.abc import AsyncIterator, Callable

import attrs
import msgspec
import pytest
import trio
import trio.testing
from remote_pairs import PAIRS, Pair, serving

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed
from stagetrio.remote import Procedures, serve_remote_stream

FRAMING = LengthPrefixed(2**20)


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    make: Callable[[], Pair] = request.param
    return make()


def frames(*messages: tuple[object, ...]) -> bytes:
    return b"".join(FRAMING.encode(wire.encode(message)) for message in messages)


@attrs.define
class RawCaller:
    """Says what it is told, in one segment, and reads answers."""

    stream: trio.abc.Stream
    heard: list[list[object]] = attrs.Factory(list)

    async def begin(self) -> None:
        await self.stream.send_all(frames((0, wire.VERSION, None, 2**20)))
        await self.stream.receive_some()

    async def ask(self, *messages: tuple[object, ...], answers: int) -> list[list[object]]:
        """Send all at once, and return so many answers."""
        await self.stream.send_all(frames(*messages))
        decoder, heard = FRAMING.decoder(), list[list[object]]()
        while len(heard) < answers:
            data = bytes(await self.stream.receive_some())
            heard += [msgspec.msgpack.decode(payload) for payload in decoder.receive_data(data)]
        return heard


class Naps:
    """Procedures that block, and what can be seen of them."""

    def __init__(self) -> None:
        self.procedures = Procedures()
        for function in (self.nap, self.hold, self.now, self.sometimes):
            self.procedures.add(function)
        self.begun: list[int] = []
        self.gate = trio.Event()
        self.tasks: list[trio.lowlevel.Task] = []

    async def nap(self, x: int) -> int:
        self.begun.append(x)
        await trio.lowlevel.checkpoint()
        return x

    async def hold(self, x: int) -> int:
        self.begun.append(x)
        await self.gate.wait()
        return x

    async def now(self, x: int) -> int:
        self.begun.append(x)
        self.tasks.append(trio.lowlevel.current_task())
        return x

    async def sometimes(self, x: int, block: bool) -> int:
        if block:
            await trio.lowlevel.checkpoint()
        return x


async def test_what_does_not_block_runs_in_one_task_in_order(pair: Pair) -> None:
    """A thousand requests in one segment are run one after the other by the leader, and answered in order."""
    naps = Naps()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, naps.procedures, pair[0])
        caller = RawCaller(pair[1])
        await caller.begin()
        answers = await caller.ask(*((1, id, "now", None, [id]) for id in range(1, 1001)), answers=1000)
        await pair[1].aclose()
    assert answers == [[1, id, id] for id in range(1, 1001)]
    assert naps.begun == list(range(1, 1001))
    assert len(set(naps.tasks)) == 1


async def test_a_request_that_blocks_does_not_hold_up_those_behind_it(pair: Pair) -> None:
    """Another task takes the lead: what comes behind, in the same segment or a later one, is served."""
    naps = Naps()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, naps.procedures, pair[0])
        caller = RawCaller(pair[1])
        await caller.begin()
        assert await caller.ask((1, 1, "hold", None, [1]), (1, 2, "now", None, [2]), answers=1) == [[1, 2, 2]]
        assert await caller.ask((1, 3, "now", None, [3]), answers=1) == [[1, 3, 3]]
        naps.gate.set()
        assert await caller.ask(answers=1) == [[1, 1, 1]]
        await pair[1].aclose()


async def test_requests_known_to_block_begin_together() -> None:
    """Once it has been seen that a procedure blocks, a whole segment of its calls begins within a few passes."""
    naps = Naps()
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, naps.procedures, ours)
        caller = RawCaller(theirs)
        await caller.begin()
        await caller.ask(*((1, id, "nap", None, [id]) for id in range(1, 11)), answers=10)
        naps.begun.clear()
        nursery.start_soon(lambda: caller.ask(*((1, id, "nap", None, [id]) for id in range(11, 75)), answers=64))
        for _ in range(12):
            await trio.lowlevel.checkpoint()
        assert sorted(naps.begun) == list(range(11, 75))
        await trio.testing.wait_all_tasks_blocked()
        await theirs.aclose()


async def test_a_request_cancelled_before_it_begins_does_not_begin() -> None:
    """A cancel that comes in one segment with its call stops it, if it has been handed out and not run yet."""
    naps = Naps()
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, naps.procedures, ours)
        caller = RawCaller(theirs)
        await caller.begin()
        await caller.ask(*((1, id, "nap", None, [id]) for id in range(1, 11)), answers=10)
        naps.begun.clear()
        calls = [(1, id, "nap", None, [id]) for id in range(11, 21)]
        answers = await caller.ask(*calls, (5, 13), (5, 17), (1, 21, "now", None, [21]), answers=11)
        await theirs.aclose()
    assert sorted(naps.begun) == [id for id in range(11, 22) if id not in (13, 17)]
    assert sorted(answer for answer in answers if answer[0] == 3) == [
        [3, 13, "Cancelled", "by the caller", ""],
        [3, 17, "Cancelled", "by the caller", ""],
    ]
    assert naps.procedures.statistics().cancelled == 2
    assert naps.procedures.statistics().running == 0


async def test_a_guess_about_blocking_only_costs_time(pair: Pair) -> None:
    """Procedures that block now and then answer right, however often they do."""
    naps = Naps()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, naps.procedures, pair[0])
        caller = RawCaller(pair[1])
        await caller.begin()
        id = 0
        for every in (1, 2, 3, 5, 10, 100, 1):
            calls = [(1, id + n, "sometimes", None, [n, n % every == 0]) for n in range(1, 101)]
            answers = await caller.ask(*calls, answers=100)
            assert sorted(answers) == [[1, id + n, n] for n in range(1, 101)]
            id += 100
        await pair[1].aclose()
    assert naps.procedures.statistics().returned == 700


async def test_handed_out_requests_keep_their_deadlines_and_contexts(
    pair: Pair, autojump_clock: trio.testing.MockClock
) -> None:
    """What holds for a call that the leader runs holds for one that another worker runs."""
    procedures = Procedures()
    seen: contextvars.ContextVar[int] = contextvars.ContextVar("seen", default=0)

    @procedures.procedure
    async def look(seconds: float) -> tuple[int, float]:
        before = seen.get()
        seen.set(1)
        deadline = trio.current_effective_deadline() - trio.current_time()
        await trio.sleep(seconds)
        return before, deadline

    results: list[tuple[int, float]] = []

    async def call(deadline: float, seconds: float) -> None:
        with trio.move_on_after(deadline) as scope:
            results.append(await remote.call(look, seconds))
        assert scope.cancelled_caught == (seconds > deadline)

    async with serving(procedures, pair) as remote:
        for _ in range(3):
            results.clear()
            async with trio.open_nursery() as nursery:
                for n in range(20):
                    nursery.start_soon(call, 10.0 if n % 2 else math.inf, 20.0 if n % 4 == 1 else 1.0)
            assert sorted(results) == [(0, 10.0)] * 5 + [(0, math.inf)] * 10
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert procedures.statistics().cancelled == 15
        assert procedures.statistics().running == 0


async def test_a_burst_of_requests_that_block_leaves_few_tasks_behind(pair: Pair) -> None:
    """Workers are kept for the next burst, but not all of them."""
    naps = Naps()
    async with serving(naps.procedures, pair) as remote, trio.open_nursery() as nursery:
        for x in range(500):
            nursery.start_soon(remote.call, "hold", x)
        while len(naps.begun) < 500:
            await trio.lowlevel.checkpoint()
        busy = trio.lowlevel.current_statistics().tasks_living
        naps.gate.set()
        await trio.testing.wait_all_tasks_blocked(0.005)
        assert busy - trio.lowlevel.current_statistics().tasks_living >= 500 + 400
        assert await remote.call("now", 5) == 5


async def test_a_leader_gives_way_to_other_tasks(autojump_clock: trio.testing.MockClock) -> None:
    """A segment full of requests does not hold the loop: other tasks run in between."""
    naps = Naps()
    ours, theirs = trio.testing.memory_stream_pair()
    seen: list[int] = []

    async def bystander() -> None:
        while len(naps.begun) < 1000:
            seen.append(len(naps.begun))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, naps.procedures, ours)
        caller = RawCaller(theirs)
        await caller.begin()
        nursery.start_soon(bystander)
        await caller.ask(*((1, id, "now", None, [id]) for id in range(1, 1001)), answers=1000)
        await theirs.aclose()
    # Two slices of 64, where the leader comes last in one scheduler pass and first in the next.
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 128


async def test_a_stream_among_calls_of_its_connection(pair: Pair) -> None:
    """Values, answers and credits share the connection without mixing."""
    procedures = Procedures()

    @procedures.procedure
    async def count(first: int, n: int) -> AsyncIterator[int]:
        for x in range(first, first + n):
            yield x

    @procedures.procedure
    async def echo(x: int) -> int:
        return x

    async def consume(first: int) -> None:
        async with remote.with_options(window=3).stream(count, first, 50) as values:
            assert [value async for value in values] == list(range(first, first + 50))

    async def call(first: int) -> None:
        for x in range(first, first + 50):
            assert await remote.call(echo, x) == x

    async with serving(procedures, pair) as remote, trio.open_nursery() as nursery:
        for n in range(10):
            nursery.start_soon(consume, 100 * n)
            nursery.start_soon(call, 100 * n)
