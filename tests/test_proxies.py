"""Behind a proxy the client's address counts; nobody else can claim one, and no bad header costs more than itself."""

from __future__ import annotations

import os
import random
import ssl
from typing import Any

import pytest
import trio
import trustme
from fuzzed import TRIED
from served import CODEC, FRAMING, Raw, Running, Say, echo, serving, shout
from test_proxy_header import SIGNATURE, version_1, version_2
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.admission import Admission, Refusal
from stagetrio.codec import Closed
from stagetrio.peer import Peer
from stagetrio.proxies import Proxies, ProxyStatistics
from stagetrio.rules import CloseReason
from stagetrio.sockets import TcpAddress, UnixAddress
from stagetrio.tls import secure

LOCAL = ["127.0.0.0/8"]
HEADER = version_1("TCP4", "192.0.2.7", 4711)
FUZZ = int(os.environ.get("STAGETRIO_FUZZ", "1000")) // 2


async def whoami(peer: Peer[bytes], message: bytes) -> bytes:
    return f"{peer.address} {message.decode()}".encode()


async def lost(running: Running) -> None:
    """Wait until no connection waits for its header."""
    while running.server.statistics().proxied.waiting:  # type: ignore[union-attr]
        await trio.lowlevel.checkpoint()


async def ended(client: Raw) -> bool:
    """Whether the other side closes without a word; with unread input its kernel makes that a reset."""
    try:
        return not await client.stream.receive_some()
    except trio.BrokenResourceError:
        return True


@pytest.mark.parametrize("cut", [1, len(HEADER) - 1, len(HEADER), len(HEADER) + 2])
async def test_handlers_see_the_clients_address(cut: int) -> None:
    """Wherever the network cuts header and messages, both arrive whole."""
    wire = HEADER + FRAMING.encode(b"hello") + FRAMING.encode(b"again")
    async with serving("tcp", whoami, proxies=Proxies(LOCAL)) as running:
        client = await running.connect()
        await client.stream.send_all(wire[:cut])
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        await client.stream.send_all(wire[cut:])
        assert await client.receive() == b"tcp://192.0.2.7:4711 hello"
        assert await client.receive() == b"tcp://192.0.2.7:4711 again"
        statistics = running.server.statistics()
        assert statistics.proxied == ProxyStatistics(0, 1, {})
        assert statistics.accepted == 1


async def test_admission_counts_the_clients_not_the_proxy() -> None:
    """One client has its one connection; the next one through the same proxy has another."""
    admission = Admission(max_per_host=1)
    async with serving("tcp", shout, codec=CODEC, admission=admission, proxies=Proxies(LOCAL)) as running:

        async def through(header: bytes) -> Any:
            client = await running.connect()
            await client.stream.send_all(header + FRAMING.encode(CODEC.encode(Say("in"), 1)))
            return await client.message()

        assert await through(HEADER) == Say("IN")
        assert isinstance(await through(version_1("TCP4", "192.0.2.7", 4712)), Closed)
        assert await through(version_1("TCP4", "192.0.2.8", 4711)) == Say("IN")
        assert running.server.statistics().admission.turned_away == {Refusal.HOST: 1}


async def test_nobody_else_can_claim_an_address() -> None:
    """From an address that is not trusted a header is data, and here a mistake; without one it is served as itself."""
    async with serving("tcp", whoami, proxies=Proxies(["192.0.2.0/24"])) as running:
        liar = await running.connect()
        await liar.stream.send_all(HEADER)
        assert await liar.receive() is None
        honest = await running.connect()
        await honest.send(b"hello")
        answer = await honest.receive()
        assert answer is not None
        assert answer.startswith(b"tcp://127.0.0.1:")
        assert running.server.statistics().closed == {CloseReason.PROTOCOL: 1}


