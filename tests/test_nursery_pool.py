"""A pool of tasks in scopes of their own."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Hashable
from functools import partial
from typing import Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stagetrio.limiter import Overloaded
from stagetrio.nursery_pool import open_nursery_pool


class Gate:
    """Tasks that note when they begin and end, and wait until they are let go."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.open = trio.Event()

    async def task(self, name: str) -> None:
        self.log.append(f"+{name}")
        try:
            await self.open.wait()
            self.log.append(f"-{name}")
        except trio.Cancelled:
            self.log.append(f"!{name}")
            raise


async def test_spawn_waits_for_a_slot_in_turn() -> None:
    """No more than max_tasks run at once; callers of spawn get slots in the order they came."""
    gate = Gate()
    async with open_nursery_pool(1) as pool, trio.open_nursery() as callers:
        for name in "abc":
            callers.start_soon(pool.spawn, gate.task, name)
            await wait_all_tasks_blocked()
        assert gate.log == ["+a"]
        assert (pool.statistics().running, pool.statistics().waiting) == (1, 2)
        gate.open.set()
    assert gate.log == ["+a", "-a", "+b", "-b", "+c", "-c"]
    assert pool.statistics().finished == 3
    assert pool.statistics().running == 0


async def test_spawn_is_a_checkpoint_even_when_a_slot_is_free() -> None:
    """A cancelled spawn starts nothing and takes no slot."""
    gate = Gate()
    async with open_nursery_pool(1) as pool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.spawn(gate.task, "never")
        assert scope.cancelled_caught
        pool.spawn_nowait(gate.task, "a")
        with trio.testing.assert_checkpoints():
            gate.open.set()
            await pool.spawn(gate.task, "b")
    assert gate.log == ["+a", "-a", "+b", "-b"]


async def test_a_cancelled_wait_for_a_slot_leaves_the_queue_intact() -> None:
    """Whoever stands behind a caller that gave up gets the slot."""
    gate = Gate()
    async with open_nursery_pool(1) as pool, trio.open_nursery() as callers:
        pool.spawn_nowait(gate.task, "a")
        with trio.CancelScope() as scope:
            callers.start_soon(pool.spawn, gate.task, "b")
            await wait_all_tasks_blocked()
            scope.cancel()
            await pool.spawn(gate.task, "never")
        gate.open.set()
    assert gate.log == ["+a", "-a", "+b", "-b"]


async def test_spawn_nowait_refuses_when_full() -> None:
    """Overloaded, which is a WouldBlock that names the bound, and nothing is started."""
    gate = Gate()
    async with open_nursery_pool(2) as pool:
        pool.spawn_nowait(gate.task, "a")
        pool.spawn_nowait(gate.task, "b")
        with pytest.raises(Overloaded) as refusal:
            pool.spawn_nowait(gate.task, "c")
        assert refusal.value.reason == "tasks"
        assert pool.statistics().refused == 1
        gate.open.set()
    assert gate.log.count("+c") == 0
    assert pool.statistics().finished == 2


async def test_start_soon_starts_and_its_body_waits() -> None:
    """start_soon returns at once, and its function is called when a slot is free."""
    gate = Gate()
    async with open_nursery_pool(1) as pool:
        pool.start_soon(gate.task, "a")
        await wait_all_tasks_blocked()
        pool.start_soon(gate.task, "b")
        await wait_all_tasks_blocked()
        assert gate.log == ["+a"]
        assert pool.statistics().waiting == 1
        gate.open.set()
    assert gate.log == ["+a", "-a", "+b", "-b"]


async def test_start_soon_calls_its_function_even_when_cancelled_first() -> None:
    """What a waiting task was handed is cleaned up: the function runs to its first checkpoint, without a slot."""
    gate = Gate()
    async with open_nursery_pool(1) as pool:
        pool.spawn_nowait(gate.task, "a")
        pool.start_soon(gate.task, "waiting")
        await wait_all_tasks_blocked()
        assert await pool.drain(0) == 2
        pool.start_soon(gate.task, "late")
        await wait_all_tasks_blocked()
    assert sorted(gate.log) == ["!a", "!late", "!waiting", "+a", "+late", "+waiting"]
    assert pool.statistics().cancelled == 3
    assert pool.statistics().running == 0


async def test_a_task_is_named_after_its_function() -> None:
    """Task trees and stall reports show the handler, not the pool; start_soon takes a name like a nursery."""
    names = []

    async def handler() -> None:
        names.append(trio.lowlevel.current_task().name)

    async with open_nursery_pool(2) as pool:
        await pool.spawn(handler)
        pool.start_soon(handler, name="connection 7")
    assert {name.rpartition(".")[2] for name in names} == {"handler", "connection 7"}


