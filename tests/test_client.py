"""A client's calls are answered, refused or failed, each in its own way."""

from __future__ import annotations

import ssl
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from served import CODEC, FRAMING, Say, serving

from stagetrio.client import RequestFailed, open_client
from stagetrio.codec import Done
from stagetrio.limiter import Overloaded
from stagetrio.peer import Peer
from stagetrio.server import serve_stage
from stagetrio.sockets import open_listeners
from stagetrio.tls import secure

CERTIFICATE = Path(__file__).parent / "localhost.pem"


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_a_client_asks_sends_and_listens(kind: str) -> None:
    """Replies find their calls in any order of asking; pushes come by iteration; refusals and failures raise."""

    async def handler(peer: Peer[Any], message: Any) -> Any:
        if message.text == "refuse":
            raise Overloaded("rate", 1.5)
        if message.text == "fail":
            raise ValueError
        if message.text == "push":
            peer.send_nowait(Say("pushed"))
            return None
        if message.text == "bye":
            peer.close("go away")
            return None
        return Say(message.text.upper())

    async with serving(kind, handler, codec=CODEC, on_error=lambda peer, error: None) as running:
        stream = (await running.connect()).stream
        async with open_client(stream, CODEC, framing=FRAMING) as client:
            replies: dict[str, Any] = {}

            async def ask(text: str) -> None:
                replies[text] = await client.ask(Say(text))

            async with trio.open_nursery() as nursery:
                for text in "abcdefgh":
                    nursery.start_soon(ask, text)
            assert replies == {text: Say(text.upper()) for text in "abcdefgh"}
            with pytest.raises(Overloaded) as refused:
                await client.ask(Say("refuse"))
            assert (refused.value.reason, refused.value.retry_after) == ("rate", 1.5)
            with pytest.raises(RequestFailed, match="the handler failed"):
                await client.ask(Say("fail"))
            await client.send(Say("push"))
            assert await client.receive() == Say("pushed")
            assert await client.ask(Say("push")) == Done()
            with pytest.raises(trio.BrokenResourceError, match="go away"):
                await client.ask(Say("bye"))
            assert [message async for message in client] == [Say("pushed")]
            assert client.close_reason == "go away"
            with pytest.raises(trio.BrokenResourceError, match="go away"):
                await client.send(Say("too late"))


async def test_a_client_speaks_tls() -> None:
    """With a context, to an address, and as the host of the address; a server it does not trust is none."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(CERTIFICATE)
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))

    async def handler(peer: Peer[Any], message: Any) -> Any:
        return Say(message.text.upper())

    async with trio.open_nursery() as nursery:
        (listener,) = await open_listeners("tcp://127.0.0.1:0")
        await nursery.start(partial(serve_stage, handler, [secure(listener, server)], framing=FRAMING, codec=CODEC))
        where = f"tcp://localhost:{listener.socket.getsockname()[1]}"
        async with open_client(where, CODEC, framing=FRAMING, ssl_context=trusting) as client:
            assert await client.ask(Say("hello")) == Say("HELLO")
        with pytest.raises(trio.BrokenResourceError) as broken:
            async with open_client(where, CODEC, framing=FRAMING, ssl_context=ssl.create_default_context()):
                raise AssertionError("entered")
        assert isinstance(broken.value.__cause__, ssl.SSLCertVerificationError)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("address", "codec", "arguments", "error", "says"),
    [
        (3, CODEC, {}, TypeError, "address must be a str, not 3"),
        ("tcp://127.0.0.1:1", 3, {}, TypeError, "codec must be a Codec, not 3"),
        ("tcp://127.0.0.1:1", CODEC, {"max_pushed": -1}, ValueError, "max_pushed must be >= 0, not -1"),
        ("tcp://127.0.0.1:1", CODEC, {"ssl_context": 3}, TypeError, r"ssl_context must be .*, not 3"),
        (
            trio.testing.memory_stream_pair()[0],
            CODEC,
            {"ssl_context": ssl.create_default_context()},
            ValueError,
            r"ssl_context must be None for a stream, such as .*: wrap it",
        ),
    ],
)
async def test_wrong_arguments_are_named(
    address: Any, codec: Any, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    """Each is refused with its name and value, before anything is opened."""
    with pytest.raises(error, match=says):
        async with open_client(address, codec, **arguments):
            raise AssertionError("unreachable")
