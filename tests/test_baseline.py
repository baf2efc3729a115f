"""After thousands of connections, ended in every way, nothing is left. ``STAGETRIO_CONNECTIONS=100000``: full size."""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
from typing import Any

import pytest
import trio
from served import CODEC, Raw, Running, Say, serving, shout
from trio.testing import MockClock

from stagetrio.admission import Admission
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason

CONNECTIONS = int(os.environ.get("STAGETRIO_CONNECTIONS", "3000"))
AT_ONCE = 50
MESSAGE = CODEC.encode(Say("hello"), 1)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def polite(client: Raw) -> None:
    await client.send(MESSAGE)
    assert await client.message() == Say("HELLO")


async def half_closed(client: Raw) -> None:
    await client.send(MESSAGE, MESSAGE)
    await client.stream.send_eof()
    assert len(await client.receive_all()) == 2


async def reset(client: Raw) -> None:
    await client.send(MESSAGE)
    stream: Any = client.stream
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def silent(client: Raw) -> None:
    pass


async def wrong(client: Raw) -> None:
    await client.stream.send_all(b"\xff" * 20)
    await client.receive_all()


async def in_mid_frame(client: Raw) -> None:
    await client.stream.send_all(b"\0\0\0\x09abc")


async def unread(client: Raw) -> None:
    await client.send(*[MESSAGE] * 100)


async def told_to_go(client: Raw) -> None:
    await client.send(CODEC.encode(Say("go"), 1))
    await client.receive_all()


async def failing(client: Raw) -> None:
    await client.send(CODEC.encode(Say("fail"), 1))
    await client.message()


WAYS = [polite, half_closed, reset, silent, wrong, in_mid_frame, unread, told_to_go, failing]


async def handler(peer: Peer[Any], message: Any) -> Any:
    if message.text == "go":
        peer.close("go")
    if message.text == "fail":
        raise ValueError("asked for")
    return await shout(peer, message)


async def use(running: Running, connections: int, rng: random.Random) -> None:
    async def visit(way: Any) -> None:
        async with limit:
            client = await running.connect()
            try:
                await way(client)
            except trio.BrokenResourceError:
                assert way in (wrong, told_to_go)
            await trio.aclose_forcefully(client.stream)

    limit = trio.CapacityLimiter(AT_ONCE)
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(visit, rng.choice(WAYS))


async def left(running: Running) -> tuple[int, int, int]:
    """Descriptors, tasks, and objects, once every timer has run out; the queue's own record of flows not counted."""
    await trio.sleep(100)
    gc.collect()
    objects = len(gc.get_objects()) - running.server.statistics().stage.queue.flows_known
    return descriptors(), trio.lowlevel.current_statistics().tasks_living, objects


@pytest.mark.parametrize("kind", ["tcp", "stream"])
async def test_everything_is_given_back(kind: str, autojump_clock: MockClock) -> None:
    """Descriptors, tasks, peers and memory: as many after the last thousand connections as after the first ones."""
    connections = CONNECTIONS if kind == "tcp" else CONNECTIONS // 3
    admission = Admission(max_per_host=10 * AT_ONCE)
    before = descriptors(), trio.lowlevel.current_statistics().tasks_living
    rng = random.Random(8)
    async with serving(
        kind, handler, codec=CODEC, admission=admission, on_error=lambda peer, error: None, keep=False
    ) as running:
        await use(running, connections // 3, rng)
        between = await left(running)
        await use(running, connections // 3, rng)
        await left(running)
        await use(running, connections // 3, rng)
        after = await left(running)
        assert after[:2] == between[:2]
        assert after[2] - between[2] < connections // 30  # objects; a connection has dozens
        statistics = running.server.statistics()
        assert statistics.accepted == connections // 3 * 3
        assert sum(statistics.closed.values()) == statistics.accepted
        assert {CloseReason.ENDED, CloseReason.PROTOCOL, CloseReason.CLOSED} <= set(statistics.closed)
        assert statistics.admission.hosts == 0
        assert statistics.stage.queue.items == 0
    assert (descriptors(), trio.lowlevel.current_statistics().tasks_living) == before
