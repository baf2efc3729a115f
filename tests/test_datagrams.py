"""Datagrams are served fairly and in order, nobody is hit by way of the server, and nothing grows without bound."""

from __future__ import annotations

import gc
import os
import random
import socket
import weakref
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import attrs
import pytest
import trio
from fuzzed import TRIED
from hypothesis import given
from hypothesis import strategies as st
from served import CODEC, Say
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.addresses import UdpAddress, address_of
from stagetrio.admission import Admission, Refusal
from stagetrio.codec import Closed, Codec, Failed, Refused
from stagetrio.datagrams import DatagramServer, serve_datagrams
from stagetrio.inflow import InputRates
from stagetrio.limiter import Overloaded, Rate
from stagetrio.sockets import open_datagram_sockets
from stagetrio.sources import EXPIRE_AT_MOST, TOKEN_PERIOD, Source, Sources
from stagetrio.watchdog import open_watchdog

FUZZ = int(os.environ.get("STAGETRIO_FUZZ", "1000"))


@attrs.frozen
class Running:
    """A server under test, and the ways to it."""

    server: DatagramServer[Any]
    address: UdpAddress

    def client(self) -> trio.socket.SocketType:
        """Return a source of its own."""
        family = socket.AF_INET6 if ":" in self.address.host else socket.AF_INET
        real = socket.socket(family, socket.SOCK_DGRAM)
        real.connect((self.address.host, self.address.port))
        return trio.socket.from_stdlib_socket(real)

    async def received(self, datagrams: int) -> None:
        """Wait until the server has taken so many from the kernel."""
        while self.server.statistics().received < datagrams:
            await trio.lowlevel.checkpoint()


async def echo(source: Source[bytes], message: bytes) -> bytes:
    return message


async def shout(source: Source[Any], message: Any) -> Any:
    return Say(message.text.upper())


@asynccontextmanager
async def serving(handler: Any = echo, address: str = "udp://127.0.0.1:0", **options: Any) -> AsyncIterator[Running]:
    async with trio.open_nursery() as nursery:
        sockets = await open_datagram_sockets(address)
        where: Any = address_of(sockets[0])
        server = await nursery.start(partial(serve_datagrams, handler, sockets, **options))
        yield Running(server, where)
        nursery.cancel_scope.cancel()


async def test_a_message_per_datagram_and_a_reply_to_its_source() -> None:
    """Each source gets its own replies, in the order of its messages."""
    async with serving() as running:
        with running.client() as one, running.client() as other:
            for number in range(20):
                await one.send(b"one %d" % number)
                await other.send(b"other %d" % number)
            assert [await one.recv(100) for _ in range(20)] == [b"one %d" % number for number in range(20)]
            assert [await other.recv(100) for _ in range(20)] == [b"other %d" % number for number in range(20)]
            await one.send(b"")
            assert await one.recv(100) == b""
        statistics = running.server.statistics()
        assert (statistics.received, statistics.sent, statistics.sources) == (41, 41, 2)
        assert statistics.dropped == {}
        assert statistics.stage.handled == 41


@pytest.mark.parametrize("listen", ["udp://[::1]:0", "udp://[::]:0"])
async def test_sources_of_either_family_are_served(listen: str) -> None:
    """One socket may serve both."""
    seen: list[str] = []

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        seen.append(source.address.host)
        return message

    async with serving(handler, listen) as running:
        with Running(running.server, UdpAddress("::1", running.address.port)).client() as six:
            await six.send(b"x")
            assert await six.recv(10) == b"x"
        if listen == "udp://[::]:0":
            with Running(running.server, UdpAddress("127.0.0.1", running.address.port)).client() as four:
                await four.send(b"x")
                assert await four.recv(10) == b"x"
    assert seen == (["::1"] if listen == "udp://[::1]:0" else ["::1", "::ffff:127.0.0.1"])


