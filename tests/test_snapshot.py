"""A shared value replaced in versions."""

from __future__ import annotations

import gc
import operator
import threading
from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from stagetrio.snapshot import Snapshot, View


def test_a_change_is_a_new_version() -> None:
    """update returns the new view; value, version and view agree with it; the old view stays what it was."""
    snapshot = Snapshot(10)
    first = snapshot.view
    assert snapshot.update(lambda value: value + 1) == View(1, 11)
    assert (snapshot.value, snapshot.version, snapshot.view) == (11, 1, View(1, 11))
    assert first == View(0, 10)


def test_an_update_that_raises_changes_nothing() -> None:
    """The exception comes out, the version stands, and the next update works."""
    snapshot = Snapshot(0)
    with pytest.raises(ZeroDivisionError):
        snapshot.update(lambda value: 1 // value)
    assert snapshot.view == View(0, 0)
    assert snapshot.update(lambda value: value + 1) == View(1, 1)


def test_compare_and_set_sets_only_what_it_was_meant_for() -> None:
    """A version that is no longer (or not yet) current changes nothing."""
    snapshot = Snapshot("a")
    assert snapshot.compare_and_set(0, "b")
    assert not snapshot.compare_and_set(0, "c")
    assert not snapshot.compare_and_set(2, "c")
    assert snapshot.view == View(1, "b")


def test_an_update_within_an_update_is_not_lost() -> None:
    """The outer one finds that it was overtaken and starts over with the inner one's value; nothing deadlocks."""
    snapshot: Snapshot[tuple[str, ...]] = Snapshot(())
    calls = 0

    def outer(value: tuple[str, ...]) -> tuple[str, ...]:
        nonlocal calls
        calls += 1
        if calls == 1:
            snapshot.update(lambda value: (*value, "inner"))
        return (*value, "outer")

    assert snapshot.update(outer) == View(2, ("inner", "outer"))
    assert (calls, snapshot.statistics().conflicts) == (2, 1)


def test_updates_from_many_threads_are_all_there() -> None:
    """No increment is lost, and each version is made by exactly one of them."""
    snapshot: Snapshot[int] = Snapshot(0)
    versions: list[int] = []

    def count() -> None:
        versions.extend(snapshot.update(lambda value: value + 1).version for _ in range(500))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot.view == View(4000, 4000)
    assert sorted(versions) == list(range(1, 4001))


@given(st.lists(st.tuples(st.sampled_from(["update", "set", "stale"]), st.integers()), max_size=30))
@settings(deadline=None)
def test_versions_count_the_changes(steps: list[tuple[str, int]]) -> None:
    """Whatever is done to it, the version is the number of changes and the value is the last one's."""
    snapshot = Snapshot(0)
    history = [0]
    for step, n in steps:
        match step:
            case "update":
                history.append(snapshot.update(partial(operator.add, n)).value)
            case "set":
                assert snapshot.compare_and_set(snapshot.version, n)
                history.append(n)
            case "stale":
                assert not snapshot.compare_and_set(snapshot.version - 1, n)
        assert snapshot.view == View(len(history) - 1, history[-1])


async def test_wait_changed_returns_at_once_when_the_version_is_past() -> None:
    """It is a checkpoint even then, and gives the newest view, not the next one."""
    snapshot = Snapshot(0)
    snapshot.update(lambda value: 5)
    snapshot.update(lambda value: 6)
    with assert_checkpoints():
        assert await snapshot.wait_changed(0) == View(2, 6)


async def test_a_change_wakes_every_waiter_once() -> None:
    """All waiters get the change, and a waiter that waits again sleeps until the next one."""
    snapshot = Snapshot(0)
    seen: list[int] = []

    async def follow() -> None:
        version = 0
        for _ in range(2):
            view = await snapshot.wait_changed(version)
            version = view.version
            seen.append(view.value)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        assert snapshot.statistics().waiting == 3
        snapshot.update(lambda value: 1)
        await wait_all_tasks_blocked()
        assert seen == [1, 1, 1]
        assert snapshot.statistics().waiting == 3
        snapshot.compare_and_set(1, 2)
    assert seen == [1, 1, 1, 2, 2, 2]
    assert snapshot.statistics().waiting == 0


async def test_a_waiter_sees_the_newest_of_several_changes() -> None:
    """Changes made before the waiter runs are one wake-up with the last value."""
    snapshot = Snapshot(0)
    seen: list[View[int]] = []

    async def wait() -> None:
        seen.append(await snapshot.wait_changed(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        for _ in range(3):
            snapshot.update(lambda value: value + 1)
    assert seen == [View(3, 3)]


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    """Also when it was cancelled before it slept; the snapshot then works without waiters."""
    snapshot = Snapshot(0)
    with trio.CancelScope() as scope:
        scope.cancel()
        await snapshot.wait_changed(0)
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(snapshot.wait_changed, 0)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert snapshot.statistics().waiting == 0
    assert snapshot.update(lambda value: 1) == View(1, 1)


async def test_a_version_that_never_was_is_refused() -> None:
    """Waiting for the change after a version of the future is a mistake, and says so."""
    with pytest.raises(ValueError, match="version must be one this snapshot has had, 0 to 0, not 1"):
        await Snapshot(0).wait_changed(1)
    with pytest.raises(TypeError, match="version must be an int, not 'a'"):
        await Snapshot(0).wait_changed("a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="version must be >= 0, not -1"):
        await Snapshot(0).wait_changed(-1)


async def test_changes_in_threads_wake_tasks() -> None:
    """A task that follows a snapshot written by threads ends with the last value and never goes back."""
    snapshot = Snapshot(0)
    seen = [0]

    def write() -> None:
        for _ in range(1000):
            snapshot.update(lambda value: value + 1)

    async def follow() -> None:
        view = snapshot.view
        while view.value < 4000:
            view = await snapshot.wait_changed(view.version)
            seen.append(view.value)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(follow)
            for _ in range(4):
                nursery.start_soon(trio.to_thread.run_sync, write)
    assert snapshot.version == 4000
    assert seen.count(4000) == 5


def test_tasks_of_two_runs_wait_for_the_same_snapshot() -> None:
    """Ping-pong between two event loops in two threads: each change wakes the other loop."""
    snapshot = Snapshot(0)

    async def play(parity: int) -> None:
        with trio.fail_after(30):
            view = snapshot.view
            while view.value < 400:
                if view.value % 2 == parity:
                    view = snapshot.update(lambda value: value + 1)
                else:
                    view = await snapshot.wait_changed(view.version)

    other = threading.Thread(target=trio.run, args=(play, 1))
    other.start()
    trio.run(play, 0)
    other.join()
    assert snapshot.value == 400


async def test_a_waiter_that_gives_up_takes_no_other_with_it() -> None:
    """Cancelling one of two waiters leaves the other where a change finds it."""
    snapshot = Snapshot(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(snapshot.wait_changed, 0)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as gives_up:
            gives_up.start_soon(snapshot.wait_changed, 0)
            await wait_all_tasks_blocked()
            assert snapshot.statistics().waiting == 2
            gives_up.cancel_scope.cancel()
        snapshot.update(lambda value: 1)
        await wait_all_tasks_blocked()
        assert not nursery.child_tasks
        nursery.cancel_scope.cancel()


async def test_a_wake_up_meant_for_an_earlier_change_returns_nothing_old() -> None:
    """A thread's change wakes whoever waits by then; who waits for the change after it goes on waiting."""
    snapshot = Snapshot(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(snapshot.wait_changed, 0)
        await wait_all_tasks_blocked()
        thread = threading.Thread(target=snapshot.update, args=(lambda value: 1,))
        thread.start()
        thread.join()  # its wake-up is on its way, and the next waiter gets in before
        nursery.start_soon(snapshot.wait_changed, 1)
        await wait_all_tasks_blocked()
        assert snapshot.statistics().waiting == 1
        nursery.cancel_scope.cancel()


def test_a_run_that_ended_is_forgotten() -> None:
    """A run whose tasks waited leaves nothing behind: not its token, and nothing that later changes could wake."""

    def tokens() -> int:
        gc.collect()
        return sum(isinstance(thing, trio.lowlevel.TrioToken) for thing in gc.get_objects())

    before = tokens()
    snapshot = Snapshot(0)

    async def wait_and_give_up() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(snapshot.wait_changed, 0)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(wait_and_give_up)
    assert tokens() == before
    assert snapshot.statistics().waiting == 0
    assert snapshot.update(lambda value: 1).version == 1
