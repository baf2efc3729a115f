"""A server whose handlers run under a watchdog, and may hold the GIL for good: in a worker process, or alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial

import trio

from stagetrio.prefork_worker import Worker
from stagetrio.watchdog import Watchdog, open_watchdog

BUDGET = 0.1


async def hold_the_gil() -> None:
    """Stay in C code that asks for nothing, for longer than any test lasts."""
    sum(range(10**13))


async def answer(watchdog: Watchdog, stream: trio.SocketStream) -> None:
    """Answer every line with the process id; hold the GIL first when the line says "hold"."""
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):
            async for data in stream:
                if data == b"hold\n":
                    await watchdog.run(hold_the_gil, budget=BUDGET)
                await stream.send_all(f"{os.getpid()}\n".encode())


async def accept(listeners: Sequence[trio.SocketListener], *, task_status: trio.TaskStatus[object]) -> None:
    """Serve `answer`."""
    async with open_watchdog() as watchdog:
        await trio.serve_listeners(partial(answer, watchdog), list(listeners), task_status=task_status)


async def serve(worker: Worker) -> None:
    """What a worker process runs."""
    async with trio.open_nursery() as nursery:
        await nursery.start(accept, worker.listeners)
        worker.ready()
        await worker.wait_drain()
        nursery.cancel_scope.cancel()


async def alone() -> None:
    """The same without an arbiter; says on stdout where."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(accept, listeners)
        print(listeners[0].socket.getsockname()[1], flush=True)


if __name__ == "__main__":
    trio.run(alone)
