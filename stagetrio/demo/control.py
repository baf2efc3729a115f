"""The plain Trio server that stagetrio is compared with: what a good Trio programmer writes in an evening.

One task per connection, reads through a buffer, a limiter before the database, and a timeout on whatever depends on the
other side.
"""

from __future__ import annotations

import trio

from stagetrio.demo.storm import (
    CODEC,
    DATABASE_LIMIT,
    FRAMING,
    IDLE_SECONDS,
    SEND_SECONDS,
    Answer,
    Ask,
    Database,
    Fetch,
    Judge,
    Message,
    Page,
    Query,
    judge,
)
from stagetrio.framing import ProtocolError


async def serve(listeners: list[trio.SocketListener], database: Database) -> None:
    """Serve until cancelled."""
    limiter = trio.CapacityLimiter(DATABASE_LIMIT)

    async def reply_to(message: Message) -> Answer | Page:
        match message:
            case Ask(text):
                return Answer(text.upper())
            case Query(key):
                async with limiter:
                    return Answer(await database.query(key))
            case Judge(rounds):
                return Answer(f"judged: {judge(rounds)}")
            case Fetch(size):
                return Page(bytes(size))
        raise ProtocolError(f"not a question: {message!r}")

    async def serve_one(stream: trio.SocketStream) -> None:
        decoder = FRAMING.decoder()
        async with stream:
            try:
                while True:
                    with trio.fail_after(IDLE_SECONDS):
                        data = await stream.receive_some(65536)
                    if not data:
                        break
                    for frame in decoder.receive_data(bytes(data)):
                        message, id = CODEC.decode(frame)
                        reply = await reply_to(message)
                        with trio.fail_after(SEND_SECONDS):
                            await stream.send_all(FRAMING.encode(CODEC.encode(reply, id)))
            except (trio.BrokenResourceError, trio.TooSlowError, ProtocolError):
                pass  # the client left, says nothing, does not read, or talks nonsense: its connection ends

    await trio.serve_listeners(serve_one, listeners)
