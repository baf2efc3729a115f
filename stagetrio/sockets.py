"""The sockets behind addresses.

Of an address (`stagetrio.addresses`) `open_listeners` makes listening sockets, `open_datagram_sockets` sockets that
receive datagrams, and `connect` a stream.

Which families a listener serves: ``tcp://192.0.2.1:80`` IPv4, ``tcp://[2001:db8::1]:80`` IPv6, ``tcp://[::]:80``
both by one socket (IPv4 addresses appear as ``::ffff:192.0.2.1``), ``tcp://:80`` both by a socket each. Datagram
sockets do alike.

What is set on every TCP connection, and, where it says so, on listeners and datagram sockets, and why:

================= ======== =================================================================================
option            value    reason
================= ======== =================================================================================
TCP_NODELAY       on       output is batched by the outbox already; Nagle's delay would only be added to it
SO_KEEPALIVE      on       with 60 s idle, 10 s apart, 3 probes: a vanished peer is noticed within 90 s; of a server's
                           connections, `PeerLimits.vanished_within` says when
TCP_NOTSENT_LOWAT 16 KiB   more output waits in the outbox, where it is bounded and a slow reader is noticed
TCP_USER_TIMEOUT  90 s     the same bound while output waits to be acknowledged, when no probes are sent
SO_REUSEADDR      on       (listeners) a restarted server can bind while old connections linger; not on Windows; off
                           for datagrams, where it would let a second process take the port
SO_REUSEPORT      choice   (listeners, datagrams) several processes may have one port, and the kernel shares out what
                           comes; off by default, as another process of the same user may take a share unnoticed
IPV6_V6ONLY       on       (IPv6) one socket per family, as trio does; off for ``[::]``, which serves both
SO_RCVBUF         1 MiB    (datagrams) what comes in one burst waits there; the kernel caps it at ``net.core.rmem_max``
SO_LINGER         unset    closing waits for nobody; the peers linger, within bounds, before they close
backlog           1,024    connections waiting to be accepted; the kernel caps it at ``net.core.somaxconn``
================= ======== =================================================================================
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from math import inf

import trio

from stagetrio.addresses import (
    Address,
    FdAddress,
    TcpAddress,
    UdpAddress,
    UnixAddress,
    address_of,
    parse_address,
    parse_listening_address,
)
from stagetrio.amounts import check_count

__all__ = [
    "Address",
    "FdAddress",
    "SocketListener",
    "TcpAddress",
    "UdpAddress",
    "UnixAddress",
    "UnixListener",
    "address_of",
    "connect",
    "inherited_addresses",
    "open_datagram_sockets",
    "open_listeners",
    "parse_address",
    "set_connection_options",
]

VANISHED_WITHIN = 90.0  # seconds
KEEPALIVE_PROBES = 3
UNSENT = 16384  # bytes of output in the kernel, of a TCP connection, that have not been sent yet
RECEIVE_BUFFER = 1 << 20  # bytes of datagrams, per socket
BACKLOG = 1024  # connections waiting to be accepted, per listener


class UnixListener(trio.abc.Listener[trio.SocketStream]):
    """Listens on a path and takes the socket file away with it."""

    def __init__(self, sock: trio.socket.SocketType, path: str) -> None:
        self._listener = trio.SocketListener(sock)
        self._path = path
        self._inode = os.stat(path).st_ino

    @property
    def socket(self) -> trio.socket.SocketType:
        """The listening socket, as of `trio.SocketListener`."""
        return self._listener.socket

    async def accept(self) -> trio.SocketStream:
        """Accept a connection, as `trio.SocketListener.accept` does.

        Checkpoints: always; cancelled, no connection was taken.
        """
        return await self._listener.accept()

    async def aclose(self) -> None:
        """Close the socket and remove its file, unless another server has put its own there since.

        Checkpoints: once.
        """
        with suppress(FileNotFoundError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        await self._listener.aclose()


SocketListener = trio.SocketListener | UnixListener


async def open_listeners(
    *addresses: str | Address, backlog: int = BACKLOG, reuse_port: bool = False, mode: int | None = None
) -> list[SocketListener]:
    """Open listening sockets: one per Unix address, one per numeric address that a TCP host stands for.

    All or none: when one cannot be opened, those opened before it are closed.

    Args:
        addresses: Where to listen, as text or parsed.
        backlog: Connections the kernel holds for each listener until they are accepted; ≥ 1.
        reuse_port: Whether other processes may listen on the same TCP ports, if they say so too.
        mode: Who may connect to the Unix sockets, as permission bits such as ``0o660``; by default as the umask has
            it. Nobody can connect before it is set.

    Raises:
        ValueError: An address makes no sense.
        OSError: The address is in use or not ours, the path may not be written, or the descriptor is no listening
            socket; the address is in the message.

    Checkpoints: at least once; a cancellation leaves nothing open.
    """
    if not addresses:
        raise ValueError("addresses must name at least one place to listen, not ()")
    check_count("backlog", backlog, 1)
    if mode is not None and check_count("mode", mode, 0) > 0o777:
        raise ValueError(f"mode must be permission bits between 0 and 0o777, not {mode!r}")
    parsed = [parse_listening_address(address) for address in addresses]
    listeners: list[SocketListener] = []
    try:
        for address in parsed:
            try:
                if isinstance(address, UnixAddress):
                    listeners.append(await _listen_unix(address.path, backlog, mode))
                elif isinstance(address, FdAddress):
                    listeners.append(_listen_inherited(address.fd))
                else:
                    listeners += await _listen_tcp(address, backlog, reuse_port)
            except OSError as error:
                raise _with_address(error, address) from error
    except BaseException:
        for listener in listeners:
            with trio.CancelScope(shield=True):
                await listener.aclose()
        raise
    return listeners


def _with_address(error: OSError, address: Address) -> OSError:
    return type(error)(error.errno, f"cannot listen on {address}: {error.strerror or error}")


async def _listen_tcp(address: TcpAddress, backlog: int, reuse_port: bool) -> list[trio.SocketListener]:
    if not reuse_port and address.host != "::":
        return await trio.open_tcp_listeners(address.port, host=address.host or None, backlog=backlog)
    found = await trio.socket.getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listeners: list[trio.SocketListener] = []
    try:
        for family, type_, protocol, _name, where in found:
            sock = trio.socket.socket(family, type_, protocol)
            try:
                if sys.platform != "win32":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
                await sock.bind(where)
                sock.listen(backlog)
                listeners.append(trio.SocketListener(sock))
            except BaseException:
                sock.close()
                raise
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


def _listen_inherited(fd: int) -> trio.SocketListener:
    otherwise = "the descriptor is no listening socket"
    sock = _inherit(fd, socket.SOCK_STREAM, otherwise)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return trio.SocketListener(sock)
    sock.detach()
    raise OSError(errno.EINVAL, otherwise)


async def open_datagram_sockets(*addresses: str | Address, reuse_port: bool = False) -> list[trio.socket.SocketType]:
    """Open sockets that receive datagrams: one per numeric address that a host stands for.

    All or none: when one cannot be opened, those opened before it are closed. A socket of all interfaces answers from
    whichever address the way back has; where there are several, name the one that clients know.

    Args:
        addresses: Where datagrams come in: ``udp://host:port``, or ``fd://3`` for a socket opened already.
        reuse_port: Whether other processes may have the same ports, if they say so too.

    Raises:
        ValueError: An address makes no sense, or is none for datagrams.
        OSError: The address is in use or not ours, or the descriptor is no datagram socket; the address is in the
            message.

    Checkpoints: at least once; a cancellation leaves nothing open.
    """
    if not addresses:
        raise ValueError("addresses must name at least one place to receive datagrams, not ()")
    parsed = [parse_address(a) if isinstance(a, str) else a for a in addresses]
    opened: list[trio.socket.SocketType] = []
    try:
        for address in parsed:
            try:
                if isinstance(address, UdpAddress):
                    opened += await _bind_udp(address, reuse_port)
                elif isinstance(address, FdAddress):
                    opened.append(_inherit(address.fd, socket.SOCK_DGRAM, "the descriptor is no datagram socket"))
                else:
                    raise ValueError(f"addresses must be ones for datagrams, not {address}")
            except OSError as error:
                raise _with_address(error, address) from error
        await trio.lowlevel.checkpoint()
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return opened


async def _bind_udp(address: UdpAddress, reuse_port: bool) -> list[trio.socket.SocketType]:
    found = await trio.socket.getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
    )
    bound: list[trio.socket.SocketType] = []
    try:
        for family, type_, protocol, _name, where in found:
            bound.append(sock := trio.socket.socket(family, type_, protocol))
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            await sock.bind(where)
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    return bound


def _inherit(fd: int, kind: int, otherwise: str) -> trio.socket.SocketType:
    sock = socket.socket(fileno=fd)  # from here on it is its new owner's, and closed with it
    try:
        if sock.type != kind:
            raise OSError(errno.EINVAL, otherwise)
        sock.set_inheritable(False)
        return trio.socket.from_stdlib_socket(sock)
    except BaseException:
        sock.detach()
        raise


def inherited_addresses(environ: MutableMapping[str, str] = os.environ) -> list[FdAddress]:
    """Return the listening sockets that a service manager has opened for this process, as addresses.

    The protocol is that of systemd's socket activation: ``LISTEN_FDS`` descriptors from 3 on, meant for the process
    ``LISTEN_PID``. The variables are removed, so that neither a second call nor a child takes them for its own.

    Raises:
        ValueError: ``LISTEN_FDS`` is set, but is no number.
    """
    pid, fds = environ.get("LISTEN_PID"), environ.get("LISTEN_FDS")
    if pid != str(os.getpid()) or fds is None:
        return []
    if not (fds.isascii() and fds.isdigit()):
        raise ValueError(f"LISTEN_FDS must be a number, not {fds!r}")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(name, None)
    return [FdAddress(fd) for fd in range(3, 3 + int(fds))]


async def _listen_unix(path: str, backlog: int, mode: int | None) -> UnixListener:
    await trio.lowlevel.checkpoint()
    await _remove_stale(path)
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.bind(path)
        if mode is not None:
            os.chmod(path, mode)
        sock.listen(backlog)
        return UnixListener(sock, path)
    except BaseException:
        sock.close()
        raise


async def _remove_stale(path: str) -> None:
    """Remove the socket file of a server that is gone; one that answers, or another kind of file, is left to `bind`.

    Two servers that start at once can both find the file stale; the inode check in `UnixListener.aclose` keeps the
    loser from removing the winner's.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:
        return
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            await probe.connect(path)
        except ConnectionRefusedError:
            with suppress(FileNotFoundError):
                os.unlink(path)
        except OSError:
            return


