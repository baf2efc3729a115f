"""Several tickets at once, without deadlock.

Theory of operation. Two tasks that each hold what the other waits for wait for ever. That needs a circle, and there is
none where everybody takes tickets in one order: here the order of the stages' names. So all who need tickets of the
same stages together must ask for them here; a request nested inside the block of another one by hand is not in order,
and nothing can see it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from stagetrio.lease import Ticket
from stagetrio.ticket import TicketRequest


@asynccontextmanager
async def all_tickets(*requests: TicketRequest) -> AsyncIterator[tuple[Ticket, ...]]:
    """Hold tickets of several stages for one block: ``async with all_tickets(a.ticket(), b.ticket()) as (x, y):``.

    They are waited for one after the other, in the order of the stages' names, and given back together. The lease of
    one that is held already runs while the next is waited for; when it ends, the wait ends too, and `LeaseLost` is
    raised.

    Args:
        requests: One for each stage, none entered yet; the tickets come in the same order.

    Raises:
        ValueError: Two requests are for the same stage, for stages of the same name, or for stages that draw from the
            same limiter: they could wait for each other. Ask for one ticket of a greater ``cost`` instead.
        Overloaded: As for `TicketStage.ticket`, of any of them; those held are given back.
        LeaseLost: A lease ended, while another ticket was waited for or in the block.

    Checkpoints: as many times as there are requests. A cancelled call holds none.
    """
    stages = [request._stage for request in requests]
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"tickets taken together must be of stages with different names, not {names!r}")
    limiters = [id(stage._lending.limiter) for stage in stages if stage._lending is not None]
    if len(set(limiters)) < len(limiters):
        raise ValueError(f"tickets taken together must not come from the same limiter: {stages!r}")
    async with AsyncExitStack() as stack:
        held = {
            request: await stack.enter_async_context(request)
            for request in sorted(requests, key=lambda request: request._stage.name)
        }
        yield tuple(held[request] for request in requests)
