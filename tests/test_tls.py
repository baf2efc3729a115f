"""TLS below a peer: the same service, and nobody's handshake can hold anybody up."""

from __future__ import annotations

import contextlib
import os
import random
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import trio
import trustme
from fuzzed import TRIED
from served import Raw, Running, closed_by, serving
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.codec import Closed, Codec
from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.tls import TlsListener, secure

HELLOS = int(os.environ.get("STAGETRIO_FUZZ", "1000")) // 5
AUTHORITY = trustme.CA()
CERTIFICATE = AUTHORITY.issue_cert("localhost")


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def server_context() -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CERTIFICATE.configure_cert(context)
    return context


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


def wrapping(made: list[TlsListener], context: ssl.SSLContext, **options: Any) -> Callable[[Any], TlsListener]:
    def wrap(listener: Any) -> TlsListener:
        made.append(secure(listener, context, **options))
        return made[0]

    return wrap


async def dial(running: Running, context: ssl.SSLContext | None = None) -> Raw:
    raw = await running.connect()
    stream: Any = trio.SSLStream(raw.stream, context or client_context(), server_hostname="localhost")
    await stream.do_handshake()
    return Raw(stream)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_messages_pass_in_order(kind: str, version: ssl.TLSVersion) -> None:
    """Five hundred messages in one write come back complete and in order, then the end, announced by both sides."""
    context = client_context()
    context.maximum_version = version
    listeners: list[TlsListener] = []
    async with serving(kind, wrap=wrapping(listeners, server_context())) as running:
        client = await dial(running, context)
        payloads = [b"%d" % i for i in range(500)]
        await client.send(*payloads)
        assert [await client.receive() for _ in payloads] == payloads
        peer = running.server.peers[0]
        assert peer.tls is not None
        assert peer.tls.version() == {771: "TLSv1.2", 772: "TLSv1.3"}[version]
        await client.stream.aclose()
        await closed_by(running, CloseReason.ENDED)
        statistics = listeners[0].statistics()
        assert (statistics.completed, statistics.failed, statistics.under_way) == (1, 0, 0)


async def test_megabytes_pass_both_ways(kind: str) -> None:
    """More than any buffer on the way holds comes back whole; what is held for the peer stays within its bound."""
    framing = LengthPrefixed(1 << 24)
    wire = framing.encode(os.urandom(1 << 23))
    async with serving(kind, wrap=wrapping([], server_context()), framing=framing) as running:
        client = await dial(running)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, wire)
            received = bytearray()
            while len(received) < len(wire):
                received += await client.stream.receive_some()
        assert received == wire


async def test_the_servers_last_words_arrive_and_then_the_end(kind: str) -> None:
    """A closed peer reads what was sent to it, the farewell, and a proper end of the encrypted session."""
    codec: Codec[Any] = Codec([])

    async def on_connect(peer: Peer[Any]) -> None:
        peer.close("enough")

    async with serving(kind, wrap=wrapping([], server_context()), codec=codec, on_connect=on_connect) as running:
        client = await dial(running)
        frame = await client.receive()
        assert frame is not None
        assert codec.decode(frame)[0] == Closed("enough")
        assert await client.receive() is None  # without close_notify this would raise
        await client.stream.aclose()
        await closed_by(running, CloseReason.CLOSED)


async def test_a_client_shows_its_certificate(kind: str) -> None:
    """With a context that asks for one, the handler knows whom it serves, and who has none does not get in."""
    context = server_context()
    AUTHORITY.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED

    async def whoami(peer: Peer[bytes], message: bytes) -> bytes:
        assert peer.tls is not None
        certificate: Any = peer.tls.getpeercert()
        return str(certificate["subjectAltName"][0][1]).encode()

    listeners: list[TlsListener] = []
    async with serving(kind, whoami, wrap=wrapping(listeners, context)) as running:
        theirs = client_context()
        AUTHORITY.issue_cert("alice@example.org").configure_cert(theirs)
        client = await dial(running, theirs)
        await client.send(b"?")
        assert await client.receive() == b"alice@example.org"
        with pytest.raises(trio.BrokenResourceError):  # TLS 1.3 tells after the client's own half of the handshake
            await (await dial(running)).receive()
        while not running.server.statistics().closed:
            await trio.lowlevel.checkpoint()
        assert running.server.statistics().closed == {CloseReason.HANDSHAKE: 1}
        assert listeners[0].statistics().failed == 1


async def test_plain_text_ends_its_own_connection_only(kind: str) -> None:
    """Who speaks no TLS is closed, and counted; whoever does is served before and after."""
    async with serving(kind, wrap=wrapping([], server_context())) as running:
        before = await dial(running)
        plain = await running.connect()
        await plain.stream.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        try:
            while await plain.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        for client in (before, await dial(running)):
            await client.send(b"hello")
            assert await client.receive() == b"hello"
        assert running.server.statistics().closed == {CloseReason.HANDSHAKE: 1}


