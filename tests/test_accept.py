"""Accepting goes on, whatever becomes of single connections and however short the system is of what it takes."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections import deque
from functools import partial
from typing import Any

import pytest
import trio
from served import FRAMING, Raw, StreamListener, closed_by, echo, serving
from trio.testing import MockClock

from stagetrio.accept import PAUSE
from stagetrio.rules import CloseReason
from stagetrio.server import serve_stage
from stagetrio.sockets import ACCEPT_PAUSE, ACCEPT_SKIP

DESCRIPTORS = 60
CLIENTS = 100

SERVER = """
import resource, sys, trio
from functools import partial
from stagetrio import open_listeners, serve_stage

async def echo(peer, message):
    return message

async def main():
    descriptors = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    async with trio.open_nursery() as nursery:
        listeners = await open_listeners("tcp://127.0.0.1:0")
        server = await nursery.start(partial(serve_stage, echo, listeners))
        print(listeners[0].socket.getsockname()[1], flush=True)
        for line in iter(lambda: None, 1):
            await trio.to_thread.run_sync(sys.stdin.readline)
            statistics = server.statistics()
            print(statistics.accepted, statistics.accept_errors, trio.current_time(), flush=True)

trio.run(main)
"""


class Served:
    """A server in a process that may have few descriptors."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._buffer = b""

    async def line(self) -> str:
        while b"\n" not in self._buffer:
            data = await self._stdout.receive_some()
            assert data, "the server has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    async def counts(self) -> tuple[int, int, float]:
        """Connections accepted, times accepting failed, and the server's clock."""
        await self._stdin.send_all(b"\n")
        accepted, errors, now = (await self.line()).split()
        return int(accepted), int(errors), float(now)


async def test_a_server_without_descriptors_waits_for_some_and_goes_on() -> None:
    """Those it has are served meanwhile; it does not spin; everybody else gets in when others have left."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-W", "error", "-c", SERVER, str(DESCRIPTORS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server = Served(process)
    try:
        with trio.fail_after(120):
            port = int(await server.line())
            clients = [Raw(await trio.open_tcp_stream("127.0.0.1", port)) for _ in range(CLIENTS)]
            accepted, before, then = await server.counts()
            errors = before
            while errors < before + 3:
                accepted, errors, now = await server.counts()
            assert 0 < accepted < DESCRIPTORS
            assert errors - before <= (now - then) / PAUSE + 1
            for client in clients[:accepted]:
                await client.send(b"hello")
                assert await client.receive() == b"hello"
                await client.stream.aclose()
            for client in clients[accepted:]:
                await client.send(b"hello")
                assert await client.receive() == b"hello"
                await client.stream.aclose()
            assert (await server.counts())[0] == CLIENTS
    finally:
        process.kill()
        await process.wait()
        await process.stdin.aclose()  # type: ignore[union-attr]
        await process.stdout.aclose()  # type: ignore[union-attr]


class Failing(StreamListener):
    """Fails as the operating system may, before it accepts."""

    def __init__(self, errors: list[int]) -> None:
        super().__init__()
        self.errors = deque(errors)

    async def accept(self) -> trio.abc.Stream:
        if self.errors:
            await trio.lowlevel.checkpoint()
            raise OSError(self.errors[0], os.strerror(self.errors.popleft()))
        return await super().accept()


@pytest.mark.parametrize(
    ("errors", "pauses"),
    [
        ([errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETUNREACH, errno.EHOSTDOWN], 0),
        ([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM], 4),
        (sorted(ACCEPT_SKIP | ACCEPT_PAUSE), 4),
    ],
)
async def test_errors_of_accepting_are_counted_and_survived(
    errors: list[int], pauses: int, autojump_clock: MockClock
) -> None:
    """What concerns one connection costs no time, a shortage a pause; then the next one is served."""
    listener = Failing(errors)
    async with trio.open_nursery() as nursery:
        start = trio.current_time()
        serve = partial(serve_stage, echo, [listener], framing=FRAMING)
        server: Any = await nursery.start(serve)
        client = Raw(await listener.connect())
        await client.send(b"hello")
        assert await client.receive() == b"hello"
        assert trio.current_time() - start == pytest.approx(pauses * PAUSE)
        assert server.statistics().accept_errors == len(errors)
        await client.stream.aclose()
        nursery.cancel_scope.cancel()


async def test_an_error_of_the_listener_itself_reaches_the_owner() -> None:
    """A closed descriptor never comes back; waiting for it would be hiding it."""
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="Bad file descriptor"), flatten_subgroups=True):
        await serve_stage(echo, [Failing([errno.EBADF])])


class ByStreams(trio.abc.Listener[trio.SocketStream]):
    """A listener which the server does not know to be a plain socket's."""

    def __init__(self, inner: trio.abc.Listener[trio.SocketStream]) -> None:
        self._inner = inner

    async def accept(self) -> trio.SocketStream:
        return await self._inner.accept()

    async def aclose(self) -> None:
        await self._inner.aclose()