async def test_cancel_ends_the_tasks_of_one_key_only() -> None:
    """cancel reaches running tasks and children of their nurseries, says how many, and touches nobody else."""
    gate = Gate()
    async with open_nursery_pool(10) as pool:
        await pool.spawn(gate.task, "a", key="peer")
        await pool.spawn(gate.task, "b", key="peer")
        await pool.spawn(gate.task, "c", key="other")
        await wait_all_tasks_blocked()
        pool.nursery_of("peer").start_soon(gate.task, "child of a")
        await wait_all_tasks_blocked()
        assert pool.cancel("peer", "kicked") == 2
        await wait_all_tasks_blocked()
        assert pool.cancel("peer", "kicked") == 0
        gate.open.set()
    assert {entry for entry in gate.log if entry[0] != "+"} == {"!a", "!b", "!child of a", "-c"}
    assert (pool.statistics().cancelled, pool.statistics().failed) == (2, 0)


async def test_a_task_cancelled_before_it_ran_gets_the_reason() -> None:
    """Cancelling between spawn and the first step works, and the task can read why."""
    reasons = []

    async def task() -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            reasons.append(cancelled.reason)
            raise

    async with open_nursery_pool(1) as pool:
        pool.spawn_nowait(task, key="k")
        assert pool.cancel("k", "kicked") == 1
    assert reasons == ["kicked"]


async def test_nursery_of_is_the_oldest_running_task_of_the_key() -> None:
    """A key without a running task has no nursery; children keep their task's slot until they end."""
    gate = Gate()
    async with open_nursery_pool(1) as pool:
        with pytest.raises(KeyError):
            pool.nursery_of("k")

        async def short() -> None:
            pool.nursery_of("k").start_soon(gate.task, "child")

        pool.spawn_nowait(short, key="k")
        with pytest.raises(KeyError):
            pool.nursery_of("k")  # it has not begun
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 1
        gate.open.set()
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 0
        with pytest.raises(KeyError):
            pool.nursery_of("k")
    assert gate.log == ["+child", "-child"]


async def test_the_nursery_of_a_task_is_there_when_it_was_spawned() -> None:
    """Whatever order the tasks of a pass run in."""
    async with open_nursery_pool(30) as pool:
        for key in range(30):
            await pool.spawn(trio.sleep_forever, key=key)
            assert pool.nursery_of(key).cancel_scope.cancel_called is False
        assert await pool.drain(0) == 30


async def test_a_task_that_was_spawned_and_has_ended_has_no_nursery() -> None:
    """The caller of spawn goes on all the same."""
    async with open_nursery_pool(1) as pool:
        await pool.spawn(trio.lowlevel.checkpoint, key="short")
        await wait_all_tasks_blocked()
        with pytest.raises(KeyError, match="short"):
            pool.nursery_of("short")


async def test_a_cancellation_after_the_start_is_for_the_next_checkpoint() -> None:
    """A cancelled spawn has started nothing, so one that has started something returns."""
    async with open_nursery_pool(1) as pool:
        with trio.CancelScope() as scope:

            async def cancels() -> None:
                scope.cancel()

            await pool.spawn(cancels, key="one")
            returned = True
            await trio.lowlevel.checkpoint()
        assert returned
        assert scope.cancelled_caught


async def test_a_key_that_cannot_be_hashed_is_refused_and_takes_no_slot() -> None:
    """It is the caller's mistake alone: the pool goes on."""
    async with open_nursery_pool(1) as pool:
        with pytest.raises(TypeError, match=r"key must be hashable, not \['x'\]"):
            await pool.spawn(trio.sleep_forever, key=["x"])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"key must be hashable, not \(\[\],\)"):
            pool.spawn_nowait(trio.sleep_forever, key=([],))
        assert pool.statistics().running == 0
        pool.spawn_nowait(trio.lowlevel.checkpoint)


async def test_without_on_error_an_exception_reaches_the_owner() -> None:
    """The other tasks are cancelled, and the block raises a group that holds the exception."""
    gate = Gate()

    async def fails() -> None:
        raise KeyError("broken")

    with pytest.RaisesGroup(pytest.RaisesGroup(pytest.RaisesExc(KeyError, match="broken"))):
        async with open_nursery_pool(10) as pool:
            await pool.spawn(gate.task, "a")
            await wait_all_tasks_blocked()
            await pool.spawn(fails)
            await trio.sleep_forever()
    assert gate.log == ["+a", "!a"]
    assert pool.statistics().failed == 1


