"""Remote calls over real sockets: tokens, TLS, connections that are lost and made again, processes that are killed."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed
from stagetrio.remote import (
    Procedures,
    Remote,
    RemoteError,
    WorkerLost,
    open_remote,
    open_remote_stream,
    serve_remote,
    serve_remote_stream,
)
from stagetrio.remote_hello import MAX_TOKEN_BYTES
from stagetrio.sockets import open_listeners

HERE = Path(__file__).parent
CERTIFICATE = HERE / "localhost.pem"


def echoing() -> Procedures:
    procedures = Procedures()

    @procedures.procedure
    async def echo(x: int) -> int:
        return x

    @procedures.procedure
    async def hang() -> None:
        await trio.sleep_forever()

    return procedures


@contextlib.asynccontextmanager
async def listening(procedures: Procedures, address: str, **options: Any) -> AsyncIterator[str]:
    """Serve at an address; gives the address with the port it got."""
    async with trio.open_nursery() as nursery:
        listeners = await open_listeners(address)
        await nursery.start(functools.partial(serve_remote, procedures, listeners, **options))
        if address.startswith("tcp:"):
            address = f"tcp://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        yield address
        nursery.cancel_scope.cancel()


async def settled() -> None:
    """Let everything happen that can happen without time passing, kernel included."""
    await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_calls_over_addresses(scheme: str, tmp_path: Path) -> None:
    """TCP and Unix addresses lead to the same place; 2,000 calls of 100 callers all get their own answer."""
    address = "tcp://127.0.0.1:0" if scheme == "tcp" else f"unix://{tmp_path}/s"

    async def caller(n: int, remote: Remote) -> None:
        for x in range(n, n + 20):
            assert await remote.call("echo", x) == x

    async with listening(echoing(), address) as where, open_remote(where) as remote:
        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(caller, n, remote)
        assert remote.statistics().sent == 2000


@pytest.mark.parametrize("token", [None, "wrong", "sesame ", "\ud800", "x" * 3000, "x" * MAX_TOKEN_BYTES])
async def test_a_wrong_token_opens_nothing(token: str | None) -> None:
    """Whoever does not know the token is told so before anything else is looked at, and counted."""
    procedures = echoing()
    async with listening(procedures, "tcp://127.0.0.1:0", token="sesame") as where:
        with pytest.raises((WorkerLost, UnicodeEncodeError)) as caught:
            async with open_remote(where, token=token):
                raise AssertionError("it was let in")
        if isinstance(caught.value, WorkerLost):
            assert caught.value.reason == "wrong token"
            assert not caught.value.may_have_run
        async with open_remote(where, token="sesame") as remote:
            assert await remote.call("echo", 1) == 1
        await settled()
    assert procedures.statistics().broken == 1


@pytest.mark.parametrize(
    ("token", "error", "match"),
    [
        ("", ValueError, "token must have 1 to .* bytes, not 0"),
        ("x" * (MAX_TOKEN_BYTES + 1), ValueError, "token must have 1 to"),
        (b"sesame", TypeError, "token must be a str or None, not bytes$"),
    ],
)
async def test_what_cannot_be_a_token_is_refused(token: Any, error: type[Exception], match: str) -> None:
    """Before anybody connects, above all the empty one, which anybody would know; it is not told what it is."""
    with pytest.raises(error, match=match):
        await serve_remote(echoing(), [], token=token)
    with pytest.raises(error, match=match):
        await serve_remote_stream(echoing(), trio.testing.memory_stream_pair()[0], token=token)
    with pytest.raises(error, match=match):
        async with open_remote("tcp://127.0.0.1:1", token=token):
            raise AssertionError("entered")


async def test_a_token_nobody_asks_for_does_no_harm() -> None:
    """A worker without a token takes anybody."""
    async with listening(echoing(), "tcp://127.0.0.1:0") as where, open_remote(where, token="any") as remote:
        assert await remote.call("echo", 1) == 1


async def test_tls_carries_calls_and_turns_plain_callers_away() -> None:
    """With a context on both sides calls go through; a caller that speaks plain text is counted as broken."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(CERTIFICATE)
    client = ssl.create_default_context(cafile=str(CERTIFICATE))
    procedures = echoing()
    async with listening(procedures, "tcp://127.0.0.1:0", ssl_context=server, token="t") as where:
        for _ in range(2):
            async with open_remote(where, ssl_context=client, token="t") as remote:
                async with trio.open_nursery() as nursery:
                    for x in range(100):
                        nursery.start_soon(remote.call, "echo", x)
                await remote.post("echo", 1)
        with pytest.raises(WorkerLost):
            async with open_remote(where, token="t"):
                raise AssertionError("it was let in")
        with pytest.raises(WorkerLost, match=r"the connection broke: .*certificate verify failed"):
            async with open_remote(where, ssl_context=ssl.create_default_context(), token="t"):
                raise AssertionError("an unknown certificate was taken")
        await settled()
    assert procedures.statistics().returned == 202
    assert procedures.statistics().broken == 2


