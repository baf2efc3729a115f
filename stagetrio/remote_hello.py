"""The first words on a remote connection: who may call, and what both sides can take.

The caller says `Hello` and waits; the worker says `Welcome`, or `Bye` with a reason. Until then the worker takes no
frame longer than ``HELLO_BYTES`` and nothing after it, compares the token in constant time before it looks at anything
else, and gives up after ``HELLO_SECONDS``; so a stranger costs it a task and four kilobytes for ten seconds.

The token crosses as it is: over a network it needs TLS to stay a secret.
"""

from __future__ import annotations

import contextlib
import hmac

import trio

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed, ProtocolError
from stagetrio.remote_wire import WorkerLost

HELLO_SECONDS = 10.0
GOODBYE_SECONDS = 1.0  # for the last words of a connection
MAX_TOKEN_BYTES = wire.HELLO_BYTES - 64  # what else is in a hello takes less
_hellos = LengthPrefixed(wire.HELLO_BYTES)


class Unwelcome(Exception):
    """Somebody connected who may not call, or makes no sense; the message is meant for them."""


def check_token(token: object) -> None:
    """Refuse what cannot be a token, without telling what it is.

    Raises:
        TypeError: It is neither a str nor None.
        ValueError: It is empty, which everybody knows, or longer than a caller could say.
    """
    if token is None:
        return
    if not isinstance(token, str):
        raise TypeError(f"token must be a str or None, not {type(token).__name__}")
    if not 0 < len(_bytes_of(token)) <= MAX_TOKEN_BYTES:
        raise ValueError(
            f"token must have 1 to {MAX_TOKEN_BYTES} bytes, not {len(_bytes_of(token))}; None asks for none"
        )


async def receive_hello(stream: trio.abc.Stream, token: str | None) -> wire.Hello:
    """Let a caller introduce itself.

    Args:
        stream: Fresh from being accepted.
        token: What it has to know; None: nothing.

    Raises:
        Unwelcome: It has the wrong token, speaks another version, or makes no sense.
        trio.BrokenResourceError: It has left, or does not speak TLS as it should.

    Checkpoints: yes; gives up after ``HELLO_SECONDS``.
    """
    with trio.move_on_after(HELLO_SECONDS):
        try:
            hello = wire.read_from_caller(await _one_frame(stream))
        except (ProtocolError, UnicodeDecodeError) as error:
            raise Unwelcome(str(error)) from None
        if not isinstance(hello, wire.Hello):
            raise Unwelcome("hello comes first")
        if token is not None and not hmac.compare_digest(_bytes_of(hello.token or ""), _bytes_of(token)):
            raise Unwelcome("wrong token")
        if hello.version != wire.VERSION:
            raise Unwelcome(f"version {wire.VERSION} is spoken here, not {hello.version}")
        return hello
    raise Unwelcome(f"no hello within {HELLO_SECONDS:g} s")


def _bytes_of(token: str) -> bytes:
    return token.encode(errors="surrogatepass")


async def say_welcome(stream: trio.abc.Stream, max_in_flight: int, max_frame_bytes: int) -> None:
    """Let the caller begin.

    Raises:
        trio.BrokenResourceError: It has left.

    Checkpoints: yes.
    """
    await stream.send_all(_hellos.encode(wire.encode((0, wire.VERSION, max_in_flight, max_frame_bytes))))


async def say_bye(stream: trio.abc.Stream, reason: str) -> None:
    """Tell a caller why it is not welcome, if it listens.

    Checkpoints: yes; gives up after ``GOODBYE_SECONDS``.
    """
    with trio.move_on_after(GOODBYE_SECONDS):
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(_hellos.encode(wire.encode((5, reason[:500]))))
        await see_off(stream)


async def see_off(stream: trio.abc.Stream) -> None:
    """Read until the other side leaves, after the last word has been said to it.

    A socket that is closed with input unread resets the connection, and that would overtake the last word.

    Checkpoints: yes; gives up after ``GOODBYE_SECONDS``.
    """
    with trio.move_on_after(GOODBYE_SECONDS):
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await stream.receive_some(65536):
                pass


async def introduce(stream: trio.abc.Stream, token: str | None, max_frame_bytes: int) -> wire.Welcome:
    """Introduce this side to a worker.

    Raises:
        WorkerLost: It is not there, does not answer, or does not want this caller; with its reason.

    Checkpoints: yes; gives up after ``HELLO_SECONDS``.
    """
    reason = f"no answer within {HELLO_SECONDS:g} s"
    with trio.move_on_after(HELLO_SECONDS):
        try:
            await stream.send_all(_hellos.encode(wire.encode((0, wire.VERSION, token, max_frame_bytes))))
            answer = wire.read_from_worker(await _one_frame(stream))
        except ProtocolError as error:
            reason = error.reason
        except trio.BrokenResourceError as error:
            reason = f"the connection broke: {error.__cause__ or error}"  # TLS gives its reasons as the cause
        else:
            if isinstance(answer, wire.Welcome):
                return answer
            reason = answer.reason if isinstance(answer, wire.Bye) else "the other side did not say welcome"
    raise WorkerLost(reason, may_have_run=False)


async def _one_frame(stream: trio.abc.Stream) -> bytes:
    decoder = _hellos.decoder()
    while True:
        data = await stream.receive_some(65536)  # or what is left unread would take our answer with it
        if not data:
            decoder.receive_eof()
            raise ProtocolError("the other side closed the connection")
        frames = decoder.receive_data(bytes(data))
        if frames:
            if len(frames) > 1 or decoder.buffered:
                raise ProtocolError("something came before it was time")
            return frames[0]
