"""Calls, streams and posts arrive, and come back as what they were: over memory streams and over sockets."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from remote_pairs import PAIRS, Pair, serving

from stagetrio.framing import ProtocolError
from stagetrio.limiter import Overloaded
from stagetrio.remote import Procedures, RemoteError, open_remote_stream, serve_remote, serve_remote_stream


@attrs.frozen
class Point:
    x: int
    y: int


@attrs.frozen
class Needy:
    """Beyond msgspec: a private name and a converter."""

    _secret: str
    number: int = attrs.field(converter=int)


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    make: Callable[[], Pair] = request.param
    return make()


async def test_a_call_returns_what_the_procedure_returned(pair: Pair) -> None:
    """Arguments and results arrive as the attrs classes they were, positional and by keyword."""
    procedures = Procedures()

    @procedures.procedure
    async def add(a: Point, b: Point, *, scale: int = 1) -> Point:
        return Point((a.x + b.x) * scale, (a.y + b.y) * scale)

    async with serving(procedures, pair) as remote:
        assert await remote.call(add, Point(1, 2), Point(3, 4)) == Point(4, 6)
        assert await remote.call(add, Point(1, 2), b=Point(3, 4), scale=2) == Point(8, 12)


async def test_a_name_is_enough_to_call(pair: Pair) -> None:
    """Called by name, arguments are read by the procedure's types and the result comes as plain types."""
    procedures = Procedures()

    @procedures.procedure(name="mirror")
    async def reflect(point: Point) -> Point:
        assert isinstance(point, Point)
        return Point(point.y, point.x)

    async with serving(procedures, pair) as remote:
        assert await remote.call("mirror", Point(1, 2)) == {"x": 2, "y": 1}
        assert await remote.call("mirror", point={"x": 5, "y": 6}) == {"x": 6, "y": 5}
        assert await remote.call(reflect, Point(1, 2)) == Point(2, 1)


async def test_a_stub_with_the_same_name_and_signature_is_enough_to_call(pair: Pair) -> None:
    """The calling side needs no access to the code it calls."""
    procedures = Procedures()

    async def double(x: int) -> Point:
        return Point(x, x)

    procedures.add(double)

    def calling_side() -> Callable[[int], Awaitable[Point]]:
        async def double(x: int) -> Point:
            raise AssertionError("the stub itself never runs")

        return double

    async with serving(procedures, pair) as remote:
        assert await remote.call(calling_side(), 4) == Point(4, 4)


async def test_types_beyond_msgspec_cross_through_cattrs(pair: Pair) -> None:
    """Private names and converters arrive unchanged, as arguments, results, extras and values."""
    procedures = Procedures()

    @procedures.procedure
    async def same(needy: Needy, *rest: Needy, **named: Needy) -> list[Needy]:
        return [needy, *rest, *named.values()]

    @procedures.procedure
    async def each(needy: Needy) -> AsyncIterator[Needy]:
        yield needy

    one, two, three = Needy("a", "1"), Needy("b", "2"), Needy("c", "3")
    async with serving(procedures, pair) as remote:
        assert await remote.call(same, one, two, other=three) == [one, two, three]
        async with remote.stream(each, one) as values:
            assert [value async for value in values] == [one]


