"""The server on stagetrio that the plain one is compared with: same questions, same answers, same limits."""

from __future__ import annotations

import trio

from stagetrio.demo import storm
from stagetrio.demo.storm import (
    CODEC,
    DATABASE_LIMIT,
    FRAMING,
    IDLE_SECONDS,
    SEND_SECONDS,
    SLOW_BYTES_PER_SECOND,
    Answer,
    Ask,
    Database,
    Fetch,
    Judge,
    Message,
    Page,
    Query,
)
from stagetrio.framing import ProtocolError
from stagetrio.peer import Peer
from stagetrio.rules import PeerLimits
from stagetrio.server import serve_stage
from stagetrio.ticket import TicketStage
from stagetrio.watchdog import open_watchdog


async def serve(listeners: list[trio.SocketListener], database: Database) -> None:
    """Serve until cancelled."""
    tickets = TicketStage("database", DATABASE_LIMIT)
    async with open_watchdog(preemptible=(storm,)) as watchdog:

        async def judged(rounds: int) -> Answer:
            return Answer(f"judged: {storm.judge(rounds)}")

        async def reply_to(peer: Peer[Message], message: Message) -> Answer | Page:
            match message:
                case Ask(text):
                    return Answer(text.upper())
                case Query(key):
                    async with tickets.ticket(peer):
                        return Answer(await database.query(key))
                case Judge(rounds):
                    return await watchdog.run(judged, rounds, flow=peer)
                case Fetch(size):
                    return Page(bytes(size))
            raise ProtocolError(f"not a question: {message!r}")

        await serve_stage(
            reply_to,
            listeners,
            framing=FRAMING,
            codec=CODEC,
            limits=PeerLimits(
                first_frame_within=IDLE_SECONDS,
                idle_within=IDLE_SECONDS,
                send_grace=SEND_SECONDS,
                min_send_rate=2 * SLOW_BYTES_PER_SECOND,
                linger=1.0,
            ),
        )
