"""What two sides of a remote connection say to each other.

A connection is a byte stream of `LengthPrefixed` frames. A frame is one MessagePack array whose first element is the
kind; times are in seconds, sizes in bytes, ``id`` is chosen by the calling side, rises, and is never used twice.

================= ==== ============================================ =================================================
caller says       kind then                                         meaning
================= ==== ============================================ =================================================
`Hello`           0    version, token or nil, max_frame_bytes       first, and alone until it is answered
`Call`            1    id, name, remaining or nil, args[, kwargs]   run this procedure, give me what it returns
`Post`            2    id, name, remaining or nil, args[, kwargs]   run it; the answer only frees its place
`Open`            3    id, name, remaining or nil, credit,          run it, and give me what it yields, at most
                       args[, kwargs]                               ``credit`` values for now
`Credit`          4    id, values                                   that many more values may come
`Cancel`          5    id                                           nobody waits for it any longer
================= ==== ============================================ =================================================

================= ==== ============================================ =================================================
worker says       kind then                                         meaning
================= ==== ============================================ =================================================
`Welcome`         0    version, max_in_flight, max_frame_bytes      go ahead; so many at a time
`Result`          1    id, value                                    it returned (or stopped yielding: nil)
`Item`            2    id, value                                    it yielded
`Raised`          3    id, type name, message, traceback            it raised, was cancelled, or never began
`Refusal`         4    id, reason, retry_after                      it met a bound and did not run
`Bye`             5    reason                                       this connection is over
================= ==== ============================================ =================================================

Every `Call`, `Post` and `Open` gets exactly one `Result`, `Raised` or `Refusal`, also when it was cancelled: only that
frees its place among ``max_in_flight``, so neither side can lose count. An array may grow at its end in later versions;
what is not known there is ignored.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, TypeAlias

import msgspec
import trio
from msgspec import Meta, Raw, Struct

from stagetrio.framing import ProtocolError

VERSION = 1
MIN_FRAME_BYTES = 1024  # what every side has to take, so that a reason always fits
HELLO_BYTES = 4096  # the longest frame taken from somebody who has not shown the token yet


class RemoteError(Exception):
    """A procedure raised, or could not begin, on the side that runs it.

    Args:
        type_name: The name of what was raised there, with its module where it is not a builtin.
        message: Its ``str``.
        remote_traceback: Where it came from, as text; cut to its last lines, and empty where the procedure never began.
    """

    def __init__(self, type_name: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(type_name, message, remote_traceback)
        self.type_name, self.message, self.remote_traceback = type_name, message, remote_traceback
        if remote_traceback:
            self.add_note(f"Over there:\n{remote_traceback}")

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}" if self.message else self.type_name


class WorkerLost(trio.BrokenResourceError):
    """The side that runs the procedures is gone.

    Args:
        reason: What is known about it.
        may_have_run: Whether the call had been handed to the connection, so that its procedure may have run, in part or
            as a whole; False: it certainly did not.
    """

    def __init__(self, reason: str, *, may_have_run: bool) -> None:
        super().__init__(reason)
        self.reason, self.may_have_run = reason, may_have_run

    def __reduce__(self) -> Any:
        return partial(type(self), may_have_run=self.may_have_run), (self.reason,), self.__dict__


Id: TypeAlias = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0)]
Count: TypeAlias = Annotated[int, Meta(ge=1, lt=2**31)]


Size: TypeAlias = Annotated[int, Meta(ge=MIN_FRAME_BYTES, lt=2**31)]


class Hello(Struct, tag=0, array_like=True):
    version: int
    token: str | None
    max_frame_bytes: Size


class Call(Struct, tag=1, array_like=True):
    id: Id
    name: str
    remaining: Seconds | None
    arguments: Raw
    keywords: dict[str, Raw] = {}


class Post(Struct, tag=2, array_like=True):
    id: Id
    name: str
    remaining: Seconds | None
    arguments: Raw
    keywords: dict[str, Raw] = {}


class Open(Struct, tag=3, array_like=True):
    id: Id
    name: str
    remaining: Seconds | None
    credit: Count
    arguments: Raw
    keywords: dict[str, Raw] = {}


class Credit(Struct, tag=4, array_like=True):
    id: Id
    values: Count


class Cancel(Struct, tag=5, array_like=True):
    id: Id


class Welcome(Struct, tag=0, array_like=True):
    version: int
    max_in_flight: Count
    max_frame_bytes: Size


class Result(Struct, tag=1, array_like=True):
    id: Id
    value: Raw


class Item(Struct, tag=2, array_like=True):
    id: Id
    value: Raw


class Raised(Struct, tag=3, array_like=True):
    id: Id
    type_name: str
    message: str
    traceback: str


class Refusal(Struct, tag=4, array_like=True):
    id: Id
    reason: str
    retry_after: Seconds


class Bye(Struct, tag=5, array_like=True):
    reason: str


Request: TypeAlias = Call | Post | Open
FromCaller: TypeAlias = Hello | Call | Post | Open | Credit | Cancel
FromWorker: TypeAlias = Welcome | Result | Item | Raised | Refusal | Bye

encode = msgspec.msgpack.Encoder().encode
_decode_from_caller = msgspec.msgpack.Decoder(FromCaller).decode
_decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read_from_caller(payload: bytes) -> Any:
    """Return what the calling side said, one of `FromCaller`.

    Raises:
        ProtocolError: It made no sense.
    """
    try:
        return _decode_from_caller(payload)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a request: {error}") from None


def read_from_worker(payload: bytes) -> Any:
    """Return what the working side said, one of `FromWorker`.

    Raises:
        ProtocolError: It made no sense.
    """
    try:
        return _decode_from_worker(payload)
    except _UNREADABLE as error:
        raise ProtocolError(f"not a reply: {error}") from None


def check_bounds(**bounds: float) -> None:
    """Refuse bounds that the wire cannot express.

    Raises:
        ValueError: One of them is out of range; named, with its value.
        TypeError: One of them is not a whole number.
    """
    for name, value in bounds.items():
        least = MIN_FRAME_BYTES if name == "max_frame_bytes" else 1
        if isinstance(value, bool) or not (isinstance(value, int) or value == math.inf):
            raise TypeError(f"{name} must be an int, not {value!r}")
        if not least <= value < 2**31:
            raise ValueError(f"{name} must be at least {least} and below 2**31, not {value!r}")
