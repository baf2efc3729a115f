"""A PROXY header says who has connected, or is refused as soon as that can be told."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from fuzzed import TRIED
from hypothesis import example, given
from hypothesis import strategies as st

from stagetrio.framing import ProtocolError
from stagetrio.proxy_header import MAX_BYTES, ProxyHeader, parse_header
from stagetrio.sockets import TcpAddress, UnixAddress

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
ports = st.integers(0, 65535)
tails = st.binary(max_size=20)


def version_1(family: str, source: str, port: int) -> bytes:
    return f"PROXY {family} {source} {source} {port} 443\r\n".encode()


def version_2(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


def addresses(source: IPv4Address | IPv6Address, port: int) -> bytes:
    return source.packed * 2 + struct.pack("!HH", port, 443)


@given(st.ip_addresses(), ports, tails)
def test_both_versions_tell_the_source(source: IPv4Address | IPv6Address, port: int, tail: bytes) -> None:
    """And where the connection's own bytes begin."""
    expected = TcpAddress(str(source), port)
    line = version_1(f"TCP{source.version}", str(source), port)
    assert parse_header(line + tail) == ProxyHeader(expected, len(line))
    family = 0x11 if source.version == 4 else 0x21
    binary = version_2(0x21, family, addresses(source, port) + b"\x04\0\x03abc")
    assert parse_header(binary + tail) == ProxyHeader(expected, len(binary))


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN ffff::ffff ffff::ffff 65535 65535\r\n",
        version_2(0x20, 0x00, b""),
        version_2(0x20, 0x11, b"whatever"),
        version_2(0x20, 0x99, b""),  # of which nothing is to be looked at
        version_2(0x21, 0x00, b"whatever"),
    ],
)
def test_a_proxy_may_speak_for_itself(header: bytes) -> None:
    """A health check, or a connection it does not know: then the address is the proxy's."""
    assert parse_header(header + b"rest") == ProxyHeader(None, len(header))


def test_a_unix_peer_of_the_proxy_is_told_by_its_path() -> None:
    """The path ends at the first zero byte."""
    header = version_2(0x21, 0x31, b"/run/a.sock".ljust(108, b"\0") + bytes(108))
    assert parse_header(header) == ProxyHeader(UnixAddress("/run/a.sock"), len(header))


def test_a_header_may_be_as_long_as_the_bound() -> None:
    """What proxies add to the addresses is skipped."""
    values = struct.pack("!BH", 0x04, MAX_BYTES - 16 - 12 - 3).ljust(MAX_BYTES - 16 - 12, b"x")
    header = version_2(0x21, 0x11, addresses(IPv4Address("192.0.2.1"), 1) + values)
    assert parse_header(header + b"rest") == ProxyHeader(TcpAddress("192.0.2.1", 1), MAX_BYTES)


GOOD = [
    version_1("TCP4", "192.0.2.1", 56324),
    version_1("TCP6", "2001:db8::1", 56324),
    b"PROXY UNKNOWN\r\n",
    version_2(0x21, 0x11, addresses(IPv4Address("192.0.2.1"), 1)),
    version_2(0x21, 0x21, addresses(IPv6Address("2001:db8::1"), 1) + b"\x20\0\x02ab"),
    version_2(0x20, 0, b"abc"),
]


@pytest.mark.parametrize("header", GOOD)
def test_a_header_is_complete_with_its_last_byte(header: bytes) -> None:
    """Until then nothing is known, and nothing is wrong."""
    assert [parse_header(header[:size]) for size in range(len(header))] == [None] * len(header)
    assert parse_header(header) is not None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "no PROXY header"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.1 1 2 3\r\n", "a PROXY line of the wrong form"),
        (b"PROXY  TCP4 192.0.2.1 192.0.2.1 1 2\r\n", "a PROXY line of the wrong form"),
        (b"PROXY UDP4 192.0.2.1 192.0.2.1 1 2\r\n", "a PROXY line of the wrong form"),
        (b"PROXY TCP4 2001:db8::1 192.0.2.1 1 2\r\n", "a PROXY line with a wrong address"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.256 1 2\r\n", "a PROXY line with a wrong address"),
        (b"PROXY TCP4 192.0.2.01 192.0.2.1 1 2\r\n", "a PROXY line with a wrong address"),
        (b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", "a PROXY line with a wrong address"),
        (b"PROXY TCP4 \xff 192.0.2.1 1 2\r\n", "a PROXY line with a wrong address"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.1 65536 2\r\n", "a PROXY line with a wrong port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.1 " + b"9" * 60 + b" 2\r\n", "a PROXY line with a wrong port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.1 01 2\r\n", "a PROXY line with a wrong port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.1 1 -2\r\n", "a PROXY line with a wrong port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.1 1 " + b"2" * 5000 + b"\r\n", "a PROXY line without an end"),
        (b"PROXY UNKNOWN" + b" " * 94, "a PROXY line without an end"),
        (SIGNATURE + b"\x11", "a PROXY header of an unknown version or command"),
        (SIGNATURE + b"\x22", "a PROXY header of an unknown version or command"),
        (version_2(0x21, 0x12, bytes(12)), "a PROXY header of an unknown family or protocol"),
        (version_2(0x21, 0x41, bytes(12)), "a PROXY header of an unknown family or protocol"),
        (version_2(0x21, 0x11, bytes(11)), "a PROXY header too short for its addresses"),
        (version_2(0x21, 0x31, bytes(215)), "a PROXY header too short for its addresses"),
        (version_2(0x21, 0x21, bytes(12)), "a PROXY header too short for its addresses"),
        (version_2(0x21, 0x11, bytes(12) + b"\x04\0\x04abc"), "a PROXY header whose values do not fit into it"),
        (version_2(0x21, 0x11, bytes(13)), "a PROXY header whose values do not fit into it"),
        (version_2(0x21, 0x11, bytes(MAX_BYTES - 15))[:16], "a PROXY header that is too long"),
    ],
)
def test_wrong_headers_have_a_reason_of_our_own_words(data: bytes, reason: str) -> None:
    """Nothing the other side sent is in it."""
    with pytest.raises(ProtocolError) as caught:
        parse_header(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("data", [b"G", b"PROXX", b"\r\n\r\n\0\r\nQUIX"])
def test_a_wrong_first_byte_is_enough(data: bytes) -> None:
    """The judgement does not wait for the rest."""
    with pytest.raises(ProtocolError, match="no PROXY header"):
        parse_header(data)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A right header with some bytes changed, lost or added, or any bytes behind a right beginning."""
    wire = bytearray(draw(st.sampled_from([*GOOD, b"PROXY ", SIGNATURE, b""])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(wire)))
        wire[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(wire) + draw(st.binary(max_size=150))


@given(mutated())
@example(SIGNATURE + b"\x21\x11\xff\xff")
def test_any_bytes_give_the_same_outcome_in_any_segmentation(data: bytes) -> None:
    """Right or wrong is decided once, at one byte, and never later than at the bound."""
    TRIED["PROXY headers"] += 1
    outcomes: list[object] = []
    for size in range(len(data) + 1):
        try:
            outcome: object = parse_header(data[:size])
        except ProtocolError as error:
            outcome = error.reason
        if outcome is not None:
            outcomes.append(outcome)
    assert len(set(map(str, outcomes))) <= 1
    if len(data) >= 107 and not data.startswith(SIGNATURE):
        assert outcomes
    for header in outcomes:
        if isinstance(header, ProxyHeader) and isinstance(header.address, TcpAddress):
            socket.getaddrinfo(header.address.host, header.address.port, flags=socket.AI_NUMERICHOST)