async def test_messages_of_one_source_keep_their_order_while_others_pass() -> None:
    """A handler that waits holds up its own source only."""
    release = trio.Event()

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        if message == b"wait":
            await release.wait()
        return message

    async with serving(handler) as running:
        with running.client() as slow, running.client() as fast:
            await slow.send(b"wait")
            await slow.send(b"after")
            await fast.send(b"hello")
            assert await fast.recv(10) == b"hello"
            release.set()
            assert [await slow.recv(10), await slow.recv(10)] == [b"wait", b"after"]


async def test_messages_are_decoded_and_a_wrong_one_concerns_itself_only() -> None:
    """The id comes back; garbage is counted and not answered."""
    async with serving(shout, codec=CODEC) as running:
        with running.client() as client:
            await client.send(b"\xc1garbage")
            await client.send(CODEC.encode(Say("hi"), 7))
            assert CODEC.decode(await client.recv(100)) == (Say("HI"), 7)
        statistics = running.server.statistics()
        assert (statistics.mistakes, statistics.stage.handled) == (1, 2)


# The guard


async def test_an_unverified_source_gets_no_more_than_it_sent() -> None:
    """What is more is withheld and counted, until the source has sent back a token that it was sent."""

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        if message.startswith(b"hello"):
            return source.token()
        if source.verify(message[:16]):
            return bytes(1000)
        return bytes(len(message) + 1)

    async with serving(handler) as running:
        with running.client() as client:
            await client.send(b"more than this")
            while not running.server.statistics().withheld:
                await trio.lowlevel.checkpoint()
            await client.send(b"hello".ljust(20))
            token = await client.recv(2000)
            await client.send(token)
            assert await client.recv(2000) == bytes(1000)
            statistics = running.server.statistics()
            assert (statistics.withheld, statistics.verified) == (1, 1)


async def test_control_a_plain_server_sends_a_stranger_whatever_it_asks_for() -> None:
    """Ten bytes in anybody's name bring that one a thousand."""
    with trio.socket.socket(type=socket.SOCK_DGRAM) as server, trio.socket.socket(type=socket.SOCK_DGRAM) as client:
        await server.bind(("127.0.0.1", 0))
        await client.sendto(b"0123456789", server.getsockname())
        _message, name = await server.recvfrom(1200)
        await server.sendto(bytes(1000), name)
        assert await client.recv(1200) == bytes(1000)


@pytest.mark.parametrize(("amplification", "sent"), [(0.0, 0), (1.0, 1), (3.0, 3), (float("inf"), 10)])
async def test_more_is_sent_where_the_owner_allows_it(amplification: float, sent: int) -> None:
    """As many times what came as was said."""
    refused: list[Overloaded] = []

    async def handler(source: Source[bytes], message: bytes) -> None:
        for _ in range(10):
            try:
                source.send_nowait(message)
            except Overloaded as overloaded:
                refused.append(overloaded)

    async with serving(handler, amplification=amplification) as running:
        with running.client() as client:
            await client.send(b"0123456789")
            while running.server.statistics().stage.handled < 1:
                await trio.lowlevel.checkpoint()
            assert running.server.statistics().sent == sent
    assert [overloaded.reason for overloaded in refused] == ["unverified"] * (10 - sent)


class Recording:
    """A host that only notes how much is sent to whom."""

    max_bytes = 1200

    def __init__(self) -> None:
        self.sent: Counter[Any] = Counter()

    def frame_of(self, message: bytes) -> bytes:
        return message

    def transmit(self, source: Any, data: bytes) -> None:
        self.sent[source.name] += len(data)

    def mistaken(self, source: Any, reason: Any) -> None:
        pass


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 1200)), max_size=60))
def test_at_no_moment_has_a_stranger_got_more_than_came_in_its_name(steps: list[tuple[int, bool, int]]) -> None:
    """Whatever comes and is sent, and though sources are forgotten and come back."""
    TRIED["the guard against amplification"] += 1
    host = Recording()
    sources = Sources(host, 1.0, max_sources=2, idle_within=10.0, on_forget=lambda source: None)
    received: Counter[Any] = Counter()
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        for now, (who, incoming, size) in enumerate(steps):
            name = ("192.0.2.1", who)
            source = sources.get(sock, name, now)
            if source is None:
                sources.expire(now)
                assert sources.make_room()
                source = sources.add(sock, name, now)
            assert len(sources) <= 2
            if incoming:
                source.heard(size)
                received[name] += size
            else:
                source.reply(bytes(size))
            assert host.sent[name] <= received[name]


