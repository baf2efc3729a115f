"""What the worker processes of scenario 12 run: a procedure that notes where it ran."""

from __future__ import annotations

import os

import trio

from stagetrio.prefork_worker import Worker
from stagetrio.remote import Procedures, serve_remote

procedures = Procedures()
journal = ""


@procedures.procedure
async def hold(name: str, seconds: float) -> int:
    """Note in the journal that this call runs here, take some time, and say where it ran."""
    with open(journal, "a") as file:  # noqa: ASYNC230 - one write, whole, by O_APPEND
        file.write(f"{name} {os.getpid()}\n")
    await trio.sleep(seconds)
    return os.getpid()


async def remote(worker: Worker, path: str) -> None:
    """Serve `hold`, after some time for getting ready."""
    global journal
    journal = path
    await trio.sleep(0.3)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_remote, procedures, worker.listeners)
        worker.ready()
        await worker.wait_drain()
        nursery.cancel_scope.cancel()
