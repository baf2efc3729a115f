"""What a server is given wrongly is named at once, and not when the first connection or message ends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial, wraps
from math import inf
from typing import Any, cast

import pytest
import trio

from stagetrio.admission import Admission
from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.server import StageServer, serve_stage
from stagetrio.sockets import open_listeners


async def echo(peer: Peer[Any], message: Any) -> Any:
    return message


class Echo:
    """An object whose call is an async function."""

    async def __call__(self, peer: Peer[Any], message: Any) -> Any:
        return message


@wraps(echo)
def wrapped(peer: Peer[Any], message: Any) -> Awaitable[Any]:
    return echo(peer, message)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"handler": 3}, TypeError, "handler must be an async function, not 3"),
        ({"listeners": 3}, TypeError, "listeners must be a sequence of listeners, as of open_listeners, not 3"),
        ({"listeners": ["tcp://h:1"]}, TypeError, "listeners must be a sequence of listeners, .* not ['tcp://h:1']"),
        ({"listeners": []}, ValueError, "listeners must be one at least, not []"),
        ({"framing": 3}, TypeError, "framing must be a Framing, not 3"),
        ({"framing": LengthPrefixed}, TypeError, "framing must be a Framing, not <class 'stagetrio.framing.Len"),
        ({"codec": [int]}, TypeError, "codec must be a stagetrio.codec.Codec | None, not [<class 'int'>]"),
        ({"limits": 3}, TypeError, "limits must be a PeerLimits, not 3"),
        ({"admission": 3}, TypeError, "admission must be a stagetrio.admission.Admission | None, not 3"),
        ({"proxies": 3}, TypeError, "proxies must be a stagetrio.proxies.Proxies | None, not 3"),
        ({"input_rates": 3}, TypeError, "input_rates must be a stagetrio.inflow.InputRates | None, not 3"),
        ({"watchdog": 3}, TypeError, "watchdog must be a stagetrio.watchdog.Watchdog | None, not 3"),
        ({"on_connect": 3}, TypeError, "on_connect must be an async function, not 3"),
        ({"on_disconnect": 3}, TypeError, "on_disconnect must be an async function, not 3"),
        *(
            ({name: 3}, TypeError, f"{name} must be a sync function, not 3")
            for name in ("flow", "weight", "cost", "handler_of", "on_error", "on_refused", "ping")
        ),
        ({"on_error": echo}, TypeError, "on_error must be a sync function, not <function echo"),
        ({"max_connections": "a"}, TypeError, "max_connections must be a number, not 'a'"),
        ({"max_connections": 0}, ValueError, "max_connections must be >= 1, not 0"),
        ({"workers": 1.5}, TypeError, "workers must be an int, not 1.5"),
        ({"workers": 0}, ValueError, "workers must be >= 1, not 0"),
        ({"max_running": 0}, ValueError, "max_running must be >= 1, not 0"),
        ({"tick": -1}, ValueError, "tick must be >= 0, not -1"),
        ({"tick": inf}, ValueError, "tick must be finite, not inf"),
    ],
)
async def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """Nothing is served, and the message has the argument's own name and its value."""
    (listener,) = await open_listeners("tcp://127.0.0.1:0")
    async with listener:
        pattern = words.replace("[", r"\[").replace("|", r"\|")
        with pytest.raises(error, match=pattern):
            await serve_stage(**{"handler": echo, "listeners": [listener], **options})


@pytest.mark.parametrize(
    "handler",
    [Echo(), partial(echo), wrapped, lambda *both: echo(*both)],
    ids=["object", "partial", "wrapped", "lambda"],
)
async def test_what_is_called_like_an_async_function_is_a_handler(handler: Callable[..., Any]) -> None:
    """It answers."""
    listeners = await open_listeners("tcp://127.0.0.1:0")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_stage, handler, listeners))
            client = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
            await client.send_all(b"\0\0\0\1a")
            assert await client.receive_some() == b"\0\0\0\1a"
            nursery.cancel_scope.cancel()
            await client.aclose()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"flow": lambda peer: ["x"]}, TypeError, r"^flow must be hashable, not \['x'\]$"),
        ({"weight": lambda flow: 0}, ValueError, "^weight must be finite and above 0, not 0$"),
        ({"flow": lambda peer: 1 / 0}, ZeroDivisionError, "division by zero"),
    ],
)
async def test_the_server_ends_by_what_its_owners_functions_did_wrong(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """By that and nothing that follows from it; a connection counted in is counted out."""
    listeners = await open_listeners("tcp://127.0.0.1:0")
    admission = Admission()
    with trio.fail_after(30), pytest.RaisesGroup(pytest.RaisesExc(error, match=words), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_stage, echo, listeners, admission=admission, **options))
            async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as client:
                await client.receive_some()
                await trio.sleep_forever()
    assert admission.statistics().hosts == 0


async def test_a_flow_that_cannot_be_hashed_leaves_the_peer_where_it_is() -> None:
    """A handler that sets one gets the error, and the messages that follow are served."""
    listeners = await open_listeners("tcp://127.0.0.1:0")
    errors: list[Exception] = []

    async def move(peer: Peer[Any], message: bytes) -> bytes:
        flow = peer.flow
        try:
            peer.flow = cast("Any", ["x"])
        except TypeError as error:
            errors.append(error)
        assert peer.flow == flow
        return message

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            server: StageServer[Any] = await nursery.start(partial(serve_stage, move, listeners))
            client = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
            for _ in range(2):
                await client.send_all(b"\0\0\0\1a")
                assert await client.receive_some() == b"\0\0\0\1a"
            await client.aclose()
            await server.drain(10)
    assert [str(error) for error in errors] == ["flow must be hashable, not ['x']"] * 2