async def connect(address: str | Address) -> trio.SocketStream:
    """Open a connection.

    Raises:
        ValueError: The address makes no sense.
        OSError: Nobody listens there, or the name does not resolve.

    Checkpoints: at least once; a cancellation leaves nothing open.
    """
    parsed = address if isinstance(address, Address) else parse_address(address)
    if isinstance(parsed, FdAddress | UdpAddress):
        raise ValueError(f"address must be one to connect to, not {parsed}")
    if isinstance(parsed, UnixAddress):
        return await trio.open_unix_socket(parsed.path)
    stream = await trio.open_tcp_stream(parsed.host or "localhost", parsed.port)
    set_connection_options(stream.socket)
    return stream


async def connect_stream(address: str | Address, ssl_context: ssl.SSLContext | None) -> trio.abc.Stream:
    """Do what `connect` does, and speak TLS where there is a context, as the client of the host in the address."""
    if not isinstance(ssl_context, ssl.SSLContext | None):
        raise TypeError(f"ssl_context must be an ssl.SSLContext or None, not {ssl_context!r}")
    target = address if isinstance(address, Address) else parse_address(address)
    stream = await connect(target)
    if ssl_context is None:
        return stream
    host = target.host if isinstance(target, TcpAddress) else None
    return trio.SSLStream(stream, ssl_context, server_hostname=host)