async def test_on_error_takes_one_tasks_exception_and_the_others_go_on() -> None:
    """on_error gets the exception and the key; several of one nursery come as one group."""
    gate = Gate()
    seen: list[tuple[Exception, Hashable]] = []

    async def fails(message: str) -> None:
        raise ValueError(message)

    async def fails_twice() -> None:
        async def other() -> None:
            raise KeyError("other")

        pool.nursery_of("two").start_soon(other)
        raise ValueError("one of two")

    async with open_nursery_pool(10, on_error=lambda error, key: seen.append((error, key))) as pool:
        await pool.spawn(gate.task, "a")
        await pool.spawn(fails, "alone", key="one")
        await wait_all_tasks_blocked()
        await pool.spawn(fails_twice, key="two")
        await wait_all_tasks_blocked()
        gate.open.set()
    (alone, one), (group, two) = seen
    assert isinstance(alone, ValueError)
    assert (str(alone), one, two) == ("alone", "one", "two")
    assert isinstance(group, ExceptionGroup)
    assert {type(error) for error in group.exceptions} == {ValueError, KeyError}
    assert gate.log == ["+a", "-a"]
    assert pool.statistics().failed == 2


async def test_what_on_error_raises_reaches_the_owner() -> None:
    """A policy may decide that one kind of error ends everything."""

    async def fails() -> None:
        raise ValueError("first")

    def strict(error: Exception, key: Hashable) -> None:
        raise RuntimeError("no more") from error

    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_nursery_pool(1, on_error=strict) as pool:
            await pool.spawn(fails)
    found = caught.value.subgroup(lambda error: isinstance(error, RuntimeError))
    assert found is not None
    assert caught.value.subgroup(ValueError) is None


