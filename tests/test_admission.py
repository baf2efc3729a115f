"""Who is not admitted is told why and when to come back, costs next to nothing, and leaves no trace."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import trio
from served import CODEC, Raw, Say, closed_by, serving, shout
from trio.testing import MockClock

from stagetrio.admission import Admission, AdmissionStatistics, Refusal
from stagetrio.codec import Closed
from stagetrio.door import MAX_FAREWELLS
from stagetrio.limiter import FlowRateLimiter, Rate, RateLimiter
from stagetrio.networks import Networks, ip_of, prefix_of
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason
from stagetrio.sockets import Address, TcpAddress, UnixAddress


def at(host: str) -> TcpAddress:
    return TcpAddress(host, 1)


def refusal(admission: Admission, address: Address | None) -> Refusal | None:
    turned_away = admission.enter(address)
    return None if turned_away is None else turned_away.refusal


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:0:0:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("0.0.0.1", "::1", False),
    ],
)
def test_a_host_is_an_ipv4_address_or_a_network_of_ipv6(one: str, other: str, same: bool) -> None:
    """With room for one connection per host, a second one gets in exactly if it comes from another host."""
    admission = Admission(max_per_host=1)
    assert refusal(admission, at(one)) is None
    assert refusal(admission, at(other)) is (Refusal.HOST if same else None)


def test_prefixes_can_be_chosen() -> None:
    """A whole /24 may count as one host, and each address of IPv6 as one."""
    admission = Admission(max_per_host=1, ipv4_prefix=24, ipv6_prefix=128)
    assert refusal(admission, at("192.0.2.1")) is None
    assert refusal(admission, at("192.0.2.255")) is Refusal.HOST
    assert refusal(admission, at("192.0.3.0")) is None
    assert refusal(admission, at("2001:db8::1")) is None
    assert refusal(admission, at("2001:db8::2")) is None


def test_a_host_gets_as_many_connections_as_it_may_and_no_trace_stays() -> None:
    """Whoever leaves makes room for the next one; a host without connections is forgotten."""
    admission = Admission(max_per_host=2)
    assert [refusal(admission, at("192.0.2.1")) for _ in range(3)] == [None, None, Refusal.HOST]
    assert refusal(admission, at("192.0.2.2")) is None
    assert admission.statistics() == AdmissionStatistics(3, {Refusal.HOST: 1}, hosts=2, most=2)
    admission.leave(at("192.0.2.1"))
    assert [refusal(admission, at("192.0.2.1")) for _ in range(2)] == [None, Refusal.HOST]
    for host in ("192.0.2.1", "192.0.2.1", "192.0.2.2"):
        admission.leave(at(host))
    assert admission.statistics() == AdmissionStatistics(4, {Refusal.HOST: 2}, hosts=0, most=0)


@pytest.mark.parametrize("address", [None, UnixAddress("/run/x"), UnixAddress(""), TcpAddress("name", 1)])
def test_who_has_no_numeric_address_is_of_no_host(address: Address | None) -> None:
    """Streams and local sockets are not counted together as if they were one stranger."""
    admission = Admission(max_per_host=1)
    assert [refusal(admission, address) for _ in range(3)] == [None] * 3
    admission.leave(address)
    assert admission.statistics().hosts == 0


async def test_a_host_that_connects_too_often_is_told_when_to_come_back(autojump_clock: MockClock) -> None:
    """The rate is per host, over all ports; what is told lies at the next free moment or up to ``spread`` later."""
    limiter = FlowRateLimiter(Rate(1, per=10), burst=2, max_flows=100)
    admission = Admission(rate_per_host=limiter, spread=5)
    assert [refusal(admission, TcpAddress("192.0.2.1", port)) for port in (1, 2)] == [None, None]
    refused = admission.enter(TcpAddress("192.0.2.1", 3))
    assert refused is not None
    assert refused.refusal is Refusal.RATE
    assert 10 <= refused.retry_after <= 15
    assert refusal(admission, at("192.0.2.2")) is None
    await trio.sleep(refused.retry_after)
    assert refusal(admission, at("192.0.2.1")) is None


def test_exempt_networks_are_not_bounded_but_filtered() -> None:
    """A load balancer brings everybody's connections; the filter still sees them."""
    admission = Admission(
        max_per_host=1,
        exempt=["10.0.0.0/8", "::1"],
        turn_away=lambda address: "no 9" if address == at("10.0.0.9") else None,
    )
    assert [refusal(admission, at("10.1.2.3")) for _ in range(3)] == [None] * 3
    assert [refusal(admission, at("::1")) for _ in range(3)] == [None] * 3
    assert refusal(admission, at("10.0.0.9")) is Refusal.FILTER
    assert [refusal(admission, at("11.0.0.0")) for _ in range(2)] == [None, Refusal.HOST]


