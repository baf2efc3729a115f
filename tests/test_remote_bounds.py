"""Everything about a remote connection is bounded: who meets a bound waits, or is refused with a reason."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from remote_pairs import PAIRS, Pair, serving

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed
from stagetrio.limiter import Overloaded
from stagetrio.remote import (
    Procedures,
    Remote,
    RemoteError,
    WorkerLost,
    open_remote,
    open_remote_stream,
    serve_remote,
    serve_remote_stream,
)

FRAMING = LengthPrefixed(2**20)


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    make: Callable[[], Pair] = request.param
    return make()


class Gate:
    """Procedures that wait until they are let go, and count how many are in there."""

    def __init__(self) -> None:
        self.procedures = Procedures()
        for function in (self.enter, self.echo, self.fail):
            self.procedures.add(function)
        self.opened = trio.Event()
        self.inside = 0
        self.most_inside = 0

    async def enter(self, x: int) -> int:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            await self.opened.wait()
        finally:
            self.inside -= 1
        return x

    async def echo(self, x: bytes) -> bytes:
        return x

    async def fail(self) -> None:
        raise ValueError("no")


async def settled() -> None:
    """Let everything happen that can happen without time passing, kernel included."""
    await trio.testing.wait_all_tasks_blocked(0.005)


async def test_callers_wait_for_a_place_in_their_turn(pair: Pair) -> None:
    """No more than max_in_flight are ever sent; the others follow, first come, first served."""
    gate = Gate()
    order: list[int] = []

    async def one(x: int, remote: Remote) -> None:
        assert await remote.call("enter", x) == x
        order.append(x)

    async with serving(gate.procedures, pair, max_in_flight=3) as remote:
        async with trio.open_nursery() as nursery:
            for x in range(9):
                nursery.start_soon(one, x, remote)
                await settled()
            assert gate.inside == 3
            assert remote.statistics().max_in_flight == remote.statistics().in_flight == 3
            assert remote.statistics().waiting == 6
            gate.opened.set()
    assert gate.most_inside == 3
    assert sorted(order[:3]) == [0, 1, 2]
    assert gate.procedures.statistics().refused == 0


async def test_posts_take_places_too(pair: Pair) -> None:
    """A flood of posts is held back like a flood of calls, and each of them runs."""
    gate = Gate()
    async with serving(gate.procedures, pair, max_in_flight=2) as remote:
        async with trio.open_nursery() as nursery:
            for x in range(6):
                nursery.start_soon(remote.post, "enter", x)
            await settled()
            assert gate.inside == 2
            assert remote.statistics().waiting == 4
            gate.opened.set()
        await settled()
        assert gate.procedures.statistics().returned == 6
        assert gate.most_inside == 2


async def test_a_post_that_fails_is_counted_and_logged_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for it, so both sides count it, and its cause is logged where it happened."""
    gate = Gate()
    with caplog.at_level(logging.WARNING):
        async with serving(gate.procedures, pair) as remote:
            for _ in range(5):
                await remote.post("fail")
            await remote.post("nothing")
            await settled()
            assert remote.statistics().posts_failed == 6
    assert gate.procedures.statistics().raised == 5
    assert gate.procedures.statistics().rejected == 1
    [record] = caplog.records
    assert "posted procedure: ValueError in fail" in record.getMessage()
    assert record.exc_info is not None
    [(cause, count)] = gate.procedures.statistics().failures.items()
    assert cause.startswith("ValueError in fail")
    assert count == 5


async def test_what_was_posted_is_finished_after_the_caller_has_left(pair: Pair) -> None:
    """Its calls are cancelled, since nobody waits for them; its posts are not."""
    gate = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, gate.procedures, pair[0])
        async with open_remote_stream(pair[1]) as remote, trio.open_nursery() as callers:
            callers.start_soon(remote.call, "enter", 1)
            await remote.post("enter", 2)
            await settled()
            assert gate.inside == 2
            callers.cancel_scope.cancel()
        await settled()
        assert gate.inside == 1
        gate.opened.set()
    assert gate.procedures.statistics().returned == 1
    assert gate.procedures.statistics().cancelled == 1


async def test_posts_survive_a_caller_that_leaves_at_once(pair: Pair) -> None:
    """Whatever was posted before a clean exit runs, blocking or not."""
    gate = Gate()
    gate.opened.set()
    async with serving(gate.procedures, pair) as remote:
        for x in range(200):
            await remote.post("enter", x)
    assert gate.procedures.statistics().returned == 200


