"""Addresses as people write them.

``tcp://127.0.0.1:8800``, ``tcp://[::1]:8800``, ``udp://127.0.0.1:8800``, ``unix:///run/game.sock`` (a path relative to
the working directory has no third slash: ``unix://game.sock``), ``fd://3`` for a socket which whoever started this
process has opened (`stagetrio.sockets.inherited_addresses`). `parse_address` turns one into a value, ``str`` back.
"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

import attrs
import trio


@attrs.frozen
class TcpAddress:
    """A TCP endpoint.

    Args:
        host: A name or a numeric IPv4 or IPv6 address, without brackets; ``""`` listens on every interface.
        port: 0 to 65535; 0 lets the system choose when listening.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


@attrs.frozen
class UdpAddress:
    """Where datagrams come in, or from.

    Args:
        host: As of `TcpAddress`.
        port: 0 to 65535; 0 lets the system choose when opening.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"udp://[{self.host}]:{self.port}" if ":" in self.host else f"udp://{self.host}:{self.port}"


@attrs.frozen
class UnixAddress:
    """A Unix-domain stream socket.

    Args:
        path: Of the socket in the file system.
    """

    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"


@attrs.frozen
class FdAddress:
    """A socket inherited from the process that started this one.

    Args:
        fd: Its descriptor, ≥ 0.
    """

    fd: int

    def __str__(self) -> str:
        return f"fd://{self.fd}"


Address = TcpAddress | UdpAddress | UnixAddress | FdAddress


def parse_address(address: str) -> Address:
    """Read an address as people write it.

    Raises:
        ValueError: The scheme is unknown, or the rest does not fit it; the message says what would.
    """
    if not isinstance(address, str):
        raise TypeError(f"address must be a str, not {address!r}")
    scheme, separator, rest = address.partition("://")
    if not separator:
        raise ValueError(f"address must start with tcp://, udp://, unix:// or fd://, not {address!r}")
    if scheme == "unix":
        if not rest or "\0" in rest:
            raise ValueError(f"address must be unix:///path/of.sock, not {address!r}")
        return UnixAddress(rest)
    if scheme == "fd":
        if not (rest.isascii() and rest.isdigit()):
            raise ValueError(f"address must be fd:// and the number of a descriptor, not {address!r}")
        return FdAddress(int(rest))
    if scheme not in ("tcp", "udp"):
        raise ValueError(f"address has an unknown scheme {scheme!r} (tcp, udp, unix and fd are known): {address!r}")
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"address must be {scheme}://host:port, not {address!r}: {error}") from None
    if port is None or parts.path or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"address must be {scheme}://host:port, not {address!r}")
    return (TcpAddress if scheme == "tcp" else UdpAddress)(parts.hostname or "", port)


def address_of(sock: socket.socket | trio.socket.SocketType, *, remote: bool = False) -> Address:
    """Return the address a socket is bound to, or, with ``remote``, whom it is connected to."""
    name = sock.getpeername() if remote else sock.getsockname()
    if isinstance(name, tuple):
        return (UdpAddress if sock.type == socket.SOCK_DGRAM else TcpAddress)(name[0], name[1])
    return UnixAddress(os.fsdecode(name))


def parse_listening_address(address: str | Address) -> TcpAddress | UnixAddress | FdAddress:
    """Read an address at which connections can be accepted.

    Raises:
        ValueError: It is no address, or one for datagrams.
    """
    parsed = address if isinstance(address, Address) else parse_address(address)
    if isinstance(parsed, UdpAddress):
        raise ValueError(f"addresses must be ones to accept connections on, not {parsed}")
    return parsed