async def test_a_token_is_good_for_its_address_and_for_a_minute_or_two(autojump_clock: MockClock) -> None:
    """Not for another source, not for another server, and not for ever."""
    sources: list[Source[bytes]] = []

    async def handler(source: Source[bytes], message: bytes) -> None:
        sources.append(source)

    async with serving(handler) as running, serving(handler) as elsewhere:
        with running.client() as one, trio.socket.socket(type=socket.SOCK_DGRAM) as other:
            await one.send(b"x")
            await wait_all_tasks_blocked(0.01)
            for server in (running, elsewhere):
                await other.sendto(b"x", (server.address.host, server.address.port))
                await wait_all_tasks_blocked(0.01)
        first, second, foreign = sources
        token = first.token()
        assert len(token) == 16
        assert not second.verify(token)
        assert second.address == foreign.address
        assert not foreign.verify(second.token())
        assert not first.verify(b"")
        assert not first.verify(bytes(16))
        await trio.sleep(2 * TOKEN_PERIOD)
        assert not first.verify(token)
        token = first.token()
        await trio.sleep(TOKEN_PERIOD)
        assert first.verify(token)
        assert not first.verify(bytes(16))  # anybody can write a verified address, too
        assert first.verified
        assert first.verify(token)
        await trio.sleep(TOKEN_PERIOD)
        assert not first.verify(token)


def test_a_token_is_good_on_its_link_only() -> None:
    """Neighbours on two links may have the same link-local address."""

    async def main() -> None:
        sources = Sources(Recording(), 1.0, max_sources=2, idle_within=10.0, on_forget=lambda source: None)
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            one, other = (sources.add(sock, ("fe80::1", 9, 0, link), trio.current_time()) for link in (2, 3))
        assert one.address == other.address
        assert not other.verify(one.token())
        assert one.verify(one.token())

    trio.run(main)


def test_a_flood_that_falls_silent_is_forgotten_by_and_by() -> None:
    """Whoever comes next does not wait until all of it is, and every newcomer takes more away than itself."""
    forgotten: list[Any] = []
    sources = Sources(Recording(), 1.0, max_sources=10_000, idle_within=10.0, on_forget=forgotten.append)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        for port in range(3 * EXPIRE_AT_MOST):
            sources.add(sock, ("192.0.2.1", port), 0.0)
        for rounds in range(1, 4):
            sources.expire(11.0)
            assert len(forgotten) == rounds * EXPIRE_AT_MOST
        sources.expire(11.0)
        assert len(sources) == 0


async def test_a_server_that_cannot_begin_gives_its_sockets_back() -> None:
    """One of them is closed already: the others are not left open by their doubles."""
    sockets = [*await open_datagram_sockets("udp://127.0.0.1:0"), *await open_datagram_sockets("udp://127.0.0.1:0")]
    name = sockets[0].getsockname()
    sockets[1].close()
    with pytest.raises(OSError, match="descriptor"):
        await serve_datagrams(echo, sockets)
    with socket.socket(type=socket.SOCK_DGRAM) as again:
        again.bind(name)  # in use as long as the socket or its double is open


# The bounds