async def raw_caller(stream: trio.abc.Stream, *messages: tuple[object, ...]) -> list[list[object]]:
    """Say hello and ``messages`` without keeping to anything, and return what came until the end."""
    await stream.send_all(FRAMING.encode(wire.encode((0, wire.VERSION, None, 2**20))))
    decoder = FRAMING.decoder()
    frames = decoder.receive_data(bytes(await stream.receive_some()))
    await stream.send_all(b"".join(FRAMING.encode(wire.encode(message)) for message in messages))
    while len(frames) < len(messages) + 1:
        data = await stream.receive_some()
        if not data:
            break
        frames += decoder.receive_data(bytes(data))
    await stream.aclose()
    return [msgspec.msgpack.decode(frame) for frame in frames]


async def test_a_caller_that_does_not_wait_for_places_is_refused(pair: Pair) -> None:
    """Requests beyond max_in_flight do not run; the refusal says when to come back."""
    gate = Gate()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_remote_stream(gate.procedures, pair[0], max_in_flight=3))
        answers: list[list[object]] = []

        async def call() -> None:
            answers.extend(await raw_caller(pair[1], *((1, id, "enter", None, [id]) for id in range(1, 11))))

        nursery.start_soon(call)
        await settled()
        assert gate.inside == 3
        gate.opened.set()
    assert answers[0] == [0, wire.VERSION, 3, 2**20]
    refused = [answer for answer in answers if answer[0] == 4]
    assert [answer[1:3] for answer in refused] == [[id, "flow"] for id in range(4, 11)]
    assert all(isinstance(answer[3], float) and answer[3] > 0 for answer in refused)
    assert sorted(answer for answer in answers if answer[0] == 1) == [[1, 1, 1], [1, 2, 2], [1, 3, 3]]
    assert gate.procedures.statistics().refused == 7


async def test_all_callers_together_meet_a_bound(pair: Pair) -> None:
    """Beyond max_running, calls of any connection are refused as overload, and the caller may come back."""
    gate = Gate()
    second = trio.testing.memory_stream_pair()
    async with (
        serving(gate.procedures, pair, max_running=2) as one,
        serving(gate.procedures, second, max_running=2) as two,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.call, "enter", 1)
            nursery.start_soon(two.call, "enter", 2)
            await settled()
            for remote in (one, two):
                with pytest.raises(Overloaded) as caught:
                    await remote.call("enter", 3)
                assert caught.value.reason == "queue"
                assert caught.value.retry_after > 0
            gate.opened.set()
        assert await one.call("enter", 4) == 4


async def test_too_long_a_request_never_leaves(pair: Pair) -> None:
    """The caller learns it at once, its place is free again, and the connection goes on."""
    gate = Gate()
    async with serving(gate.procedures, pair, max_in_flight=1, max_frame_bytes=5000) as remote:
        for act in (remote.call, remote.post):
            with pytest.raises(ValueError, match="exceeds the limit of 5000 bytes"):
                await act("echo", b"x" * 5000)
        with pytest.raises(ValueError, match="exceeds the limit of 5000 bytes"):
            async with remote.stream("echo", b"x" * 5000):
                pass
        assert await remote.call("echo", b"x" * 4900) == b"x" * 4900
        assert remote.statistics().sent == 1


async def test_too_long_an_answer_is_an_error_of_that_call(pair: Pair) -> None:
    """The other side says so instead of breaking the caller's bound."""
    procedures = Procedures()

    @procedures.procedure
    async def much(n: int) -> bytes:
        return b"x" * n

    @procedures.procedure
    async def long_complaint(n: int) -> None:
        raise ValueError("€" * n)

    @procedures.procedure
    async def many(n: int) -> AsyncIterator[bytes]:
        yield b"x"
        yield b"x" * n

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, procedures, pair[0])
        async with open_remote_stream(pair[1], max_frame_bytes=1024) as remote:
            assert await remote.call(much, 1000) == b"x" * 1000
            with pytest.raises(RemoteError, match=r"ValueError: the result of 'much' cannot be sent: .*1024"):
                await remote.call(much, 1024)
            with pytest.raises(RemoteError, match=r"ValueError: €{100}$"):
                await remote.call(long_complaint, 100_000)
            async with remote.stream(many, 1024) as values:
                assert await anext(values) == b"x"
                with pytest.raises(RemoteError, match=r"ValueError: .*1024"):
                    await anext(values)