@pytest.mark.parametrize("beyond", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_exceptions_beyond_exception_always_propagate(beyond: type[BaseException]) -> None:
    """KeyboardInterrupt and the like are nobody's handler error."""
    seen: list[Exception] = []

    async def interrupted() -> None:
        raise beyond

    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_nursery_pool(1, on_error=lambda error, key: seen.append(error)) as pool:
            await pool.spawn(interrupted)
    assert caught.value.subgroup(beyond) is not None
    assert seen == []


async def test_cancelling_the_owner_is_no_error_and_is_not_swallowed() -> None:
    """on_error never sees a cancellation, even one that comes with an error of the same nursery."""
    seen: list[Exception] = []

    async def raises_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            pool.nursery_of("k").start_soon(trio.sleep_forever)
            raise ValueError("cleanup failed")

    with trio.CancelScope() as scope:
        async with open_nursery_pool(2, on_error=lambda error, key: seen.append(error)) as pool:
            await pool.spawn(raises_when_cancelled, key="k")
            await pool.spawn(trio.sleep_forever)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert [str(error) for error in seen] == ["cleanup failed"]


async def test_drain_lets_tasks_end_within_the_grace(autojump_clock: trio.testing.MockClock) -> None:
    """Tasks that end in time are not cancelled, waiting ones of start_soon included; new work is turned away."""
    done = []

    async def task(seconds: float) -> None:
        await trio.sleep(seconds)
        done.append(seconds)

    async with open_nursery_pool(1) as pool:
        pool.start_soon(task, 1)
        pool.start_soon(task, 1.5)
        await wait_all_tasks_blocked()
        assert await pool.drain(3) == 0
        assert trio.current_time() == 2.5
        with pytest.raises(trio.ClosedResourceError):
            await pool.spawn(task, 9)
        with pytest.raises(trio.ClosedResourceError):
            pool.spawn_nowait(task, 9)
    assert sorted(done) == [1, 1.5]


async def test_drain_cancels_what_is_left_and_waits_for_its_end(autojump_clock: trio.testing.MockClock) -> None:
    """After the grace tasks are cancelled; drain returns when they are gone, cleanup included."""

    async def stubborn() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(2)

    async with open_nursery_pool(5) as pool:
        await pool.spawn(stubborn)
        await pool.spawn(trio.sleep, 1)
        assert await pool.drain(3) == 1
        assert trio.current_time() == 5
        assert (pool.statistics().finished, pool.statistics().cancelled) == (2, 1)


async def test_a_caller_that_waits_for_a_slot_when_the_pool_drains_is_turned_away(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its work was never accepted, so it gets ClosedResourceError rather than the next slot."""
    outcomes: list[str] = []

    async def caller() -> None:
        try:
            await pool.spawn(trio.sleep, 1)
        except trio.ClosedResourceError:
            outcomes.append("closed")

    async with open_nursery_pool(1) as pool, trio.open_nursery() as callers:
        await pool.spawn(trio.sleep, 1)
        callers.start_soon(caller)
        callers.start_soon(caller)
        await wait_all_tasks_blocked()
        assert await pool.drain(10) == 0
    assert outcomes == ["closed", "closed"]
    assert pool.statistics().running == 0


async def test_an_interrupted_drain_may_be_called_again(autojump_clock: trio.testing.MockClock) -> None:
    """Cancelled, it cancels no task and leaves the pool closed to new work."""
    async with open_nursery_pool(1) as pool:
        await pool.spawn(trio.sleep, 5)
        with trio.move_on_after(1) as scope:
            await pool.drain(math.inf)
        assert scope.cancelled_caught
        assert pool.statistics().closed
        assert pool.statistics().running == 1
        assert await pool.drain(1) == 1
        assert trio.current_time() == 2


async def test_drain_is_a_checkpoint_when_there_is_nothing_to_drain() -> None:
    """An empty pool drains at once, but not without a checkpoint."""
    async with open_nursery_pool(1) as pool:
        with trio.testing.assert_checkpoints():
            assert await pool.drain(math.inf) == 0


async def test_a_key_is_forgotten_with_its_last_task() -> None:
    """A pool that has seen a million peers holds on to none of them."""

    class Peer:
        pass

    peer = Peer()
    forgotten = weakref.ref(peer)
    async with open_nursery_pool(2) as pool:
        await pool.spawn(trio.lowlevel.checkpoint, key=peer)
        await pool.spawn(trio.lowlevel.checkpoint, key=peer)
        await wait_all_tasks_blocked()
        del peer
        gc.collect()
        assert forgotten() is None


async def test_a_pool_whose_block_was_left_is_closed() -> None:
    """Work handed to it raises ClosedResourceError."""
    async with open_nursery_pool(1) as pool:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await pool.spawn(trio.sleep, 0)
    with pytest.raises(trio.ClosedResourceError):
        pool.spawn_nowait(trio.sleep, 0)


async def test_the_pool_is_a_handler_nursery_for_serve_listeners() -> None:
    """serve_listeners hands connections to it; a failing handler ends its own connection and no other."""
    errors: list[Exception] = []

    async def handler(stream: trio.SocketStream) -> None:
        data = await stream.receive_some()
        if data == b"fail":
            raise ValueError("handler")
        await stream.send_all(data)

    async with open_nursery_pool(2, on_error=lambda error, key: errors.append(error)) as pool:
        async with trio.open_nursery() as server:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            address = listeners[0].socket.getsockname()
            handlers = cast("trio.Nursery", pool)
            server.start_soon(partial(trio.serve_listeners, handler, listeners, handler_nursery=handlers))
            for sent, answered in ((b"fail", b""), (b"echo", b"echo")):
                async with await trio.open_tcp_stream(*address[:2]) as client:
                    await client.send_all(sent)
                    assert await client.receive_some() == answered
            server.cancel_scope.cancel()
    assert [str(error) for error in errors] == ["handler"]


@pytest.mark.parametrize("bad", [0, -1, 1.5, math.nan, None])
async def test_a_pool_needs_slots(bad: object) -> None:
    """Zero, negative, fractional and missing bounds are refused by name and value."""
    with pytest.raises((ValueError, TypeError), match="max_tasks"):
        async with open_nursery_pool(cast("int", bad)):
            raise AssertionError("unreachable")


async def test_an_unbounded_pool_is_spelled_inf() -> None:
    """math.inf bounds nothing."""
    gate = Gate()
    async with open_nursery_pool(math.inf) as pool:
        for n in range(300):
            pool.spawn_nowait(gate.task, str(n))
        assert pool.statistics().running == 300
        gate.open.set()
    assert pool.statistics().finished == 300


async def test_wrong_arguments_are_named() -> None:
    """None is no key to cancel by, and a grace is not negative."""
    async with open_nursery_pool(1) as pool:
        with pytest.raises(ValueError, match="key"):
            pool.cancel(None, "why")
        with pytest.raises(ValueError, match=r"grace.*-1"):
            await pool.drain(-1)
        with pytest.raises(ValueError, match=r"grace.*nan"):
            await pool.drain(math.nan)
        with pytest.raises(TypeError, match="grace must be a number, not 'a'"):
            await pool.drain("a")  # type: ignore[arg-type]
        pool.spawn_nowait(trio.lowlevel.checkpoint)  # it is open as before
    with pytest.raises(TypeError, match="on_error must be callable or None, not 3"):
        async with open_nursery_pool(1, on_error=3):  # type: ignore[arg-type]
            raise AssertionError("unreachable")


async def test_what_is_no_function_is_refused_and_takes_no_slot() -> None:
    """A coroutine, say: where it is handed in, and the pool and its tasks go on."""
    async def fn() -> None: ...

    coroutine: Any = fn()
    async with open_nursery_pool(2) as pool:
        pool.spawn_nowait(trio.sleep_forever, key="other")
        for start in (pool.spawn_nowait, pool.start_soon):
            with pytest.raises(TypeError, match="fn must be an async function, not <coroutine object"):
                start(coroutine)
        with pytest.raises(TypeError, match="fn must be an async function, not <coroutine object"):
            await pool.spawn(coroutine)
        assert pool.statistics().running == 1
        assert pool.cancel("other", "the end") == 1
    coroutine.close()