async def test_nobody_there_is_an_oserror(tmp_path: Path) -> None:
    """The first connection fails as any connection fails, unwrapped; a wrong address is named."""
    with pytest.raises(OSError, match=r"nothing|No such file"):
        async with open_remote(f"unix://{tmp_path}/nothing"):
            raise AssertionError
    with pytest.raises(ValueError, match="unknown scheme 'http'"):
        open_remote("http://localhost:1")


async def test_what_the_block_raises_leaves_as_itself(tmp_path: Path) -> None:
    """Neither errors nor cancellations of the block are wrapped into a group."""
    async with listening(echoing(), f"unix://{tmp_path}/s") as where:
        with pytest.raises(KeyError, match="mine"):
            async with open_remote(where):
                raise KeyError("mine")
        with trio.CancelScope() as scope:
            async with open_remote(where):
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_a_cancellation_on_the_way_out_hides_no_error(tmp_path: Path) -> None:
    """What the block raised comes out, whatever is cancelled while the connection is being closed."""
    async with listening(echoing(), f"unix://{tmp_path}/s") as where:
        raised = False
        with trio.CancelScope() as scope:
            try:
                async with open_remote(where):
                    scope.cancel()
                    raise KeyError
            except KeyError:
                raised = True
        assert raised


@pytest.mark.parametrize("how", ["leave", "raise"])
async def test_who_still_calls_when_the_remote_is_closed_is_told(how: str, tmp_path: Path) -> None:
    """Calls in flight, waiting and later get ClosedResourceError: it was this side that left."""
    procedures = echoing()
    closed = 0

    async def call(name: str, *args: object) -> None:
        nonlocal closed
        with pytest.raises(trio.ClosedResourceError):
            await remote.call(name, *args)
        closed += 1

    async with listening(procedures, f"unix://{tmp_path}/s", max_in_flight=2) as where:
        async with trio.open_nursery() as nursery:
            with contextlib.suppress(KeyError):
                async with open_remote(where) as remote:
                    for _ in range(4):
                        nursery.start_soon(call, "hang")
                    await settled()
                    assert (remote.statistics().in_flight, remote.statistics().waiting) == (2, 2)
                    if how == "raise":
                        raise KeyError
            await call("echo", 1)
            with pytest.raises(trio.ClosedResourceError):
                await remote.post("echo", 1)
        assert closed == 5
        await settled()
        assert procedures.statistics().running == 0


class Flaky:
    """Serves one connection after another at an address, each until it is told to drop it."""

    def __init__(self, procedures: Procedures) -> None:
        self.procedures = procedures
        self.connections = 0
        self.turns_away = False
        self._scope = trio.CancelScope()

    async def run(self, path: Path, *, task_status: trio.TaskStatus[str]) -> None:
        [listener] = await open_listeners(f"unix://{path}")
        async with listener:
            task_status.started(f"unix://{path}")
            while True:
                stream = await listener.accept()
                self.connections += 1
                if self.turns_away:
                    await stream.aclose()
                    continue
                with trio.CancelScope() as self._scope:
                    await serve_remote_stream(self.procedures, stream)

    def drop(self) -> None:
        self._scope.cancel()


