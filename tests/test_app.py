"""An app is what its decorators say, and none of its functions can end it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.app import App
from stagetrio.client import RequestFailed, open_client
from stagetrio.codec import Done
from stagetrio.limiter import Overloaded
from stagetrio.peer import Peer
from stagetrio.remote import open_remote
from stagetrio.rules import PeerLimits


@attrs.frozen
class Ask:
    text: str


@attrs.frozen
class Answer:
    text: str


@attrs.frozen
class News:
    text: str


@asynccontextmanager
async def serving(app: App, **options: Any) -> AsyncIterator[str]:
    """Serve an app on a free port until the block ends."""
    async with trio.open_nursery() as nursery:
        (address,) = await nursery.start(lambda task_status: app.serve(
            "tcp://127.0.0.1:0", task_status=task_status, **options
        ))
        yield str(address)
        nursery.cancel_scope.cancel()


async def test_messages_reach_their_handlers_and_replies_come_back() -> None:
    """The wire knows the messages handled, those their handlers return, and those declared as sent."""
    app = App("test", sends=[News])

    @app.on(Ask)
    async def ask(peer: Peer[Any], message: Ask) -> Answer | None:
        app.broadcast(News(message.text))
        return Answer(message.text.upper()) if message.text else None

    async with serving(app) as address, open_client(address, app.codec) as client:
        assert await client.ask(Ask("hello")) == Answer("HELLO")
        assert await client.ask(Ask("")) == Done()
        assert [await client.receive(), await client.receive()] == [News("hello"), News("")]
        assert len(app.peers) == 1
        assert app.statistics().server.stage.handled == 2


async def test_a_message_nobody_handles_ends_its_connection() -> None:
    """A client that sends what only the server sends has mistaken its side."""
    app = App("test", sends=[News])
    async with serving(app) as address, open_client(address, app.codec) as client:
        with pytest.raises(trio.BrokenResourceError, match="News is not a message for this server"):
            await client.ask(News("x"))


async def test_failures_are_told_counted_and_logged_once_per_cause(caplog: pytest.LogCaptureFixture) -> None:
    """The peer gets `Failed`, the log one traceback per cause, and the app goes on."""
    app = App("test")

    @app.on(Ask)
    async def ask(peer: Peer[Any], message: Ask) -> None:
        if message.text == "key":
            raise KeyError("k")
        if message.text == "value":
            raise ExceptionGroup("group", [ValueError("v")])

    async with serving(app) as address, open_client(address, app.codec) as client:
        for text in ("key", "value", "key", "key"):
            with pytest.raises(RequestFailed, match="the handler failed"):
                await client.ask(Ask(text))
        assert await client.ask(Ask("fine")) == Done()
        counts = app.statistics().failures
    assert sorted(counts.values()) == [1, 3]
    assert all(" in ask (" in cause or cause.startswith("ValueError") for cause in counts)
    assert len(caplog.records) == 2
    assert caplog.records[0].exc_info
    assert caplog.records[0].message.startswith("test: KeyError in ask (")


async def test_a_ticket_bounds_a_message_and_refuses_the_rest(autojump_clock: MockClock) -> None:
    """``ticket=`` takes one per message; when the line is full, the message is refused and no failure."""
    app = App("test")
    door = app.ticket("door", 1, max_waiting=1)
    inside = most = 0

    @app.on(Ask, ticket=door)
    async def ask(peer: Peer[Any], message: Ask) -> Answer:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await trio.sleep(1)
        inside -= 1
        return Answer("in")

    async with serving(app) as address:
        outcomes: list[str] = []

        async def enter() -> None:
            async with open_client(address, app.codec) as client:
                try:
                    outcomes.append((await client.ask(Ask("x"))).text)
                except Overloaded as refused:
                    outcomes.append(refused.reason)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(enter)
        assert sorted(outcomes) == ["in", "in", "waiting", "waiting"]
        assert most == 1
        assert app.statistics().tickets["door"].granted == 2


async def test_jobs_keep_to_their_grid(autojump_clock: MockClock) -> None:
    """Starts do not drift, a long call leaves out what falls into it, and a call that raises is not the last."""
    app = App("test")
    starts: list[float] = []

    @app.every(1.0)
    async def job() -> None:
        starts.append(trio.current_time() - begun)
        if len(starts) == 2:
            await trio.sleep(2.5)
        if len(starts) == 3:
            raise ValueError("once")
        await trio.sleep(0.3)

    begun = trio.current_time()
    async with serving(app):
        await trio.sleep(7.5)
        assert list(app.statistics().failures.values()) == [1]
    assert starts == pytest.approx([0, 1, 4, 5, 6, 7], abs=1e-6)


@pytest.mark.parametrize("seconds", [0.1, 0.3, 1 / 7])
async def test_no_point_of_the_grid_comes_twice(autojump_clock: MockClock, seconds: float) -> None:
    """However the multiples of an interval are rounded, and wherever on the clock they begin."""
    app = App("test")
    starts: list[float] = []

    @app.every(seconds)
    async def job() -> None:
        starts.append(trio.current_time())

    await trio.sleep(1234.567)
    async with serving(app):
        await trio.sleep(99.5 * seconds)
    assert starts == pytest.approx([starts[0] + n * seconds for n in range(100)])


async def test_hooks_and_lifespan_enclose_what_they_should() -> None:
    """The lifespan is open before the first connection and after the last; hooks see each peer come and go."""
    app = App("test")
    events: list[str] = []
    gone = trio.Event()

    @app.lifespan
    @asynccontextmanager
    async def database() -> AsyncIterator[None]:
        events.append("opened")
        yield
        events.append("closed")

    @app.on_connect
    async def connected(peer: Peer[Any]) -> None:
        events.append("connected")

    @app.on_disconnect
    async def disconnected(peer: Peer[Any]) -> None:
        events.append("disconnected")
        gone.set()

    @app.on(Ask)
    async def ask(peer: Peer[Any], message: Ask) -> None:
        events.append("asked")

    async with serving(app) as address:
        async with open_client(address, app.codec) as client:
            await client.ask(Ask("x"))
        await gone.wait()
        await app.drain(1)
        await wait_all_tasks_blocked()
    assert events == ["opened", "connected", "asked", "disconnected", "closed"]


async def test_procedures_are_served_where_they_are_told_to(tmp_path: Any) -> None:
    """Other processes call them on addresses of their own; clients cannot."""
    app = App("test")

    @app.procedure
    async def add(one: int, other: int) -> int:
        return one + other

    inner = f"unix://{tmp_path}/inner.sock"
    async with serving(app, procedures_at=[inner]), open_remote(inner) as remote:
        assert await remote.call(add, 1, 2) == 3


async def test_handlers_are_forced_only_when_the_app_says_so() -> None:
    """With a quantum, two handlers that spin until both have begun take turns; the budget cuts off what never ends."""
    app = App("test", quantum=0.002, budget=0.1)
    begun = 0

    @app.on(Ask)
    async def ask(peer: Peer[Any], message: Ask) -> Answer:
        nonlocal begun
        begun += 1
        while begun < 2 or message.text == "forever":
            pass
        return Answer(message.text)

    async with serving(app) as address, open_client(address, app.codec) as one, open_client(address, app.codec) as two:
        answers: list[Any] = []

        async def put(client: Any, text: str) -> None:
            answers.append(await client.ask(Ask(text)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, one, "one")
            nursery.start_soon(put, two, "two")
        assert sorted(answer.text for answer in answers) == ["one", "two"]
        with pytest.raises(RequestFailed, match="budget"):
            await one.ask(Ask("forever"))


async def test_drain_finishes_what_was_received() -> None:
    """Draining answers, says farewell and ends ``serve``; the app can be served again."""
    app = App("test")
    proceed = trio.Event()

    @app.on(Ask)
    async def ask(peer: Peer[Any], message: Ask) -> Answer:
        await proceed.wait()
        return Answer("late")

    async with serving(app) as address:
        async with open_client(address, app.codec) as client, trio.open_nursery() as nursery:

            async def check() -> None:
                assert await client.ask(Ask("x")) == Answer("late")

            nursery.start_soon(check)
            await wait_all_tasks_blocked(0.01)
            nursery.start_soon(app.drain, 5)
            await wait_all_tasks_blocked(0.01)
            proceed.set()
        assert client.close_reason == "the server shuts down"
    async with serving(app) as address, open_client(address, app.codec) as client:
        assert await client.ask(Ask("x")) == Answer("late")


async def test_of_two_that_begin_to_serve_an_app_one_is_told() -> None:
    """Also where neither listens yet."""
    app = App("test")
    refused = 0

    async def serve() -> None:
        nonlocal refused
        try:
            await app.serve("tcp://127.0.0.1:0")
        except RuntimeError:
            refused += 1
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        nursery.start_soon(serve)
    assert refused == 1
    async with serving(app):
        assert app.peers == ()


async def test_an_app_is_served_once_at_a_time_and_only_then_has_peers() -> None:
    """What needs a running server says so."""
    app = App("test")
    with pytest.raises(RuntimeError, match="is not being served"):
        app.statistics()
    async with serving(app):
        with pytest.raises(RuntimeError, match="is being served already"):
            await app.serve("tcp://127.0.0.1:0")
    with pytest.raises(ValueError, match="at least one place"):
        await app.serve()
    with pytest.raises(ValueError, match="unknown scheme"):
        await app.serve("http://x:1")


def test_an_app_can_be_described_without_serving() -> None:
    """The description names everything that was declared."""
    app = App("shop", sends=[News])
    app.ticket("till", 3)

    @app.on(Ask)
    async def ask(peer: Peer[Any], message: Ask) -> Answer | None: ...

    @app.every(2.5)
    async def tidy() -> None: ...

    @app.procedure
    async def price(of: str) -> int:
        return 1

    @app.on_connect
    async def hello(peer: Peer[Any]) -> None: ...

    description = app.describe()
    assert description.name == "shop"
    assert list(description.messages) == ["Ask"]
    assert {"Answer", "News"} <= set(description.replies)
    assert description.tickets == {"till": 3}
    assert list(description.jobs.values()) == [2.5]
    assert description.procedures == ["price"]
    assert description.hooks[0].endswith("hello")


def test_wrong_declarations_are_named() -> None:
    """Mistakes are found where they are made."""
    app = App("test")

    @app.on(Ask)
    async def ask(peer: Peer[Any], message: Ask) -> None: ...

    app.ticket("till", 1)
    with pytest.raises(ValueError, match="name must be a non-empty str, not ''"):
        App("")
    with pytest.raises(TypeError, match="message_type must be an attrs class, not <class 'int'>"):
        app.on(int)
    with pytest.raises(ValueError, match="Ask has a handler already"):
        app.on(Ask)(ask)
    with pytest.raises(TypeError, match="a handler must be an async function"):
        app.on(News)(lambda peer, message: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="a job must be an async function"):
        app.every(1)(print)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="a hook must be an async function"):
        app.on_connect(print)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="there is a ticket 'till' already"):
        app.ticket("till", 1)
    with pytest.raises(ValueError, match="seconds must be > 0, not 0"):
        app.every(0)
    with pytest.raises(TypeError, match=r"ticket must be what app.ticket\(...\) has returned, not 'till'"):
        app.on(News, ticket="till")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"seconds must be a number, not <function .*; write for instance @app.every"):
        app.every(ask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seconds must be a number, not '1'"):
        app.every("1")  # type: ignore[arg-type]


def test_functions_must_take_what_they_are_called_with() -> None:
    """A wrong number of parameters is found when the function is declared, and not at the first message."""
    app = App("test")

    async def nothing() -> None: ...

    async def one(peer: object) -> None: ...

    with pytest.raises(TypeError, match=r"a handler must take \(peer, message\), not \(peer: 'object'\) -> 'None'"):
        app.on(Ask)(one)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"a job must take \(\), not \(peer: 'object'\)"):
        app.every(1)(one)  # type: ignore[type-var]
    for hook in (app.on_connect, app.on_disconnect):
        with pytest.raises(TypeError, match=r"a hook must take \(peer\), not \(\)"):
            hook(nothing)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"a lifespan must take \(\), not \(peer: 'object'\)"):
        app.lifespan(asynccontextmanager(one))  # type: ignore[arg-type, type-var]


@pytest.mark.parametrize("kind", ["async generator", "coroutine", "generator", "value"])
def test_a_lifespan_that_is_no_context_manager_is_told_how_to_become_one(kind: str) -> None:
    """Whatever stands there without its decorator."""

    async def generates() -> AsyncIterator[None]:
        yield

    async def returns() -> None: ...

    def yields() -> Iterator[None]:
        yield

    wrong: Any = {"async generator": generates, "coroutine": returns, "generator": yields, "value": 3}[kind]
    mend = "; write @asynccontextmanager between @app.lifespan and the function"
    with pytest.raises(TypeError, match=f"a lifespan must be .* not {wrong!r}{mend}".replace("(", r"\(")):
        App("test").lifespan(wrong)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"workers": -3}, ValueError, "workers must be >= 1, not -3"),
        ({"workers": 1.5}, TypeError, "workers must be an int, not 1.5"),
        ({"max_items": 0}, ValueError, "max_items must be >= 1, not 0"),
        ({"max_connections": 0}, ValueError, "max_connections must be >= 1, not 0"),
        ({"max_frame_bytes": 0}, ValueError, "max_frame_bytes must be >= 1, not 0"),
        ({"max_frame_bytes": 2**32}, ValueError, r"max_frame_bytes must be below 2\*\*32, not 4294967296"),
        ({"max_handling": 0}, ValueError, "max_handling must be > 0, not 0"),
        ({"flow": "address"}, TypeError, "flow must be a function of a peer, not 'address'"),
        ({"limits": 3}, TypeError, "limits must be a PeerLimits, not 3"),
        ({"limits": PeerLimits(ping_after=1)}, ValueError, "limits.ping_after must be inf, as an App .*, not 1"),
        ({"quantum": 0}, ValueError, "quantum must be > 0, not 0"),
        ({"budget": "1"}, TypeError, "budget must be a number, not '1'"),
        ({"budget": 1.0}, ValueError, "budget is kept only with a finite quantum: budget=1.0, quantum=inf"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """At once, and not when the app is served."""
    with pytest.raises(error, match=words):
        App("test", **options)


def _handled_by(handler: Any) -> App:
    app = App("test")
    app.on(Ask)(handler)
    return app


async def _into_nothing(peer: Peer[Any], message: Ask) -> Missing:  # type: ignore[name-defined]  # noqa: F821
    ...


async def _into_int(peer: Peer[Any], message: Ask) -> int | None: ...


async def _into_list(peer: Peer[Any], message: Ask) -> list[Answer]: ...


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (_into_nothing, "what _into_nothing returns, 'Missing', cannot be looked up: name 'Missing' is not"),
        (_into_int, "what _into_int returns must be an attrs class or None, not <class 'int'>"),
        (_into_list, r"what _into_list returns must be an attrs class or None, not list\["),
    ],
)
def test_what_a_handler_says_it_returns_must_be_a_message(handler: Any, words: str) -> None:
    """Found when the app is described, as by --check, and not when the first reply is sent."""
    with pytest.raises(TypeError, match=words):
        _handled_by(handler).describe()


async def _of_unknown(peer: Missing, message: Ask) -> Answer | None:  # type: ignore[name-defined]  # noqa: F821
    ...


async def _into_any(peer: Peer[Any], message: Ask) -> Any: ...


async def _into_object(peer: Peer[Any], message: Ask) -> object: ...


@pytest.mark.parametrize(
    ("handler", "replies"), [(_of_unknown, {"Answer"}), (_into_any, set()), (_into_object, set())]
)
def test_only_what_a_handler_returns_is_looked_up(handler: Any, replies: set[str]) -> None:
    """What its parameters are may be known to the type checker only, and what it returns may be left open."""
    assert set(_handled_by(handler).describe().replies) - {"Done", "Refused", "Failed", "Closed"} == replies
