"""The arena's judge: a procedure that holds the processor, served to the process that started this one."""

from __future__ import annotations

import math
import socket
import sys

import trio

from stagetrio.remote import Procedures, serve_remote_stream

procedures = Procedures()


@procedures.procedure
async def verdict(x: int, y: int, other_x: int, other_y: int) -> bool:
    """Whether a strike from one field reaches another, judged at length."""
    distances = [math.hypot(other_x - x, other_y - y + i * 1e-9) for i in range(20_000)]
    return sum(distances) / len(distances) < 5


async def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    await serve_remote_stream(procedures, trio.SocketStream(trio.socket.from_stdlib_socket(sock)))


if __name__ == "__main__":
    trio.run(main)