@pytest.mark.parametrize("result", [object(), 2**70, {1j}, "\ud800"])
async def test_an_answer_that_cannot_be_sent_is_an_error_of_that_call(pair: Pair, result: object) -> None:
    """Whatever the encoder finds in it, after blocking or at once, the caller is told and the worker goes on."""
    procedures = Procedures()

    @procedures.procedure
    async def odd(block: bool) -> object:
        if block:
            await trio.lowlevel.checkpoint()
        return result

    async with serving(procedures, pair) as remote:
        for block in (False, True):
            with pytest.raises(RemoteError, match="the result of 'odd' cannot be sent"):
                await remote.call(odd, block)
    assert procedures.statistics().raised == 2


async def test_an_argument_that_cannot_be_sent_is_the_callers_error(pair: Pair) -> None:
    """It costs neither a place nor the connection."""
    gate = Gate()
    async with serving(gate.procedures, pair, max_in_flight=1) as remote:
        for argument in (object(), 2**70):
            with pytest.raises((TypeError, OverflowError)):
                await remote.call("enter", argument)
        assert await remote.call("echo", b"x") == b"x"


@pytest.mark.parametrize("block", [False, True])
async def test_a_caller_that_does_not_read_is_not_listened_to(block: bool) -> None:
    """Answers pile up to a bound; then its requests stay in the stream, and memory stays where it is."""
    ran = 0
    procedures = Procedures()

    @procedures.procedure
    async def fill(block: bool) -> bytes:
        nonlocal ran
        ran += 1
        if block:
            await trio.lowlevel.checkpoint()
        return b"x" * 1000

    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_remote_stream(procedures, ours, max_buffered_bytes=10_000, max_in_flight=50))
        await theirs.send_all(FRAMING.encode(wire.encode((0, wire.VERSION, None, 2**20))))
        await theirs.receive_some()
        requests = [FRAMING.encode(wire.encode((1, id, "fill", None, [block]))) for id in range(1, 1001)]
        nursery.start_soon(theirs.send_all, b"".join(requests))
        await settled()
        assert 10 <= ran <= 100
        decoder, answers = FRAMING.decoder(), 0
        while answers < 1000:
            answers += len(decoder.receive_data(bytes(await theirs.receive_some())))
        assert ran + procedures.statistics().refused == 1000
        await theirs.aclose()


async def test_a_stream_that_is_not_read_is_not_collected() -> None:
    """Whatever credit it was given, its values fill the buffer and no more."""
    yielded = 0
    procedures = Procedures()

    @procedures.procedure
    async def flood() -> AsyncIterator[bytes]:
        nonlocal yielded
        for _ in range(1000):
            yielded += 1
            yield b"x" * 1000

    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_remote_stream(procedures, ours, max_buffered_bytes=10_000))
        await theirs.send_all(FRAMING.encode(wire.encode((0, wire.VERSION, None, 2**20))))
        await theirs.receive_some()
        await theirs.send_all(FRAMING.encode(wire.encode((3, 1, "flood", None, 10_000, []))))
        await settled()
        assert 10 <= yielded <= 25
        await theirs.aclose()


