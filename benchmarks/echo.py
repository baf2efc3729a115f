"""Echo of 100-byte frames over TCP, through the whole way of a message, beside a naive Trio server.

What is compared is the processor time the *server's* process spends per message, so neither the load generator nor
another busy core decides; only ``1 × 1`` is a round trip, measured with both ends on one core. The naive server is what
one writes first: one task per connection, `receive_exactly`, `send_all`.

``python -m benchmarks.echo KIND`` is a server (naive, batched, asyncio, uvloop, ours, or watched, which is ours under a
watchdog) that prints its port, and its processor seconds and resident bytes for every line on its standard input.
``python -m benchmarks.echo`` prints all kinds side by side, what 10,000 idle connections take, and what a hog does.
"""

from __future__ import annotations

import asyncio
import os
import resource
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from struct import Struct
from typing import Any

import trio

from benchmarks.case import Case
from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.server import serve_stage
from stagetrio.sockets import open_listeners
from stagetrio.watchdog import Watchdog, open_watchdog

_PREFIX = Struct(">I")
MESSAGE = _PREFIX.pack(100) + bytes(100)
SECONDS = 1.0  # of load per run
IDLE = 10_000  # connections; every one is a descriptor here and one there


async def _naive(stream: trio.SocketStream) -> None:
    async def receive_exactly(count: int) -> bytes:
        received = b""
        while len(received) < count:
            data = await stream.receive_some(count - len(received))
            if not data:
                raise trio.EndOfChannel
            received += data
        return received

    try:
        while True:
            (length,) = _PREFIX.unpack(await receive_exactly(4))
            payload = await receive_exactly(length)
            await stream.send_all(_PREFIX.pack(length) + payload)
    except (trio.EndOfChannel, trio.BrokenResourceError):
        pass


async def _batched(stream: trio.SocketStream) -> None:
    decoder = LengthPrefixed(65536).decoder()
    try:
        while data := await stream.receive_some(65536):
            frames = decoder.receive_data(data)
            if frames:
                await stream.send_all(b"".join([_PREFIX.pack(len(frame)) + frame for frame in frames]))
    except trio.BrokenResourceError:
        pass


async def _serve_trio(handler: Callable[[trio.SocketStream], object]) -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, handler, 0)
        print(listeners[0].socket.getsockname()[1], flush=True)


async def _echo(peer: Peer[bytes], message: bytes) -> bytes:
    return message


async def _serve_ours(watchdog: Watchdog | None = None) -> None:
    listeners = await open_listeners("tcp://127.0.0.1:0")
    print(listeners[0].socket.getsockname()[1], flush=True)
    await serve_stage(_echo, listeners, watchdog=watchdog, max_connections=2 * IDLE)


async def _serve_watched() -> None:
    async with open_watchdog(on_stall=lambda stall: None) as watchdog:
        await _serve_ours(watchdog)


async def _serve_monitored() -> None:
    async with open_watchdog(on_stall=lambda stall: None):
        await _serve_ours()


class _Protocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.decoder = LengthPrefixed(65536).decoder()

    def data_received(self, data: bytes) -> None:
        frames = self.decoder.receive_data(data)
        if frames:
            self.transport.write(b"".join([_PREFIX.pack(len(frame)) + frame for frame in frames]))


