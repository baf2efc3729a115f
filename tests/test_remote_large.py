"""Large requests, answers and values cross whole, however little the kernel takes at a time."""

from __future__ import annotations

import functools
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from remote_pairs import Pair, serving

from stagetrio.remote import Procedures, open_remote, serve_remote
from stagetrio.sockets import open_listeners

SIZE = 300_000


def narrow_pair() -> Pair:
    """Two ends of a real socket whose buffers hold a few kilobytes."""
    ends = socket.socketpair()
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in ends)
    return ours, theirs


def copying() -> Procedures:
    procedures = Procedures()

    @procedures.procedure
    async def copy(data: bytes, block: bool) -> bytes:
        if block:
            await trio.lowlevel.checkpoint()
        return data

    @procedures.procedure
    async def copies(data: bytes, count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield data

    return procedures


def pattern(seed: int) -> bytes:
    return bytes((seed * 31 + place) % 251 for place in range(256)) * (SIZE // 256)


@pytest.mark.parametrize("block", [False, True])
async def test_large_calls_cross_whole(block: bool) -> None:
    """Twenty of them at a time, through buffers that hold a hundredth of one, beside small ones."""

    async def call(seed: int) -> None:
        data = pattern(seed) if seed % 4 else b"small"
        assert await remote.call("copy", data, block) == data

    async with serving(copying(), narrow_pair(), max_buffered_bytes=50_000) as remote:
        async with trio.open_nursery() as nursery:
            for seed in range(20):
                nursery.start_soon(call, seed)


async def test_large_values_cross_whole() -> None:
    """A stream of them, with a consumer that never waits."""
    async with serving(copying(), narrow_pair(), max_buffered_bytes=50_000) as remote:
        async with remote.with_options(window=3).stream("copies", pattern(1), 20) as values:
            assert [value == pattern(1) async for value in values] == [True] * 20


async def test_large_posts_cross_whole_before_the_caller_leaves() -> None:
    """Leaving hands over what has been said first."""
    procedures = copying()
    async with serving(procedures, narrow_pair()) as remote:
        for seed in range(5):
            await remote.post("copy", pattern(seed), False)
    assert procedures.statistics().returned == 5


async def test_large_calls_over_tcp() -> None:
    """The kernel's own buffers, too, take only part of a megabyte at a time."""

    async def call(seed: int) -> None:
        data = pattern(seed) * 3
        assert await remote.call("copy", data, False) == data

    listeners = await open_listeners("tcp://127.0.0.1:0")
    address = f"tcp://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(serve_remote, copying(), listeners))
        async with open_remote(address) as remote, trio.open_nursery() as callers:
            for seed in range(10):
                callers.start_soon(call, seed)
        nursery.cancel_scope.cancel()
