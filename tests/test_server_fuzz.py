"""Mutated sessions in random segments against a running server; ``STAGETRIO_FUZZ`` sets how many."""

from __future__ import annotations

import gc
import os
import random
from typing import Any

import pytest
import trio
from fuzzed import TRIED
from served import CODEC, FRAMING, Say, serving, shout
from trio.testing import MockClock

from stagetrio.rules import PeerLimits
from stagetrio.server import StageServer

SESSIONS = int(os.environ.get("STAGETRIO_FUZZ", "1000"))


def session(rng: random.Random) -> bytes:
    """The bytes of a real client, some of them changed, lost, doubled or moved."""
    wire = bytearray()
    for id in range(rng.randint(1, 8)):
        wire += FRAMING.encode(CODEC.encode(Say("x" * rng.randint(0, 200)), rng.choice([None, id])))
    for _ in range(rng.choice([0, 1, 1, 2, 10])):
        at = rng.randrange(len(wire) + 1)
        match rng.randrange(4):
            case 0:
                wire[at : at + 1] = rng.randbytes(1)
            case 1:
                del wire[at : at + rng.randint(1, 9)]
            case 2:
                wire[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3:
                wire[at:at] = wire[rng.randrange(len(wire) + 1) :][:50]
    return bytes(wire)


def objects(server: StageServer[Any]) -> int:
    """Count what is alive, but for the flows that the queue remembers, which have a bound of their own."""
    gc.collect()
    return len(gc.get_objects()) - server.statistics().stage.queue.flows_known


@pytest.mark.parametrize("kind", ["tcp", "stream"])
async def test_no_bytes_can_hurt_a_server(
    kind: str, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """No exception, no connection left, nothing that grows, and a good client is served after every one of them."""
    rng = random.Random(4)
    sessions = SESSIONS // 2
    halfway = 0
    async with serving(kind, shout, codec=CODEC, limits=PeerLimits(), keep=False) as running:
        good = await running.connect()

        async def alone() -> None:
            while len(running.server.peers) > 1:
                await trio.lowlevel.checkpoint()
            await trio.sleep(60)  # until every check of a rule was due, which is kept as long

        for number in range(sessions):
            if number == sessions // 2:
                await alone()
                halfway = objects(running.server)
            stream = (await running.connect()).stream
            wire = session(rng)
            try:
                while wire:
                    size = rng.randint(1, len(wire))
                    await stream.send_all(wire[:size])
                    wire = wire[size:]
                    if rng.random() < 0.5:
                        await trio.lowlevel.checkpoint()
                if rng.random() < 0.7:
                    await stream.send_eof()
                    while await stream.receive_some():
                        pass
            except trio.BrokenResourceError:
                pass
            await trio.aclose_forcefully(stream)
            await good.send(CODEC.encode(Say("still there"), 1))
            assert await good.message() == Say("STILL THERE")
        await alone()
        assert objects(running.server) - halfway < sessions / 4
        statistics = running.server.statistics()
        TRIED[f"a running server ({kind})"] += sessions
        assert sum(statistics.closed.values()) == sessions
        assert len(statistics.closed) >= 2
        assert statistics.failed == statistics.stage.queue.items == 0
        await good.stream.aclose()
    assert caplog.records == []
