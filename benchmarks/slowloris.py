"""What good clients notice of a thousand that send a byte a second: how long 99 of 100 of their messages take.

``python -m benchmarks.slowloris`` prints that and the median, for good clients alone and beside the others. Server,
drips and good clients are processes of their own; whoever is cut off at the end of its ten seconds connects again.
"""

from __future__ import annotations

import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import trio

from benchmarks.case import Case
from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.server import serve_stage
from stagetrio.sockets import open_listeners

GOOD = 50
DRIPS = 1000
INTERVAL = 0.02  # seconds between two messages of a good client
SECONDS = 5.0
MESSAGE = LengthPrefixed(1000).encode(bytes(100))


async def _echo(peer: Peer[bytes], message: bytes) -> bytes:
    return message


async def _serve() -> None:
    listeners = await open_listeners("tcp://127.0.0.1:0")
    print(listeners[0].socket.getsockname()[1], flush=True)
    await partial(serve_stage, _echo, listeners, framing=LengthPrefixed(1000))()


def _drip(port: int) -> None:
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(DRIPS)]
    sent = [0] * DRIPS
    print("dripping", flush=True)
    begun = time.perf_counter()
    for turn in range(sys.maxsize):
        number = turn % DRIPS
        try:
            socks[number].send(MESSAGE[sent[number] : sent[number] + 1])
            sent[number] += 1
        except OSError:  # cut off
            socks[number].close()
            socks[number] = socket.create_connection(("127.0.0.1", port))
            sent[number] = 0
        time.sleep(max(0.0, begun + (turn + 1) / DRIPS - time.perf_counter()))


@contextmanager
def _process(*arguments: str) -> Iterator[str]:
    """Run another part of this in a process of its own, and give the line it prints when it is ready."""
    command = [sys.executable, "-m", "benchmarks.slowloris", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline()
        finally:
            process.kill()


def _round_trips(port: int) -> list[float]:
    """Seconds of every round trip of the good clients, each of which has one message under way."""
    times: list[float] = []
    with select.epoll() as epoll, ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(GOOD)]
        by_fd = {sock.fileno(): number for number, sock in enumerate(socks)}
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            epoll.register(sock.fileno(), select.EPOLLIN)
        now = time.perf_counter()
        due = [now + INTERVAL * number / GOOD for number in range(GOOD)]
        begun, received = [0.0] * GOOD, [0] * GOOD
        turn, end = 0, now + SECONDS
        while now < end:
            number = turn % GOOD
            if due[number] <= now and not begun[number]:
                begun[number] = time.perf_counter()
                due[number] = begun[number] + INTERVAL
                socks[number].sendall(MESSAGE)
                turn += 1
            for fd, _events in epoll.poll(max(0.0, due[turn % GOOD] - now)):
                number = by_fd[fd]
                received[number] += len(socks[number].recv(4096))
                if received[number] == len(MESSAGE):
                    times.append(time.perf_counter() - begun[number])
                    begun[number], received[number] = 0.0, 0
            now = time.perf_counter()
    return times


def measured(*, drips: bool) -> tuple[float, float]:
    """Return the median round trip of the good clients, and that within which 99 of 100 are back, in seconds."""
    with ExitStack() as stack:
        port = int(stack.enter_context(_process("serve")))
        if drips:
            stack.enter_context(_process("drip", str(port)))
        times = sorted(_round_trips(port))
    return statistics.median(times), times[len(times) * 99 // 100]


CASES = [
    Case(
        f"slowloris: p99 of {GOOD} good clients beside {DRIPS} that drip, against alone",
        lambda: measured(drips=True)[1],
        lambda: measured(drips=False)[1],
        0.9,
        note="round trips of 100-byte frames, each client one every 20 ms; server, drips and clients on two cores",
    )
]


def main() -> None:
    """Print both, in µs."""
    for name, drips in (("alone", False), ("beside drips", True)):
        median, p99 = (seconds * 1e6 for seconds in measured(drips=drips))
        print(f"{name}: p50 {median:.0f}, p99 {p99:.0f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        trio.run(_serve)
    elif sys.argv[1:2] == ["drip"]:
        _drip(int(sys.argv[2]))
    else:
        main()
