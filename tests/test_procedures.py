"""A registry names functions once, and reads and writes their arguments by their signatures."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import attrs
import cattrs
import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from stagetrio.codec import wire_type
from stagetrio.procedures import NamedProcedure, Procedure, Procedures, procedure_of
from stagetrio.remote_wire import encode

if TYPE_CHECKING:
    from somewhere import Unknown  # type: ignore[import-not-found]


@attrs.frozen
class Point:
    x: int
    y: int


@attrs.frozen
class Needy:
    _secret: str
    number: int = attrs.field(converter=int)


async def add(a: int, b: int = 0) -> int:
    return a + b


def crossed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a worker reads of what a caller writes."""
    procedure = Procedure(function, "f")
    arguments, keywords = procedure.pack_arguments(args, kwargs)
    raw = {key: msgspec.Raw(encode(value)) for key, value in keywords.items()}
    return procedure.read_arguments(msgspec.Raw(encode(arguments)), raw)


async def plain(a: int, b: Point, /, c: float = 1.0, *, d: list[Point] | None = None) -> None: ...
async def variadic(a: int, *rest: Point, **named: int) -> None: ...
async def needy(a: Needy, *rest: Needy, k: Needy | None = None, **named: Needy) -> None: ...
async def untyped(a, b=2, *rest, **named): ...  # type: ignore[no-untyped-def]
async def required_keyword(a: int, *, k: str) -> None: ...
async def nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (plain, (1, Point(1, 2)), {}),
        (plain, (1, Point(1, 2), 2.5), {"d": [Point(3, 4)]}),
        (plain, (1, Point(1, 2)), {"c": 3.5}),
        (variadic, (1,), {}),
        (variadic, (1, Point(1, 2), Point(3, 4)), {"x": 5, "y": 6}),
        (needy, (Needy("a", 1),), {}),
        (needy, (Needy("a", 1), Needy("b", 2)), {"k": Needy("c", 3), "z": Needy("d", 4)}),
        (untyped, (1, [2, {"x": None}], "c"), {"d": b"e"}),
        (required_keyword, (1,), {"k": "x"}),
        (nothing, (), {}),
    ],
)
def test_arguments_cross_as_what_they_were(
    function: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    """Positional, by keyword, variadic and left out: the function would be called as it was called."""
    read_args, read_kwargs = crossed(function, *args, **kwargs)
    signature = Procedure(function, "f").signature
    assert signature.bind(*read_args, **read_kwargs).arguments == signature.bind(*args, **kwargs).arguments


@given(
    st.integers(-(2**63), 2**63 - 1), st.none() | st.text(), st.lists(st.builds(Point, st.integers(0, 9), st.just(1)))
)
def test_any_values_of_the_types_cross(a: int, b: str | None, c: list[Point]) -> None:
    """The fast way and the slow way read the same."""

    async def function(a: int, b: str | None, c: list[Point]) -> None: ...

    assert crossed(function, a, b, c) == ((a, b, c), {})
    assert crossed(function, a, b=b, c=c) == ((a, b, c), {})


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "reason"),
    [
        (plain, (), {}, "missing a required argument: 'a'|missing a required positional-only argument: 'a'"),
        (plain, (1, {"x": 1, "y": "2"}), {}, r"argument 'b': Expected `int`, got `str` - at `\$.y`"),
        (plain, (1, {"x": 1}), {}, "argument 'b': .*missing required field `y`"),
        (plain, (1, Point(1, 2), 1.0, 4), {}, "too many positional arguments"),
        (plain, (1, Point(1, 2)), {"e": 1}, "got an unexpected keyword argument 'e'"),
        (variadic, (1, Point(1, 2), 3), {}, "argument 'rest': Expected `object`, got `int`"),
        (variadic, (1,), {"x": "y"}, "argument 'named': Expected `int`, got `str`"),
        (required_keyword, (1,), {}, "missing a required .*argument: 'k'"),
        (nothing, (1,), {}, "too many positional arguments"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    function: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object], reason: str
) -> None:
    """The caller reads which argument was wrong, and what was expected."""
    with pytest.raises(TypeError, match=rf"f\(\): {reason}"):
        crossed(function, *args, **kwargs)


@pytest.mark.parametrize("payload", [b"\xc1", b"", b"\x05", b"\xc0", b"\x81\xa1a\x01", b"\x92\x01"])
def test_arguments_that_are_no_array_are_refused(payload: bytes) -> None:
    """Whatever stands where the arguments should be is the caller's TypeError, for any signature."""
    for function in (plain, variadic, needy, nothing):
        with pytest.raises(TypeError, match=r"f\(\): "):
            Procedure(function, "f").read_arguments(msgspec.Raw(payload), {})


def test_values_that_do_not_fit_a_cattrs_type_are_named() -> None:
    """A class beyond msgspec says which of its fields was wrong."""
    procedure = Procedure(needy, "f")
    with pytest.raises(TypeError, match=r"f\(\): argument 'a': .*(number|secret)"):
        procedure.read_arguments(msgspec.Raw(encode([{"number": "x"}])), {})


def test_a_name_is_taken_once() -> None:
    """Registering twice, or one function under two names, is an error with the name in it."""
    procedures = Procedures()
    assert procedures.add(add) is add
    with pytest.raises(ValueError, match="'add' is registered twice"):
        procedures.add(add)
    with pytest.raises(ValueError, match=r"name must be 'add'.*not 'plus'"):
        procedures.add(add, "plus")
    with pytest.raises(ValueError, match="'add' is registered twice"):
        procedures.procedure(name="add")(nothing)
    assert procedures.names == ("add",)


