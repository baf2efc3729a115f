"""Scenario 9: peers that vanish without a word, that half-close, and that reset; nothing of them stays.

The vanished ones live in a network namespace of their own, behind a pair of virtual interfaces; when its only route
leads nowhere, whatever their kernel would answer is lost, as if the machine had lost its power.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import attrs
import pytest
import trio
from served import FRAMING, Raw, serving

from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.ticket import TicketStage

CLONE_NEWNET = 0x40000000
EACH = 10  # peers of each kind
T = TypeVar("T")


def may_make_namespaces() -> bool:
    """Whether this process may; the project's own test run may always."""
    if os.environ.get("CI"):
        return True
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    return made.returncode == 0 and subprocess.run(["ip", "-V"], capture_output=True).returncode == 0


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@attrs.frozen
class Elsewhere:
    """A network namespace with one interface, reached from here by another."""

    name: str
    here: str
    there: str

    def call(self, fn: Callable[[], T]) -> T:
        """Call a function in a thread that is in the namespace: sockets it makes stay there."""
        results: list[T] = []

        def run() -> None:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/var/run/netns/{self.name}") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            results.append(fn())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results[0]

    def vanish(self) -> None:
        """Lose whatever is sent from there."""
        ip(f"-n {self.name} route replace blackhole {self.here}/32")


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    serial = os.getpid() % 16384  # so that several runs at once have a network of four addresses each
    network = ipaddress.IPv4Address("10.213.0.0") + 4 * serial
    net = Elsewhere(f"gone{serial}", str(network + 1), str(network + 2))
    ip(f"netns add {net.name}")
    try:
        ip(f"link add h{serial} type veth peer name t{serial} netns {net.name}")
        ip(f"addr add {net.here}/30 dev h{serial}")
        ip(f"link set h{serial} up")
        ip(f"-n {net.name} addr add {net.there}/30 dev t{serial}")
        ip(f"-n {net.name} link set t{serial} up")
        yield net
    finally:
        ip(f"link del h{serial}")  # what is unacknowledged keeps the namespace, and with it the interfaces, for minutes
        ip(f"netns del {net.name}")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def naive(stream: trio.SocketStream) -> None:
    """What one writes first: it waits for input for as long as the connection lasts, as far as it knows."""
    async with stream:
        while await stream.receive_some():
            pass


@pytest.mark.skipif(not may_make_namespaces(), reason="making network namespaces is not permitted here")
async def test_vanished_peers_are_reaped_and_nothing_of_them_stays(elsewhere: Elsewhere) -> None:
    """Idle, in a handler with a ticket, or not reading: all gone, while the plain server keeps every one of them."""
    tickets = TicketStage("t", EACH)
    before = descriptors(), trio.lowlevel.current_statistics().tasks_living
    reasons: list[CloseReason | None] = []
    all_gone = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> bytes | None:
        if message == b"hold":
            async with tickets.ticket(peer):
                await trio.sleep_forever()
        if message == b"much":
            for _ in range(5000):
                await peer.send(bytes(1000))
        return message

    async def on_disconnect(peer: Peer[bytes]) -> None:
        reasons.append(peer.close_reason)
        if len(reasons) == 3 * EACH:
            all_gone.set()

    limits = PeerLimits(vanished_within=2, send_grace=3, linger=1)
    options: dict[str, Any] = {"limits": limits, "on_disconnect": on_disconnect, "cancel_on_disconnect": True}
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            (plain,) = await trio.open_tcp_listeners(0, host=elsewhere.here)
            scope = trio.CancelScope()

            async def serve_plainly() -> None:
                with scope:
                    await trio.serve_listeners(naive, [plain])

            nursery.start_soon(serve_plainly)
            async with serving("tcp", handler, address=f"tcp://{elsewhere.here}:0", **options) as running:
                port = running.address.port

                def dial(port: int, message: bytes) -> list[socket.socket]:
                    socks = [socket.create_connection((elsewhere.here, port)) for _ in range(EACH)]
                    for sock in socks:
                        sock.sendall(FRAMING.encode(message))
                    return socks

                zombies = []
                for message in (b"hello", b"hold", b"much"):
                    zombies += elsewhere.call(lambda message=message: dial(port, message))  # type: ignore[misc]
                naive_port = plain.socket.getsockname()[1]
                zombies += elsewhere.call(lambda: dial(naive_port, b"hello"))
                while tickets.statistics().holders < EACH or len(running.server.peers) < 3 * EACH:
                    await trio.lowlevel.checkpoint()
                living = trio.lowlevel.current_statistics().tasks_living
                elsewhere.vanish()
                await all_gone.wait()
                assert set(reasons) <= {CloseReason.RESET, CloseReason.SLOW_READER}
                assert reasons.count(CloseReason.RESET) >= 2 * EACH
                while tickets.statistics().holders:
                    await trio.lowlevel.checkpoint()
                assert running.server.peers == ()
                # The control: the plain server still has a task and a descriptor for each.
                assert trio.lowlevel.current_statistics().tasks_living >= living - 3 * EACH
                assert descriptors() >= before[0] + len(zombies) + EACH
                for sock in zombies:
                    sock.close()
            scope.cancel()
    assert (descriptors(), trio.lowlevel.current_statistics().tasks_living) == before


async def test_half_closed_peers_are_served_and_reset_ones_forgotten() -> None:
    """Who only stops sending gets every reply; who resets leaves no ticket, no task and no descriptor behind."""
    tickets = TicketStage("t", EACH)
    before = descriptors(), trio.lowlevel.current_statistics().tasks_living

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        async with tickets.ticket(peer):
            if message == b"hold":
                await trio.sleep_forever()
            return message

    async with serving("tcp", handler, cancel_on_disconnect=True) as running:
        clients: list[Raw] = [await running.connect() for _ in range(2 * EACH)]
        for client in clients[:EACH]:
            await client.send(b"hold")
        while tickets.statistics().holders < EACH:
            await trio.lowlevel.checkpoint()
        for client in clients[:EACH]:
            stream: Any = client.stream
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
        for client in clients[EACH:]:
            await client.send(b"one", b"two")
            await client.stream.send_eof()
        for client in clients[EACH:]:
            assert await client.receive_all() == [b"one", b"two"]
            await client.stream.aclose()
        while running.server.peers or tickets.statistics().holders:
            await trio.lowlevel.checkpoint()
        closed = running.server.statistics().closed
        assert closed[CloseReason.ENDED] == EACH
        assert closed[CloseReason.RESET] == EACH
    assert (descriptors(), trio.lowlevel.current_statistics().tasks_living) == before
