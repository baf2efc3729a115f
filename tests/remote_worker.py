"""A worker process for the tests of remote calls: ``python remote_worker.py ADDRESS LOG``.

It says ``ready`` once it listens, and writes the argument of each call that has begun, one a line, to ``LOG``.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import trio

from stagetrio.remote import Procedures, serve_remote
from stagetrio.sockets import open_listeners


async def main(address: str, log: str) -> None:
    procedures = Procedures()

    def note(x: int) -> None:
        with Path(log).open("a") as file:
            file.write(f"{x}\n")

    @procedures.procedure
    async def hang(x: int) -> None:
        note(x)
        await trio.sleep_forever()

    @procedures.procedure
    async def double(x: int) -> int:
        note(x)
        return 2 * x

    @procedures.procedure
    async def begun() -> int:
        return len(Path(log).read_text().split()) if Path(log).exists() else 0

    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve_remote, procedures, await open_listeners(address)))
        print("ready", flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2])
