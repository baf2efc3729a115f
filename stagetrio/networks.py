"""Who counts as one stranger: addresses by prefix, and sets of networks.

An IPv6 customer is given a /64 at least and may use any address in it, so per-address bounds mean nothing there: the
prefix is the stranger. An IPv4 address that reached a dual-stack listener (``::ffff:192.0.2.1``) is that IPv4 address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from stagetrio.addresses import Address, TcpAddress, UdpAddress

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def ip_of(address: Address | None) -> _Ip | None:
    """Return the numeric address behind an address, or None where there is none (Unix sockets, names, streams).

    Cost: about 2 µs.
    """
    if not isinstance(address, TcpAddress | UdpAddress):
        return None
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip.scope_id is not None:
            return ipaddress.IPv6Address(int(ip))
    return ip


def prefix_of(ip: _Ip, ipv4_prefix: int, ipv6_prefix: int) -> tuple[int, int]:
    """Return what all addresses with the same leading bits have in common: a version and those bits."""
    bits = ipv4_prefix if ip.version == 4 else ipv6_prefix
    return ip.version, int(ip) >> (ip.max_prefixlen - bits)


class Networks:
    """A set of networks, to look addresses up in.

    Args:
        networks: Such as ``"10.0.0.0/8"``, ``"2001:db8::/32"`` or a single address.

    Raises:
        ValueError: One of them is no network, or has bits set behind its prefix.

    Cost: of a look-up, one dict access for each distinct prefix length.
    """

    def __init__(self, networks: Iterable[str]) -> None:
        if isinstance(networks, str):
            raise TypeError(f"networks must be a sequence of networks, not the str {networks!r}")
        self._of_length: dict[tuple[int, int], set[int]] = {}  # {(version, bits left out): leading bits}
        for text in networks:
            network = ipaddress.ip_network(text)
            left_out = network.max_prefixlen - network.prefixlen
            bits = int(network.network_address) >> left_out
            self._of_length.setdefault((network.version, left_out), set()).add(bits)

    def __contains__(self, ip: object) -> bool:
        if not isinstance(ip, ipaddress.IPv4Address | ipaddress.IPv6Address):
            return False
        number = int(ip)
        return any(
            version == ip.version and number >> left_out in bits
            for (version, left_out), bits in self._of_length.items()
        )
