"""Scenario 11: everybody connects at once; ``STAGETRIO_HERD=10000`` runs it at full size."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from typing import Any

import trio
from served import CODEC, Raw, Say, serving, shout
from trio.testing import MockClock, open_stream_to_socket_listener

from stagetrio.admission import Admission
from stagetrio.codec import Closed
from stagetrio.door import MAX_FAREWELLS
from stagetrio.limiter import Rate, RateLimiter
from stagetrio.peer import Peer

HERD = int(os.environ.get("STAGETRIO_HERD", "2000"))
PLACES = 250  # fewer than are let in while one is served
SPREAD = 10.0  # seconds
BIN = 1000 / HERD  # seconds: 100 ms at full size, and enough returns in each at any other


async def test_a_herd_is_let_in_at_a_pace_and_spread_over_time(autojump_clock: MockClock) -> None:
    """All are served in the end; connections stay bounded, no descriptor runs out, and no two waves are alike."""
    most = served = 0
    returns: list[float] = []

    async def on_connect(peer: Peer[Any]) -> None:
        nonlocal most
        most = max(most, len(running.server.peers))

    async def visit(connect: Any) -> None:
        nonlocal served
        while True:
            client: Raw = await connect()
            retry_after = 0.0
            with suppress(trio.BrokenResourceError):
                async with client.stream:
                    await client.send(CODEC.encode(Say("hello"), 1))
                    answer = await client.message()
                    if answer == Say("HELLO"):
                        await trio.sleep(0.5)  # and keeps its place
                        served += 1
                        return
                    assert isinstance(answer, Closed)
                    retry_after = answer.retry_after
                    returns.append(trio.current_time() + retry_after)
            await trio.sleep(retry_after)

    pace = RateLimiter(Rate(1000), burst=100)
    admission = Admission(pace=pace, spread=SPREAD)
    async with serving(
        "tcp", shout, codec=CODEC, admission=admission, max_connections=PLACES, on_connect=on_connect, backlog=16384
    ) as running:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(HERD):
                nursery.start_soon(visit, running.connect)
        statistics = running.server.statistics()
    assert served == HERD
    assert most <= PLACES + MAX_FAREWELLS
    assert statistics.accept_errors == 0
    assert statistics.accepted <= 100 + 1000 * (trio.current_time() - start) + 1
    first = returns[: HERD // 2]  # of the first wave, all turned away
    bins = Counter(int((when - start) / BIN) for when in first)
    assert max(bins.values()) <= 2 * len(first) * BIN / SPREAD


async def test_control_a_herd_that_comes_back_after_a_fixed_time_stays_a_herd(autojump_clock: MockClock) -> None:
    """A plain server takes everybody's descriptor at once, and who was turned away comes back in one wave."""
    connections = most = 0
    returns: list[float] = []

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal connections, most
        async with stream:
            connections += 1
            most = max(most, connections)
            if connections > PLACES:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(b"full")
            await trio.sleep(1)
            connections -= 1

    async def visit(listener: trio.SocketListener) -> None:
        async with await open_stream_to_socket_listener(listener) as stream:
            with suppress(trio.BrokenResourceError):
                if await stream.receive_some() == b"full":
                    returns.append(trio.current_time() + SPREAD)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=16384)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        start = trio.current_time()
        async with trio.open_nursery() as visits:
            for _ in range(HERD):
                visits.start_soon(visit, listener)
        nursery.cancel_scope.cancel()
    bins = Counter(int((when - start) / BIN) for when in returns)
    assert most > PLACES + MAX_FAREWELLS
    assert max(bins.values()) > 5 * len(returns) * BIN / SPREAD
