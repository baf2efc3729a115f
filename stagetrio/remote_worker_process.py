"""The inside of a worker process that runs procedures: it is told which, and serves them to its parent.

The parent speaks first as it does to a worker for jobs (`stagetrio.process_worker`), and then as any caller of
procedures (`stagetrio.remote_hello`), over the same socket.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
from functools import partial
from typing import Any

import trio

from stagetrio.process_worker import get_ready
from stagetrio.remote import serve_remote_stream


def main(fd: int) -> None:
    """Run procedures for the parent at the other end of a socket until it leaves."""
    ready = get_ready(fd, _serving)
    if ready is None:
        return
    sock, serve = ready
    with sock.dup() as connection:
        try:
            trio.run(_serve, sock, serve)
        finally:
            # Closed it is not, as long as the thread that watches the parent polls it; and a process may go on as long
            # as there are other threads.
            with contextlib.suppress(OSError):  # the parent has left
                connection.shutdown(socket.SHUT_RDWR)


def _serving(setup: dict[str, Any]) -> Any:
    return partial(serve_remote_stream, pickle.loads(setup["procedures"]), **setup["bounds"])


async def _serve(sock: Any, serve: Any) -> None:
    await serve(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