def test_the_return_of_the_refused_is_spread() -> None:
    """Of any thousand refusals in a row, each tenth of the time gets its tenth, within two per cent of all."""
    admission = Admission(turn_away=lambda address: "closed", spread=20)
    times = []
    for _ in range(3000):
        refused = admission.enter(None)
        assert refused is not None
        times.append(refused.retry_after)
    for start in (0, 777, 2000):
        for tenth in range(10):
            share = sum(tenth <= time / 2 < tenth + 1 for time in times[start : start + 1000])
            assert 80 <= share <= 120


def test_networks_are_looked_up_by_prefix() -> None:
    """Edges of a network are in it, neighbours and the other family are not."""
    networks = Networks(["192.0.2.0/24", "2001:db8::/32", "198.51.100.7"])
    inside = ["192.0.2.0", "192.0.2.255", "2001:db8:ffff::", "198.51.100.7", "::ffff:192.0.2.9"]
    outside = ["192.0.1.255", "192.0.3.0", "2001:db9::", "198.51.100.8", "::c000:200"]
    assert [ip_of(at(host)) in networks for host in inside] == [True] * len(inside)
    assert [ip_of(at(host)) in networks for host in outside] == [False] * len(outside)
    assert None not in networks
    ip = ip_of(at("192.0.2.1"))
    assert ip is not None
    assert prefix_of(ip, 8, 64) == (4, 192)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_per_host": 0}, ValueError, "max_per_host must be >= 1, not 0"),
        ({"max_per_host": "a"}, TypeError, "max_per_host must be a number, not 'a'"),
        ({"ipv4_prefix": "a"}, TypeError, "ipv4_prefix must be an int, not 'a'"),
        ({"spread": "a"}, TypeError, "spread must be a number, not 'a'"),
        ({"ipv4_prefix": 33}, ValueError, "ipv4_prefix must be between 1 and 32, not 33"),
        ({"ipv6_prefix": 0}, ValueError, "ipv6_prefix must be >= 1, not 0"),
        ({"spread": -1}, ValueError, "spread must be >= 0, not -1"),
        ({"spread": inf}, ValueError, "spread must be a number"),
        ({"exempt": ["10.0.0.1/8"]}, ValueError, "has host bits set"),
        ({"exempt": "10.0.0.0/8"}, TypeError, "exempt must be a sequence of networks, not the str '10.0.0.0/8'"),
        ({"rate_per_host": Rate(1)}, TypeError, "rate_per_host must be a FlowRateLimiter"),
        ({"turn_away": 3}, TypeError, "turn_away must be a sync function of an address, not 3"),
        ({"turn_away": trio.sleep}, TypeError, "turn_away must be a sync function of an address, not <function sleep"),
        ({"pace": Rate(1)}, TypeError, "pace must be a RateLimiter"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """At once, and not when the first stranger comes."""
    with pytest.raises(error, match=words.replace("(", r"\(")):
        Admission(**options)


async def test_a_server_turns_away_by_address_and_counts(autojump_clock: MockClock) -> None:
    """The third connection of a host gets a farewell; when one of the others has left, a fourth is served."""
    left: list[Peer[Any]] = []

    async def on_disconnect(peer: Peer[Any]) -> None:
        left.append(peer)

    async with serving(
        "tcp", shout, codec=CODEC, admission=Admission(max_per_host=2), on_disconnect=on_disconnect
    ) as running:
        one, two = await running.connect(), await running.connect()
        await two.send(CODEC.encode(Say("in"), 1))
        assert await two.message() == Say("IN")
        three = await running.connect()
        farewell = await three.message()
        assert farewell.reason == "your address has 2 connections, as many as it may"
        assert 0 < farewell.retry_after <= 10
        assert await three.message() is None
        await three.stream.aclose()
        await one.stream.aclose()
        while len(running.server.peers) > 1:
            await trio.lowlevel.checkpoint()
        four = await running.connect()
        await four.send(CODEC.encode(Say("in"), 1))
        assert await four.message() == Say("IN")
        statistics = running.server.statistics()
        assert statistics.admission == AdmissionStatistics(3, {Refusal.HOST: 1}, hosts=1, most=2)
        assert (statistics.refused_connections, statistics.closed) == (
            1,
            {CloseReason.REFUSED: 1, CloseReason.ENDED: 1},
        )
        assert len(left) == 1  # the one that had been let in


async def test_a_server_is_closed_for_maintenance() -> None:
    """The filter's words are the farewell; without a codec the connection just ends."""
    words: str | None = "back at noon"
    async with serving("tcp", shout, codec=CODEC, admission=Admission(turn_away=lambda address: words)) as running:
        client = await running.connect()
        farewell = await client.message()
        assert isinstance(farewell, Closed)
        assert farewell.reason == "back at noon"
        await client.stream.aclose()
        words = None
        client = await running.connect()
        await client.send(CODEC.encode(Say("in"), 1))
        assert await client.message() == Say("IN")
    async with serving("stream", admission=Admission(turn_away=lambda address: "no")) as running:
        client = await running.connect()
        assert await client.receive() is None
        await client.stream.aclose()
        await closed_by(running, CloseReason.REFUSED)


async def test_those_turned_away_do_not_fill_the_server() -> None:
    """However many refused connections linger, they hold few descriptors, and no place of those let in."""
    refused = True
    admission = Admission(turn_away=lambda address: "no" if refused else None)
    async with serving("tcp", shout, codec=CODEC, admission=admission, max_connections=2) as running:
        knocking = [await running.connect() for _ in range(MAX_FAREWELLS + 50)]
        while running.server.statistics().refused_connections < len(knocking):
            await trio.lowlevel.checkpoint()
        assert len(running.server.peers) == MAX_FAREWELLS
        told = [client for client in knocking if await _farewell(client) is not None]
        assert len(told) == MAX_FAREWELLS
        refused = False
        client = await running.connect()
        await client.send(CODEC.encode(Say("in"), 1))
        assert await client.message() == Say("IN")
        for stranger in knocking:
            await stranger.stream.aclose()
        while len(running.server.peers) > 1:
            await trio.lowlevel.checkpoint()
        assert running.server.statistics().closed == {CloseReason.REFUSED: len(knocking)}


async def _farewell(client: Raw) -> Any:
    try:
        return await client.message()
    except trio.BrokenResourceError:
        return None


async def test_connections_are_accepted_at_a_pace(autojump_clock: MockClock) -> None:
    """Those over the pace wait, and all get in: ten more, one a second, after a burst of five."""
    entered: list[float] = []

    async def on_connect(peer: Peer[Any]) -> None:
        entered.append(trio.current_time())

    admission = Admission(pace=RateLimiter(Rate(1), burst=5))
    async with serving("tcp", admission=admission, on_connect=on_connect) as running:
        start = trio.current_time()
        for _ in range(15):
            await running.connect()
        await trio.sleep(20)
        assert [round(time - start) for time in entered] == [0] * 5 + list(range(1, 11))


def test_what_the_filter_raises_reaches_its_owner() -> None:
    """And the connection is not counted."""

    def turn_away(address: Address | None) -> str | None:
        raise KeyError("mine")

    admission = Admission(turn_away=turn_away)
    with pytest.raises(KeyError, match="mine"):
        admission.enter(at("192.0.2.1"))
    assert admission.statistics() == AdmissionStatistics(0, {}, hosts=0, most=0)