async def test_callers_wait_while_the_worker_does_not_read() -> None:
    """Requests pile up to a bound; then callers wait, and each call arrives when the worker reads again."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:

        async def worker() -> None:
            await ours.receive_some()
            await ours.send_all(FRAMING.encode(wire.encode((0, wire.VERSION, 1000, 2**20))))
            await go_on.wait()
            decoder = FRAMING.decoder()
            async for data in ours:
                for frame in decoder.receive_data(bytes(data)):
                    call = wire.read_from_caller(frame)
                    await ours.send_all(FRAMING.encode(wire.encode((1, call.id, call.id))))

        go_on = trio.Event()
        nursery.start_soon(worker)
        async with open_remote_stream(theirs, max_buffered_bytes=10_000) as remote:
            async with trio.open_nursery() as callers:
                for _ in range(100):
                    callers.start_soon(remote.call, "any", b"x" * 1000)
                await settled()
                assert 10 <= remote.statistics().sent <= 25
                go_on.set()
            assert remote.statistics().sent == 100


async def test_connections_are_bounded() -> None:
    """One caller too many is told so and sent away; when another leaves, there is a place again."""
    procedures = Procedures()

    @procedures.procedure
    async def echo(x: int) -> int:
        return x

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve_remote, procedures, listeners, max_connections=2))
        async with open_remote(f"tcp://127.0.0.1:{port}") as one, open_remote(f"tcp://127.0.0.1:{port}") as two:
            with pytest.raises(WorkerLost, match="2 callers are connected already") as caught:
                async with open_remote(f"tcp://127.0.0.1:{port}"):
                    raise AssertionError("the third was let in")
            assert not caught.value.may_have_run
            assert await one.call(echo, 1) + await two.call(echo, 2) == 3
        while procedures.statistics().connections:
            await trio.testing.wait_all_tasks_blocked(0.005)
        async with open_remote(f"tcp://127.0.0.1:{port}") as three:
            assert await three.call(echo, 3) == 3
        nursery.cancel_scope.cancel()
    assert procedures.statistics().refused == 1


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_in_flight": 0},
        {"max_in_flight": math.inf},
        {"max_frame_bytes": 1023},
        {"max_frame_bytes": 2**31},
        {"max_buffered_bytes": 0},
        {"max_running": 0},
    ],
)
async def test_bounds_out_of_range_are_named(bounds: dict[str, Any]) -> None:
    """A worker is not started with a bound that cannot be kept."""
    name, value = next(iter(bounds.items()))
    with pytest.raises(ValueError, match=f"{name} must be .*not {value!r}"):
        await serve_remote_stream(Procedures(), trio.testing.memory_stream_pair()[0], **bounds)
    with pytest.raises(ValueError, match=f"{name} must be .*not {value!r}"):
        await serve_remote(Procedures(), [], **bounds)


async def test_bounds_that_are_no_whole_numbers_are_named() -> None:
    """Half a call cannot be in flight, and would not cross the wire."""
    with pytest.raises(TypeError, match=r"max_in_flight must be an int, not 1\.5"):
        await serve_remote(Procedures(), [], max_in_flight=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_frame_bytes must be an int, not '4096'"):
        async with open_remote_stream(trio.testing.memory_stream_pair()[0], max_frame_bytes="4096"):  # type: ignore[arg-type]
            raise AssertionError("entered")


async def test_a_place_goes_to_one_caller_only(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    """With many callers that come again and again, three are in hand at any time, and the worker never refuses."""
    procedures = Procedures()
    inside = most = 0

    @procedures.procedure
    async def nap() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await trio.sleep(1)
        inside -= 1

    async def caller() -> None:
        for _ in range(3):
            await remote.call(nap)

    async with serving(procedures, pair, max_in_flight=3) as remote:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(33):
                nursery.start_soon(caller)
        assert trio.current_time() - start == 33
        assert remote.statistics().in_flight == remote.statistics().waiting == 0
    assert most == 3
    assert procedures.statistics().refused == 0
    assert procedures.statistics().returned == 99


async def test_the_smallest_buffer_holds_nobody_up_for_good(pair: Pair) -> None:
    """With room for a single answer, callers of all kinds take turns, and all of them end."""
    procedures = Procedures()

    @procedures.procedure
    async def now(x: int) -> int:
        return x

    @procedures.procedure
    async def later(x: int) -> int:
        await trio.lowlevel.checkpoint()
        return x

    @procedures.procedure
    async def several(n: int) -> AsyncIterator[int]:
        for x in range(n):
            yield x

    async def caller(n: int) -> None:
        for x in range(20):
            assert await remote.call(later if (x + n) % 3 else now, x) == x
        async with remote.with_options(window=4).stream(several, 10) as values:
            assert [value async for value in values] == list(range(10))

    async with serving(procedures, pair, max_buffered_bytes=1) as remote, trio.open_nursery() as nursery:
        for n in range(30):
            nursery.start_soon(caller, n)


async def test_a_caller_that_has_stopped_talking_and_reading_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    """Its posts are finished, its answers are given up on, and nobody waits for room for them."""
    gate = Gate()
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_remote_stream(gate.procedures, ours, max_buffered_bytes=1))
        await theirs.send_all(FRAMING.encode(wire.encode((0, wire.VERSION, None, 2**20))))
        await theirs.receive_some()
        requests = [FRAMING.encode(wire.encode((2, id, "enter", None, [id]))) for id in range(1, 11)]
        await theirs.send_all(b"".join(requests))
        await trio.testing.wait_all_tasks_blocked()
        assert gate.inside == 10
        gate.opened.set()
        await trio.testing.wait_all_tasks_blocked()
        await theirs.send_eof()
        start = trio.current_time()
    assert trio.current_time() - start == 1
    assert gate.procedures.statistics().returned == 10
    assert gate.procedures.statistics().undeliverable > 0
