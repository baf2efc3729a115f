"""A client's calls are answered, refused or failed, each in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from served import CODEC, FRAMING, Say, serving

from stagetrio.client import RequestFailed, open_client
from stagetrio.codec import Done
from stagetrio.limiter import Overloaded
from stagetrio.peer import Peer


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
