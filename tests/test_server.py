"""Messages come back in order, fairly, to whoever sent them, and a server begins and ends in order."""

from __future__ import annotations

import socket
import struct
from functools import partial
from math import inf
from typing import Any

import pytest
import trio
from served import CODEC, FRAMING, Raw, Say, closed_by, serving, shout
from trio.testing import MockClock, wait_all_tasks_blocked

from stagetrio.codec import Closed, Done
from stagetrio.peer import Peer
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.server import serve_stage
from stagetrio.sockets import TcpAddress, UnixAddress, address_of, connect, open_listeners
from stagetrio.watchdog import open_watchdog


@pytest.fixture(params=["tcp", "stream"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_what_the_handler_returns_is_the_reply_in_order(kind: str) -> None:
    """500 messages in one write come back complete and in order, though only 64 are taken at once."""
    async with serving(kind) as running, (await running.connect()).stream as stream:
        client = Raw(stream)
        payloads = [b"%d" % i for i in range(500)]
        await client.send(*payloads)
        await stream.send_eof()
        assert await client.receive_all() == payloads
        await closed_by(running, CloseReason.ENDED)
        assert running.server.statistics().stage.handled == 500


async def test_order_is_kept_when_handlers_wait(kind: str) -> None:
    """Some messages wait and some do not: one connection's never overlap, and its replies are in order."""
    running_now = 0

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        nonlocal running_now
        running_now += 1
        assert running_now == 1
        for _ in range(int(message) % 4):
            await trio.lowlevel.checkpoint()
        running_now -= 1
        return message

    async with serving(kind, handler) as running:
        client = await running.connect()
        payloads = [b"%d" % i for i in range(300)]
        await client.send(*payloads)
        await client.stream.send_eof()
        assert await client.receive_all() == payloads


async def test_answers_come_as_they_are_ready_where_the_owner_says_so(kind: str) -> None:
    """Two at a time: the third waits for a place, and a slow one does not keep the others."""
    release = trio.Event()
    running_now = most = 0

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        nonlocal running_now, most
        running_now += 1
        most = max(most, running_now)
        if message == b"slow":
            await release.wait()
        else:
            await trio.lowlevel.checkpoint()
        running_now -= 1
        return message

    async with serving(kind, handler, max_running=2) as running:
        client = await running.connect()
        await client.send(b"slow", *[b"%d" % i for i in range(100)])
        assert [await client.receive() for _ in range(100)] == [b"%d" % i for i in range(100)]
        release.set()
        assert await client.receive() == b"slow"
        assert most == 2


async def test_cancel_on_disconnect_cancels_all_that_run_for_a_peer(kind: str) -> None:
    """However many of its messages run at once."""

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        await trio.sleep_forever()

    async with serving(kind, handler, max_running=3, cancel_on_disconnect=True) as running:
        client = await running.connect()
        await client.send(*[b"x"] * 5)
        while running.server.statistics().stage.occupied < 3:
            await trio.lowlevel.checkpoint()
        running.server.peers[0].close()
        while running.server.statistics().stage.occupied:
            await trio.lowlevel.checkpoint()
        assert running.server.statistics().stage.cancelled == 3


async def test_a_handler_that_waits_hinders_only_its_own_connection(kind: str) -> None:
    """A handler that never returns keeps its connection's next messages waiting, and nobody else's."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        if message == b"hang":
            await trio.sleep_forever()
        return message

    async with serving(kind, handler) as running:
        stuck, other = await running.connect(), await running.connect()
        await stuck.send(b"before", b"hang", b"after")
        assert await stuck.receive() == b"before"
        for _ in range(20):
            await other.send(b"hello")
            assert await other.receive() == b"hello"
        statistics = running.server.statistics().stage
        assert statistics.occupied == 1
        assert statistics.handled == 21


async def test_cancel_on_disconnect_cancels_the_handler_in_hand(kind: str) -> None:
    """When asked for, nobody works for a peer that is gone."""
    cancelled = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with serving(kind, handler, cancel_on_disconnect=True) as running:
        client = await running.connect()
        await client.send(b"x")
        await wait_all_tasks_blocked(0.01)
        running.server.peers[0].close()
        await cancelled.wait()
        await wait_all_tasks_blocked()
        assert running.server.statistics().stage.cancelled == 1
        other = await running.connect()
        await other.send(b"x")


async def test_a_message_without_reply_is_answered_by_done_if_it_has_an_id(kind: str) -> None:
    """Whoever asks hears of the end; whoever does not ask hears nothing."""

    async def handler(peer: Peer[Any], message: Any) -> Any:
        return Say("reply") if message.text == "reply" else None

    async with serving(kind, handler, codec=CODEC) as running:
        client = await running.connect()
        await client.send(CODEC.encode(Say("silent")), CODEC.encode(Say("asked"), 7), CODEC.encode(Say("reply")))
        frames = [await client.receive(), await client.receive()]
        assert [CODEC.decode(frame) for frame in frames if frame] == [(Done(), 7), (Say("reply"), None)]


async def test_handlers_that_hold_the_loop_take_turns_under_a_watchdog(kind: str) -> None:
    """Four handlers that spin until all four have begun can only end if each is forced to a checkpoint."""
    begun = 0

    async def spin(peer: Peer[bytes], message: bytes) -> bytes:
        nonlocal begun
        begun += 1
        while begun < 4:
            pass
        return message

    async with open_watchdog(quantum=0.002) as watchdog, serving(kind, spin, watchdog=watchdog) as running:
        clients = [await running.connect() for _ in range(4)]
        for client in clients:
            await client.send(b"first", b"second")
        for client in clients:
            assert [await client.receive(), await client.receive()] == [b"first", b"second"]
        assert watchdog.statistics().forced >= 3
        assert running.server.statistics().stage.handled == 8


async def test_hooks_see_connections_come_and_go(kind: str) -> None:
    """Nothing is read before ``on_connect`` returns; what it started ends with the connection, then it is told."""
    events: list[str] = []
    connected = trio.Event()

    async def on_connect(peer: Peer[Any]) -> None:
        async def companion() -> None:
            try:
                await trio.sleep_forever()
            finally:
                events.append("companion ended")

        peer.start_soon(companion)
        await connected.wait()
        events.append("connected")

    gone = trio.Event()

    async def on_disconnect(peer: Peer[Any]) -> None:
        await wait_all_tasks_blocked()
        events.append(f"gone: {peer.close_reason.value if peer.close_reason else None}")
        gone.set()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        events.append("message")
        return message

    async with serving(kind, handler, codec=CODEC, on_connect=on_connect, on_disconnect=on_disconnect) as running:
        client = await running.connect()
        await client.send(CODEC.encode(Say("x"), 1))
        await wait_all_tasks_blocked(0.01)
        assert events == []
        connected.set()
        assert await client.message() == Say("x")
        await client.stream.aclose()
        await gone.wait()
        assert events == ["connected", "message", "companion ended", "gone: ended"]


async def test_a_hook_that_raises_ends_its_connection_only(kind: str) -> None:
    """With ``on_error`` the owner hears of it; the peer is told, the server goes on."""
    errors: list[Exception] = []

    async def on_connect(peer: Peer[Any]) -> None:
        if not errors:
            raise ValueError("no")

    def on_error(peer: Peer[Any], error: Exception) -> None:
        errors.append(error)

    async with serving(kind, shout, codec=CODEC, on_connect=on_connect, on_error=on_error) as running:
        client = await running.connect()
        assert await client.message() == Closed("the server failed to take the connection")
        other = await running.connect()
        await other.send(CODEC.encode(Say("x"), 1))
        assert await other.message() == Say("X")
        assert [str(error) for error in errors] == ["no"]


async def test_draining_serves_what_was_received_and_says_farewell(kind: str) -> None:
    """Queued messages are answered within the grace, nobody new gets in, and the server ends."""
    proceed = trio.Event()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        await proceed.wait()
        return message

    async with serving(kind, handler, codec=CODEC) as running:
        client = await running.connect()
        await client.send(*[CODEC.encode(Say(str(i)), i) for i in range(100)])
        await wait_all_tasks_blocked(0.01)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.server.drain, inf)
            await wait_all_tasks_blocked(0.01)
            proceed.set()
            assert [await client.message() for _ in range(100)] == [Say(str(i)) for i in range(100)]
            assert await client.message() == Closed("the server shuts down")
            await client.stream.aclose()
        assert running.server.statistics().closed == {CloseReason.DRAINED: 1}
        with pytest.raises((OSError, trio.BrokenResourceError)):
            await running.connect()


async def test_the_grace_of_a_drain_ends(kind: str, autojump_clock: MockClock) -> None:
    """What does not finish within the grace is cancelled, and everything is closed."""
    cancelled = trio.Event()

    async def handler(peer: Peer[Any], message: Any) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with serving(kind, handler, codec=CODEC) as running:
        client = await running.connect()
        await client.send(CODEC.encode(Say("x"), 1))
        await trio.sleep(1)
        start = trio.current_time()
        await running.server.drain(7)
        assert trio.current_time() - start == pytest.approx(7)
        assert cancelled.is_set()
        assert running.server.peers == ()


async def test_a_broadcast_is_encoded_once_and_reaches_everyone(kind: str) -> None:
    """Each open connection gets it; those that cannot be reached are returned."""
    async with serving(kind, shout, codec=CODEC) as running:
        clients = [await running.connect() for _ in range(5)]
        while len(running.server.peers) < 5:
            await trio.lowlevel.checkpoint()
        gone = running.server.peers[0]
        gone.close("bye")
        assert running.server.broadcast(Say("news")) == [gone]
        assert await clients[0].message() == Closed("bye")
        assert [await client.message() for client in clients[1:]] == [Say("news")] * 4


async def test_many_connections_under_one_flow_share_one_share(kind: str) -> None:
    """Opening more connections gains nothing where the flow is the identity, and order is kept per connection."""
    served: list[bytes] = []
    proceed = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        if message == b"gate":
            await proceed.wait()
        else:
            served.append(message[:1])

    def cost(payload: bytes) -> float:
        return 1.0

    async with serving(kind, handler, workers=1, cost=cost, flow=lambda peer: "x") as running:
        gate = await running.connect()
        await gate.send(b"gate")
        await wait_all_tasks_blocked(0.01)
        many = [await running.connect() for _ in range(9)]
        single = await running.connect()
        await wait_all_tasks_blocked(0.01)
        running.server.peers[-1].flow = "y"
        for client in many:
            await client.send(*[b"many"] * 10)
        await single.send(*[b"single"] * 10)
        await wait_all_tasks_blocked(0.01)
        proceed.set()
        while len(served) < 100:
            await trio.lowlevel.checkpoint()
        assert served[:20].count(b"s") in (9, 10)


async def test_peers_know_where_they_come_from(tmp_path: Any) -> None:
    """TCP and Unix peers have an address, and the socket file goes with the server."""
    addresses: list[Any] = []

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        addresses.append(peer.address)
        return message

    listeners = await open_listeners("tcp://127.0.0.1:0", f"unix://{tmp_path}/s.sock")
    tcp = address_of(listeners[0].socket)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_stage, handler, listeners, framing=FRAMING))
        for address in (tcp, f"unix://{tmp_path}/s.sock"):
            async with await connect(address) as stream:
                client = Raw(stream)
                await client.send(b"x")
                assert await client.receive() == b"x"
        nursery.cancel_scope.cancel()
    assert isinstance(addresses[0], TcpAddress)
    assert addresses[1] == UnixAddress("")
    assert list(tmp_path.iterdir()) == []


async def test_output_is_written_on_the_tick(kind: str, autojump_clock: MockClock) -> None:
    """With a tick, a lone reply is written at once, and what follows within the tick waits for its end."""
    async with serving(kind, tick=2.0) as running:
        client = await running.connect()
        start = trio.current_time()
        arrived: list[float] = []
        for wait in (0.0, 0.5, 0.1, 5.0):
            await trio.sleep(wait)
            await client.send(b"x")
            assert await client.receive() == b"x"
            arrived.append(trio.current_time() - start)
        assert arrived == pytest.approx([0.0, 2.0, 4.0, 9.1], abs=0.2)


async def test_flows_share_by_their_weights(kind: str) -> None:
    """A flow of weight 3 is served three times as often as one of weight 1 while both have messages."""
    served: list[bytes] = []
    proceed = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> None:
        if message == b"gate":
            await proceed.wait()
        else:
            served.append(message)

    options: dict[str, Any] = {"weight": {"heavy": 3.0, "light": 1.0, "gate": 1.0}.get, "cost": lambda payload: 1.0}
    names = iter(["gate", "heavy", "light"])
    async with serving(kind, handler, workers=1, flow=lambda peer: next(names), **options) as running:
        for name in (b"gate", b"heavy", b"light"):
            client = await running.connect()
            await client.send(*([name] if name == b"gate" else [name] * 60))
            await wait_all_tasks_blocked(0.01)
        proceed.set()
        while len(served) < 120:
            await trio.lowlevel.checkpoint()
        assert 28 <= served[:40].count(b"heavy") <= 32


async def test_sockets_are_looked_after_while_every_worker_is_occupied() -> None:
    """With its one worker in a handler that waits, the server still sees its peer reset, and then serves the next."""

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        if message == b"hang":
            await trio.sleep_forever()
        return message

    async with serving("tcp", handler, workers=1, cancel_on_disconnect=True) as running:
        stuck, other = await running.connect(), await running.connect()
        await stuck.send(b"hang")
        while not running.server.statistics().stage.occupied:
            await trio.lowlevel.checkpoint()
        await other.send(b"hello")
        await wait_all_tasks_blocked(0.01)
        assert running.server.statistics().stage.queue.items == 1
        stuck.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stuck.stream)
        with trio.fail_after(20):
            assert await other.receive() == b"hello"


async def test_what_was_held_behind_a_handler_is_served_when_it_ends(kind: str) -> None:
    """Messages beyond those parked behind the one in hand stay in the queue, and come out of it in their turn."""
    proceed = trio.Event()

    async def handler(peer: Peer[bytes], message: bytes) -> bytes:
        await proceed.wait()
        return message

    payloads = [b"%d" % i for i in range(300)]
    async with serving(kind, handler, limits=PeerLimits(max_decoded=1000)) as running:
        client = await running.connect()
        await client.send(*payloads)
        while not running.server.peers or running.server.peers[0].statistics().backlog < len(payloads):
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked(0.01)
        assert running.server.statistics().stage.queue.items > 0
        proceed.set()
        with trio.fail_after(20):
            assert [await client.receive() for _ in payloads] == payloads