async def test_a_hog_has_its_bound_and_takes_nobodys_turn() -> None:
    """Its messages beyond its places are dropped and counted; a polite source is served in between."""
    order: list[bytes] = []
    release = trio.Event()

    async def handler(source: Source[bytes], message: bytes) -> None:
        await release.wait()
        order.append(message)

    async with serving(handler, workers=1, max_items_per_source=10, cost=lambda payload: 1.0) as running:
        with running.client() as first, running.client() as hog, running.client() as polite:
            await first.send(b"first")
            while not running.server.statistics().stage.occupied:
                await trio.lowlevel.checkpoint()
            for _ in range(100):
                await hog.send(b"hog")
            for _ in range(3):
                await polite.send(b"polite")
            await running.received(104)
            release.set()
            while running.server.statistics().stage.handled < 14:
                await trio.lowlevel.checkpoint()
        assert running.server.statistics().dropped == {"flow": 90}
    assert Counter(order) == {b"first": 1, b"hog": 10, b"polite": 3}
    assert order.index(b"polite") <= 3
    assert max(index for index, message in enumerate(order) if message == b"polite") <= 8


async def test_strangers_without_end_drive_out_strangers_only(autojump_clock: MockClock) -> None:
    """The table is bounded; who is verified stays, and when all are, who is new is not served until one is idle."""

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        if message == b"verify":
            assert source.verify(source.token())
        return b"yes" if source.verified else b"no"

    async with serving(handler, max_sources=3, idle_within=60) as running:
        with running.client() as good, running.client() as better:

            async def ask(client: Any, message: bytes) -> bytes:
                await client.send(message)
                answer: bytes = await client.recv(10)
                return answer

            assert await ask(good, b"verify") == b"yes"
            for _ in range(20):
                with running.client() as stranger:
                    assert await ask(stranger, b"hello") == b"no"
            assert running.server.statistics().sources == 3
            assert await ask(good, b"hello") == b"yes"
            assert await ask(better, b"verify") == b"yes"
            with running.client() as third, running.client() as fourth:
                assert await ask(third, b"verify") == b"yes"
                assert running.server.statistics().verified == 3
                await fourth.send(b"hello")
                await wait_all_tasks_blocked(0.01)
                statistics = running.server.statistics()
                assert statistics.dropped == {"too many sources": 1}
                assert statistics.admission.most == 3
                await trio.sleep(61)
                assert await ask(fourth, b"hello") == b"no"
                assert await ask(good, b"hello") == b"no"  # it was forgotten


async def test_whoever_has_been_silent_longest_is_forgotten_first(autojump_clock: MockClock) -> None:
    """At the bound, and after its time whoever it is; then nothing of it is kept."""
    sources: list[weakref.ref[Source[bytes]]] = []

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        if not source.data:
            sources.append(weakref.ref(source))
        source.data = (source.data or 0) + 1
        if message == b"verify":
            source.verify(source.token())
        return b"%d" % source.data

    rates = InputRates(message_rate=Rate(100))
    async with serving(handler, max_sources=2, idle_within=60, input_rates=rates) as running:
        with running.client() as one, running.client() as two, running.client() as three:

            async def ask(client: Any, message: bytes = b"x") -> bytes:
                await client.send(message)
                answer: bytes = await client.recv(10)
                return answer

            assert [await ask(one), await ask(two), await ask(one)] == [b"1", b"1", b"2"]
            assert [await ask(three), await ask(one)] == [b"1", b"3"]
            assert await ask(two) == b"1"
            assert await ask(two, b"verify") == b"2"
            await trio.sleep(61)
            assert await ask(two) == b"1"
            assert running.server.statistics().verified == 0
            await ask(one)
            gc.collect()
            assert len([source for source in sources if source() is not None]) == 2


