"""Where a handler is not stopped: in others' modules, at the edges of contexts, inside of C code, in its own masks.

Each test has a handler that holds the loop inside of something until a checkpoint was had there, or has been put off
several times, and a witness that looks at every pass. A deny list of modules, or a switch wherever the signal lands,
fails most of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from stagetrio.watchdog import Watchdog, no_preempt, open_watchdog

THIRD_MODULE = '''
import threading

class Counter:
    """What a metrics library has: a lock of its own, held by ``with``."""

    def __init__(self, hold):
        self._lock = threading.Lock()
        self._hold = hold
        self.value = 0

    def increment(self):
        with self._lock:
            value = self.value
            self._hold()
            self.value = value + 1

def hold(done):
    while not done():
        pass

async def call(fn, *args):
    return await fn(*args)

def decorated(fn):
    async def wrapper(*args):
        return await fn(*args)
    wrapper.__wrapped__ = fn
    return wrapper

def apply(fn, *args):
    return fn(*args)
'''


@pytest.fixture
def third(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that belongs neither to the handler nor to the watchdog."""
    path = tmp_path / "third_module.py"
    path.write_text(THIRD_MODULE)
    spec = importlib.util.spec_from_file_location("third_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["third_module"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["third_module"]


@pytest.fixture
async def watchdog() -> AsyncIterator[Watchdog]:
    """A watchdog with a short quantum."""
    async with open_watchdog(quantum=0.001) as watchdog:
        yield watchdog


class Witness:
    """Runs a handler, and beside it a task that notes whether it ever ran while the handler was inside of something.

    Handlers hold the loop there until `done`: somebody else ran, or a checkpoint was put off several times.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.inside = False
        self.seen = False
        self._put_off = 0
        self._rounds = 0

    def done(self) -> bool:
        """Whether the handler has held the loop for long enough."""
        self._rounds += 1
        if self._rounds % 5000:
            return self.seen
        return self.watchdog.statistics().put_off > self._put_off + 5 or self._rounds > 5_000_000

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """Mark what must not be seen from outside."""
        self.inside = True
        self._put_off = self.watchdog.statistics().put_off
        try:
            yield
        finally:
            self.inside = False

    async def run(self, handler: Callable[..., Awaitable[object]], *args: object) -> bool:
        """Run the handler; return whether anybody else ran while it was inside."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            await self.watchdog.run(handler, *args)
            nursery.cancel_scope.cancel()
        return self.seen

    async def _watch(self) -> None:
        while True:
            self.seen |= self.inside
            await trio.lowlevel.checkpoint()


async def test_a_handler_is_stopped_in_its_own_functions(watchdog: Watchdog) -> None:
    """The control: without anything special on the stack, the witness sees the inside."""
    witness = Witness(watchdog)

    def deeper() -> None:
        while not witness.done():
            pass

    async def handler() -> None:
        with witness.within():
            deeper()

    assert await witness.run(handler)


async def test_a_handler_is_not_stopped_in_a_third_module(watchdog: Watchdog, third: ModuleType) -> None:
    """Neither in its functions, nor in the handler's own when that module has called them back."""
    witness = Witness(watchdog)

    def own() -> None:
        while not witness.done():
            pass

    async def handler() -> None:
        with witness.within():
            third.hold(witness.done)
        with witness.within():
            third.apply(own)

    assert not await witness.run(handler)
    assert watchdog.statistics().put_off >= 6


@pytest.mark.parametrize("declared", ["third_module", "module itself"])
async def test_a_module_can_be_declared(third: ModuleType, declared: str) -> None:
    """In what ``preemptible`` names, by name or as module, a handler is stopped like in its own."""
    async with open_watchdog(
        quantum=0.001, preemptible=(third if declared == "module itself" else declared,)
    ) as watchdog:
        witness = Witness(watchdog)

        async def handler() -> None:
            with witness.within():
                third.hold(witness.done)

        assert await witness.run(handler)


async def test_a_package_stands_for_its_modules_and_not_for_its_namesakes(third: ModuleType) -> None:
    """``preemptible=("third",)`` covers ``third`` and ``third.x``, not ``third_module``."""
    third.__dict__["__name__"] = "third.inner"
    async with open_watchdog(quantum=0.001, preemptible=("third",)) as watchdog:
        witness = Witness(watchdog)

        async def handler() -> None:
            with witness.within():
                third.hold(witness.done)

        assert await witness.run(handler)
        third.__dict__["__name__"] = "third_module"
        witness.seen = False
        assert not await witness.run(handler)


@pytest.mark.parametrize("name", ["__enter__", "__exit__", "__del__", "__eq__", "__hash__"])
async def test_a_handler_is_not_stopped_in_certain_methods(watchdog: Watchdog, name: str) -> None:
    """Contexts are entered and left whole; so are finalizers, and what containers call in mid-operation."""
    witness = Witness(watchdog)

    def method(self: object, *args: object) -> bool | int:
        with witness.within():
            while not witness.done():
                pass
        return 1

    thing = type("Thing", (), {"__enter__": lambda self: self, "__exit__": lambda *_: None, "__hash__": lambda _: 1})
    setattr(thing, name, method)
    method.__code__ = method.__code__.replace(co_name=name)

    async def handler() -> None:
        with thing():
            pass
        {thing(): 1}.get(thing())

    assert not await witness.run(handler)


@pytest.mark.parametrize("name", ["__aenter__", "__aexit__"])
async def test_a_handler_is_not_stopped_in_async_contexts_edges(watchdog: Watchdog, name: str) -> None:
    """What was acquired on the way in belongs to nobody yet."""
    witness = Witness(watchdog)

    class Thing:
        async def __aenter__(self) -> None:
            if name == "__aenter__":
                self.hold()

        async def __aexit__(self, *args: object) -> None:
            if name == "__aexit__":
                self.hold()

        def hold(self) -> None:
            with witness.within():
                while not witness.done():
                    pass

    async def handler() -> None:
        async with Thing():
            pass

    assert not await witness.run(handler)


async def test_a_handler_is_not_stopped_in_the_edges_of_a_contextmanager(watchdog: Watchdog) -> None:
    """The generator is the handler's own, but it is contextlib that runs it."""
    witness = Witness(watchdog)

    @contextlib.contextmanager
    def resource() -> Iterator[None]:
        with witness.within():
            while not witness.done():
                pass
        yield
        with witness.within():
            while not witness.done():
                pass

    async def handler() -> None:
        with resource():
            pass

    assert not await witness.run(handler)


async def test_a_handler_is_not_stopped_while_a_list_is_sorted(watchdog: Watchdog) -> None:
    """``list.sort`` empties the list while it works; a key function of the handler's own is inside of that."""
    witness = Witness(watchdog)
    shared = [3, 1, 2]
    lengths: set[int] = set()

    async def look() -> None:
        while True:
            lengths.add(len(shared))
            await trio.lowlevel.checkpoint()

    def key(number: int) -> int:
        while not witness.done():
            pass
        return number

    async def handler() -> None:
        with witness.within():
            shared.sort(key=key)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await watchdog.run(handler)
        nursery.cancel_scope.cancel()
    assert shared == [1, 2, 3]
    assert lengths <= {3}
    assert watchdog.statistics().put_off > 5


@pytest.mark.parametrize(
    "call",
    [
        lambda key: sum(key(number) for number in range(3)),
        lambda key: list(map(key, range(3))),
        lambda key: sorted(range(3), key=key),
        lambda key: ",".join(str(key(number)) for number in range(3)),
        functools.partial(lambda key: key(3)),
        functools.lru_cache(lambda key: key(3)),
        lambda key: max((key(number) for number in range(3)), default=0),
    ],
)
async def test_c_code_that_harms_nobody_does_not_protect(watchdog: Watchdog, call: Callable[[Any], Any]) -> None:
    """A handler that burns its time in ``sum`` over a generator is stopped there: what C builds is its own."""
    witness = Witness(watchdog)

    def key(number: int) -> int:
        while not witness.done():
            pass
        return number

    async def handler() -> None:
        with witness.within():
            call(key)

    assert await witness.run(handler)


async def test_sleeping_the_blocking_way_is_interrupted(watchdog: Watchdog) -> None:
    """``time.sleep`` holds the loop and asks for signals: others run before it is over."""
    witness = Witness(watchdog)

    async def handler() -> None:
        with witness.within():
            time.sleep(0.05)  # noqa: ASYNC251 – that is the point

    assert await witness.run(handler)


async def test_a_handler_that_waits_for_a_lock_lets_others_run(watchdog: Watchdog) -> None:
    """Two handlers share a lock of their own module: the one that waits does not keep the one that holds it away."""
    lock = threading.Lock()
    order: list[str] = []

    async def holder() -> None:
        with lock:
            order.append("held")
            while "waiting" not in order:
                pass
        order.append("released")

    async def waiter() -> None:
        while "held" not in order:
            pass
        order.append("waiting")
        with lock:
            order.append("acquired")

    async with trio.open_nursery() as nursery:
        watchdog.start_soon(nursery, holder)
        watchdog.start_soon(nursery, waiter)
    assert order[:2] == ["held", "waiting"]
    assert sorted(order[2:]) == ["acquired", "released"]


async def test_two_handlers_may_write_to_one_file(watchdog: Watchdog, tmp_path: Path) -> None:
    """A buffered file flushes in C code that asks for signals while it holds its lock: nobody is stopped in it."""
    letters = "abc"
    written = dict.fromkeys(letters, 0)
    with (tmp_path / "log").open("w", buffering=16) as file:

        async def handler(letter: str) -> None:
            while min(written.values()) < 200:
                file.write(letter * 40 + "\n")
                written[letter] += 1

        async with trio.open_nursery() as nursery:
            for letter in letters:
                watchdog.start_soon(nursery, handler, letter)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == sorted(letter * 40 for letter in letters for _ in range(written[letter]))


async def test_no_preempt_is_honoured_until_its_outermost_end(watchdog: Watchdog) -> None:
    """Inner blocks change nothing, and the checkpoint that was due is had at the end of the outer one."""
    witness = Witness(watchdog)
    seen: list[bool] = []

    async def handler() -> None:
        with no_preempt():
            with witness.within():
                with no_preempt():
                    while not witness.done():
                        pass
                while not witness.done():
                    pass
            seen.append(witness.seen)
            witness.inside = True
        witness.inside = False

    assert await witness.run(handler)
    assert seen == [False]


async def test_an_exception_leaves_no_preempt_as_it_is(watchdog: Watchdog) -> None:
    """A block that raises is not stopped at its end, and the handler can be stopped again afterwards."""
    witness = Witness(watchdog)
    ended: list[bool] = []

    async def handler() -> None:
        with contextlib.suppress(KeyError), no_preempt(), witness.within():
            while not witness.done():
                pass
            raise KeyError
        ended.append(witness.seen)
        with witness.within():
            while not witness.done():
                pass

    assert await witness.run(handler)
    assert ended == [False]


def test_no_preempt_outside_of_a_handler_does_nothing() -> None:
    """Library code may use it without knowing where it runs."""
    with no_preempt(), no_preempt():
        pass


@pytest.mark.parametrize("kind", ["partial", "method", "object", "decorated", "plain function"])
async def test_the_handlers_own_frame_is_found(watchdog: Watchdog, third: ModuleType, kind: str) -> None:
    """Behind partials, methods, objects, third modules' decorators, and functions that return a coroutine."""
    witness = Witness(watchdog)

    async def function(*args: object) -> None:
        with witness.within():
            while not witness.done():
                pass

    class Handler:
        async def method(self) -> None:
            await function()

        async def __call__(self) -> None:
            await function()

    handlers: dict[str, Callable[[], Awaitable[None]]] = {
        "partial": functools.partial(function, 1),
        "method": Handler().method,
        "object": Handler(),
        "decorated": third.decorated(function),
        "plain function": lambda: function(1),
    }
    assert await witness.run(handlers[kind])


async def test_a_handler_called_back_by_a_third_module_is_inside_of_it(watchdog: Watchdog, third: ModuleType) -> None:
    """Recursion through a library does not make the library's frames the handler's."""
    witness = Witness(watchdog)

    async def handler(depth: int) -> None:
        if depth:
            await third.call(handler, depth - 1)
            return
        with witness.within():
            while not witness.done():
                pass

    assert not await witness.run(handler, 1)


async def test_a_handler_that_is_often_late_is_reported(
    watchdog: Watchdog, third: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, by name, with the place that it could not be stopped in; and it is counted."""
    witness = Witness(watchdog)

    async def stubborn() -> None:
        while sum(watchdog.statistics().late.values()) < 25:
            with witness.within():
                third.hold(witness.done)
            await trio.lowlevel.checkpoint()

    await watchdog.run(stubborn)
    (count,) = watchdog.statistics().late.values()
    assert count >= 20
    (record,) = (record for record in caplog.records if "preemptible=" in record.message)
    assert "stubborn" in record.message
    assert "third_module" in record.message
