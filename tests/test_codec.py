"""Messages cross the wire as what they were, and anything else is a protocol error with a reason."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import typing
import uuid
from typing import Any

import attrs
import msgspec
import pytest
from fuzzed import TRIED
from hypothesis import given
from hypothesis import strategies as st

from stagetrio.codec import Closed, Codec, Done, Failed, Refused, wire_type
from stagetrio.framing import ProtocolError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@attrs.frozen
class Position:
    x: int
    y: int


@attrs.frozen
class Move:
    player: str
    to: Position
    path: list[Position] = attrs.Factory(list)
    colour: Colour = Colour.RED
    at: datetime.datetime | None = None


@attrs.frozen
class Bid:
    amount: int = attrs.field(validator=attrs.validators.gt(0))


@attrs.frozen
class Needy:
    """Everything msgspec would get wrong: a converter, private name, alias, a field outside of ``__init__``."""

    number: int = attrs.field(converter=int)
    _secret: str = "s"
    named: int = attrs.field(default=1, alias="other")
    derived: int = attrs.field(init=False, default=7)


@attrs.frozen
class Holder:
    needy: Needy | None
    rest: list[Position]


CODEC = Codec([Move, Bid, Needy, Holder])
T = typing.TypeVar("T")
Renamed = typing.NewType("Renamed", Needy)


@attrs.frozen
class Box(typing.Generic[T]):
    _inside: T


@attrs.frozen
class Boxed:
    """What is not plain hides in a generic class, under a new name, in a dataclass and in a dict with known keys."""

    box: Box[int]
    renamed: Renamed
    dataclass: InDataclass
    typed_dict: InTypedDict


@dataclasses.dataclass
class InDataclass:
    needy: Needy


class InTypedDict(typing.TypedDict):
    needy: Needy


@attrs.frozen
class OfSelf:
    """A default that msgspec cannot make."""

    start: int
    end: int = attrs.Factory(lambda self: self.start + 1, takes_self=True)


@attrs.define
class OwnInit:
    """A class with a way of its own to be made, which nothing from outside may avoid."""

    amount: int

    def __init__(self, amount: int) -> None:
        if amount < 0:
            raise ValueError("less than nothing")
        self.amount = amount


@attrs.define
class PreInit:
    amount: int

    def __attrs_pre_init__(self, amount: int) -> None:
        if amount < 0:
            raise ValueError("less than nothing")


@attrs.define
class Untyped:
    anything = attrs.field()


@attrs.define
class Recursive:
    _value: int
    rest: list[Recursive] = attrs.Factory(list)


@attrs.define
class Caching:
    """It holds what is nobody's business."""

    amount: int

    @functools.cached_property
    def secret(self) -> str:
        return "secret"


@attrs.define(slots=False)
class Open:
    amount: int


@attrs.frozen
class Strange:
    """Its validator raises what validators do not raise."""

    amount: int = attrs.field()

    @amount.validator
    def _check(self, attribute: object, value: int) -> None:
        if value == 0:
            raise ZeroDivisionError
        if value < 0:
            raise KeyError("negative")


@attrs.frozen
class Plain:
    """Fields of many types, for the fast path."""

    integer: int = 0
    number: float = 0.0
    text: str = ""
    blob: bytes = b""
    flag: bool = False
    items: list[int] = attrs.Factory(list)
    pair: tuple[int, str] = (0, "")
    row: tuple[int, ...] = ()
    bag: frozenset[int] = frozenset()
    table: dict[str, int] = attrs.Factory(dict)
    maybe: int | None = None
    either: int | str = 0
    word: typing.Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    at: datetime.datetime | None = None
    id: uuid.UUID | None = None
    position: Position | None = None
    positions: list[Position] = attrs.Factory(list)
    anything: typing.Any = None


@attrs.frozen
class Beyond(Plain):
    """The same fields, but not for the fast path."""

    _private: int = 0


positions = st.builds(Position, st.integers(-(2**63), 2**63 - 1), st.integers(0, 9))


@given(
    st.builds(
        Move,
        st.text(max_size=20),
        positions,
        st.lists(positions, max_size=5),
        st.sampled_from(Colour),
        st.none() | st.datetimes(timezones=st.just(datetime.UTC)),
    ),
    st.none() | st.integers(0, 2**63 - 1),
)
def test_plain_messages_round_trip(message: Move, id: int | None) -> None:
    """A message and its id arrive as they were sent."""
    assert CODEC.decode(CODEC.encode(message, id)) == (message, id)


