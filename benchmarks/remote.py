"""Remote calls over a Unix socket to a process of its own, beside what one would write in plain Trio.

The plain side is multiplexed too: one task per request at the server, an event per call at the client, a lock around
``send_all``, the same frames, and msgspec for the same attrs classes. ``python -m benchmarks.remote KIND PATH`` is the
server.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from struct import Struct
from typing import Any

import attrs
import msgspec
import trio

from benchmarks.case import Case
from stagetrio.remote import Procedures, open_remote, serve_remote
from stagetrio.sockets import open_listeners


@attrs.frozen
class Question:
    number: int
    name: str
    values: list[float]


@attrs.frozen
class Answer:
    number: int
    name: str
    total: float


QUESTION = Question(7, "seven", [1.0, 2.0, 3.0])
procedures = Procedures()


@procedures.procedure
async def judge(question: Question) -> Answer:
    """Answer at once, as most procedures do."""
    return Answer(question.number, question.name, sum(question.values))


@procedures.procedure
async def ponder(question: Question) -> Answer:
    """Answer after a scheduler pass."""
    await trio.lowlevel.checkpoint()
    return Answer(question.number, question.name, sum(question.values))


_PREFIX = Struct(">I")
_encode = msgspec.msgpack.Encoder().encode
_read_question = msgspec.msgpack.Decoder(tuple[int, str, Question]).decode
_read_answer = msgspec.msgpack.Decoder(tuple[int, Answer]).decode


async def _frames(stream: trio.SocketStream) -> AsyncIterator[bytes]:
    buffer = bytearray()
    async for data in stream:
        buffer += data
        while len(buffer) >= 4:
            end = 4 + _PREFIX.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            yield bytes(buffer[4:end])
            del buffer[:end]


class _PlainSender:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream, self._lock = stream, trio.Lock()

    async def send(self, message: object) -> None:
        payload = _encode(message)
        async with self._lock:
            await self._stream.send_all(_PREFIX.pack(len(payload)) + payload)


async def _serve_plain(stream: trio.SocketStream) -> None:
    sender, functions = _PlainSender(stream), {"judge": judge, "ponder": ponder}

    async def answer(id: int, name: str, question: Question) -> None:
        await sender.send((id, await functions[name](question)))

    async with trio.open_nursery() as nursery:
        async for frame in _frames(stream):
            nursery.start_soon(answer, *_read_question(frame))


class _PlainCaller:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream, self._sender = stream, _PlainSender(stream)
        self._ids, self._events, self._answers = itertools.count(), dict[int, trio.Event](), dict[int, Answer]()

    async def read(self) -> None:
        async for frame in _frames(self._stream):
            id, answer = _read_answer(frame)
            self._answers[id] = answer
            self._events.pop(id).set()

    async def call(self, name: str, question: Question) -> Answer:
        id, event = next(self._ids), trio.Event()
        self._events[id] = event
        await self._sender.send((id, name, question))
        await event.wait()
        return self._answers.pop(id)


async def _serve(kind: str, path: str) -> None:
    listeners = await open_listeners(f"unix://{path}")
    print("ready", flush=True)
    if kind == "ours":
        await serve_remote(procedures, listeners)
    else:
        await trio.serve_listeners(_serve_plain, listeners)


@contextlib.contextmanager
def _server(kind: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/s"
        command = [sys.executable, "-m", "benchmarks.remote", kind, path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                yield path
            finally:
                process.kill()


async def _timed(call: Callable[[], Awaitable[Any]], callers: int, calls: int) -> float:
    async def caller(count: int) -> None:
        for _ in range(count):
            await call()

    async with trio.open_nursery() as nursery:  # warm up
        for _ in range(callers):
            nursery.start_soon(caller, 10)
    start = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(caller, calls // callers)
    return (time.perf_counter() - start) / calls


def _ours(procedure: Callable[[Question], Awaitable[Answer]], callers: int, calls: int) -> float:
    async def run(path: str) -> float:
        async with open_remote(f"unix://{path}") as remote:
            return await _timed(lambda: remote.call(procedure, QUESTION), callers, calls)

    with _server("ours") as path:
        return trio.run(run, path)


def _plain(name: str, callers: int, calls: int) -> float:
    async def run(path: str) -> float:
        async with await trio.open_unix_socket(path) as stream, trio.open_nursery() as nursery:
            caller = _PlainCaller(stream)
            nursery.start_soon(caller.read)
            seconds = await _timed(lambda: caller.call(name, QUESTION), callers, calls)
            nursery.cancel_scope.cancel()
        return seconds

    with _server("plain") as path:
        return trio.run(run, path)


def _case(name: str, procedure: Callable[[Question], Awaitable[Answer]], callers: int, calls: int, note: str) -> Case:
    return Case(
        name,
        lambda: _ours(procedure, callers, calls),
        lambda: _plain(procedure.__name__, callers, calls),
        note=note,
    )


CASES = [
    _case("remote call 1 x 64", judge, 64, 32_000, "one connection, 64 callers, attrs both ways"),
    _case("remote call 1 x 1", judge, 1, 4000, "one connection, one caller: two processes take turns"),
    _case("remote call that blocks 1 x 64", ponder, 64, 16_000, "the procedure passes the scheduler once"),
]


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(_serve, sys.argv[1], sys.argv[2])
