"""Call procedures that run elsewhere: in a sibling process, on another machine, or at the end of any Trio stream.

Synopsis::

    procedures = Procedures()

    @procedures.procedure
    async def judge(game: Game) -> Verdict: ...

    # the side that runs it
    await nursery.start(serve_remote, procedures, await open_listeners("unix:///run/judge.sock"))

    # the side that calls it
    async with open_remote("unix:///run/judge.sock") as remote:
        verdict = await remote.call(judge, game)

    # or both in one program, in worker processes of its own
    async with open_remote_workers(procedures, 4) as workers:
        verdict = await workers.call(judge, game)

What it does and does not promise (`docs/remote.rst` tells the whole way of a call):

- Names and data cross, never code. Calls are multiplexed on one connection.
- The deadline of the caller crosses as the seconds that remain, and its cancellation as a message.
- A call runs at most once. When the connection is lost, whoever waits gets `WorkerLost`, whose ``may_have_run`` says
  what is known. Only a call `Remote.with_options` ``(idempotent=True)`` is tried again, once, on a new connection.
- Everything is bounded: frames, requests in hand, what is collected for output, the values of a stream.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio

from stagetrio.amounts import check_amount
from stagetrio.backstage import open_backstage
from stagetrio.procedures import Procedures, ProceduresStatistics
from stagetrio.remote_hello import Unwelcome, check_token, receive_hello, say_bye, say_welcome
from stagetrio.remote_link import Link, Remote, RemoteStatistics, RemoteStream
from stagetrio.remote_serving import ServedConnection
from stagetrio.remote_wire import RemoteError, WorkerLost, check_bounds
from stagetrio.remote_workers import RemoteWorkers, RemoteWorkersStatistics, open_remote_workers
from stagetrio.sockets import connect_stream, parse_address

__all__ = [
    "Procedures",
    "ProceduresStatistics",
    "serve_remote",
    "serve_remote_stream",
    "open_remote",
    "open_remote_stream",
    "open_remote_workers",
    "Remote",
    "RemoteStatistics",
    "RemoteStream",
    "RemoteWorkers",
    "RemoteWorkersStatistics",
    "RemoteError",
    "WorkerLost",
]


def _check_serving_bounds(
    max_in_flight: int, max_running: float, max_frame_bytes: int, max_buffered_bytes: int
) -> None:
    check_bounds(max_in_flight=max_in_flight, max_frame_bytes=max_frame_bytes, max_buffered_bytes=max_buffered_bytes)
    check_amount("max_running", max_running, 1)


def _check_procedures(procedures: Procedures) -> None:
    if not isinstance(procedures, Procedures):
        raise TypeError(f"procedures must be Procedures, not {procedures!r}")


def _check_stream(stream: trio.abc.Stream) -> None:
    if not isinstance(stream, trio.abc.Stream):
        raise TypeError(f"stream must be a trio.abc.Stream, not {stream!r}")


async def serve_remote_stream(
    procedures: Procedures,
    stream: trio.abc.Stream,
    *,
    token: str | None = None,
    max_in_flight: int = 1000,
    max_running: float = 10_000,
    max_frame_bytes: int = 2**20,
    max_buffered_bytes: int = 2**20,
) -> None:
    """Run procedures for whoever is at the other end of a stream, until they leave.

    The other side's mistakes end its connection with a reason, are counted in ``procedures.statistics()`` and logged
    once per cause, and are not raised here. When it leaves, its calls and streams are cancelled, and what it posted is
    finished.

    Args:
        procedures: What may be called.
        stream: The connection; closed at the end.
        token: What the other side has to know, up to 4,000 bytes; None: nothing.
        max_in_flight: Requests in hand at a time which did not end in their first step; more are refused.
        max_running: The same bound for all connections of these procedures together.
        max_frame_bytes: The longest request; ≥ 1024.
        max_buffered_bytes: Answers collected for a caller that does not read; beyond it, no request of it is looked at.

    Raises:
        ValueError, TypeError: A bound or the token makes no sense.

    Checkpoints: yes; a cancellation cancels what is in hand.
    """
    _check_procedures(procedures)
    _check_stream(stream)
    check_token(token)
    _check_serving_bounds(max_in_flight, max_running, max_frame_bytes, max_buffered_bytes)
    procedures.tally.connections += 1
    try:
        hello = await receive_hello(stream, token)
        await say_welcome(stream, max_in_flight, max_frame_bytes)
        await ServedConnection(
            procedures,
            stream,
            hello,
            max_in_flight=max_in_flight,
            max_running=max_running,
            max_frame_bytes=max_frame_bytes,
            max_buffered_bytes=max_buffered_bytes,
        ).run()
    except Unwelcome as unwelcome:
        procedures.tally.broken += 1
        procedures.mistakes.record(unwelcome)
        await say_bye(stream, str(unwelcome))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        procedures.tally.broken += 1  # it left before it could be welcomed
    finally:
        procedures.tally.connections -= 1
        await trio.aclose_forcefully(stream)


async def serve_remote(
    procedures: Procedures,
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
    *,
    token: str | None = None,
    ssl_context: ssl.SSLContext | None = None,
    max_connections: int = 1000,
    max_in_flight: int = 1000,
    max_running: float = 10_000,
    max_frame_bytes: int = 2**20,
    max_buffered_bytes: int = 2**20,
    task_status: trio.TaskStatus[list[trio.abc.Listener[trio.abc.Stream]]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run procedures for everybody who connects to these listeners; until cancelled.

    Args:
        procedures: What may be called; `Procedures.statistics` tells what has been.
        listeners: Such as `stagetrio.sockets.open_listeners` returns; closed at the end.
        token: What callers have to know. Without one, whoever can connect can call: keep that to a Unix socket
            in a directory of your own.
        ssl_context: Serve TLS with it.
        max_connections: Callers connected at a time; more are told so and sent away.
        max_in_flight: As for `serve_remote_stream`, as are the others.
        task_status: Reports the listeners as soon as they are being served.

    Raises:
        ValueError, TypeError: A bound or the token makes no sense.

    Checkpoints: yes.
    """
    _check_procedures(procedures)
    check_bounds(max_connections=max_connections)
    check_token(token)
    _check_serving_bounds(max_in_flight, max_running, max_frame_bytes, max_buffered_bytes)
    listeners = list(listeners)
    if not listeners:
        raise ValueError("listeners must name at least one place to listen, not []")
    for listener in listeners:
        if not isinstance(listener, trio.abc.Listener):
            raise TypeError(f"listeners must hold listeners, such as open_listeners() returns, not {listener!r}")
    connected = 0

    async def serve_one(stream: trio.abc.Stream) -> None:
        nonlocal connected
        if ssl_context is not None:
            stream = trio.SSLStream(stream, ssl_context, server_side=True)
        connected += 1
        try:
            if connected > max_connections:
                procedures.tally.refused += 1
                if connected <= 2 * max_connections:  # a herd is not seen off one by one
                    await say_bye(stream, f"{max_connections} callers are connected already")
                await trio.aclose_forcefully(stream)
                return
            await serve_remote_stream(
                procedures,
                stream,
                token=token,
                max_in_flight=max_in_flight,
                max_running=max_running,
                max_frame_bytes=max_frame_bytes,
                max_buffered_bytes=max_buffered_bytes,
            )
        finally:
            connected -= 1

    await trio.serve_listeners(serve_one, listeners, task_status=task_status)


