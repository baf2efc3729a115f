"""The process of one server: ``python -m stagetrio.demo.process control|staged STORM``.

It speaks JSON lines with whoever started it: it says ``listening``, takes ``start`` and ``report``, and answers with
what it measured about itself. It ends when its input does, so it cannot outlive its parent.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio

from stagetrio.demo.measure import StallClock, open_peer_ports, peak_memory
from stagetrio.demo.storm import Database, Storm

Serve = Callable[[list[trio.SocketListener], Database], Awaitable[None]]


def say(**event: Any) -> None:
    """Write one line to the parent. Lines are short and the parent reads them all the time, so this does not block."""
    os.write(1, json.dumps(event).encode() + b"\n")


async def commands() -> AsyncIterator[dict[str, Any]]:
    """What the parent says, until it closes our input (or is gone)."""
    pending = b""
    while True:
        # Not sys.stdin: an abandoned thread would hold its lock, which the interpreter wants when it ends.
        data = await trio.to_thread.run_sync(os.read, 0, 65536, abandon_on_cancel=True)
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def trio_time(monotonic: float) -> float:
    """The time on Trio's clock at a time of the clock that all processes share."""
    return trio.current_time() + monotonic - time.monotonic()


def _serve_of(side: str) -> Serve:
    """The server's function; the other server's modules stay out of this process's memory."""
    serve: Serve = importlib.import_module(f"stagetrio.demo.{side}").serve
    return serve


async def main(side: str, storm: Storm) -> None:
    """Host one server for one storm."""
    serve, database, stalls = _serve_of(side), Database(), StallClock()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=512)
    memory_before = peak_memory()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, listeners, database)
        nursery.start_soon(stalls.run)
        say(event="listening", port=listeners[0].socket.getsockname()[1])
        async for command in commands():
            if command["do"] == "start":
                begin = trio_time(command["at"])
                database.slow_between(*(begin + moment for moment in storm.database_slow))
                await trio.sleep_until(begin)
                stalls.reset()
            elif command["do"] == "report":
                say(
                    event="report",
                    worst_stall=stalls.worst,
                    memory_before=memory_before,
                    memory_peak=peak_memory(),
                    open_ports=sorted(open_peer_ports()),
                    database_queries=database.queries,
                    database_most_at_once=database.most_at_once,
                )
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], Storm(**json.loads(sys.argv[2])))
