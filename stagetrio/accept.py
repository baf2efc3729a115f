"""Connections taken from listeners, as fast as they come and as the system allows.

Of a plain listening socket, all connections that wait are accepted in one pass of the loop; of any other listener, one
per checkpoint. What goes wrong with a single connection is counted and skipped; when the process or the machine has
run out of descriptors or memory, accepting pauses, as only the end of other connections can help.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any

import trio

from stagetrio.hub import Hub
from stagetrio.limiter import RateLimiter
from stagetrio.nursery_pool import NurseryPool
from stagetrio.proxies import Arrivals, Welcome
from stagetrio.reaper import Reaper
from stagetrio.sockets import (
    ACCEPT_PAUSE,
    ACCEPT_SKIP,
    VANISHED_WITHIN,
    Address,
    SocketListener,
    address_of,
    set_connection_options,
)
from stagetrio.tls import TlsListener
from stagetrio.transport import HubTransport, StreamTransport, Transport

BATCH = 64  # connections accepted in one pass
PAUSE = 0.1  # seconds to wait for descriptors or memory


class Acceptor:
    """Accepts connections and hands each to its owner as a transport.

    Args:
        hub: What watches plain sockets; None: every connection gets tasks of its own.
        reaper: What looks after handshakes.
        welcome: Called with each new transport and the address of the other side, None if it has none.
        pace: How fast connections are taken; None: as they come.
        arrivals: Where connections from proxies wait for the header that says whose they are; closed by `run`.
        vanished_within: Seconds after which a silent host counts as lost, see `set_connection_options`.
    """

    def __init__(
        self,
        hub: Hub | None,
        reaper: Reaper,
        welcome: Welcome,
        *,
        pace: RateLimiter | None = None,
        arrivals: Arrivals | None = None,
        vanished_within: float = VANISHED_WITHIN,
    ) -> None:
        self._hub = hub
        self._reaper = reaper
        self._hand_over = welcome
        self._pace = pace
        self._arrivals = arrivals
        self._vanished_within = vanished_within
        self._scope = trio.CancelScope()
        #: Times accepting failed, for one connection or for all.
        self.errors = 0

    def close(self) -> None:
        """Accept no more; the listeners are closed by `run`."""
        self._scope.cancel()

    async def run(self, listeners: Sequence[trio.abc.Listener[Any]], pool: NurseryPool) -> None:
        """Accept until `close`, then close the listeners.

        Args:
            listeners: Where connections come from.
            pool: Where the tasks of connections run which need tasks.

        Checkpoints: throughout.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for listener in listeners:
                        nursery.start_soon(self._accept, listener, pool)
        finally:
            if self._arrivals is not None:
                self._arrivals.close()
            with trio.CancelScope(shield=True):  # closing listeners does not wait
                for listener in listeners:
                    await listener.aclose()

    async def _accept(self, listener: trio.abc.Listener[Any], pool: NurseryPool) -> None:
        welcome = self._hand_over
        if isinstance(listener, TlsListener):
            welcome = partial(self._secure, listener)
            listener = listener.inner
        if self._arrivals is not None:
            welcome = partial(self._introduce, self._arrivals, welcome)
        if self._hub is not None and isinstance(listener, SocketListener) and _is_plain(listener.socket):
            await self._accept_sockets(listener, self._hub, welcome)
        else:
            await self._accept_streams(listener, pool, welcome)

    def _secure(self, listener: TlsListener, transport: Transport, address: Address | None) -> None:
        self._hand_over(listener.wrap(transport, self._reaper), address)

    def _introduce(
        self, arrivals: Arrivals, welcome: Welcome, transport: Transport, address: Address | None
    ) -> None:
        if arrivals.proxies.trusts(address):
            arrivals.expect(transport, address, welcome)
        else:
            welcome(transport, address)

    async def _accept_sockets(self, listener: SocketListener, hub: Hub, welcome: Welcome) -> None:
        # Trio's socket accepts one connection per checkpoint; its double accepts all that wait.
        with socket.socket(fileno=os.dup(listener.socket.fileno())) as double:
            double.setblocking(False)
            granted = False  # whether the pace has let one pass that has not come yet
            while True:
                await trio.lowlevel.wait_readable(listener.socket)
                for _ in range(BATCH):
                    if self._pace is not None and not granted:
                        await self._pace.acquire()
                        granted = True
                    try:
                        sock, _name = double.accept()
                    except BlockingIOError:
                        break
                    except OSError as error:
                        await self._failed(error)
                        break
                    granted = False
                    self._welcome_socket(sock, hub, welcome)

    def _welcome_socket(self, sock: socket.socket, hub: Hub, welcome: Welcome) -> None:
        try:
            sock.setblocking(False)
            address = self._prepare(sock)
        except OSError:  # gone already
            self.errors += 1
            sock.close()
            return
        welcome(HubTransport(sock, hub), address)

    async def _accept_streams(self, listener: trio.abc.Listener[Any], pool: NurseryPool, welcome: Welcome) -> None:
        while True:
            if self._pace is not None:
                await self._pace.acquire()
            try:
                stream = await listener.accept()
            except OSError as error:
                await self._failed(error)
                continue
            try:
                address = self._prepare(stream.socket) if isinstance(stream, trio.SocketStream) else None
            except OSError:  # gone already
                self.errors += 1
                await trio.aclose_forcefully(stream)
                continue
            transport = StreamTransport(stream)
            pool.start_soon(transport.run)
            welcome(transport, address)

    def _prepare(self, sock: socket.socket | trio.socket.SocketType) -> Address:
        set_connection_options(sock, self._vanished_within)
        return address_of(sock, remote=True)

    async def _failed(self, error: OSError) -> None:
        self.errors += 1
        if error.errno in ACCEPT_PAUSE:
            await trio.sleep(PAUSE)
        elif error.errno not in ACCEPT_SKIP:
            raise error


def _is_plain(sock: trio.socket.SocketType) -> bool:
    """Whether a socket is the operating system's, not one of a virtual network."""
    with socket.socket() as real:
        return type(sock) is type(trio.socket.from_stdlib_socket(real))
