"""attrs messages to payloads and back.

A payload is one MessagePack array, ``[type, id, body]``:

===== =============== ==============================================================================
place MessagePack     content
===== =============== ==============================================================================
type  str             the name of the message's class
id    int or nil      chosen by whoever asks; the reply to a message carries its id; nil: no reply is wanted
body  map             ``{field: value}``
===== =============== ==============================================================================

Theory of operation. msgspec encodes and decodes attrs classes itself, several times faster than structuring a tree of
dicts, but it leaves out what attrs can do beyond plain fields: converters, private names, aliases and ``init=False``
fields. So each class is looked at once (`_is_plain`, which follows the types of its fields): plain ones
take the fast path, the others go through a cattrs converter. Both give the same bytes for a class that either could
take, so a peer cannot tell.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import attrs
import cattrs
import msgspec
import msgspec.inspect

from stagetrio.framing import ProtocolError

M = TypeVar("M")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


@attrs.frozen
class Refused:
    """What a peer gets instead of a reply when its message met a bound (`stagetrio.limiter.Overloaded`).

    Args:
        reason: Which bound: ``"queue"``, ``"flow"``, ``"rate"``, ``"tickets"`` or ``"waiting"``.
        retry_after: Seconds after which another attempt may succeed; 0 when nothing is known.
    """

    reason: str
    retry_after: float = 0.0


@attrs.frozen
class Done:
    """The reply to a message whose handler came to its end and had nothing to say."""


@attrs.frozen
class Failed:
    """What a peer gets instead of a reply when the handler of its message did not come to one.

    Args:
        error: What went wrong, in words meant for the peer.
    """

    error: str


@attrs.frozen
class Closed:
    """The last message on a connection which the server ends.

    Args:
        reason: Why, in words meant for the peer.
        retry_after: Seconds after which another connection may fare better; 0 when nothing is known.
    """

    reason: str
    retry_after: float = 0.0


class Codec(Generic[M]):
    """The messages that two sides have agreed on.

    `Done`, `Refused`, `Failed` and `Closed` are always among them.

    Args:
        types: The attrs classes, each known on the wire by its ``__name__``.
        converter: A cattrs converter for the classes that need one; the default knows attrs classes, enums and the
            usual containers.

    Raises:
        TypeError: One of the types is not an attrs class.
        ValueError: Two of them have the same name.

    Cost: about 1 µs per message and direction for a small class on the fast path, 4 µs through cattrs.
    """

    def __init__(self, types: Iterable[type[M]], *, converter: cattrs.Converter | None = None) -> None:
        self._converter = cattrs.Converter() if converter is None else converter
        self._encode = msgspec.msgpack.Encoder().encode
        self._envelope = msgspec.msgpack.Decoder(tuple[str, int | None, msgspec.Raw]).decode
        self._decoders: dict[str, Callable[[msgspec.Raw], Any]] = {}
        self._names: dict[type, str] = {}
        self._unstructure: set[type] = set()
        for cls in (*types, Done, Refused, Failed, Closed):
            self._add(cls)

    def _add(self, cls: type) -> None:
        if not (isinstance(cls, type) and attrs.has(cls)):
            raise TypeError(f"types must be attrs classes, not {cls!r}")
        if cls in self._names:
            return
        if cls.__name__ in self._decoders:
            raise ValueError(f"types must have distinct names: there are two called {cls.__name__!r}")
        self._names[cls] = cls.__name__
        if _is_plain(cls, set()):
            self._decoders[cls.__name__] = msgspec.msgpack.Decoder(cls).decode
        else:
            self._unstructure.add(cls)
            self._decoders[cls.__name__] = self._structurer(cls)

    def _structurer(self, cls: type) -> Callable[[msgspec.Raw], Any]:
        structure, decode = self._converter.get_structure_hook(cls), msgspec.msgpack.Decoder().decode
        return lambda body: structure(decode(body), cls)

    @property
    def types(self) -> tuple[type, ...]:
        """The classes this codec knows, in the order in which they were given."""
        return tuple(self._names)

    def encode(self, message: M | Done | Refused | Failed | Closed, id: int | None = None) -> bytes:
        """Return the payload of a message.

        Args:
            message: An instance of one of the types.
            id: The id of the request, or of the request that this replies to; None where no reply is wanted.

        Raises:
            TypeError: The message's class is not one of the types.
        """
        cls = type(message)
        name = self._names.get(cls)
        if name is None:
            raise TypeError(f"message must be one of {sorted(self._decoders)}, not {message!r}")
        if cls in self._unstructure:
            return self._encode((name, id, self._converter.unstructure(message, cls)))
        return self._encode((name, id, message))

    def decode(self, payload: bytes) -> tuple[Any, int | None]:
        """Return the message in a payload, and its id.

        Raises:
            ProtocolError: The payload is not a message, its type is unknown, or its body is not one of that type.
        """
        try:
            name, id, body = self._envelope(payload)
        except _UNREADABLE as error:
            raise ProtocolError(f"not a message: {error}") from None
        decode = self._decoders.get(name)
        if decode is None:
            raise ProtocolError(f"unknown message type {name[:40]!r}")
        try:
            return decode(body), id
        except _UNREADABLE as error:
            raise ProtocolError(f"not a {name}: {error}") from None
        except UNFIT as error:
            raise ProtocolError(f"not a {name}: {why_unfit(error)}") from error


UNFIT = (*_UNREADABLE, ValueError, TypeError, ExceptionGroup)
"""What decoding and structuring raise for a value that is not of its type: msgspec, cattrs (which groups what it
found), and the validators and converters of the class itself."""


def why_unfit(error: Exception) -> str:
    """Say in words for the peer why a value was not of its type, given one of `UNFIT`."""
    return "; ".join(cattrs.transform_error(error)) if isinstance(error, ExceptionGroup) else str(error)


@attrs.frozen
class WireType:
    """How the values of one annotation cross the wire, where they are not messages of a `Codec`.

    Args:
        wire: The type to hand to a msgspec decoder: the annotation itself, or ``Any`` for one that cattrs reads.
        structure: Makes the value out of what that decoder gave; None: it is the value already.
        unstructure: Makes of a value what a msgspec encoder takes; None: it takes the value itself.
    """

    wire: Any
    structure: Callable[[Any], Any] | None = None
    unstructure: Callable[[Any], Any] | None = None


_SCALARS = frozenset({bool, int, float, str, bytes, type(None)})


def wire_type(annotation: Any, converter: cattrs.Converter | None = None) -> WireType:
    """Say how the values of an annotation cross the wire: by msgspec alone where that is right, else through cattrs.

    Args:
        annotation: A resolved type; ``Any`` and ``object`` stand for whatever MessagePack has.
        converter: As for `Codec`.

    Raises:
        TypeError: Neither msgspec nor the converter knows what to do with it.
    """
    converter = cattrs.Converter() if converter is None else converter
    if annotation in (Any, object, inspect.Parameter.empty):
        any_value = converter.unstructure
        return WireType(Any, None, lambda value: value if type(value) in _SCALARS else any_value(value))
    if _is_known(annotation) and _is_plain(annotation, set()):
        return WireType(annotation)
    try:
        structure = converter.get_structure_hook(annotation)
        unstructure = converter.get_unstructure_hook(annotation)
    except (TypeError, cattrs.StructureHandlerNotFoundError) as error:
        raise TypeError(f"{annotation!r} cannot cross the wire: {error}") from None
    return WireType(Any, lambda value: structure(value, annotation), unstructure)


def _is_known(annotation: Any) -> bool:
    """Whether msgspec has a meaning of its own for the type and for what it is made of."""
    try:
        known = not isinstance(msgspec.inspect.type_info(annotation), msgspec.inspect.CustomType)
    except TypeError:  # such as a union of two classes
        return False
    inner = [a for a in typing.get_args(annotation) if isinstance(a, type) or typing.get_args(a)]
    return known and all(_is_known(argument) for argument in inner)


def _is_plain(annotation: Any, seen: set[Any]) -> bool:
    """Whether msgspec gives for this type what attrs means: follow every attrs class that it mentions."""
    for argument in typing.get_args(annotation):
        if not _is_plain(argument, seen):
            return False
    if not isinstance(annotation, type) or not attrs.has(annotation) or annotation in seen:
        return True
    seen.add(annotation)
    attrs.resolve_types(annotation)
    for field in attrs.fields(annotation):
        name_is_kept = field.alias == field.name and not field.name.startswith("_")
        if not (field.init and field.converter is None and name_is_kept and _is_plain(field.type, seen)):
            return False
    try:
        msgspec.msgpack.Decoder(annotation)
    except TypeError:  # a field's type, or a union of types, is beyond msgspec
        return False
    return True
