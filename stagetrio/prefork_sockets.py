"""Listening sockets for several worker processes, kept open by the arbiter.

On Linux, every worker of a TCP address has a listening socket of its own (``SO_REUSEPORT``), and the kernel spreads new
connections evenly, whatever the workers do. Where one socket is shared, whoever wakes first takes all that wait, and
one worker ends up with most of the connections. The arbiter opens these sockets, hands them to the worker in their
slot, and keeps them open while that worker dies or is replaced. (A socket that belongs to the worker alone takes its
queue with it, and resets those in it.) New connections go only to slots whose worker is ready (``steering.py``), from
the moment at which the arbiter hears that another one's has gone. What was in that one's queue by then waits there for
its next worker; it is neither refused nor reset. While no worker is ready at all, every slot gets its share, and these
wait as well. Closing a slot for good resets what waits there, unless ``net.ipv4.tcp_migrate_req`` is on.

Unix sockets, and TCP elsewhere, are one socket that all workers share.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Collection, Sequence

import trio

from stagetrio.addresses import Address, TcpAddress, address_of, parse_listening_address
from stagetrio.sockets import BACKLOG, SocketListener, open_listeners
from stagetrio.steering import Group

PER_WORKER = sys.platform == "linux"


class WorkerSockets:
    """The listening sockets of all workers.

    Args:
        shared: listeners that all workers share.
        names: ``(family, address)`` of those of which each worker has one of its own.
    """

    def __init__(self, shared: Sequence[SocketListener], names: Sequence[tuple[int, tuple[object, ...]]]) -> None:
        self._shared = list(shared)
        self._groups = [(family, name, Group[int]()) for family, name in names]  # keyed by slot

    def of_slot(self, slot: int) -> list[int]:
        """The descriptors of a slot's sockets, opened if they are not open yet.

        Raises:
            OSError: An address cannot be had any more.
        """
        try:
            for family, name, group in self._groups:
                if slot not in group:
                    group.add(slot, _listen(family, name))
        except BaseException:
            self.close_slot(slot)
            raise
        shared = [listener.socket.fileno() for listener in self._shared]
        return [*shared, *(group[slot].fileno() for _, _, group in self._groups)]

    @property
    def addresses(self) -> list[Address]:
        """Where the workers listen."""
        shared = [address_of(listener.socket) for listener in self._shared]
        return [*shared, *(TcpAddress(str(name[0]), int(str(name[1]))) for _, name, _ in self._groups)]

    def steer(self, slots: Collection[int]) -> None:
        """Have new connections go to these slots only, in equal shares; to none: no change."""
        for _, _, group in self._groups:
            group.steer(slots)

    def close_slot(self, slot: int) -> None:
        """Close the sockets of a slot that will have no worker any more."""
        for _, _, group in self._groups:
            if slot in group:
                group.close(slot)

    async def aclose(self) -> None:
        """Close all of them.

        Checkpoints: always; cancelled, they are closed all the same.
        """
        for _, _, group in self._groups:
            group.close_all()
        with trio.CancelScope(shield=True):
            for listener in self._shared:
                await listener.aclose()
        await trio.lowlevel.checkpoint()


async def open_worker_sockets(addresses: Sequence[str | Address], *, per_worker: bool = PER_WORKER) -> WorkerSockets:
    """Bind the addresses: all or none.

    Raises:
        ValueError: An address makes no sense.
        OSError: An address is in use or not ours; it is in the message.

    Checkpoints: at least once; a cancellation leaves nothing open.
    """
    if not addresses:
        raise ValueError("addresses must name at least one place to listen, not ()")
    parsed = [parse_listening_address(address) for address in addresses]
    own = [address for address in parsed if per_worker and isinstance(address, TcpAddress)]
    others = [address for address in parsed if address not in own]
    listeners = await open_listeners(*others) if others else []
    sockets = WorkerSockets(listeners, [])
    try:
        names = []
        for address in own:
            # without SO_REUSEPORT: with it, a second server on this port would not be noticed
            for probe in await open_listeners(address):
                assert isinstance(probe, trio.SocketListener)
                names.append((int(probe.socket.family), probe.socket.getsockname()))
                await trio.aclose_forcefully(probe)
        sockets = WorkerSockets(listeners, names)
        sockets.of_slot(0)
    except BaseException:
        with trio.CancelScope(shield=True):
            await sockets.aclose()
        raise
    return sockets


def _listen(family: int, name: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