async def _serve_asyncio() -> None:
    server = await asyncio.get_running_loop().create_server(_Protocol, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def _serve(kind: str) -> None:
    def report() -> None:
        for _line in sys.stdin:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(time.process_time(), pages * resource.getpagesize(), flush=True)

    threading.Thread(target=report, daemon=True).start()
    if kind == "ours":
        trio.run(_serve_ours)
    elif kind == "watched":
        trio.run(_serve_watched)
    elif kind == "monitored":
        trio.run(_serve_monitored)
    elif kind == "naive":
        trio.run(_serve_trio, _naive)
    elif kind == "batched":
        trio.run(_serve_trio, _batched)
    elif kind == "asyncio":
        asyncio.run(_serve_asyncio())
    else:
        import uvloop

        uvloop.run(_serve_asyncio())


@contextmanager
def _server(kind: str, core: int | None = None) -> Iterator[tuple[int, Callable[[], tuple[float, float]]]]:
    """Run a server; give its port, and a function that asks it for its processor seconds and resident bytes."""
    command = [sys.executable, "-m", "benchmarks.echo", kind]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        port = int(stdout.readline())

        def spent() -> tuple[float, float]:
            stdin.write("\n")
            stdin.flush()
            seconds, size = stdout.readline().split()
            return float(seconds), float(size)

        try:
            yield port, spent
        finally:
            process.kill()


def _load(port: int, connections: int, depth: int, seconds: float) -> int:
    """Keep ``depth`` messages of each connection in flight for so many seconds; return how many came back."""
    burst, chunk = MESSAGE * depth, len(MESSAGE) * depth
    epoll = select.epoll()
    socks: dict[int, list[object]] = {}
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        socks[sock.fileno()] = [sock, 0]
        epoll.register(sock.fileno(), select.EPOLLIN)
    for sock, _ in socks.values():
        sock.sendall(burst)  # type: ignore[attr-defined]
    done = 0
    buffer = bytearray(65536)  # one for all: a fresh one for every read would make this side the slower one
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for fd, _events in epoll.poll(1.0):
            entry = socks[fd]
            sock = entry[0]
            entry[1] += sock.recv_into(buffer)  # type: ignore[operator, attr-defined]
            if entry[1] >= chunk:  # type: ignore[operator]
                entry[1] -= chunk  # type: ignore[operator]
                done += depth
                sock.send(burst)  # type: ignore[attr-defined]
    for sock, _ in socks.values():
        sock.close()  # type: ignore[attr-defined]
    epoll.close()
    return done


def server_seconds(kind: str, connections: int, depth: int) -> float:
    """Processor seconds of the server per message."""
    with _server(kind) as (port, spent):
        _load(port, connections, depth, SECONDS / 4)
        before, _ = spent()
        messages = _load(port, connections, depth, SECONDS)
        return (spent()[0] - before) / messages


def _polite(port: int, seconds: float) -> list[float]:
    """Keep one message of each of 99 connections in flight for so many seconds; return the round trips, sorted."""
    epoll = select.epoll()
    socks: dict[int, socket.socket] = {}
    sent: dict[int, float] = {}
    for _ in range(99):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socks[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLIN)
    times: list[float] = []
    buffer = bytearray(4096)
    end = time.perf_counter() + seconds
    for fd, sock in socks.items():
        sent[fd] = time.perf_counter()
        sock.sendall(MESSAGE)
    while (now := time.perf_counter()) < end:
        for fd, _events in epoll.poll(1.0):
            received = socks[fd].recv_into(buffer)
            now = time.perf_counter()
            while received < len(MESSAGE):
                received += socks[fd].recv_into(buffer)
            times.append(now - sent[fd])
            sent[fd] = now
            socks[fd].send(MESSAGE)
    for sock in socks.values():
        sock.close()
    epoll.close()
    return sorted(times)


@contextmanager
def _hog(port: int, seconds: float) -> Iterator[list[float]]:
    """Another process keeps 512 messages of one connection in flight; the list gets how many per second it sent."""
    code = f"from benchmarks.echo import _load; print(_load({port}, 1, 512, {seconds}) / {seconds})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        time.sleep(0.5)  # until it is under way
        rate: list[float] = []
        yield rate
        rate.append(float(process.stdout.readline()))


def beside_a_hog(kind: str, *, hog: bool) -> tuple[float, float]:
    """The p99 of 99 polite clients in seconds, and messages per second of all, alone or beside a hog."""
    with _server(kind) as (port, _spent):
        with _hog(port, SECONDS + 0.5) if hog else nullcontext([0.0]) as rate:
            times = _polite(port, SECONDS)
        return times[len(times) * 99 // 100], len(times) / SECONDS + rate[0]


def idle(kind: str, connections: int) -> tuple[float, float]:
    """Bytes of the server per idle connection, and the share of a processor that all of them take."""
    with _server(kind) as (port, spent):
        _, before = spent()
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        for sock in socks:
            sock.sendall(MESSAGE)
        for sock in socks:
            received = 0
            while received < len(MESSAGE):
                received += len(sock.recv(4096))
        time.sleep(0.5)
        begun, after = spent()
        time.sleep(5.0)
        ended, _ = spent()
        for sock in socks:
            sock.close()
        return (after - before) / connections, (ended - begun) / 5.0


def round_trip(kind: str) -> float:
    """Median seconds of a round trip with one message in flight, client and server on one core."""
    affinity = os.sched_getaffinity(0)
    core = max(affinity)
    with _server(kind, core) as (port, _spent), socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        os.sched_setaffinity(0, {core})
        try:
            times = []
            end = time.perf_counter() + SECONDS
            while (begun := time.perf_counter()) < end:
                sock.sendall(MESSAGE)
                received = 0
                while received < len(MESSAGE):
                    received += len(sock.recv(4096))
                times.append(time.perf_counter() - begun)
        finally:
            os.sched_setaffinity(0, affinity)
    return statistics.median(times)


def _case(connections: int, depth: int, target: float) -> Case:
    return Case(
        f"echo, {connections} connections x {depth} in flight",
        lambda: server_seconds("ours", connections, depth),
        lambda: server_seconds("naive", connections, depth),
        target,
        note="processor seconds of the server per message; 100-byte frames, TCP on loopback",
    )


CASES = [
    _case(100, 8, 10.0),
    _case(1, 64, 10.0),
    _case(100, 1, 2.0),
    Case(
        "echo, 1 connection x 1 in flight, round trip",
        lambda: round_trip("ours"),
        lambda: round_trip("naive"),
        1.0,
        note="median round trip with both ends on one core",
    ),
    Case(
        "echo under a watchdog, 100 connections x 8",
        lambda: server_seconds("watched", 100, 8),
        lambda: server_seconds("ours", 100, 8),
        0.95,
        note="processor seconds of the server per message; plain is the same server without the watchdog",
    ),
    Case(
        "echo beside a watchdog's monitor, 100 connections x 8",
        lambda: server_seconds("monitored", 100, 8),
        lambda: server_seconds("ours", 100, 8),
        0.97,
        note="processor seconds of the server per message; the watchdog only watches, no handler runs under it",
    ),
    Case(
        "echo beside a hog, p99 of 99 polite clients",
        lambda: beside_a_hog("ours", hog=True)[0],
        lambda: beside_a_hog("ours", hog=False)[0],
        0.5,
        note="plain is without the hog, which keeps 512 messages in flight; three processes share the machine",
    ),
    Case(
        "echo beside a hog, all clients' throughput",
        lambda: 1 / beside_a_hog("ours", hog=True)[1],
        lambda: 1 / beside_a_hog("ours", hog=False)[1],
        0.95,
        note="seconds per message, the hog's included; plain is without the hog",
    ),
]


def main() -> None:
    """Print what every kind of server spends per message, in µs, and how much less that is than the naive one."""
    kinds = ["naive", "batched", "asyncio", "ours"]
    try:
        import uvloop  # noqa: F401 - is it there?
    except ImportError:
        print("uvloop is not installed")
    else:
        kinds.append("uvloop")
    kinds.append("watched")
    for connections, depth in [(100, 8), (1, 64), (100, 1)]:
        spent = {kind: server_seconds(kind, connections, depth) * 1e6 for kind in kinds}
        row = "   ".join(f"{kind} {value:.2f} ({spent['naive'] / value:.1f}x)" for kind, value in spent.items())
        print(f"{connections} x {depth}: {row}")
    trips = {kind: round_trip(kind) * 1e6 for kind in kinds}
    for kind in ("naive", "ours"):
        size, busy = idle(kind, IDLE)
        print(f"{IDLE:,} idle connections: {kind} {size:,.0f} bytes each, {busy:.2%} of a processor for all")
        for hog in (False, True):
            p99, rate = beside_a_hog(kind, hog=hog)
            print(f"99 polite{' and a hog' * hog}: {kind} p99 {p99 * 1e3:.2f} ms, {rate:,.0f}/s in all")
    print("1 x 1: " + "   ".join(f"{kind} {v:.1f} ({trips['naive'] / v:.2f}x)" for kind, v in trips.items()))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _serve(sys.argv[1])
    else:
        main()
