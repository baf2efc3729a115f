"""Storms of forced checkpoints and cancellations over locks, resources and counters: no deadlock, no leak.

What a prototype got wrong: a counter of the shape ``with self._lock: self._value += 1`` in a third module deadlocked
the loop, an RLock let two tasks in, and resources behind ``@contextmanager`` leaked when their users were cancelled.
Each of these is done here by several handlers at once that never await, against the real timer at a tenth of a
millisecond, and by a storm of cancellations, each at whatever place its handler happens to be.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from stagetrio.watchdog import Watchdog, no_preempt, open_watchdog

ROUNDS = 30

LIBRARY = '''
import contextlib
import threading

class Counter:
    def __init__(self):
        self._lock = threading.Lock()
        self.value = 0

    def use(self):
        with self._lock:
            value = self.value
            for _ in range(50):
                pass
            self.value = value + 1

    def free(self):
        return not self._lock.locked()

class Reentrant:
    """What an RLock guards is safe from other threads, not from other tasks of its own thread."""

    def __init__(self):
        self._lock = threading.RLock()
        self._inside = 0
        self.together = False
        self.value = 0

    def use(self):
        with self._lock:
            self._inside += 1
            self.together = self.together or self._inside > 1
            for _ in range(50):
                pass
            self.value += 1
            self._inside -= 1

    def free(self):
        return self._inside == 0 and not self.together

class Pool:
    """Lends by a ``@contextmanager``."""

    def __init__(self):
        self.lent = 0
        self.value = 0

    @contextlib.contextmanager
    def borrow(self):
        self.lent += 1
        for _ in range(20):
            pass
        try:
            yield
        finally:
            for _ in range(20):
                pass
            self.lent -= 1

    def use(self):
        with self.borrow():
            self.value += 1

    def free(self):
        return self.lent == 0
'''


@pytest.fixture
def library(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that belongs neither to the handlers nor to the watchdog."""
    path = tmp_path / "some_library.py"
    path.write_text(LIBRARY)
    spec = importlib.util.spec_from_file_location("some_library", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["some_library"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["some_library"]


async def storm(watchdog: Watchdog, use: Callable[[], object], handlers: int = 2) -> int:
    """Run handlers that use something without ever awaiting, and cancel each after a few passes; return the stops."""

    async def handler() -> None:
        while True:
            use()

    async def cancelled_after(passes: int) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                watchdog.start_soon(nursery, handler)
                for _ in range(passes):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    before = watchdog.statistics().forced
    for number in range(ROUNDS):
        async with trio.open_nursery() as nursery:
            for which in range(handlers):
                nursery.start_soon(cancelled_after, 2 + (number + 3 * which) % 7)
    return watchdog.statistics().forced - before


@pytest.mark.parametrize("kind", ["Counter", "Reentrant", "Pool"])
async def test_a_librarys_locks_and_resources_survive(library: ModuleType, kind: str) -> None:
    """Nothing is ever stopped in a module that is not declared, so what it guards stays guarded."""
    thing: Any = getattr(library, kind)()
    async with open_watchdog(quantum=0.0001) as watchdog:
        assert await storm(watchdog, thing.use) > ROUNDS / 2
    assert thing.value > 0
    assert thing.free()


async def test_a_declared_librarys_resources_survive(library: ModuleType) -> None:
    """Where handlers are stopped, and cancelled, inside of the library too, it still gets back what it lends."""
    pool = library.Pool()
    async with open_watchdog(quantum=0.0001, preemptible=(library,)) as watchdog:
        assert await storm(watchdog, pool.use) > ROUNDS / 2
    assert pool.value > 0
    assert pool.free()


async def test_a_lock_of_the_handlers_module_needs_no_preempt() -> None:
    """With it, a lock of one's own is as safe as anybody's: held and released within one stretch."""
    lock = threading.Lock()
    value = 0

    def use() -> None:
        nonlocal value
        with no_preempt(), lock:
            before = value
            for _ in range(50):
                pass
            value = before + 1

    async with open_watchdog(quantum=0.0001) as watchdog:
        assert await storm(watchdog, use) > ROUNDS / 2
    assert value > 0
    assert not lock.locked()


async def test_resources_of_the_handlers_module_do_not_leak() -> None:
    """By ``with`` of a class, by ``@contextmanager``, by ``try`` and ``finally``: each given back when cancelled."""
    lent = {"class": 0, "generator": 0, "finally": 0}
    used = 0

    class Resource:
        def __enter__(self) -> None:
            lent["class"] += 1

        def __exit__(self, *args: object) -> None:
            for _ in range(20):
                pass
            lent["class"] -= 1

    @contextlib.contextmanager
    def resource() -> Iterator[None]:
        lent["generator"] += 1
        try:
            yield
        finally:
            for _ in range(20):
                pass
            lent["generator"] -= 1

    def use() -> None:
        nonlocal used
        with Resource():
            with resource():
                lent["finally"] += 1
                try:
                    for _ in range(50):
                        used += 1
                finally:
                    for _ in range(20):
                        pass
                    lent["finally"] -= 1

    async with open_watchdog(quantum=0.0001) as watchdog:
        assert await storm(watchdog, use) > ROUNDS / 2
    assert used > 0
    assert lent == {"class": 0, "generator": 0, "finally": 0}


async def test_a_declared_librarys_lock_is_waited_for_without_a_deadlock(library: ModuleType) -> None:
    """Who declares a module with a lock lets handlers be stopped while they hold it; one that waits makes room."""
    counter = library.Counter()

    async def handler() -> None:
        for _ in range(300):
            counter.use()

    async with open_watchdog(quantum=0.0001, preemptible=(library,)) as watchdog, trio.open_nursery() as nursery:
        for _ in range(3):
            watchdog.start_soon(nursery, handler)
    assert counter.free()
    assert counter.value == 900
    assert watchdog.statistics().forced > 0