async def test_a_health_check_keeps_its_own_address() -> None:
    """The proxy's own connections are its own."""
    async with serving("tcp", whoami, proxies=Proxies(LOCAL)) as running:
        client = await running.connect()
        await client.stream.send_all(version_2(0x20, 0, b"") + FRAMING.encode(b"ping"))
        answer = await client.receive()
        assert answer is not None
        assert answer.startswith(b"tcp://127.0.0.1:")


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (FRAMING.encode(b"hello"), "no PROXY header"),
        (SIGNATURE + b"\x31", "a PROXY header of an unknown version or command"),
        (HEADER[:-2] + b"0" * 100, "a PROXY line without an end"),
    ],
)
async def test_a_wrong_header_ends_its_connection_with_a_reason(wire: bytes, reason: str) -> None:
    """Nothing reaches the handler, and the others do not notice."""
    seen: list[bytes] = []

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        seen.append(message)
        return message

    async with serving("tcp", handler, proxies=Proxies(LOCAL)) as running:
        good = await running.connect()
        await good.stream.send_all(HEADER + FRAMING.encode(b"good"))
        assert await good.receive() == b"good"
        bad = await running.connect()
        await bad.stream.send_all(wire)
        assert await ended(bad)
        await good.send(b"still")
        assert await good.receive() == b"still"
        statistics = running.server.statistics()
        assert statistics.closed == {CloseReason.PROXY: 1}
        assert statistics.proxied == ProxyStatistics(0, 1, {reason: 1})
    assert seen == [b"good", b"still"]


@pytest.mark.parametrize("first_bytes", [b"", HEADER[:20], SIGNATURE])
async def test_a_header_that_never_ends_is_cut_off_at_its_deadline(
    first_bytes: bytes, autojump_clock: MockClock
) -> None:
    """Whatever drips in meanwhile."""
    async with serving("tcp", proxies=Proxies(LOCAL, header_within=3)) as running:
        client = await running.connect()
        await client.stream.send_all(first_bytes)
        start = trio.current_time()
        with trio.fail_after(5):
            assert await client.stream.receive_some() == b""
        assert 3 <= trio.current_time() - start <= 3.5
        proxied = running.server.statistics().proxied
        assert proxied == ProxyStatistics(0, 0, {"the PROXY header took too long": 1})


