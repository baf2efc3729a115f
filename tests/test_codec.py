"""Messages cross the wire as what they were, and anything else is a protocol error with a reason."""

from __future__ import annotations

import datetime
import enum
import typing

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
    [Needy("5", secret="x", other=3), Holder(Needy(1), [Position(1, 2)]), Holder(None, [])],  # type: ignore[arg-type]
)
def test_messages_beyond_msgspec_round_trip(message: object) -> None:
    """Converters, private names, aliases and nested uses of them go through cattrs and arrive unchanged."""
    assert CODEC.decode(CODEC.encode(message))[0] == message


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
    for annotation in (int, Position, list[Position], dict[str, Move], int | None):
        assert wire_type(annotation).structure is None
        assert wire_type(annotation).unstructure is None
    for beyond in (Needy, list[Needy], Holder, Position | Bid):
        assert wire_type(beyond).structure is not None


@pytest.mark.parametrize("annotation", [complex, list[list[complex]], dict[complex, int], typing.Callable[[int], str]])
def test_annotations_nobody_can_read_are_refused(annotation: object) -> None:
    """A type that neither msgspec nor the converter knows is an error at once, not at the first value."""
    with pytest.raises(TypeError, match="cannot cross the wire"):
        wire_type(annotation)
