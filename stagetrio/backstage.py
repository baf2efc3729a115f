"""A nursery for tasks that serve one block, such as the reader of a connection: they need not raise, and end with it.

Of an ordinary nursery everything comes out in a group, also what the block alone has raised: ``except KeyError`` around
``async with open_remote(…)`` would see none. And a cancellation that arrives while the tasks are being ended would come
out in the error's place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_backstage() -> AsyncIterator[trio.Nursery]:
    """Open a nursery whose tasks are cancelled at the end of the block; what the block raises leaves as itself.

    What a task raises cancels the block, and leaves in a group, as from any nursery.

    Checkpoints: at the end, until its tasks have ended; a cancellation meanwhile takes the place of no error.
    """
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                raised = error
            nursery.cancel_scope.cancel("its block has been left")
    except BaseExceptionGroup as group:
        if isinstance(raised, trio.Cancelled) and group.split(trio.Cancelled)[1] is not None:
            raised = None  # a task has failed, and that is why the block was cancelled
        if raised is None:
            raise
    finally:
        if raised is not None:
            try:
                raise raised
            finally:
                del raised  # or it would hold itself by its traceback