@pytest.mark.parametrize("first_bytes", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
async def test_a_handshake_that_never_ends_is_cut_off(kind: str, first_bytes: bytes, autojump_clock: MockClock) -> None:
    """Whatever has come of it, the deadline counts from the connection; the others are served meanwhile."""
    limits = PeerLimits(first_frame_within=60, linger=1)
    listeners: list[TlsListener] = []
    wrap = wrapping(listeners, server_context(), handshake_within=3)
    async with serving(kind, wrap=wrap, limits=limits) as running:
        stuck = await running.connect()
        start = trio.current_time()
        if first_bytes:
            await stuck.stream.send_all(first_bytes)
        client = await dial(running)
        await client.send(b"hello")
        assert await client.receive() == b"hello"
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stuck.stream.receive_some() == b""
        assert 3 <= trio.current_time() - start <= 3.5
        assert running.server.statistics().closed == {CloseReason.HANDSHAKE: 1}
        assert listeners[0].statistics().overdue == 1


async def test_silent_connections_take_no_place_and_stuck_ones_give_it_back(
    kind: str, autojump_clock: MockClock
) -> None:
    """With one place, ten silent strangers hinder nobody; one who begins and stops holds it until his deadline."""
    listeners: list[TlsListener] = []
    wrap = wrapping(listeners, server_context(), handshake_within=5, max_handshakes=1)
    async with serving(kind, wrap=wrap) as running:
        for _ in range(10):
            await running.connect()
        client = await dial(running)
        await client.send(b"hello")
        assert await client.receive() == b"hello"

        stuck = await running.connect()
        await stuck.stream.send_all(b"\x16\x03\x01\x02\x00\x01")
        while listeners[0].statistics().under_way < 1:
            await trio.lowlevel.checkpoint()
        await trio.sleep(1)
        async with trio.open_nursery() as nursery:
            served = 0

            async def late() -> None:
                nonlocal served
                other = await dial(running)
                await other.send(b"late")
                assert await other.receive() == b"late"
                served += 1

            start = trio.current_time()
            for _ in range(3):
                nursery.start_soon(late)
            while listeners[0].statistics().waiting < 3:
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked()
            assert (served, listeners[0].statistics().under_way) == (0, 1)
        assert served == 3
        assert 3 <= trio.current_time() - start <= 4.5
        assert listeners[0].statistics().waiting == listeners[0].statistics().under_way == 0


async def test_a_connection_cut_off_without_notice_is_lost(kind: str) -> None:
    """An end which anybody between the two could have made is not taken for the other side's."""
    async with serving(kind, wrap=wrapping([], server_context())) as running:
        client = await dial(running)
        await client.send(b"hello")
        assert await client.receive() == b"hello"
        stream: Any = client.stream
        await stream.transport_stream.aclose()
        await closed_by(running, CloseReason.RESET)


async def test_alone_it_is_a_listener_of_trios_streams() -> None:
    """``trio.serve_listeners`` takes it, without any server of ours."""
    (plain,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def answer(stream: trio.SSLStream[Any]) -> None:
        await stream.send_all(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(trio.serve_listeners, answer, [secure(plain, server_context())]))
        raw = await trio.testing.open_stream_to_socket_listener(plain)
        stream = trio.SSLStream(raw, client_context(), server_hostname="localhost")
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


def old_context() -> ssl.SSLContext:
    context = server_context()
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    return context


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ssl_context": None}, TypeError, "ssl_context must be an ssl.SSLContext, not None"),
        ({"ssl_context": old_context()}, ValueError, "ssl_context must have a minimum_version of TLSv1_2 or later"),
        ({"handshake_within": 0}, ValueError, "handshake_within must be positive, not 0"),
        ({"max_handshakes": 0}, ValueError, "max_handshakes must be at least 1, not 0"),
        ({"max_handshakes": 1.5}, TypeError, r"max_handshakes must be an int, not 1\.5"),
    ],
)
async def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """At once; old versions of TLS are not served by accident."""
    async with (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] as listener:
        with pytest.raises(error, match=words):
            secure(listener, **{"ssl_context": server_context(), **options})


def hello(rng: random.Random, context: ssl.SSLContext) -> bytes:
    """What a client says first, some bytes of it changed, lost or added, and perhaps any bytes behind."""
    output = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), output, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    wire = bytearray(output.read())
    for _ in range(rng.choice([0, 1, 2, 5, 20])):
        at = rng.randrange(len(wire))
        wire[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
    return bytes(wire) + rng.randbytes(rng.choice([0, 0, 100]))


async def test_no_bytes_can_hurt_a_handshake() -> None:
    """Mutated hellos in random segments fail, each by itself, and give their places back."""
    rng = random.Random(4)
    context = client_context()
    made: list[TlsListener] = []
    async with serving("tcp", keep=False, wrap=wrapping(made, server_context(), max_handshakes=3)) as running:
        for _ in range(HELLOS):
            stream = (await running.connect()).stream
            wire = hello(rng, context)
            try:
                while wire:
                    size = rng.randint(1, len(wire))
                    await stream.send_all(wire[:size])
                    wire = wire[size:]
                    await trio.lowlevel.checkpoint()
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            await trio.aclose_forcefully(stream)
        TRIED["handshakes"] += HELLOS
        good = await dial(running)
        await good.send(b"still there")
        assert await good.receive() == b"still there"
        statistics = made[0].statistics()
        assert (statistics.waiting, statistics.under_way, statistics.completed) == (0, 0, 1)
        assert statistics.failed == HELLOS
        assert running.server.statistics().closed == {CloseReason.HANDSHAKE: HELLOS}
        await trio.aclose_forcefully(good.stream)