async def test_blocking_calls_run_side_by_side(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    """A procedure that waits holds up nobody: 100 naps of a second take a second."""
    procedures = Procedures()

    @procedures.procedure
    async def nap(x: int) -> int:
        await trio.sleep(1)
        return x

    results: list[int] = []

    async def one(x: int) -> None:
        results.append(await remote.call(nap, x))

    async with serving(procedures, pair) as remote:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for x in range(100):
                nursery.start_soon(one, x)
        assert trio.current_time() - start == 1
    assert sorted(results) == list(range(100))


async def test_an_exception_comes_back_with_type_message_and_traceback(pair: Pair) -> None:
    """A procedure that raises, at once or after it has blocked, fails its caller and nobody else."""
    procedures = Procedures()

    @procedures.procedure
    async def fail(late: bool) -> None:
        if late:
            await trio.lowlevel.checkpoint()
        raise ProtocolError("not today")

    async with serving(procedures, pair) as remote:
        for late in (False, True):
            with pytest.raises(RemoteError) as caught:
                await remote.call(fail, late)
            assert caught.value.type_name == "stagetrio.framing.ProtocolError"
            assert caught.value.message == "not today"
            assert str(caught.value) == "stagetrio.framing.ProtocolError: not today"
            assert 'raise ProtocolError("not today")' in caught.value.remote_traceback
            assert "remote_serving" not in caught.value.remote_traceback
            assert "not today" in caught.value.__notes__[0]
    assert procedures.statistics().raised == 2


async def test_a_refusal_in_a_procedure_arrives_as_a_refusal(pair: Pair) -> None:
    """Overloaded crosses with its reason and the time to come back."""
    procedures = Procedures()

    @procedures.procedure
    async def refuse() -> None:
        raise Overloaded("tickets", 1.5)

    async with serving(procedures, pair) as remote:
        with pytest.raises(Overloaded) as caught:
            await remote.call(refuse)
    assert (caught.value.reason, caught.value.retry_after) == ("tickets", 1.5)
    assert procedures.statistics().refused == 1


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "reason"),
    [
        ("nothing", (), {}, "LookupError: there is no procedure 'nothing'"),
        ("add", (), {}, r"TypeError: add\(\): missing a required argument: 'a'"),
        ("add", (1, 2, 3), {}, r"TypeError: add\(\): too many positional arguments"),
        ("add", (1,), {"c": 2}, r"TypeError: add\(\): got an unexpected keyword argument 'c'"),
        ("add", ("1",), {}, r"TypeError: add\(\): argument 'a': Expected `int`, got `str`"),
        ("add", (1,), {"b": None}, r"TypeError: add\(\): argument 'b': Expected `int`, got `None`"),
        ("each", (1,), {}, "LookupError: procedure 'each' yields: stream it"),
    ],
)
async def test_a_call_that_fits_nothing_is_refused_with_the_reason(
    name: str, args: tuple[object, ...], kwargs: dict[str, object], reason: str, pair: Pair
) -> None:
    """Unknown procedures and wrong arguments fail that call only, and do not run."""
    procedures = Procedures()
    ran = []

    @procedures.procedure
    async def add(a: int, b: int = 0) -> int:
        ran.append((a, b))
        return a + b

    @procedures.procedure
    async def each(n: int) -> AsyncIterator[int]:
        yield n

    async with serving(procedures, pair) as remote:
        with pytest.raises(RemoteError, match=reason):
            await remote.call(name, *args, **kwargs)
        assert not ran
        assert await remote.call(add, 1, 2) == 3
    assert procedures.statistics().rejected == 1


async def test_each_call_has_a_context_of_its_own(pair: Pair) -> None:
    """What a procedure sets in a context variable is not seen by the next one, whether they block or not."""
    procedures = Procedures()
    seen: contextvars.ContextVar[int] = contextvars.ContextVar("seen", default=0)

    @procedures.procedure
    async def count(block: bool) -> int:
        seen.set(seen.get() + 1)
        if block:
            await trio.lowlevel.checkpoint()
        seen.set(seen.get() + 1)
        return seen.get()

    async with serving(procedures, pair) as remote:
        for block in (False, True, False, True, True):
            assert await remote.call(count, block) == 2


async def test_what_is_not_to_be_called_or_served_is_named() -> None:
    """Where it is handed in; and the remote goes on."""
    procedures = Procedures()

    @procedures.procedure
    async def add(one: int, two: int) -> int:
        return one + two

    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, procedures, theirs)
        async with open_remote_stream(ours) as remote:
            wrong: Any = 3
            with pytest.raises(TypeError, match="procedure must be a function or its name, not 3"):
                await remote.call(wrong)
            with pytest.raises(TypeError, match="procedure must be a function or its name, not 3"):
                await remote.post(wrong)
            assert await remote.call(add, 1, 2) == 3
    with pytest.raises(TypeError, match=r"stream must be a trio\.abc\.Stream, not 3"):
        async with open_remote_stream(wrong):
            raise AssertionError("unreachable")
    with pytest.raises(TypeError, match=r"stream must be a trio\.abc\.Stream, not 3"):
        await serve_remote_stream(procedures, wrong)
    with pytest.raises(TypeError, match="procedures must be Procedures, not 3"):
        await serve_remote(wrong, [])
    with pytest.raises(ValueError, match=r"listeners must name at least one place to listen, not \[\]"):
        await serve_remote(procedures, [])
    with pytest.raises(TypeError, match=r"listeners must hold listeners, .* not 't'"):
        await serve_remote(procedures, "tcp://127.0.0.1:0")  # type: ignore[arg-type]