async def test_new_sources_pass_the_admission(autojump_clock: MockClock) -> None:
    """The filter's words are the farewell, which is no longer than what came; idle sources give their place back."""
    words: str | None = "closed"
    admission = Admission(max_per_host=2, turn_away=lambda address: words, spread=0)
    async with serving(shout, codec=CODEC, admission=admission, idle_within=60) as running:
        with running.client() as short, running.client() as long:
            await short.send(CODEC.encode(Say("hi"), 1))
            await long.send(CODEC.encode(Say("x" * 100), 1))
            assert CODEC.decode(await long.recv(200)) == (Closed("closed"), None)
            assert running.server.statistics().sent == 1
        words = None
        with running.client() as one, running.client() as two, running.client() as three:
            for client in (one, two):
                await client.send(CODEC.encode(Say("hi"), 1))
                assert CODEC.decode(await client.recv(100)) == (Say("HI"), 1)
            await three.send(CODEC.encode(Say("hi"), 1))
            await wait_all_tasks_blocked(0.01)
            statistics = running.server.statistics()
            assert statistics.dropped == {"not admitted": 3}
            assert statistics.admission.turned_away == {Refusal.FILTER: 2, Refusal.HOST: 1}
            await trio.sleep(61)
            await three.send(CODEC.encode(Say("hi"), 1))
            assert CODEC.decode(await three.recv(100)) == (Say("HI"), 1)
            assert running.server.statistics().admission.hosts == 1


@pytest.mark.parametrize("refuse", [False, True])
async def test_faster_than_the_rate_is_dropped_or_refused(refuse: bool, autojump_clock: MockClock) -> None:
    """Each source has its own rate; the refusal says when to come back."""
    rates = InputRates(message_rate=Rate(2))
    async with serving(shout, codec=CODEC, input_rates=rates, refuse=refuse) as running:
        with running.client() as client, running.client() as other:
            for _ in range(3):
                await client.send(CODEC.encode(Say("x" * 50), 1))
            await other.send(CODEC.encode(Say("hi"), 2))
            assert CODEC.decode(await other.recv(100)) == (Say("HI"), 2)
            answers = [CODEC.decode(await client.recv(100))[0] for _ in range(3 if refuse else 2)]
            assert answers.count(Say("X" * 50)) == 2
            if refuse:
                (refused,) = [answer for answer in answers if isinstance(answer, Refused)]
                assert refused == Refused("rate", pytest.approx(0.5))
            statistics = running.server.statistics()
            assert statistics.dropped == {"rate": 1}
            assert statistics.refused == refuse
            await trio.sleep(0.5)
            await client.send(CODEC.encode(Say("again"), 3))
            assert CODEC.decode(await client.recv(100)) == (Say("AGAIN"), 3)


async def test_a_full_queue_costs_no_allowance() -> None:
    """What was dropped for want of room is not held against the source's rate."""
    release = trio.Event()

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        await release.wait()
        return message

    rates = InputRates(message_rate=Rate(20))
    async with serving(handler, input_rates=rates, workers=1, max_items=1) as running:
        with running.client() as client:
            await client.send(b"first")
            while not running.server.statistics().stage.occupied:
                await trio.lowlevel.checkpoint()
            for _ in range(50):
                await client.send(b"x")
            await running.received(51)
            assert set(running.server.statistics().dropped) == {"queue"}
            release.set()
            assert [await client.recv(10), await client.recv(10)] == [b"first", b"x"]


async def test_a_datagram_that_is_too_long_is_dropped_whole() -> None:
    """Not cut, and nothing longer is sent either: no stranger's datagram ends a server, or is its owner's error."""
    errors: list[ValueError] = []

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        try:
            source.send_nowait(bytes(101))
        except ValueError as error:
            errors.append(error)
        return message + b"!"

    async with serving(handler, max_bytes=100, amplification=2) as running:
        with running.client() as client:
            await client.send(bytes(101))
            await client.send(bytes(100))
            await client.send(bytes(99))
            assert await client.recv(200) == bytes(99) + b"!"
        statistics = running.server.statistics()
        assert (statistics.dropped, statistics.withheld, statistics.failed) == ({"too long": 1}, 1, 0)
    assert [str(error) for error in errors] == ["message of 101 bytes exceeds max_bytes=100"] * 2


