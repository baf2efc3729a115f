"""Remote streams give every value once, in order, and never run ahead of who reads them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest
import trio
import trio.testing
from remote_pairs import PAIRS, Pair, serving

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed
from stagetrio.remote import Procedures, RemoteError, WorkerLost, open_remote_stream


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    make: Callable[[], Pair] = request.param
    return make()


class Source:
    """A procedure that yields, and what can be seen of it from outside."""

    def __init__(self) -> None:
        self.procedures = Procedures()
        self.procedures.add(self.numbers, "numbers")
        self.procedures.add(self.hesitate, "hesitate")
        self.yielded = 0
        self.closed = trio.Event()

    async def numbers(self, count: int, fail: bool = False) -> AsyncIterator[int]:
        try:
            for number in range(count):
                self.yielded += 1
                yield number
            if fail:
                raise ValueError("out of numbers")
        finally:
            self.closed.set()

    async def hesitate(self) -> AsyncIterator[int]:
        yield 1
        await trio.sleep_forever()


@pytest.mark.parametrize("window", [1, 2, 3, 64])
@pytest.mark.parametrize("count", [0, 1, 64, 1000])
async def test_every_value_arrives_once_and_in_order(pair: Pair, window: int, count: int) -> None:
    """Whatever the window and the number of values."""
    source = Source()
    async with serving(source.procedures, pair) as remote:
        async with remote.with_options(window=window).stream("numbers", count) as values:
            assert [value async for value in values] == list(range(count))
            with pytest.raises(StopAsyncIteration):
                await anext(values)
    assert source.closed.is_set()


async def test_an_error_comes_after_the_values_before_it(pair: Pair) -> None:
    """The consumer sees what was yielded, then the exception; asked again, the end."""
    source = Source()
    async with serving(source.procedures, pair) as remote:
        async with remote.stream("numbers", 3, fail=True) as values:
            await trio.testing.wait_all_tasks_blocked()
            assert [await anext(values) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(RemoteError, match="ValueError: out of numbers"):
                await anext(values)
            with pytest.raises(StopAsyncIteration):
                await anext(values)


async def test_a_slow_consumer_holds_up_the_generator(pair: Pair) -> None:
    """No more than a window of values is under way; the connection is free for others meanwhile."""
    source = Source()

    @source.procedures.procedure
    async def echo(x: int) -> int:
        return x

    async with serving(source.procedures, pair) as remote:
        async with remote.with_options(window=8).stream("numbers", 1000) as values:
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert source.yielded <= 9
            assert await remote.call(echo, 5) == 5
            for expected in range(4):
                assert await anext(values) == expected
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert source.yielded >= 12  # half a window ahead, or the worker would run dry
            for expected in range(4, 20):
                assert await anext(values) == expected
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert 20 < source.yielded <= 29


async def test_leaving_the_block_ends_the_generator(pair: Pair) -> None:
    """Its finally runs over there, and its place is free again."""
    source = Source()
    async with serving(source.procedures, pair, max_in_flight=1) as remote:
        for _ in range(5):
            source.closed = trio.Event()
            async with remote.with_options(window=4).stream("numbers", 1000) as values:
                assert await anext(values) == 0
            await source.closed.wait()
        async with remote.stream("numbers", 3) as values:
            assert [value async for value in values] == [0, 1, 2]
    assert source.procedures.statistics().cancelled == 5
    assert source.procedures.statistics().returned == 1


async def test_several_tasks_share_a_stream(pair: Pair) -> None:
    """Each value goes to exactly one of them, and all of them see the end."""
    source = Source()
    got: list[int] = []

    async def consume(values: AsyncIterator[int]) -> None:
        got.extend([value async for value in values])

    async with serving(source.procedures, pair) as remote:
        async with remote.with_options(window=5).stream("numbers", 200) as values, trio.open_nursery() as nursery:
            for _ in range(7):
                nursery.start_soon(consume, values)
    assert sorted(got) == list(range(200))


async def test_whoever_iterates_after_the_block_is_told(pair: Pair) -> None:
    """Those that wait for a value when it is left, and those that come later; nobody waits for ever."""
    source = Source()
    told = 0

    async def consume(values: AsyncIterator[int]) -> None:
        nonlocal told
        with pytest.raises(trio.ClosedResourceError):
            _ = [value async for value in values]
        told += 1

    async with serving(source.procedures, pair) as remote, trio.open_nursery() as nursery:
        async with remote.stream("hesitate") as values:
            for _ in range(3):
                nursery.start_soon(consume, values)
            await trio.testing.wait_all_tasks_blocked(0.01)
        await consume(values)
    assert told == 4


async def test_a_cancelled_consumer_takes_no_value_with_it(pair: Pair) -> None:
    """A value is taken or it stays for the next."""
    source = Source()
    async with serving(source.procedures, pair) as remote:
        async with remote.stream("numbers", 50) as values:
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(5):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await anext(values)
                assert scope.cancelled_caught
            assert [value async for value in values] == list(range(50))


async def test_safe_channels_and_typed_generators_stream_too(pair: Pair) -> None:
    """A generator under ``trio.as_safe_channel`` is streamed like a bare one."""
    procedures = Procedures()

    @procedures.procedure
    @trio.as_safe_channel
    async def safe(n: int) -> AsyncGenerator[int, None]:
        for number in range(n):
            yield number

    @procedures.procedure
    async def bare(n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    async with serving(procedures, pair) as remote:
        async with remote.stream(safe, 100) as values:
            assert [value async for value in values] == list(range(100))
        async with remote.stream(bare, 100) as values:
            assert [value async for value in values] == list(range(100))


async def test_a_function_that_returns_cannot_be_streamed(pair: Pair) -> None:
    """Who streams what should be called is told so, and so is who yields what cannot be sent."""
    procedures = Procedures()

    @procedures.procedure
    async def once() -> int:
        return 1

    @procedures.procedure
    async def odd() -> AsyncIterator[object]:
        yield 1
        yield object()

    async with serving(procedures, pair) as remote:
        async with remote.stream("once") as values:
            with pytest.raises(RemoteError, match="procedure 'once' returns: call it"):
                await anext(values)
        async with remote.stream(odd) as odds:
            assert await anext(odds) == 1
            with pytest.raises(RemoteError, match=r"TypeError: .*object"):
                await anext(odds)


async def test_the_deadline_of_the_block_ends_the_generator(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    """A stream opened under a deadline is not run past it, even by a consumer that never comes back."""
    procedures = Procedures()
    ended_at = 0.0

    @procedures.procedure
    async def ticks() -> AsyncIterator[float]:
        nonlocal ended_at
        try:
            while True:
                yield trio.current_time()
                await trio.sleep(1)
        finally:
            ended_at = trio.current_time()

    async with serving(procedures, pair) as remote:
        start = trio.current_time()
        with trio.move_on_after(3.5) as scope:
            async with remote.stream(ticks) as values:
                seen = [value - start async for value in values]
                raise AssertionError(seen)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert ended_at - start == 3.5


async def fake_worker(stream: trio.abc.Stream, *messages: tuple[object, ...]) -> None:
    """Welcome a caller, wait for its first request, say ``messages``, and leave."""
    framing = LengthPrefixed(2**20)
    await stream.receive_some()
    await stream.send_all(framing.encode(wire.encode((0, wire.VERSION, 10, 2**20))))
    await stream.receive_some()
    await stream.send_all(b"".join(framing.encode(wire.encode(message)) for message in messages))
    await stream.aclose()


async def test_a_lost_connection_ends_a_stream_after_what_has_come(pair: Pair) -> None:
    """What arrived is given out, then the loss."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fake_worker, pair[0], (2, 1, 5), (2, 1, 6))
        async with open_remote_stream(pair[1]) as remote, remote.stream("numbers") as values:
            assert [await anext(values), await anext(values)] == [5, 6]
            with pytest.raises(WorkerLost, match="the other side closed the connection") as caught:
                await anext(values)
            assert caught.value.may_have_run


async def test_a_worker_that_ignores_credit_is_cut_off(pair: Pair) -> None:
    """More values than asked for end the connection; they are not collected."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fake_worker, pair[0], (2, 1, 5), (2, 1, 6), (2, 1, 7))
        async with open_remote_stream(pair[1]) as remote:
            async with remote.with_options(window=2).stream("numbers") as values:
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert [await anext(values), await anext(values)] == [5, 6]
                with pytest.raises(WorkerLost, match="broke the rules: more values than credit for id 1"):
                    await anext(values)