def test_a_function_may_be_served_by_two_registries() -> None:
    """Under its one name."""
    one, two = Procedures(), Procedures()

    @one.procedure(name="x.y")
    async def function() -> None: ...

    two.add(function, "x.y")
    assert one.names == two.names == ("x.y",)
    assert procedure_of(function).name == "x.y"


def test_methods_and_partials_can_be_registered() -> None:
    """A bound method goes by its own name or a given one, a partial needs one; their bound arguments stay at home."""

    class Judge:
        async def decide(self, point: Point) -> int:
            return point.x

    procedures = Procedures()
    procedures.add(Judge().decide)
    procedures.add(Judge().decide, "other")
    procedures.add(functools.partial(add, 5), "add_five")
    with pytest.raises(TypeError, match="procedure needs a name"):
        procedures.add(functools.partial(add, 5))
    assert procedures.names == ("decide", "other", "add_five")
    for name, argument in (("decide", Point(1, 2)), ("add_five", 3)):
        procedure = procedures.get(name)
        assert procedure is not None
        assert procedure.read_arguments(msgspec.Raw(encode([argument])), {}) == ((argument,), {})


@pytest.mark.parametrize("function", [len, lambda: None, 5, "name", print])
def test_only_async_functions_can_be_registered(function: Any) -> None:
    """Anything else is refused where it is registered."""
    with pytest.raises(TypeError, match=r"procedure must be an async function|needs a name"):
        Procedures().add(function)


def test_a_name_must_be_a_name() -> None:
    """Not empty, and a str."""
    for name in ("", 5):
        with pytest.raises(TypeError, match="name must be a non-empty str"):
            Procedures().add(add, name)  # type: ignore[arg-type]


def test_types_that_cannot_cross_are_refused_at_registration() -> None:
    """The parameter and the procedure are named; so is an annotation that nobody can resolve."""

    async def odd(a: int, b: complex) -> None: ...
    async def returns_odd() -> list[complex]:
        return []

    async def unknown(a: Unknown) -> None: ...

    with pytest.raises(TypeError, match="'b' of procedure 'odd': <class 'complex'> cannot cross the wire"):
        Procedures().add(odd)
    with pytest.raises(TypeError, match=r"'return' of procedure 'returns_odd': .*complex"):
        Procedures().add(returns_odd)
    with pytest.raises(TypeError, match=r"the annotations of procedure 'unknown' cannot be resolved: .*Unknown"):
        Procedures().add(unknown)


def test_a_converter_teaches_new_types() -> None:
    """What cattrs was taught crosses as argument and as result."""
    converter = cattrs.Converter()
    converter.register_unstructure_hook(complex, lambda value: [value.real, value.imag])
    converter.register_structure_hook(complex, lambda value, _: complex(*value))

    async def square(z: complex) -> complex:
        return z * z

    procedure = Procedure(square, "square", converter)
    arguments, _ = procedure.pack_arguments((1 + 2j,), {})
    assert procedure.read_arguments(msgspec.Raw(encode(arguments)), {}) == ((1 + 2j,), {})
    assert procedure.pack_result is not None
    assert procedure.read_result(msgspec.Raw(encode(procedure.pack_result(3j)))) == 3j


def test_streams_are_told_from_calls() -> None:
    """Async generator functions yield, also under as_safe_channel; the type of their values is that of the results."""

    async def numbers() -> AsyncIterator[Point]:
        yield Point(1, 2)

    @trio.as_safe_channel
    async def safe() -> AsyncGenerator[Point, None]:
        yield Point(1, 2)

    async def untold():  # type: ignore[no-untyped-def]
        yield 1

    for function in (numbers, safe):
        procedure = Procedure(function, "f")
        assert procedure.streams
        assert procedure.read_result(msgspec.Raw(encode(Point(1, 2)))) == Point(1, 2)
    assert Procedure(untold, "f").streams
    assert not Procedure(add, "f").streams


def test_a_name_alone_carries_attrs_classes_both_ways() -> None:
    """Without a signature, classes cross as maps of their fields, whatever they need."""
    procedure = NamedProcedure("f", wire_type(Any))
    arguments, keywords = procedure.pack_arguments((Point(1, 2), [Needy("a", 1)], None), {"k": math.inf})
    assert msgspec.msgpack.decode(encode(arguments)) == [
        {"x": 1, "y": 2},
        [{"_secret": "a", "number": 1}],
        None,
    ]
    assert keywords == {"k": math.inf}
    assert procedure.read_result(msgspec.Raw(encode({"x": 1}))) == {"x": 1}


class Shop:
    async def price(self, of: str) -> int:
        return len(of)


def test_what_crosses_to_a_process_of_ones_own() -> None:
    """Functions by their names; a converter stays behind, and what would need it is refused rather than misread."""
    procedures = Procedures()
    procedures.add(Shop().price)
    crossed = pickle.loads(pickle.dumps(procedures))
    assert crossed.names == ("price",)
    assert crossed.get("price").read_result(msgspec.Raw(encode(3))) == 3
    with_converter = Procedures(converter=cattrs.Converter())
    with_converter.add(Shop().price)
    with pytest.raises(TypeError, match="procedure 'price' must be registered where its module is imported"):
        pickle.loads(pickle.dumps(with_converter))