async def test_what_the_kernel_does_not_take_or_keep_is_counted() -> None:
    """On the way out, and on the way in."""
    (sock,) = await open_datagram_sockets("udp://127.0.0.1:0")
    with pytest.raises(OSError, match="not connected"):
        sock.shutdown(socket.SHUT_WR)  # but from now on nothing can be sent
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
        for _ in range(100):
            await client.sendto(bytes(1000), sock.getsockname())
        await client.sendto(b"last", sock.getsockname())

        async def handler(source: Source[bytes], message: bytes) -> bytes:
            return message

        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve_datagrams, handler, [sock])
            await trio.lowlevel.checkpoint()
            while server.statistics().stage.handled == 0:
                await trio.lowlevel.checkpoint()
            await wait_all_tasks_blocked(0.01)
            statistics = server.statistics()
            assert statistics.unsent == statistics.received > 0
            assert statistics.dropped_by_kernel == 101 - statistics.received > 0
            nursery.cancel_scope.cancel()


# The handler, and the end


async def test_a_handler_that_raises_fails_its_message_only() -> None:
    """The source is told, the owner too, and the next message is served."""
    errors: list[Exception] = []

    async def handler(source: Source[Any], message: Any) -> Any:
        if message.text.startswith("fail"):
            raise KeyError(message.text)
        return message

    async with serving(handler, codec=CODEC, on_error=lambda source, error: errors.append(error)) as running:
        with running.client() as client:
            await client.send(CODEC.encode(Say("fail" * 10), 1))
            await client.send(CODEC.encode(Say("good"), 2))
            assert CODEC.decode(await client.recv(100)) == (Failed("the handler failed"), 1)
            assert CODEC.decode(await client.recv(100)) == (Say("good"), 2)
        assert running.server.statistics().failed == len(errors) == 1


async def test_without_on_error_an_exception_reaches_the_owner() -> None:
    """And the sockets are closed."""

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        raise KeyError("mine")

    (sock,) = await open_datagram_sockets("udp://127.0.0.1:0")
    with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
        await client.sendto(b"x", sock.getsockname())
        with pytest.RaisesGroup(pytest.RaisesExc(KeyError, match="mine"), flatten_subgroups=True):
            await serve_datagrams(handler, [sock])
    assert sock.fileno() == -1


async def test_handlers_that_hold_the_loop_take_turns_under_a_watchdog() -> None:
    """Two handlers that spin until both have begun can only end if each is forced to a checkpoint."""
    begun = 0

    async def spin(source: Source[bytes], message: bytes) -> bytes:
        nonlocal begun
        begun += 1
        while begun < 2:
            pass
        return message

    async with open_watchdog(quantum=0.002) as watchdog, serving(spin, watchdog=watchdog) as running:
        with running.client() as one, running.client() as other:
            await one.send(b"one")
            await other.send(b"other")
            assert [await one.recv(10), await other.recv(10)] == [b"one", b"other"]


async def test_a_reply_that_found_nobody_does_not_stop_the_receiving() -> None:
    """Where the owner has asked to hear of it, by the socket's own option, it is counted."""
    (sock,) = await open_datagram_sockets("udp://127.0.0.1:0")
    sock.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
    where = sock.getsockname()
    release = trio.Event()

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        if message == b"gone":
            await release.wait()
        return message

    async with trio.open_nursery() as nursery:
        server: DatagramServer[bytes] = await nursery.start(serve_datagrams, handler, [sock])
        with trio.socket.socket(type=socket.SOCK_DGRAM) as gone:
            await gone.sendto(b"gone", where)
            while not server.statistics().stage.occupied:
                await trio.lowlevel.checkpoint()
        release.set()
        while not server.statistics().receive_errors:
            await trio.lowlevel.checkpoint()
        with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
            await client.sendto(b"hello", where)
            assert await client.recv(10) == b"hello"
        nursery.cancel_scope.cancel()


