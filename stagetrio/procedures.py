"""Functions that may be called from elsewhere, by name.

What crosses the wire is a name and data, never code: the side that runs a procedure has registered it, and the side
that calls it needs no more than its signature. Arguments are read by the types of the parameters, results by the
return type.

Theory of operation. Each function is looked at once (`Procedure`). Where msgspec reads all the types itself (see
`stagetrio.codec.wire_type`), the positional arguments of a call are decoded in one go, as an array of those types.
Everything else takes the slow way: bind names to parameters as Python does, then decode one by one. The slow way also
finds the words for what was wrong, so a call that fails on the fast way is read once more on the slow one.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import inspect
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import attrs
import cattrs
import msgspec

from stagetrio.codec import UNFIT, WireType, strict_converter, why_unfit, wire_type
from stagetrio.failures import Failures

F = TypeVar("F", bound=Callable[..., Any])

_STAMP = "__stagetrio_procedure__"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_STREAMS = (
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
    contextlib.AbstractAsyncContextManager,
)

_read_list = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class Procedure:
    """One function as the wire sees it: its name, and how its arguments and results cross.

    Args:
        function: An async function, or an async generator function (also under ``trio.as_safe_channel``).
        name: What it is called by.
        converter: A cattrs converter for the types that need one.

    Raises:
        TypeError: It is neither, or one of its types cannot cross the wire.

    Cost: half a microsecond to read the arguments of a call where msgspec reads their types, some 10 µs otherwise.
    """

    def __init__(self, function: Callable[..., Any], name: str, converter: cattrs.Converter | None = None) -> None:
        if not (isinstance(name, str) and name):
            raise TypeError(f"name must be a non-empty str, not {name!r}")
        inner = _innermost(function)
        self.streams = inspect.isasyncgenfunction(inner)
        if not self.streams and not inspect.iscoroutinefunction(function):
            raise TypeError(f"procedure must be an async function or an async generator function, not {function!r}")
        self.function, self.name, self.signature = function, name, inspect.signature(function)
        try:
            hints = typing.get_type_hints(inner, include_extras=True)
        except NameError as error:
            raise TypeError(f"the annotations of procedure {name!r} cannot be resolved: {error}") from None
        converter = strict_converter() if converter is None else converter
        parameters = self.signature.parameters
        self._types = {name: self._type_of(name, hints.get(name, Any), converter) for name in parameters}
        self._readers = {name: _reader(type) for name, type in self._types.items()}
        self._read_at_once = self._fast_decoder()
        self.packs = any(type.unstructure for type in self._types.values())
        result = hints.get("return", Any)
        result_type = self._type_of("return", _yielded(result) if self.streams else result, converter)
        self.read_result = _reader(result_type)
        self.pack_result = result_type.unstructure
        self.blocking = 0.0  # how often it blocks where it runs: a moving average, 0 to 1

    def _type_of(self, parameter: str, annotation: Any, converter: cattrs.Converter) -> WireType:
        try:
            return wire_type(annotation, converter)
        except TypeError as error:
            raise TypeError(f"{parameter!r} of procedure {self.name!r}: {error}") from None

    def _fast_decoder(self) -> Callable[[msgspec.Raw], Any] | None:
        """Return a decoder of all positional arguments at once, where the signature and its types allow one."""
        fields: list[Any] = []
        for parameter in self.signature.parameters.values():
            type = self._types[parameter.name]
            required = parameter.default is parameter.empty
            if parameter.kind in _POSITIONAL and type.structure is None:
                place = f"_{len(fields)}"
                fields.append((place, type.wire) if required else (place, type.wire, msgspec.UNSET))
            elif parameter.kind in (*_POSITIONAL, parameter.VAR_POSITIONAL) or (
                parameter.kind is parameter.KEYWORD_ONLY and required
            ):
                return None
        array = msgspec.defstruct("Arguments", fields, array_like=True, forbid_unknown_fields=True)
        return msgspec.msgpack.Decoder(array).decode

    def read_arguments(
        self, arguments: msgspec.Raw, keywords: Mapping[str, msgspec.Raw]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what to call the function with.

        Raises:
            TypeError: The arguments do not fit the signature, or one of them is not of its type.
        """
        if self._read_at_once is not None and not keywords:
            try:
                values = msgspec.structs.astuple(self._read_at_once(arguments))
            except UNFIT:
                pass  # the slow way finds the words
            else:
                if values and values[-1] is msgspec.UNSET:
                    values = tuple(value for value in values if value is not msgspec.UNSET)
                return values, {}
        try:
            bound = self.signature.bind(*_read_list(arguments), **keywords)
        except UNFIT as error:
            raise TypeError(f"{self.name}(): {error}") from None
        for parameter, raw in bound.arguments.items():
            bound.arguments[parameter] = self._read_argument(parameter, raw)
        return bound.args, bound.kwargs

    def _read_argument(self, parameter: str, raw: Any) -> Any:
        read, kind = self._readers[parameter], self.signature.parameters[parameter].kind
        try:
            if kind is inspect.Parameter.VAR_POSITIONAL:
                return tuple(read(one) for one in raw)
            if kind is inspect.Parameter.VAR_KEYWORD:
                return {key: read(one) for key, one in raw.items()}
            return read(raw)
        except UNFIT as error:
            raise TypeError(f"{self.name}(): argument {parameter!r}: {why_unfit(error)}") from None

    def pack_arguments(
        self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return the arguments as a msgspec encoder takes them.

        Raises:
            TypeError: They do not fit the signature.
        """
        if not self.packs:
            return arguments, keywords
        self.signature.bind(*arguments, **keywords)
        parameters = list(self.signature.parameters.values())
        positional = [p for p in parameters if p.kind in (*_POSITIONAL, p.VAR_POSITIONAL)]
        last = self._types[parameters[-1].name]  # where the name is not a parameter's, this is ``**``
        places = [positional[min(place, len(positional) - 1)] for place in range(len(arguments))]
        return (
            [_pack(self._types[p.name], value) for p, value in zip(places, arguments, strict=True)],
            {key: _pack(self._types.get(key, last), value) for key, value in keywords.items()},
        )


def _pack(type: WireType, value: Any) -> Any:
    return value if type.unstructure is None else type.unstructure(value)


def _reader(type: WireType) -> Callable[[msgspec.Raw], Any]:
    decode, structure = msgspec.msgpack.Decoder(type.wire).decode, type.structure
    return decode if structure is None else lambda raw: structure(decode(raw))


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that the ``def`` made, under decorators and partials."""
    inner: Callable[..., Any] = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    return inner


def _yielded(annotation: Any) -> Any:
    """Return the type of the values of a stream, given the return annotation of its procedure."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin not in _STREAMS or not arguments:
        return Any
    return _yielded(arguments[0]) if origin is contextlib.AbstractAsyncContextManager else arguments[0]


def procedure_of(function: Callable[..., Any], converter: cattrs.Converter | None = None) -> Procedure:
    """Return how a function is called: by the name it was registered under where it was, else by its own.

    Raises:
        TypeError: It cannot be a procedure.
    """
    return stamp_of(function) or Procedure(function, function.__name__, converter)


def stamp_of(function: object) -> Procedure | None:
    """Return what a function was registered as, if it was."""
    return getattr(function, _STAMP, None)


@attrs.frozen
class ProceduresStatistics:
    """What has become of the requests of all connections so far.

    Args:
        connections: Callers connected now.
        running: Calls, posts and streams in hand now that did not end in their first step.
        returned: Ended by returning.
        raised: Ended by an exception of their own.
        cancelled: Cancelled by their caller, its deadline or its leaving.
        refused: Met a bound, and did not run.
        rejected: Named no procedure, or came with the wrong arguments, and did not run.
        undeliverable: Ended with an outcome that no longer had anybody to go to.
        broken: Connections ended because the caller broke the rules of the wire, or had the wrong token.
        failures: ``{"ValueError in function (file:line)": how often}`` a posted procedure raised, which nobody else is
            told.
        mistakes: Likewise, how callers broke the rules.
    """

    connections: int
    running: int
    returned: int
    raised: int
    cancelled: int
    refused: int
    rejected: int
    undeliverable: int
    broken: int
    failures: dict[str, int]
    mistakes: dict[str, int]


@attrs.define
class Tally:
    """The numbers behind `ProceduresStatistics`, counted by the connections."""

    connections: int = 0
    running: int = 0
    returned: int = 0
    raised: int = 0
    cancelled: int = 0
    refused: int = 0
    rejected: int = 0
    undeliverable: int = 0
    broken: int = 0


class Procedures:
    """The functions one side runs for others, by name.

    Register them with the decorator or with `add`; hand the whole to ``serve_remote``. Functions may be added while it
    is being served.

    Args:
        converter: A cattrs converter for the types that need one; the default as for `stagetrio.codec.Codec`.
    """

    def __init__(self, *, converter: cattrs.Converter | None = None) -> None:
        self._has_own_converter = converter is not None
        self._converter = strict_converter() if converter is None else converter
        self._by_name: dict[str, Procedure] = {}
        self.tally = Tally()
        logger = logging.getLogger("stagetrio.remote")
        self.failures, self.mistakes = Failures(logger, "posted procedure"), Failures(logger, "remote caller")

    @overload
    def procedure(self, function: F, /) -> F: ...
    @overload
    def procedure(self, /, *, name: str) -> Callable[[F], F]: ...
    def procedure(self, function: F | None = None, /, *, name: str | None = None) -> F | Callable[[F], F]:
        """Register a function, as a decorator: ``@procedures.procedure`` or ``@procedures.procedure(name="…")``.

        The function stays what it is, so it can be called here too; calling sides that import it may pass it
        to ``remote.call`` in place of its name.

        Raises:
            TypeError: It is neither an async function nor an async generator function, or one of its types cannot
                cross the wire.
            ValueError: The name is taken.
        """
        if function is None:
            return lambda function: self.add(function, name)
        return self.add(function, name)

    def add(self, function: F, name: str | None = None) -> F:
        """Register a function and return it.

        Args:
            function: An async function or an async generator function; also a bound method or a partial, which
                the other side can call by name only.
            name: What it is called by; its ``__name__`` if None.

        Raises:
            TypeError: As for `procedure`.
            ValueError: The name is taken, or the function goes by another name already.
        """
        if name is None:
            name = getattr(function, "__name__", None)
            if name is None:
                raise TypeError(f"procedure needs a name: {function!r} has none of its own")
        if name in self._by_name:
            raise ValueError(f"procedure {name!r} is registered twice")
        procedure = Procedure(function, name, self._converter)
        stamped = getattr(function, _STAMP, procedure)
        if stamped.name != name:
            raise ValueError(f"name must be {stamped.name!r}, by which this function goes already, not {name!r}")
        with contextlib.suppress(AttributeError):  # a bound method takes no stamp
            setattr(function, _STAMP, procedure)
        self._by_name[name] = procedure
        return function

    def __reduce__(self) -> tuple[Callable[..., Procedures], tuple[dict[str, Callable[..., Any]], bool]]:
        # It crosses to a process of our own as functions by their names: there each is what its own module made of it.
        functions = {name: procedure.function for name, procedure in self._by_name.items()}
        return _registered, (functions, self._has_own_converter)

    def get(self, name: str) -> Procedure | None:
        """Return the procedure of that name, if there is one."""
        return self._by_name.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """What is registered, in order of registration."""
        return tuple(self._by_name)

    def statistics(self) -> ProceduresStatistics:
        """Return what has become of the requests of all connections so far."""
        failures, mistakes = dict(self.failures.counts), dict(self.mistakes.counts)
        return ProceduresStatistics(**attrs.asdict(self.tally), failures=failures, mistakes=mistakes)


def _registered(functions: dict[str, Callable[..., Any]], have_own_converter: bool) -> Procedures:
    procedures = Procedures()
    for name, function in functions.items():
        stamped = stamp_of(function)
        if stamped is None and have_own_converter:
            raise TypeError(f"procedure {name!r} must be registered where its module is imported, for the converter")
        procedures._by_name[name] = stamped or Procedure(function, name)
    return procedures


class NamedProcedure:
    """A procedure of which the calling side knows no more than the name.

    Its arguments cross as what they are, attrs classes as maps of their fields; its results come back as plain
    MessagePack types.

    Args:
        name: What it is called by.
        any_type: `wire_type` of ``Any``.
    """

    def __init__(self, name: str, any_type: WireType) -> None:
        self.name = name
        self._any_type = any_type
        self.read_result = _reader(any_type)

    def pack_arguments(
        self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return the arguments as a msgspec encoder takes them."""
        return (
            [_pack(self._any_type, value) for value in arguments],
            {key: _pack(self._any_type, value) for key, value in keywords.items()},
        )