async def test_a_connection_that_was_lost_idle_is_made_again(tmp_path: Path) -> None:
    """Nothing was in flight, so nothing is lost: the next call goes out on a new connection, one for all callers."""
    flaky = Flaky(echoing())
    async with trio.open_nursery() as nursery:
        where = await nursery.start(flaky.run, tmp_path / "s")
        async with open_remote(where) as remote:
            assert await remote.call("echo", 1) == 1
            flaky.drop()
            await settled()
            async with trio.open_nursery() as callers:
                for x in range(50):
                    callers.start_soon(remote.call, "echo", x)
            await remote.post("echo", 5)
            assert remote.statistics().connections == flaky.connections == 2
            assert flaky.procedures.statistics().returned >= 51
        nursery.cancel_scope.cancel()


async def test_calls_in_flight_are_lost_with_their_connection(tmp_path: Path) -> None:
    """They raise WorkerLost and are not tried again; the next call finds a new connection."""
    flaky = Flaky(echoing())
    lost: list[WorkerLost] = []
    async with trio.open_nursery() as nursery:
        where = await nursery.start(flaky.run, tmp_path / "s")
        async with open_remote(where) as remote:

            async def hang() -> None:
                with pytest.raises(WorkerLost) as caught:
                    await remote.call("hang")
                lost.append(caught.value)

            async with trio.open_nursery() as callers:
                for _ in range(10):
                    callers.start_soon(hang)
                await settled()
                flaky.drop()
            assert await remote.call("echo", 1) == 1
            assert remote.statistics().sent == 11
        nursery.cancel_scope.cancel()
    assert len({id(error) for error in lost}) == 10
    assert all(error.may_have_run and error.reason == "the other side closed the connection" for error in lost)


async def test_closing_while_somebody_connects_again_closes_that_too(tmp_path: Path) -> None:
    """Who connects, and who waits for it, is told that this side has left; no connection is left behind."""
    procedures = echoing()
    told = 0

    async def call() -> None:
        nonlocal told
        with pytest.raises(trio.ClosedResourceError, match="this side has closed"):
            await remote.call("echo", 1)
        told += 1

    [listener] = await open_listeners(f"unix://{tmp_path}/s")
    async with listener, trio.open_nursery() as nursery:
        first = trio.CancelScope()

        async def serve_first() -> None:
            with first:
                await serve_remote_stream(procedures, await listener.accept())

        nursery.start_soon(serve_first)
        async with open_remote(f"unix://{tmp_path}/s") as remote:
            first.cancel()
            await settled()
            nursery.start_soon(call)
            nursery.start_soon(call)
            second = await listener.accept()
            await settled()
        nursery.start_soon(serve_remote_stream, procedures, second)
    assert told == 2
    assert remote.statistics().connections == 1


async def test_an_idempotent_call_is_tried_once_more(tmp_path: Path) -> None:
    """It survives the loss of one connection, not of two: there is a budget of one."""
    procedures = Procedures()
    attempts = 0

    @procedures.procedure
    async def drop_until(count: int) -> int:
        nonlocal attempts
        attempts += 1
        if attempts <= count:
            flaky.drop()
            await trio.sleep_forever()
        return attempts

    flaky = Flaky(procedures)
    async with trio.open_nursery() as nursery:
        where = await nursery.start(flaky.run, tmp_path / "s")
        async with open_remote(where) as remote:
            assert await remote.with_options(idempotent=True).call(drop_until, 1) == 2
            attempts = 0
            with pytest.raises(WorkerLost):
                await remote.with_options(idempotent=True).call(drop_until, 2)
            assert attempts == 2
            attempts = 0
            with pytest.raises(WorkerLost):
                await remote.with_options(idempotent=True).with_options(idempotent=False).call(drop_until, 1)
            assert attempts == 1
        nursery.cancel_scope.cancel()