async def test_draining_serves_what_was_received(autojump_clock: MockClock) -> None:
    """Then the server ends, and nothing of it is left."""
    before = len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living
    release = trio.Event()

    async def handler(source: Source[bytes], message: bytes) -> bytes:
        source.verify(source.token())
        await release.wait()
        return message

    admission = Admission()
    async with serving(handler, admission=admission) as running:
        with running.client() as client:
            for _ in range(5):
                await client.send(b"x")
            await running.received(5)
            start = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(running.server.drain, 10)
                await wait_all_tasks_blocked()
                release.set()
            assert [await client.recv(10) for _ in range(5)] == [b"x"] * 5
            await client.send(b"nobody there")
            with pytest.raises(ConnectionRefusedError):
                await client.recv(10)
            with pytest.raises(ValueError, match="grace must be a number of seconds, 0 or more, not -1"):
                await running.server.drain(-1)
        assert trio.current_time() - start < 1
        assert (running.server.statistics().sources, admission.statistics().hosts) == (0, 0)
    assert (len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living) == before


async def test_the_grace_of_a_drain_ends(autojump_clock: MockClock) -> None:
    """A handler that never returns is cancelled."""

    async def handler(source: Source[bytes], message: bytes) -> None:
        await trio.sleep_forever()

    async with serving(handler) as running:
        with running.client() as client:
            await client.send(b"x")
            await wait_all_tasks_blocked(0.01)
            start = trio.current_time()
            await running.server.drain(3)
            assert trio.current_time() - start == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_bytes": 0}, ValueError, "max_bytes must be between 1 and 65507, not 0"),
        ({"max_bytes": 1e3}, TypeError, "max_bytes must be an int, not 1000.0"),
        ({"amplification": -1}, ValueError, "amplification must not be negative, not -1"),
        ({"max_sources": 0}, ValueError, "max_sources must be at least 1, not 0"),
        ({"idle_within": 0}, ValueError, "idle_within must be positive, not 0"),
        ({"workers": 0}, ValueError, "workers must be >= 1, not 0"),
        ({"max_items_per_source": 0}, ValueError, "max_items_per_flow must be at least 1, not 0"),
    ],
)
async def test_wrong_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """Before anything is received."""
    (sock,) = await open_datagram_sockets("udp://127.0.0.1:0")
    with sock, pytest.raises(error, match=words):
        await serve_datagrams(echo, [sock], **options)
    with pytest.raises(ValueError, match="sockets must be one or more, not none"):
        await serve_datagrams(echo, [])
    with pytest.raises(TypeError, match=r"sockets must be a sequence of sockets, .* not 'udp://127.0.0.1:0'"):
        await serve_datagrams(echo, cast(Any, "udp://127.0.0.1:0"))


def datagram(rng: random.Random, codec: Codec[Any]) -> bytes:
    """A real message, some bytes of it changed, lost or added."""
    wire = bytearray(codec.encode(Say("x" * rng.randint(0, 300)), rng.choice([None, 1])))
    for _ in range(rng.choice([0, 1, 2, 10])):
        at = rng.randrange(len(wire) + 1)
        wire[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    return bytes(wire) + rng.randbytes(rng.choice([0, 0, 0, 1000]))


async def test_no_datagrams_can_hurt_a_server() -> None:
    """Mutated ones from ever new sources: no exception, no growth, and a good source is served after each."""
    rng = random.Random(4)
    async with serving(shout, codec=CODEC, max_sources=20, refuse=True) as running:
        with running.client() as good:
            for number in range(FUZZ):
                with running.client() as stranger:
                    for _ in range(rng.randint(1, 3)):
                        await stranger.send(datagram(rng, CODEC))
                await good.send(CODEC.encode(Say("still there"), number))
                assert CODEC.decode(await good.recv(100)) == (Say("STILL THERE"), number)
        await wait_all_tasks_blocked(0.01)
        statistics = running.server.statistics()
        TRIED["a running server of datagrams"] += statistics.received - FUZZ
        assert statistics.sources <= 20
        assert statistics.mistakes > FUZZ / 10
        assert statistics.dropped["too long"] > FUZZ / 100
        assert statistics.failed == statistics.stage.queue.items == statistics.dropped_by_kernel == 0
        assert statistics.stage.handled + statistics.dropped["too long"] == statistics.received
