"""The hub calls back what is ready, and only what is wanted."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stagetrio.hub import Hub


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        other.setblocking(False)
        yield one, other


async def call_back(hub: Hub) -> None:
    while True:
        await hub.wait()
        hub.poll()


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    """A hub that runs until the test ends."""
    hub = Hub()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call_back, hub)
        yield hub
        nursery.cancel_scope.cancel()
    hub.close()


async def settled() -> None:
    """Wait until everything that is ready has been called back."""
    await wait_all_tasks_blocked(0.01)


async def test_readable_sockets_are_called_back_until_read(hub: Hub) -> None:
    """Input left unread is offered again in the next pass; other sockets are not disturbed."""
    read: list[bytes] = []
    with pair() as (one, other), pair() as (quiet, _):
        hub.watch(one, lambda: read.append(one.recv(2)), lambda: read.append(b"writable"))
        hub.watch(quiet, lambda: read.append(b"quiet"), lambda: read.append(b"writable"))
        other.send(b"hello")
        await settled()
        assert read == [b"he", b"ll", b"o"]
        hub.forget(one)
        hub.forget(quiet)


async def test_a_paused_socket_is_left_alone_even_when_it_hangs_up(hub: Hub) -> None:
    """While nobody wants to read, neither input nor the other side's end calls back, nor keeps the loop busy."""
    called: list[str] = []
    with pair() as (one, other):
        hub.watch(one, lambda: called.append("read"), lambda: called.append("write"))
        hub.want(one, read=False, write=False)
        other.send(b"x")
        other.close()
        await settled()  # would never settle if the hang-up were reported in every pass
        assert called == []
        hub.want(one, read=True, write=False)
        with trio.fail_after(5):
            while not called:
                await trio.lowlevel.checkpoint()
        assert set(called) == {"read"}
        hub.forget(one)


async def test_writable_is_told_when_wanted_and_there_is_room(hub: Hub) -> None:
    """A full socket is silent until the other side reads."""
    called: list[str] = []
    with pair() as (one, other):

        def writable() -> None:
            called.append("write")
            hub.want(one, read=True, write=False)

        hub.watch(one, lambda: called.append("read"), writable)
        with suppress(BlockingIOError):
            while True:
                one.send(bytes(65536))
        hub.want(one, read=True, write=True)
        await settled()
        assert called == []
        with suppress(BlockingIOError):
            while True:
                other.recv(65536)
        await settled()
        assert called == ["write"]
        hub.forget(one)


async def test_a_forgotten_socket_is_not_called_back_in_the_same_pass(hub: Hub) -> None:
    """A callback may close another socket which is ready too."""
    called: list[str] = []
    with pair() as (one, one_end), pair() as (two, two_end):

        def callback(name: str, other: socket.socket) -> None:
            called.append(name)
            hub.forget(one)
            hub.forget(two)

        hub.watch(one, lambda: callback("one", two), lambda: None)
        hub.watch(two, lambda: callback("two", one), lambda: None)
        one_end.send(b"x")
        two_end.send(b"x")
        await settled()
        assert len(called) == 1


async def test_forgetting_twice_and_closing_is_harmless() -> None:
    """The owner may forget a socket it has forgotten already; closing leaves the sockets open."""
    hub = Hub()
    with pair() as (one, other):
        hub.watch(one, lambda: None, lambda: None)
        hub.forget(one)
        hub.forget(one)
        hub.watch(one, lambda: None, lambda: None)
        hub.close()
        other.send(b"x")
        assert one.recv(1) == b"x"