async def test_connections_without_a_header_are_bounded(autojump_clock: MockClock) -> None:
    """One more than may wait is closed at once; who leaves gives its place back; the drain closes the rest."""
    async with serving("tcp", proxies=Proxies(LOCAL, max_waiting=2)) as running:
        waiting = [await running.connect() for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        third = await running.connect()
        assert await third.stream.receive_some() == b""
        await waiting[0].stream.aclose()
        while running.server.statistics().proxied.waiting > 1:  # type: ignore[union-attr]
            await trio.lowlevel.checkpoint()
        fourth = await running.connect()
        await fourth.stream.send_all(HEADER + FRAMING.encode(b"in"))
        assert await fourth.receive() == b"in"
        await running.server.drain(1)
        assert await waiting[1].stream.receive_some() == b""
        assert running.server.statistics().proxied == ProxyStatistics(
            0,
            1,
            {
                "too many connections without a header": 1,
                "the connection ended before its PROXY header": 1,
                "the server stopped accepting": 1,
            },
        )


async def test_the_header_stands_before_tls() -> None:
    """The proxy passes ciphertext through, and the certificate is asked for behind the header."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    async with serving(
        "tcp", whoami, proxies=Proxies(LOCAL), wrap=lambda listener: secure(listener, context)
    ) as running:
        raw = await running.connect()
        await raw.stream.send_all(HEADER)
        stream: Any = trio.SSLStream(raw.stream, trust, server_hostname="localhost")
        client = Raw(stream)
        await client.send(b"hello")
        assert await client.receive() == b"tcp://192.0.2.7:4711 hello"


async def test_a_proxy_on_a_unix_socket_is_trusted_by_name(tmp_path: Any) -> None:
    """It has no address to be trusted by."""
    assert Proxies(["unix"]).trusts(UnixAddress(""))
    assert not Proxies(LOCAL).trusts(UnixAddress(""))
    assert Proxies(["unix", "::1"]).trusts(TcpAddress("::1", 1))
    async with serving("tcp", whoami, address=f"unix://{tmp_path}/s", proxies=Proxies(["unix"])) as running:
        client = await running.connect()
        await client.stream.send_all(HEADER + FRAMING.encode(b"hello"))
        assert await client.receive() == b"tcp://192.0.2.7:4711 hello"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"header_within": 0}, ValueError, "header_within must be positive, not 0"),
        ({"max_waiting": 0}, ValueError, "max_waiting must be at least 1, not 0"),
        ({"trusted": "10.0.0.0/8"}, TypeError, "trusted must be a sequence of networks, not the str '10.0.0.0/8'"),
        ({"trusted": ["10.0.0.1/8"]}, ValueError, "has host bits set"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """At once, and not when the first proxy comes."""
    with pytest.raises(error, match=words):
        Proxies(**{"trusted": LOCAL, **options})


def opening(rng: random.Random) -> bytes:
    """A header and a message, some bytes of them changed, lost or added."""
    header = rng.choice(
        [HEADER, b"PROXY UNKNOWN\r\n", version_2(0x21, 0x11, rng.randbytes(12)), version_2(0x20, 0, b"")]
    )
    wire = bytearray(header + FRAMING.encode(b"hello"))
    for _ in range(rng.choice([0, 1, 2, 5])):
        at = rng.randrange(len(wire))
        wire[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(wire)


async def test_no_bytes_in_front_of_a_connection_can_hurt_a_server() -> None:
    """Mutated headers in random segments: no exception, nothing left, and a good client is served all the while."""
    rng = random.Random(4)
    async with serving("tcp", echo, proxies=Proxies(LOCAL), keep=False) as running:
        good = await running.connect()
        await good.stream.send_all(HEADER)
        for _ in range(FUZZ):
            stream = (await running.connect()).stream
            wire = opening(rng)
            try:
                while wire:
                    size = rng.randint(1, len(wire))
                    await stream.send_all(wire[:size])
                    wire = wire[size:]
                    await trio.lowlevel.checkpoint()
            except trio.BrokenResourceError:
                pass
            await trio.aclose_forcefully(stream)
            await good.send(b"still there")
            assert await good.receive() == b"still there"
        await lost(running)
        while len(running.server.peers) > 1:
            await trio.lowlevel.checkpoint()
        statistics = running.server.statistics()
        TRIED["a server behind a proxy"] += FUZZ
        assert sum(statistics.closed.values()) == FUZZ
        assert statistics.proxied is not None
        assert len(statistics.proxied.failed) >= 4
        await good.stream.aclose()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_what_comes_before_the_server_reads_is_kept(kind: str, tmp_path: Any) -> None:
    """A hook may take its time with who has been introduced."""
    let_in = trio.Event()

    async def wait(peer: Peer[bytes]) -> None:
        await let_in.wait()

    address = f"unix://{tmp_path}/s" if kind == "unix" else "tcp://127.0.0.1:0"
    proxies = Proxies([*LOCAL, "unix"])
    async with serving("tcp", whoami, address=address, proxies=proxies, on_connect=wait) as running:
        client = await running.connect()
        await client.stream.send_all(HEADER + FRAMING.encode(b"with it")[:3])
        await lost(running)
        while not running.server.peers:
            await trio.lowlevel.checkpoint()
        await client.stream.send_all(FRAMING.encode(b"with it")[3:] + FRAMING.encode(b"behind"))
        await client.stream.send_eof()
        await wait_all_tasks_blocked()
        let_in.set()
        assert await client.receive() == b"tcp://192.0.2.7:4711 with it"
        assert await client.receive() == b"tcp://192.0.2.7:4711 behind"
        assert await client.receive() is None


async def test_the_deadline_is_for_headers_only(autojump_clock: MockClock) -> None:
    """Who was introduced in time stays."""
    async with serving("tcp", whoami, proxies=Proxies(LOCAL, header_within=5)) as running:
        client = await running.connect()
        await client.stream.send_all(HEADER)
        await client.send(b"early")
        assert await client.receive() == b"tcp://192.0.2.7:4711 early"
        await trio.sleep(20)
        await client.send(b"late")
        assert await client.receive() == b"tcp://192.0.2.7:4711 late"
        assert running.server.statistics().proxied == ProxyStatistics(waiting=0, introduced=1, failed={})