@asynccontextmanager
async def _open(
    open_stream: Callable[[], Awaitable[trio.abc.Stream]],
    token: str | None,
    max_frame_bytes: int,
    max_buffered_bytes: int,
    *,
    reopens: bool,
) -> AsyncIterator[Remote]:
    check_token(token)
    check_bounds(max_frame_bytes=max_frame_bytes, max_buffered_bytes=max_buffered_bytes)
    async with open_backstage() as nursery:
        link = Link(nursery, open_stream, token, max_frame_bytes, max_buffered_bytes, reopens=reopens)
        await link.open()
        try:
            yield Remote(link)
            await link.connection.say_the_rest()
        finally:
            link.close()


def open_remote_stream(
    stream: trio.abc.Stream,
    *,
    token: str | None = None,
    max_frame_bytes: int = 2**20,
    max_buffered_bytes: int = 2**20,
) -> AbstractAsyncContextManager[Remote]:
    """Call what runs at the other end of a stream: ``async with open_remote_stream(stream) as remote: …``.

    When the connection ends, calls in flight raise `WorkerLost`, and so does every later one.

    Args:
        stream: The connection; closed at the end.
        token: What the other side wants to hear.
        max_frame_bytes: The longest answer; ≥ 1024.
        max_buffered_bytes: Requests collected for a worker that does not fetch them; callers wait beyond it.

    Raises:
        WorkerLost: The other side does not want this caller, or does not answer.
        ValueError, TypeError: A bound or the token makes no sense.

    Checkpoints: on entry and on exit. Whoever still calls when the block is left gets ``trio.ClosedResourceError``.
    """

    _check_stream(stream)

    async def the_stream() -> trio.abc.Stream:
        return stream

    return _open(the_stream, token, max_frame_bytes, max_buffered_bytes, reopens=False)


def open_remote(
    address: str,
    *,
    token: str | None = None,
    ssl_context: ssl.SSLContext | None = None,
    max_frame_bytes: int = 2**20,
    max_buffered_bytes: int = 2**20,
) -> AbstractAsyncContextManager[Remote]:
    """Call what runs at an address: ``async with open_remote("unix:///run/judge.sock") as remote: …``.

    When the connection is lost, calls in flight raise `WorkerLost`. The next call connects again, once: if that fails,
    it raises `WorkerLost` with ``may_have_run=False``.

    Args:
        address: ``tcp://host:port`` or ``unix:///path``.
        token: What the other side wants to hear.
        ssl_context: Speak TLS with it; ``ssl.create_default_context()`` checks the host's name.
        max_frame_bytes: As for `open_remote_stream`, as is the other.

    Raises:
        OSError: Nobody is there.
        WorkerLost: Whoever is there does not want this caller, or does not answer.
        ValueError, TypeError: The address, a bound or the token makes no sense.

    Checkpoints: on entry and on exit. Whoever still calls when the block is left gets ``trio.ClosedResourceError``.
    """
    target = parse_address(address)

    return _open(partial(connect_stream, target, ssl_context), token, max_frame_bytes, max_buffered_bytes, reopens=True)