@pytest.mark.parametrize(
    "message",
    [
        Needy("5", secret="x", other=3),  # type: ignore[arg-type]
        Holder(Needy(1), [Position(1, 2)]),
        Holder(None, []),
        Boxed(Box(1), Renamed(Needy(2)), InDataclass(Needy(3)), {"needy": Needy(4)}),
        OfSelf(1),
        OwnInit(1),
        PreInit(1),
        Untyped([1, "a"]),
        Recursive(1, [Recursive(2), Recursive(3, [Recursive(4)])]),
        Beyond(at=datetime.datetime(2020, 1, 1), id=uuid.UUID(int=1), position=Position(1, 2), bag=frozenset({1})),
    ],
)
def test_messages_beyond_msgspec_round_trip(message: Any) -> None:
    """Whatever msgspec would get wrong, wherever it hides, goes through cattrs and arrives unchanged."""
    codec: Codec[Any] = Codec([type(message)])
    assert codec.decode(codec.encode(message))[0] == message


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(Plain)])
def test_both_ways_take_and_refuse_the_same(field: str) -> None:
    """What a value may be does not depend on what else its class has: no str is an int, and no int a gigabyte."""
    codec = Codec([Plain, Beyond])
    now, past = datetime.datetime.now(datetime.UTC), datetime.datetime(2020, 1, 1)
    position = {"x": 1, "y": 2}
    scalars = [None, True, 0, 3, -1, 2**63, 1.0, 1.5, "", "a", "5", "red", "green", "YWJj", b"", b"abc", now, past]
    lists = [[], [1], [1, "a"], ["1"], [1, 2, 3], [position], [[1]], {}, {"a": 1}, {"a": "1"}, {1: 1}, position]
    accepted = 0
    for value in [*scalars, *lists, {"x": "1", "y": 2}, {"x": 1}, str(uuid.UUID(int=1))]:
        outcomes = []
        for name in ("Plain", "Beyond"):
            try:
                outcomes.append(repr(getattr(codec.decode(pack(name, 1, {field: value}))[0], field)))
            except ProtocolError:
                outcomes.append("refused")
        assert outcomes[0] == outcomes[1], value
        accepted += outcomes[0] != "refused"
    assert accepted


def test_both_ways_send_the_same() -> None:
    """A peer cannot tell by which way a message was encoded."""
    plain = Plain(3, 1.5, "x", b"y", items=[1], table={"a": 1}, colour=Colour.BLUE, position=Position(1, 2))
    beyond = Beyond(**attrs.asdict(plain, recurse=False))
    bodies = [msgspec.msgpack.decode(Codec([type(one)]).encode(one))[2] for one in (plain, beyond)]
    assert bodies[1].pop("_private") == 0
    assert bodies[0] == bodies[1]


def test_only_fields_are_sent() -> None:
    """What an instance holds besides them stays here."""
    caching, open_ = Caching(1), Open(1)
    assert caching.secret
    open_.secret = "secret"  # type: ignore[attr-defined]
    for message in (caching, open_):
        codec: Codec[Any] = Codec([type(message)])
        assert codec.decode(codec.encode(message))[0] == type(message)(1)
        assert b"secret" not in codec.encode(message)


@pytest.mark.parametrize("cls", [OwnInit, PreInit])
def test_a_class_is_made_in_its_own_way(cls: type) -> None:
    """Nothing from outside avoids what it does to be made."""
    with pytest.raises(ProtocolError, match=f"not a {cls.__name__}: .*less than nothing"):
        Codec([cls]).decode(pack(cls.__name__, 1, {"amount": -1}))


@pytest.mark.parametrize("amount", [0, -1])
def test_whatever_a_validator_raises_is_the_peers_fault(amount: int) -> None:
    """A stranger's value ends its connection, and nothing else."""
    with pytest.raises(ProtocolError, match=r"not a Strange: (ZeroDivisionError|KeyError)"):
        Codec([Strange]).decode(pack("Strange", 1, {"amount": amount}))


def test_a_field_that_cannot_cross_is_named_at_once() -> None:
    """Not when the first message comes."""
    number = attrs.make_class("Number", {"value": attrs.field(type=complex)})
    with pytest.raises(TypeError, match=r"Number.* cannot cross the wire: .*complex"):
        Codec([number])
    lost = attrs.make_class("Lost", {"value": attrs.field(type="Nowhere")})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"annotations of .*Lost.* cannot be resolved: .*Nowhere"):
        Codec([lost])


@pytest.mark.parametrize("message", [Done(), Refused("queue", 0.5), Failed("no"), Closed("idle")])
def test_every_codec_knows_the_servers_own_messages(message: object) -> None:
    """A refusal, a failure and a farewell need not be declared."""
    codec: Codec[object] = Codec([])
    assert codec.decode(codec.encode(message, 3)) == (message, 3)


