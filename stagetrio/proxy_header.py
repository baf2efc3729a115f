"""The header by which a proxy says for whom it has opened a connection: the PROXY protocol, versions 1 and 2.

A pure function of the first bytes of a connection, without any I/O. The rules this file owns:

- The header is judged as soon as the bytes at hand prove it wrong, and never needs more than `MAX_BYTES` of them.
- Nothing is guessed: where a header is due, anything else is a mistake.
- What follows the header belongs to the connection; `ProxyHeader.size` says where it begins.
- The words of a mistake are ours alone and hold nothing that the other side sent, so they may be counted by.

Version 1 is a line of at most 107 bytes::

    PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\\r\\n        (or TCP6; or PROXY UNKNOWN and anything)

Version 2 is binary:

====== ===== ============================================================================================
offset bytes content
====== ===== ============================================================================================
0      12    ``\\r\\n\\r\\n\\0\\r\\nQUIT\\n``
12     1     0x20: the proxy speaks for itself (a health check); 0x21: for whom it says
13     1     0x11 TCP over IPv4, 0x21 TCP over IPv6, 0x31 Unix stream, 0x00 unspecified
14     2     length of what follows, unsigned, big-endian
16     n     both addresses, both ports, then type-length-values, whose form is checked and which are skipped
====== ===== ============================================================================================

Source: The PROXY protocol, versions 1 & 2, https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt
"""

from __future__ import annotations

import ipaddress
import os
from struct import Struct

import attrs

from stagetrio.addresses import TcpAddress, UnixAddress
from stagetrio.framing import ProtocolError

MAX_BYTES = 4096  # of a header of version 2; addresses take 232 at most, and the rest is left for what proxies add
_LINE = 107  # bytes of the longest header of version 1
_V1 = b"PROXY "
_V2 = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = Struct("!12sBBH")
_PORTS = Struct("!HH")
_ADDRESSES = {0x11: 12, 0x21: 36, 0x31: 216}  # {family and protocol: bytes of both addresses and ports}


@attrs.frozen
class ProxyHeader:
    """What a header says.

    Args:
        address: Who has connected to the proxy; None: the proxy does not say, or speaks for itself.
        size: Bytes of the header; what follows is the connection's.
    """

    address: TcpAddress | UnixAddress | None
    size: int


def parse_header(data: bytes) -> ProxyHeader | None:
    """Read the header at the beginning of a connection; None while it is incomplete and may still turn out right.

    Args:
        data: All that has come so far.

    Raises:
        ProtocolError: This is no header.

    Cost: 4 µs for version 1, 3 µs for version 2.
    """
    if data[: len(_V1)] == _V1[: len(data)]:
        return _parse_line(data)
    if data[: len(_V2)] == _V2[: len(data)]:
        return _parse_binary(data)
    raise ProtocolError("no PROXY header")


def _parse_line(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, _LINE)
    if end < 0:
        if len(data) >= _LINE:
            raise ProtocolError("a PROXY line without an end")
        return None
    match data[:end].split(b" "):
        case [_, b"UNKNOWN", *_]:
            return ProxyHeader(None, end + 2)
        case [_, b"TCP4" | b"TCP6" as family, source, destination, source_port, destination_port]:
            version = 4 if family == b"TCP4" else 6
            _numeric(version, destination)
            _port(destination_port)
            return ProxyHeader(TcpAddress(_numeric(version, source), _port(source_port)), end + 2)
    raise ProtocolError("a PROXY line of the wrong form")


def _numeric(version: int, text: bytes) -> str:
    try:
        ip = ipaddress.ip_address(text.decode("ascii"))
    except ValueError:  # among them UnicodeDecodeError
        raise ProtocolError("a PROXY line with a wrong address") from None
    if ip.version != version or b"%" in text:
        raise ProtocolError("a PROXY line with a wrong address")
    return str(ip)


def _port(text: bytes) -> int:
    if not (text.isdigit() and str(int(text)).encode() == text and int(text) < 65536):
        raise ProtocolError("a PROXY line with a wrong port")
    return int(text)


def _parse_binary(data: bytes) -> ProxyHeader | None:
    if len(data) > 12 and data[12] not in (0x20, 0x21):
        raise ProtocolError("a PROXY header of an unknown version or command")
    if len(data) < _FIXED.size:
        return None
    _signature, command, family, length = _FIXED.unpack_from(data)
    size = _FIXED.size + length
    if size > MAX_BYTES:
        raise ProtocolError("a PROXY header that is too long")
    if command == 0x21 and family and family not in _ADDRESSES:
        raise ProtocolError("a PROXY header of an unknown family or protocol")
    if command == 0x20 or not family:
        return ProxyHeader(None, size) if len(data) >= size else None  # what follows is to be ignored
    if length < _ADDRESSES[family]:
        raise ProtocolError("a PROXY header too short for its addresses")
    if len(data) < size:
        return None
    _check_values(data[_FIXED.size + _ADDRESSES[family] : size])
    return ProxyHeader(_address(family, data[_FIXED.size :]), size)


def _address(family: int, body: bytes) -> TcpAddress | UnixAddress:
    if family == 0x31:
        return UnixAddress(os.fsdecode(body[:108].split(b"\0")[0]))
    width = 4 if family == 0x11 else 16
    port, _destination_port = _PORTS.unpack_from(body, 2 * width)
    return TcpAddress(str(ipaddress.ip_address(body[:width])), port)


def _check_values(values: bytes) -> None:
    position = 0
    while position < len(values):
        position += 3 + int.from_bytes(values[position + 1 : position + 3], "big")
    if position != len(values):
        raise ProtocolError("a PROXY header whose values do not fit into it")