async def test_a_call_without_a_worker_says_that_it_did_not_run(tmp_path: Path) -> None:
    """Nobody can be reached: may_have_run is False; as soon as somebody listens again, calls go through."""
    procedures, address = echoing(), f"unix://{tmp_path}/s"

    async def serve(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with listening(procedures, address):
                task_status.started(scope)
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        server: trio.CancelScope = await nursery.start(serve)
        async with open_remote(address) as remote:
            assert await remote.call("echo", 1) == 1
            server.cancel()
            await settled()
            for act in (remote.call, remote.post, remote.with_options(idempotent=True).call):
                with pytest.raises(WorkerLost, match="connecting again") as caught:
                    await act("echo", 1)
                assert not caught.value.may_have_run
            await nursery.start(serve)
            assert await remote.call("echo", 2) == 2
        nursery.cancel_scope.cancel()


async def test_callers_who_wait_together_share_one_attempt(tmp_path: Path) -> None:
    """A worker that is down is tried once for all who wait for it, not once for each, one after the other."""
    flaky = Flaky(echoing())
    lost = 0

    async def call() -> None:
        nonlocal lost
        with pytest.raises(WorkerLost, match=r"the connection broke|the other side closed") as caught:
            await remote.call("echo", 1)
        assert not caught.value.may_have_run
        lost += 1

    async with trio.open_nursery() as nursery:
        where = await nursery.start(flaky.run, tmp_path / "s")
        async with open_remote(where) as remote:
            assert await remote.call("echo", 1) == 1
            flaky.turns_away = True
            flaky.drop()
            await settled()
            for attempts in (2, 3):
                async with trio.open_nursery() as callers:
                    for _ in range(50):
                        callers.start_soon(call)
                assert flaky.connections == attempts
            assert lost == 100
            flaky.turns_away = False
            assert await remote.call("echo", 1) == 1
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def worker_process(address: str, log: Path) -> AsyncIterator[trio.Process]:
    """A worker in a process of its own, ready to be called; killed at the end."""
    command = [sys.executable, str(HERE / "remote_worker.py"), address, str(log)]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    async with process.stdout:
        try:
            said = b""
            while not said.endswith(b"\n"):
                data = await process.stdout.receive_some()
                assert data, "the worker ended before it was ready"
                said += data
            yield process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
async def test_a_killed_process_loses_exactly_what_it_had_in_hand(scheme: str, tmp_path: Path) -> None:
    """SIGKILL with 100 calls outstanding: those are lost, none ran twice, and a replacement serves what comes."""
    address, log = f"unix://{tmp_path}/s", tmp_path / "log"
    if scheme == "tcp":
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
        await listener.aclose()
    outcomes: list[str] = []

    async def call(name: str, x: int) -> None:
        try:
            assert await remote.call(name, x) == 2 * x
        except WorkerLost as error:
            assert error.may_have_run
            outcomes.append(f"lost {name}")
        else:
            outcomes.append(f"done {name}")

    async with contextlib.AsyncExitStack() as stack:
        async with worker_process(address, log) as process:
            remote = await stack.enter_async_context(open_remote(address))
            async with trio.open_nursery() as nursery:
                for x in range(100):
                    nursery.start_soon(call, "hang", x)
                    nursery.start_soon(call, "double", x + 1000)
                while await remote.call("begun") < 200:
                    await trio.lowlevel.checkpoint()
                process.kill()
        assert sorted(outcomes) == ["done double"] * 100 + ["lost hang"] * 100
        with pytest.raises(WorkerLost) as caught:
            await remote.call("double", 5)
        assert not caught.value.may_have_run
        async with worker_process(address, log):
            assert await remote.call("double", 2000) == 4000
    ran = [int(line) for line in log.read_text().split()]
    assert sorted(ran) == [*range(100), *range(1000, 1100), 2000]


async def test_a_procedure_error_in_a_process_names_its_line(tmp_path: Path) -> None:
    """What a second process raises can be read here."""
    address = f"unix://{tmp_path}/s"
    async with worker_process(address, tmp_path / "log"), open_remote(address) as remote:
        with pytest.raises(RemoteError, match="TypeError: double"):
            await remote.call("double", "x")
        assert await remote.call("begun") == 0


async def test_posts_that_were_not_answered_are_counted_as_failed() -> None:
    """When the connection is lost under them, nobody else would tell."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        server = trio.CancelScope()

        async def serve() -> None:
            with server:
                await serve_remote_stream(echoing(), ours)

        nursery.start_soon(serve)
        async with open_remote_stream(theirs) as remote:
            for _ in range(3):
                await remote.post("hang")
            await settled()
            server.cancel()
            await settled()
            assert remote.statistics().posts_failed == 3


async def test_the_last_word_of_a_worker_is_heard_by_who_talks_on() -> None:
    """A call that finds the connection closed for writing still learns why, since that had been said before."""
    worker, caller = socket.socketpair()
    framing = LengthPrefixed(2**20)
    with worker:
        worker.send(framing.encode(wire.encode((0, wire.VERSION, 10, 2**20))))
        async with open_remote_stream(trio.SocketStream(trio.socket.from_stdlib_socket(caller))) as remote:
            await settled()
            worker.recv(1000)
            worker.send(framing.encode(wire.encode((5, "closing for the night"))))
            worker.close()
            with pytest.raises(WorkerLost, match="closing for the night"):
                await remote.call("echo", 1)


async def test_a_worker_that_takes_nothing_any_more_is_lost(autojump_clock: trio.testing.MockClock) -> None:
    """It neither leaves nor answers, but it has closed its ear: the call ends a second later instead of never."""
    worker, caller = socket.socketpair()
    framing = LengthPrefixed(2**20)
    with worker:
        worker.send(framing.encode(wire.encode((0, wire.VERSION, 10, 2**20))))
        async with open_remote_stream(trio.SocketStream(trio.socket.from_stdlib_socket(caller))) as remote:
            worker.shutdown(socket.SHUT_RD)
            start = trio.current_time()
            with pytest.raises(WorkerLost, match="the connection broke"):
                await remote.call("echo", 1)
            assert trio.current_time() - start == 1


async def test_an_answer_that_is_not_taken_ends_the_wait_for_more(autojump_clock: trio.testing.MockClock) -> None:
    """A caller that has closed its ear is noticed by an answer that comes late, while nothing else comes from it."""
    ours, caller = socket.socketpair()
    framing = LengthPrefixed(2**20)
    procedures = Procedures()

    @procedures.procedure
    async def nap() -> None:
        await trio.sleep(5)

    with caller:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_remote_stream, procedures, trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
            caller.send(framing.encode(wire.encode((0, wire.VERSION, None, 2**20))))
            await settled()
            caller.send(framing.encode(wire.encode((1, 1, "nap", None, []))))
            await settled()
            caller.shutdown(socket.SHUT_RD)
            start = trio.current_time()
        assert trio.current_time() - start == 6
    assert procedures.statistics().connections == 0


async def test_a_caller_that_takes_nothing_any_more_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    """Its calls are cancelled at the first answer it does not take; what it posts within a second still runs."""
    ours, caller = socket.socketpair()
    framing = LengthPrefixed(2**20)
    procedures = Procedures()
    ended: list[str] = []

    @procedures.procedure
    async def work(name: str, seconds: float) -> None:
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            ended.append(f"{name} cancelled")
            raise
        ended.append(name)

    def say(*message: object) -> None:
        caller.send(framing.encode(wire.encode(message)))

    with caller:
        async with trio.open_nursery() as nursery:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            nursery.start_soon(serve_remote_stream, procedures, stream)
            say(0, wire.VERSION, None, 2**20)
            await settled()
            caller.recv(1000)
            say(1, 1, "work", None, ["call", math.inf])
            say(2, 2, "work", None, ["post", 10.0])
            await settled()
            caller.shutdown(socket.SHUT_RD)
            say(1, 3, "work", None, ["quick", 0.0])
            await settled()
            say(1, 4, "work", None, ["late call", 0.0])
            say(2, 5, "work", None, ["late post", 20.0])
            await settled()
            assert ended == ["quick", "call cancelled"]
            start = trio.current_time()
        assert trio.current_time() - start == 20
    assert ended == ["quick", "call cancelled", "post", "late post"]
    assert procedures.statistics().connections == 0