@pytest.mark.parametrize("wrap", [None, ByStreams])
async def test_a_connection_reset_before_it_was_accepted_ends_nothing(wrap: Any) -> None:
    """It is counted, one way or the other, and the next one is served."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    for _ in range(5):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    async with trio.open_nursery() as nursery:
        served: Any = listener if wrap is None else wrap(listener)
        server: Any = await nursery.start(partial(serve_stage, echo, [served], framing=FRAMING))
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            client = Raw(stream)
            await client.send(b"hello")
            assert await client.receive() == b"hello"
            (peer,) = [peer for peer in server.peers if not peer.closed]
            assert peer.address.host == "127.0.0.1"
        while server.peers:
            await trio.lowlevel.checkpoint()
        statistics = server.statistics()
        assert statistics.accept_errors + statistics.closed.get(CloseReason.RESET, 0) == 5
        nursery.cancel_scope.cancel()


async def test_connections_accepted_as_streams_have_the_options_of_the_table() -> None:
    """They notice a vanished peer like all others."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    accepted: list[trio.SocketStream] = []

    class Noting(ByStreams):
        async def accept(self) -> trio.SocketStream:
            accepted.append(await super().accept())
            return accepted[-1]

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_stage, echo, [Noting(listener)], framing=FRAMING))
        async with await trio.open_tcp_stream(*listener.socket.getsockname()) as stream:
            client = Raw(stream)
            await client.send(b"hello")
            assert await client.receive() == b"hello"
            assert accepted[0].socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted[0].socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 90_000
        nursery.cancel_scope.cancel()


# Work is what is limited, not connections.

IDLE = 200


async def test_idle_connections_take_nothing_from_busy_ones() -> None:
    """With one worker and two places in the queue, a busy client is served beside hundreds that have been."""
    async with serving("tcp", workers=1, max_items=2, refuse=True) as running:
        idle = [await running.connect() for _ in range(IDLE)]
        for client in idle:
            await client.send(b"once")
            assert await client.receive() == b"once"
        busy = await running.connect()
        for _ in range(50):
            await busy.send(b"again")
            assert await busy.receive() == b"again"
        statistics = running.server.statistics()
        assert (statistics.connections, statistics.refused) == (IDLE + 1, 0)
        assert statistics.stage.handled == IDLE + 50
        for client in (*idle, busy):
            await client.stream.aclose()
        await closed_by(running, CloseReason.ENDED)


async def test_control_where_connections_are_limited_idle_ones_keep_the_busy_out(autojump_clock: MockClock) -> None:
    """A plain server with a place for each connection serves nobody else while the idle ones stay."""
    places = trio.CapacityLimiter(2)

    async def serve(stream: trio.SocketStream) -> None:
        async with stream, places:
            while data := await stream.receive_some():
                await stream.send_all(data)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        idle = [await trio.open_tcp_stream(*listener.socket.getsockname()) for _ in range(2)]
        for stream in idle:
            await stream.send_all(b"once")
            assert await stream.receive_some() == b"once"
        async with await trio.open_tcp_stream(*listener.socket.getsockname()) as busy:
            await busy.send_all(b"again")
            with trio.move_on_after(3600) as scope:
                await busy.receive_some()
            assert scope.cancelled_caught
        for stream in idle:
            await stream.aclose()
        nursery.cancel_scope.cancel()
