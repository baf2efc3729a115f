"""Cancellation and deadlines cross the wire, at whatever moment they come, and cost nobody else anything."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing
from remote_pairs import PAIRS, Pair, serving

from stagetrio.remote import Procedures, Remote, RemoteError, WorkerLost, open_remote_stream, serve_remote_stream


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    make: Callable[[], Pair] = request.param
    return make()


class Log:
    """Procedures that tell when they began and how they ended."""

    def __init__(self) -> None:
        self.procedures = Procedures()
        for function in (self.wait, self.echo, self.numbers):
            self.procedures.add(function)
        self.began = 0
        self.ended: list[str] = []

    async def wait(self, seconds: float) -> str:
        self.began += 1
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.ended.append("cancelled")
            raise
        self.ended.append("slept")
        return "slept"

    async def echo(self, x: int) -> int:
        return x

    async def numbers(self) -> AsyncIterator[int]:
        self.began += 1
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            self.ended.append("closed")


async def settled() -> None:
    """Let everything happen that can happen without time passing, kernel included."""
    await trio.testing.wait_all_tasks_blocked(0.005)


async def test_cancelling_the_caller_cancels_the_procedure(pair: Pair) -> None:
    """It is told at once, its place is free again, and the connection goes on."""
    log = Log()
    async with serving(log.procedures, pair) as remote:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(remote.call, "wait", math.inf)
                await settled()
                assert (log.began, log.ended) == (1, [])
                scope.cancel()
        assert scope.cancelled_caught
        await settled()
        assert log.ended == ["cancelled"]
        assert remote.statistics().in_flight == 0
        assert remote.statistics().late == 1
        assert log.procedures.statistics().running == 0
        assert log.procedures.statistics().cancelled == 1
        assert await remote.call("echo", 7) == 7


async def test_only_the_cancelled_call_is_cancelled(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    """Its neighbours on the connection, before and after it, end as if nothing had happened."""
    log = Log()
    scopes = [trio.CancelScope() for _ in range(20)]
    results: dict[int, str] = {}

    async def one(n: int, remote: Remote) -> None:
        with scopes[n]:
            results[n] = await remote.call("wait", 1.0)

    async with serving(log.procedures, pair) as remote, trio.open_nursery() as nursery:
        for n in range(20):
            nursery.start_soon(one, n, remote)
        await settled()
        for scope in scopes[::3]:
            scope.cancel()
    assert sorted(results) == [n for n in range(20) if n % 3]
    assert sorted(log.ended) == ["cancelled"] * 7 + ["slept"] * 13


async def passes_until_done(act: Callable[[], Awaitable[object]], cancel_after: int) -> bool:
    """Run ``act`` in a scope that is cancelled after so many scheduler passes; whether it was."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def canceller() -> None:
                for _ in range(cancel_after):
                    await trio.lowlevel.cancel_shielded_checkpoint()
                scope.cancel()

            if cancel_after:
                nursery.start_soon(canceller)
            else:
                scope.cancel()
            await act()
            nursery.cancel_scope.cancel()
    return scope.cancelled_caught


@pytest.mark.parametrize("kind", ["call", "blocking call", "post", "stream"])
async def test_a_cancellation_at_any_moment_leaves_everything_in_order(pair: Pair, kind: str) -> None:
    """Whichever pass the caller is cancelled in, places are freed on both sides and later answers match."""
    log = Log()

    async with serving(log.procedures, pair, max_in_flight=2) as remote:

        async def act() -> None:
            if kind == "call":
                await remote.call("echo", -1)
            elif kind == "blocking call":
                await remote.call("wait", 0.0)
            elif kind == "post":
                await remote.post("echo", -1)
            else:
                async with remote.with_options(window=3).stream("numbers") as values:
                    for expected in range(10):
                        assert await anext(values) == expected

        cancelled = [await passes_until_done(act, k) for k in range(60)]
        for k in range(60):
            await passes_until_done(act, k)
            assert await remote.call("echo", k) == k
        await settled()
        assert remote.statistics().in_flight == 0
        assert remote.statistics().waiting == 0
        assert log.procedures.statistics().running == 0
        assert await remote.call("echo", 7) == 7
    assert cancelled[0]
    if kind != "stream":
        assert not cancelled[-1]
    statistics = log.procedures.statistics()
    answered = statistics.returned + statistics.cancelled
    assert statistics.raised == statistics.refused == statistics.rejected == statistics.broken == 0
    assert answered == remote.statistics().sent


async def test_a_caller_cancelled_while_it_waits_for_a_place_has_not_called(pair: Pair) -> None:
    """Its procedure never runs, and it gives up its turn."""
    log = Log()
    async with serving(log.procedures, pair, max_in_flight=1) as remote:
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()

            async def hold() -> None:
                with first:
                    await remote.call("wait", math.inf)

            nursery.start_soon(hold)
            await settled()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as waiters:
                    for _ in range(3):
                        waiters.start_soon(remote.call, "wait", 0.0)
                    await settled()
                    assert remote.statistics().waiting == 3
                    scope.cancel()
            assert remote.statistics().waiting == 0
            assert log.began == 1
            first.cancel()
        assert await remote.call("echo", 1) == 1
        assert remote.statistics().sent == 2


async def test_an_already_cancelled_caller_does_not_call(pair: Pair) -> None:
    """Nothing is sent for who is cancelled before."""
    log = Log()
    async with serving(log.procedures, pair) as remote:
        for act in (remote.call, remote.post):
            with trio.CancelScope() as scope:
                scope.cancel()
                await act("echo", 1)
            assert scope.cancelled_caught
        assert remote.statistics().sent == 0