def pack(*envelope: object) -> bytes:
    return msgspec.msgpack.encode(envelope)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "not a message"),
        (b"\xc1", "not a message"),
        (b"hello world", "not a message"),
        (b"\x91" * 100_000, "not a message"),
        (b"\x93\xa6Holder\x01" + b"\x91" * 100_000, "not a message"),
        (pack("Bid", 1, {"amount": 1}) + b"x", "not a message"),
        (pack("Bid", 1, {"amount": 1})[:-1], "not a message"),
        (pack("Bid", "one", {"amount": 1}), "not a message"),
        (pack("Bid", 2**64 - 1, {}), "not a Bid: .*amount"),
        (pack("Bid", 1), "not a message"),
        (b"\x93\xa3\xff\xff\xff\x01\x80", "not a message"),
        (pack("Nonsense", 1, {}), "unknown message type 'Nonsense'"),
        (pack("N" * 10_000, 1, {}), "unknown message type 'N{40}'"),
        (pack("Bid", 1, {}), "not a Bid: .*amount"),
        (pack("Bid", 1, {"amount": "1"}), "not a Bid: Expected `int`"),
        (pack("Bid", 1, {"amount": 0}), "not a Bid: .*amount.* must be > 0"),
        (pack("Move", 1, {"player": "p", "to": [1, 2]}), "not a Move"),
        (pack("Move", 1, {"player": "p", "to": {"x": 1, "y": 2}, "colour": "green"}), "not a Move: .*green"),
        (pack("Needy", 1, {}), "not a Needy: .*number"),
        (pack("Needy", 1, {"number": "abc"}), "not a Needy: "),
        (pack("Needy", 1, [1, 2]), "not a Needy: "),
        (pack("Holder", 1, {"needy": 5, "rest": None}), "not a Holder: "),
    ],
)
def test_wrong_payloads_are_protocol_errors_with_a_reason(payload: bytes, reason: str) -> None:
    """Whatever a stranger sends, the answer names what was wrong."""
    with pytest.raises(ProtocolError, match=f"(?s){reason}"):
        CODEC.decode(payload)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(payload: bytes) -> None:
    """A payload is a message or a protocol error."""
    TRIED["codec"] += 1
    try:
        CODEC.decode(payload)
    except ProtocolError as error:
        assert error.reason


@given(
    st.sampled_from(CODEC.types),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | st.floats(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["amount", "number", "needy", "rest", "player", "to", "x", "y"]), inner, max_size=4
            )
        ),
    ),
)
def test_random_bodies_never_raise_anything_else(cls: type, body: object) -> None:
    """Well-formed MessagePack of the wrong shape is a protocol error too, on the fast path and through cattrs."""
    TRIED["codec"] += 1
    try:
        message, id = CODEC.decode(pack(cls.__name__, 1, body))
    except ProtocolError as error:
        assert error.reason.startswith(f"not a {cls.__name__}: ")
    else:
        assert isinstance(message, cls)
        assert id == 1


def test_a_message_outside_the_agreement_is_our_error() -> None:
    """Sending a class that was not declared fails at the sender."""
    with pytest.raises(TypeError, match=r"must be one of .*Bid.*not Position"):
        CODEC.encode(Position(1, 2))  # type: ignore[arg-type]


def test_types_must_be_attrs_classes_with_distinct_names() -> None:
    """Wrong declarations are named at construction."""
    with pytest.raises(TypeError, match="attrs classes, not <class 'int'>"):
        Codec([int])
    other = attrs.make_class("Bid", {"x": attrs.field(type=int)})
    with pytest.raises(ValueError, match="two called 'Bid'"):
        Codec([Bid, other])
    assert Codec([Bid, Bid]).types[0] is Bid


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 5),
        (None, None),
        (Position, Position(1, 2)),
        (list[Position | None], [Position(1, 2), None]),
        (dict[str, tuple[int, ...]], {"a": (1, 2)}),
        (int | str, "x"),
        (Colour, Colour.BLUE),
        (datetime.datetime, datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)),
        (Needy, Needy(1, secret="x", other=3)),
        (list[Needy], [Needy(1)]),
        (Needy | None, None),
        (dict[str, Needy], {"a": Needy(1)}),
        (Position | Bid, Bid(5)),
        (typing.Any, [1, {"a": None}, "b"]),
        (object, 1.5),
    ],
)
def test_single_values_cross_by_their_annotation(annotation: object, value: object) -> None:
    """What crosses alone, as an argument or a result, takes the fast path where that is right, else cattrs."""
    type = wire_type(annotation)
    payload = msgspec.msgpack.encode(value if type.unstructure is None else type.unstructure(value))
    decoded = msgspec.msgpack.Decoder(type.wire).decode(payload)
    assert (decoded if type.structure is None else type.structure(decoded)) == value


def test_plain_annotations_take_the_fast_path() -> None:
    """Nothing is structured or unstructured where msgspec does it all."""
    for annotation in (int, Position, list[Position], dict[str, Move], int | None, Plain):
        assert wire_type(annotation).structure is None
        assert wire_type(annotation).unstructure is None
    for beyond in (Needy, list[Needy], Holder, Position | Bid, Beyond, Box[int], Renamed, InDataclass, InTypedDict):
        assert wire_type(beyond).structure is not None


@pytest.mark.parametrize("annotation", [complex, list[list[complex]], dict[complex, int], typing.Callable[[int], str]])
def test_annotations_nobody_can_read_are_refused(annotation: object) -> None:
    """A type that neither msgspec nor the converter knows is an error at once, not at the first value."""
    with pytest.raises(TypeError, match="cannot cross the wire"):
        wire_type(annotation)