def set_connection_options(
    sock: socket.socket | trio.socket.SocketType, vanished_within: float = VANISHED_WITHIN
) -> None:
    """Set on a TCP connection what the table at the top of this module says; on others do nothing.

    Args:
        sock: The connection.
        vanished_within: Seconds after which the other side counts as lost if nothing at all comes from it, not even
            from its kernel: two thirds of it idle, the rest for probes, each in whole seconds and at least one;
            ``math.inf`` for no such rule.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if vanished_within == inf:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        vanished_within = min(vanished_within, 32767.0)  # what the kernel takes
        idle = max(1, round(vanished_within * 2 / 3))
        interval = max(1, round(vanished_within / 3 / KEEPALIVE_PROBES))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        within = idle + interval * KEEPALIVE_PROBES
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, within * 1000)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)


def _known(*names: str) -> frozenset[int]:
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


# `accept` fails with these for one connection only: it was gone before it was accepted. Linux hands over whatever
# error is pending on it (accept(2), "Error handling"), and a firewall's refusal.
ACCEPT_SKIP = _known(
    "ECONNABORTED", "EPERM", "EPROTO", "ENOPROTOOPT", "ENETDOWN", "ENETUNREACH", "ENONET", "EHOSTDOWN", "EHOSTUNREACH",
    "ETIMEDOUT", "EINTR",
)  # fmt: skip
# And with these when this process or the machine has run out of something: waiting is the only cure.
ACCEPT_PAUSE = _known("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS")