async def test_the_callers_deadline_crosses(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    """The procedure sees it as its own, the nearest of the caller's, and is cancelled by it."""
    log = Log()
    remaining: list[float] = []

    @log.procedures.procedure
    async def look(block: bool) -> float:
        if block:
            await trio.sleep(1)
        remaining.append(trio.current_effective_deadline() - trio.current_time())
        return remaining[-1]

    async with serving(log.procedures, pair) as remote:
        assert await remote.call(look, False) == math.inf
        with trio.fail_after(100), trio.fail_after(10):
            assert await remote.call(look, False) == 10
            assert await remote.call(look, True) == 9
        assert await remote.call(look, False) == math.inf
        with trio.move_on_after(2.5):
            await remote.call("wait", 100.0)
        await settled()
        assert log.ended == ["cancelled"]
        assert log.procedures.statistics().running == 0


async def test_a_deadline_of_one_call_does_not_touch_the_next(
    pair: Pair, autojump_clock: trio.testing.MockClock
) -> None:
    """Calls without a deadline run on in the worker that has just served one with a deadline."""
    log = Log()
    async with serving(log.procedures, pair) as remote:
        with trio.move_on_after(1):
            assert await remote.call("echo", 1) == 1
        assert await remote.call("wait", 5.0) == "slept"
        with trio.move_on_after(1):
            await remote.call("wait", 5.0)
        assert await remote.call("wait", 5.0) == "slept"
        await trio.sleep(10)
        assert await remote.call("echo", 1) == 1


async def test_a_deadline_that_is_put_off_after_the_call_still_ends_it(
    pair: Pair, autojump_clock: trio.testing.MockClock
) -> None:
    """The other side keeps the deadline it was told, and says so; the caller does not wait for ever."""
    log = Log()
    async with serving(log.procedures, pair) as remote:
        with trio.CancelScope(deadline=trio.current_time() + 1) as scope:
            async with trio.open_nursery() as nursery:

                async def put_off() -> None:
                    await trio.sleep(0.5)
                    scope.deadline = math.inf

                nursery.start_soon(put_off)
                with pytest.raises(RemoteError, match="TooSlowError: the deadline passed before it ended"):
                    await remote.call("wait", 100.0)
    assert log.procedures.statistics().cancelled == 1


async def test_a_post_is_not_bound_to_its_senders_deadline(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    """Who posts does not wait, so its deadline is not the procedure's."""
    log = Log()
    async with serving(log.procedures, pair) as remote:
        with trio.move_on_after(1):
            await remote.post("wait", 5.0)
        await trio.sleep(10)
        assert log.ended == ["slept"]


async def test_a_procedure_may_swallow_or_replace_its_cancellation(pair: Pair) -> None:
    """Whatever it makes of it is an answer to nobody; the next call is not mistaken for it."""
    log = Log()

    @log.procedures.procedure
    async def stubborn(how: str) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            if how == "raise":
                raise ValueError(how) from None
        return how

    async with serving(log.procedures, pair) as remote:
        for how in ("raise", "swallow"):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(remote.call, stubborn, how)
                    await settled()
                    scope.cancel()
            assert await remote.call("echo", 5) == 5
        await settled()
        assert remote.statistics().late == 2
        assert remote.statistics().in_flight == 0
        assert log.procedures.statistics().raised == 1


async def test_scopes_inside_a_procedure_work_as_usual(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    """A timeout or a nursery of its own, opened in its first step, is nested rightly under the call."""
    log = Log()

    @log.procedures.procedure
    async def scoped() -> str:
        with trio.move_on_after(1) as inner:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, 100)
                nursery.start_soon(trio.sleep, 200)
        assert inner.cancelled_caught
        await trio.sleep(1)
        return "through"

    async with serving(log.procedures, pair) as remote:
        start = trio.current_time()
        for _ in range(3):
            assert await remote.call(scoped) == "through"
        assert trio.current_time() - start == 6
        with trio.move_on_after(0.5) as scope:
            await remote.call(scoped)
        assert scope.cancelled_caught


async def test_cancelling_the_server_cancels_what_is_in_hand(pair: Pair) -> None:
    """Nobody goes on in a server that has been cancelled, and the callers are told."""
    log = Log()
    async with trio.open_nursery() as nursery:
        server = trio.CancelScope()

        async def serve() -> None:
            with server:
                await serve_remote_stream(log.procedures, pair[0])

        nursery.start_soon(serve)
        async with open_remote_stream(pair[1]) as remote, trio.open_nursery() as callers:

            async def call() -> None:
                with pytest.raises(WorkerLost):
                    await remote.call("wait", math.inf)

            for _ in range(5):
                callers.start_soon(call)
            await remote.post("wait", math.inf)
            await settled()
            server.cancel()
    assert log.ended == ["cancelled"] * 6
    assert log.procedures.statistics().connections == 0
    assert log.procedures.statistics().running == 0


async def test_a_deadline_that_has_just_passed_is_no_mistake(pair: Pair, mock_clock: trio.testing.MockClock) -> None:
    """A caller that is late, but has not been cancelled yet, is cancelled; its connection goes on."""
    log = Log()
    async with serving(log.procedures, pair) as remote:
        with trio.move_on_after(1) as scope:
            mock_clock.jump(2)
            await remote.call("wait", 5.0)
        assert scope.cancelled_caught
        assert await remote.call("echo", 1) == 1
    assert log.began == 0
