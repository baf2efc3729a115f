"""Whatever bytes come, from a caller or from a worker, that connection ends with a reason and nothing else suffers."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from remote_pairs import serving, socket_pair

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed, ProtocolError
from stagetrio.limiter import Overloaded
from stagetrio.remote import Procedures, RemoteError, WorkerLost, open_remote_stream, serve_remote_stream

FRAMING = LengthPrefixed(2**20)
HELLO = (0, wire.VERSION, None, 2**20)
WELCOME = (0, wire.VERSION, 10, 2**20)


def frame(*message: object) -> bytes:
    return FRAMING.encode(wire.encode(message))


def echoing() -> Procedures:
    procedures = Procedures()

    @procedures.procedure
    async def echo(x: int) -> int:
        return x

    @procedures.procedure
    async def nap(x: int) -> int:
        await trio.lowlevel.checkpoint()
        return x

    @procedures.procedure
    async def count(n: int) -> AsyncIterator[int]:
        for x in range(n):
            yield x

    return procedures


async def conversation(procedures: Procedures, data: bytes, hello: bytes = b"") -> list[list[object]]:
    """Say ``hello``, if anything, and wait for the answer; send ``data``; return what a worker said until it left."""
    ours, theirs = socket_pair()
    assert isinstance(theirs, trio.SocketStream)
    heard = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, procedures, ours)
        async with theirs:
            if hello:
                await theirs.send_all(hello)
                heard += await theirs.receive_some()
            await theirs.send_all(data)
            await theirs.send_eof()
            async for part in theirs:
                heard += part
    return [msgspec.msgpack.decode(payload) for payload in FRAMING.decoder().receive_data(heard)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "frame of 1195725856 bytes exceeds the limit of 4096 bytes"),
        (frame("hello"), "not a request"),
        (FRAMING.encode(b"\xc1"), "not a request"),
        (FRAMING.encode(b"\x94\x00\x01\xa1\xff\xcd\x10\x00"), "not a request"),
        (frame(1, 1, "echo", None, [1]), "hello comes first"),
        (frame(0, 99, None, 2**20), "version 1 is spoken here, not 99"),
        (frame(0, wire.VERSION, None, 10), "not a request: .*1024"),
        (frame(*HELLO) + frame(1, 1, "echo", None, [1]), "something came before it was time"),
        (frame(*HELLO) + b"\0", "something came before it was time"),
        (frame(*HELLO)[:-1], "connection closed in mid-frame"),
        (b"", "the other side closed the connection"),
        (frame(0, wire.VERSION, "x" * 5000, 2**20), "exceeds the limit of 4096 bytes"),
    ],
)
async def test_a_wrong_hello_is_answered_with_the_reason(data: bytes, reason: str) -> None:
    """Nothing of it is run, and it is counted."""
    procedures = echoing()
    [bye] = await conversation(procedures, data)
    assert bye[0] == 5
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(bye[1])
    assert procedures.statistics().broken == 1
    assert procedures.statistics().returned == 0


async def after_hello(procedures: Procedures, data: bytes) -> list[list[object]]:
    """Like `conversation`, but begun in good order; what the welcome says is left out."""
    return (await conversation(procedures, data, frame(*HELLO)))[1:]


GOOD = frame(1, 1, "echo", None, [7])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xff\xff\xff", "frame of 4294967295 bytes exceeds the limit of 1048576 bytes"),
        (FRAMING.encode(b""), "not a request"),
        (FRAMING.encode(b"\xc1\xc1"), "not a request"),
        (FRAMING.encode(b"\x91" * 100_000), "not a request"),
        (FRAMING.encode(b"\x95\x01\x02\xa4echo\xc0" + b"\x91" * 100_000), "not a request"),
        (frame(9, 2), "not a request"),
        (frame(1, 2), "not a request"),
        (frame(1, "two", "echo", None, [1]), "not a request"),
        (frame(1, 0, "echo", None, [1]), "not a request"),
        (frame(1, 2, "echo", -1.0, [1]), "not a request"),
        (frame(1, 2, "echo", float("nan"), [1]), "not a request"),
        (frame(3, 2, "count", None, 0, [1]), "not a request"),
        (frame(4, 2, 0), "not a request"),
        (frame(1, 1, "echo", None, [1]), "id 1 does not rise above 1"),
        (frame(*HELLO), "hello was said before"),
        (frame(1, 2, "echo", None, ["x" * 100])[:-50], "connection closed in mid-frame"),
    ],
)
async def test_a_broken_request_ends_the_connection_with_the_reason(data: bytes, reason: str) -> None:
    """Requests before it are answered, those after it are not looked at, others are not touched."""
    procedures = echoing()
    ours, theirs = socket_pair()
    async with serving(procedures, (ours, theirs)) as bystander:
        after = b"" if "mid-frame" in reason else frame(1, 100, "echo", None, [9])
        answers = await after_hello(procedures, GOOD + data + after)
        assert answers[0] == [1, 1, 7]
        [bye] = answers[1:]
        assert bye[0] == 5
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(bye[1])
        assert await bystander.call("echo", 3) == 3
    assert procedures.statistics().broken == 1
    assert list(procedures.statistics().mistakes.values()) == [1]
    assert procedures.statistics().returned == 2


async def test_the_reason_arrives_although_more_was_sent() -> None:
    """A caller in the middle of a megabyte still learns what was wrong with the first of it."""
    procedures = echoing()
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_remote_stream(procedures, await listener.accept())

        for hello in (b"", frame(*HELLO)):
            nursery.start_soon(serve)
            async with await trio.testing.open_stream_to_socket_listener(listener) as stream:
                await stream.send_all(hello)
                heard = bytes(await stream.receive_some()) if hello else b""
                await stream.send_all(frame(9, 9) + b"x" * 2**20)
                while len(decoded := FRAMING.decoder().receive_data(heard)) < 1 + bool(hello):
                    heard += await stream.receive_some()
                assert msgspec.msgpack.decode(decoded[-1])[0] == 5
        await listener.aclose()


@pytest.mark.parametrize("arguments", [5, {"x": 1}, None, "abc", [], [[1]], [2**64 - 1, 1], [1.5]])
async def test_arguments_of_any_shape_fail_only_their_call(arguments: object) -> None:
    """Well-formed requests with nonsense in them are answered, and the connection goes on."""
    procedures = echoing()
    answers = await after_hello(procedures, frame(1, 1, "echo", None, arguments) + frame(1, 2, "echo", None, [7]))
    assert answers[0][:3] == [3, 1, "TypeError"]
    assert answers[1] == [1, 2, 7]
    assert procedures.statistics().rejected == 1
    assert procedures.statistics().broken == 0


async def test_cancels_and_credits_for_nothing_are_ignored() -> None:
    """They may cross with the answer, so an id that is not in hand is no mistake."""
    procedures = echoing()
    data = frame(5, 77) + frame(4, 78, 5) + frame(1, 1, "nap", None, [1]) + frame(4, 1, 5) + frame(5, 1) + frame(5, 1)
    [answer] = await after_hello(procedures, data + frame(4, 1, 2**31 - 1))
    assert answer[:3] in ([3, 1, "Cancelled"], [1, 1, 1])
    assert procedures.statistics().broken == 0


async def test_a_request_may_come_in_single_bytes() -> None:
    """How the bytes were cut into segments makes no difference."""
    procedures = echoing()
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_remote_stream, procedures, ours)
        decoder = FRAMING.decoder()
        frames: list[bytes] = []
        for data in (frame(*HELLO), GOOD, frame(1, 2, "nap", 5.0, [8])):
            for byte in data:
                await theirs.send_all(bytes([byte]))
            frames += decoder.receive_data(bytes(await theirs.receive_some()))
        await theirs.aclose()
    assert [msgspec.msgpack.decode(payload) for payload in frames] == [[0, 1, 1000, 2**20], [1, 1, 7], [1, 2, 8]]


def wire_or_empty(message: object) -> bytes:
    try:
        return FRAMING.encode(wire.encode(message))
    except (OverflowError, UnicodeEncodeError):
        return b""


requests = st.one_of(
    st.binary(max_size=30).map(FRAMING.encode),
    st.tuples(
        st.sampled_from([1, 2]),
        st.integers(-1, 30),
        st.sampled_from(["echo", "nap", "count", "nothing"]),
        st.none() | st.floats(),
        st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=2) | st.integers(0, 3),
    ).map(wire_or_empty),
    st.tuples(
        st.just(3), st.integers(0, 30), st.just("count"), st.none(), st.integers(0, 5), st.tuples(st.integers(0, 20))
    ).map(wire_or_empty),
    st.tuples(st.sampled_from([4, 5]), st.integers(0, 30), st.integers(0, 30)).map(wire_or_empty),
    st.recursive(st.integers(0, 9) | st.none() | st.text(max_size=3), st.lists, max_leaves=8).map(wire_or_empty),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(requests, max_size=8).map(b"".join), st.integers(0, 200), st.integers(0, 255))
async def test_no_bytes_harm_a_worker(data: bytes, place: int, byte: int) -> None:
    """Random requests, one byte of them changed: the worker answers or ends that connection, and goes on for others."""
    if place < len(data):
        data = data[:place] + bytes([byte]) + data[place + 1 :]
    procedures = echoing()
    async with serving(procedures, trio.testing.memory_stream_pair()) as bystander:
        answers = await after_hello(procedures, data)
        assert await bystander.call("echo", 5) == 5
    assert all(answer[0] in (1, 2, 3, 4, 5) for answer in answers)
    statistics = procedures.statistics()
    assert statistics.running == statistics.connections == 0
    ids = [answer[1] for answer in answers if answer[0] in (1, 3, 4)]
    assert len(ids) == len(set(ids)), "a request was answered twice"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xff\xff\xff", "broke the rules: frame of 4294967295 bytes"),
        (FRAMING.encode(b"\xc1"), "broke the rules: not a reply"),
        (frame(9, 1), "broke the rules: not a reply"),
        (frame(*WELCOME), "broke the rules: welcome was said before"),
        (frame(1, 2, 5), "broke the rules: an answer to id 2, which is not outstanding"),
        (frame(3, 2, "a", "b", "c"), "broke the rules: an answer to id 2, which is not outstanding"),
        (frame(2, 1, 5), "broke the rules: a value for id 1, which is not a stream"),
        (frame(2, 2, 5), "broke the rules: a value for id 2, which is not a stream"),
        (frame(4, 1, "queue", -1.0), "broke the rules: not a reply"),
        (frame(5, "no more"), "ended the connection: no more"),
        (b"", "the other side closed the connection"),
        (frame(1, 1, 5)[:-1], "the other side closed the connection"),
    ],
)
async def test_a_worker_that_makes_no_sense_is_lost(data: bytes, reason: str) -> None:
    """The calls in flight learn why, and nothing else is raised on the calling side."""
    ours, theirs = socket_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker_that_says, ours, data)
        async with open_remote_stream(theirs) as remote:
            with pytest.raises(WorkerLost, match=reason) as caught:
                await remote.call("anything")
            assert caught.value.may_have_run
            with pytest.raises(WorkerLost, match=reason) as caught:
                await remote.call("anything")
            assert not caught.value.may_have_run


async def worker_that_says(stream: trio.abc.Stream, data: bytes) -> None:
    """Welcome a caller, wait for its first request, say ``data``, and leave."""
    async with stream:
        await stream.receive_some()
        await stream.send_all(frame(*WELCOME))
        await stream.receive_some()
        await stream.send_all(data)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.binary(max_size=20).map(FRAMING.encode),
            st.tuples(
                st.integers(0, 6), st.integers(0, 3), st.integers(0, 9), st.text(max_size=2), st.text(max_size=2)
            ).map(wire_or_empty),
            st.tuples(st.integers(0, 6), st.integers(0, 3), st.text(max_size=2), st.floats()).map(wire_or_empty),
        ),
        max_size=6,
    ).map(b"".join)
)
async def test_no_bytes_harm_a_caller(data: bytes) -> None:
    """A call over a worker gone mad returns, or raises what `call` says it raises."""
    ours, theirs = socket_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker_that_says, ours, data)
        async with open_remote_stream(theirs) as remote:
            with contextlib.suppress(WorkerLost, RemoteError, Overloaded):
                await remote.call("anything")


async def test_a_result_of_another_type_is_the_callers_protocol_error() -> None:
    """The two sides disagree about a procedure: only that call fails, and it says what came."""
    procedures = Procedures()

    @procedures.procedure(name="size")
    async def over_there() -> str:
        return "large"

    async def size() -> int:
        raise AssertionError("the stub itself never runs")

    async with serving(procedures, trio.testing.memory_stream_pair()) as remote:
        with pytest.raises(ProtocolError, match=r"size\(\) gave something of another type: Expected `int`, got `str`"):
            await remote.call(size)
        assert await remote.call(over_there) == "large"


async def test_a_silent_stranger_is_sent_away(autojump_clock: trio.testing.MockClock) -> None:
    """Who connects and says nothing, or says it a byte at a time, has ten seconds."""
    procedures = echoing()
    for data in (b"", frame(*HELLO)):
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_remote_stream, procedures, ours)
            start = trio.current_time()

            async def trickle(stream: trio.abc.Stream = theirs, data: bytes = data) -> None:
                for byte in data:
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(2)

            nursery.start_soon(trickle)
            [payload] = FRAMING.decoder().receive_data(bytes(await theirs.receive_some()))
            assert msgspec.msgpack.decode(payload) == [5, "no hello within 10 s"]
            assert trio.current_time() - start == 10
            nursery.cancel_scope.cancel()
    assert procedures.statistics().connections == 0


async def test_a_worker_that_never_answers_the_hello_is_lost(autojump_clock: trio.testing.MockClock) -> None:
    """Who answers the connection but not the hello is given up on."""
    _ours, theirs = trio.testing.memory_stream_pair()
    with pytest.raises(WorkerLost, match="no answer within 10 s"):
        async with open_remote_stream(theirs):
            raise AssertionError("it was let in")


@pytest.mark.parametrize("may_have_run", [True, False])
def test_a_loss_can_be_sent_on(may_have_run: bool) -> None:
    """Pickled, as what a job in a process raises is, it says the same."""
    lost = WorkerLost("it is gone", may_have_run=may_have_run)
    lost.add_note("noted")
    copy = pickle.loads(pickle.dumps(lost))
    assert isinstance(copy, WorkerLost)
    assert (str(copy), copy.reason, copy.may_have_run, copy.__notes__) == (
        "it is gone",
        "it is gone",
        may_have_run,
        ["noted"],
    )
