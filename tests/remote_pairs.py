"""What the tests of remote calls share: two ends of a stream, and a remote that calls over them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio
import trio.testing

from stagetrio.remote import Procedures, Remote, open_remote_stream, serve_remote_stream

Pair = tuple[trio.abc.Stream, trio.abc.Stream]


def socket_pair() -> Pair:
    """Two ends of a real socket."""
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in socket.socketpair())
    return ours, theirs


PAIRS: list[Callable[[], Pair]] = [trio.testing.memory_stream_pair, socket_pair]


@contextlib.asynccontextmanager
async def serving(procedures: Procedures, pair: Pair, **bounds: Any) -> AsyncIterator[Remote]:
    """A remote that calls ``procedures``, which end when it has left."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_remote_stream(procedures, pair[0], **bounds))
        async with open_remote_stream(pair[1]) as remote:
            yield remote
