"""Mutated sessions in random segments against a running server; ``STAGETRIO_FUZZ`` sets how many."""

from __future__ import annotations

import os
import random

import trio
from fuzzed import TRIED
from served import CODEC, FRAMING, Say, serving, shout

from stagetrio.rules import PeerLimits

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


async def test_no_bytes_can_hurt_a_server() -> None:
    """No exception, no connection left, and a good client is served after every one of them."""
    rng = random.Random(4)
    async with serving("tcp", shout, codec=CODEC, limits=PeerLimits(), keep=False) as running:
        good = await running.connect()
        for _ in range(SESSIONS):
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
        while len(running.server.peers) > 1:
            await trio.lowlevel.checkpoint()
        statistics = running.server.statistics()
        TRIED["a running server"] += SESSIONS
        assert sum(statistics.closed.values()) == SESSIONS
        assert len(statistics.closed) >= 2
        assert statistics.failed == statistics.stage.queue.items == 0
        await good.stream.aclose()
