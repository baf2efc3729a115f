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

import typing
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import attrs
import cattrs
import msgspec

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
    """

    reason: str


class Codec(Generic[M]):
    """The messages that two sides have agreed on.

    `Refused`, `Failed` and `Closed` are always among them.

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
        for cls in (*types, Refused, Failed, Closed):
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

    def encode(self, message: M | Refused | Failed | Closed, id: int | None = None) -> bytes:
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
        except (ValueError, TypeError, ExceptionGroup) as error:
            # From the class's own validators and converters, or from cattrs, which groups what it found.
            reasons = cattrs.transform_error(error) if isinstance(error, ExceptionGroup) else [str(error)]
            raise ProtocolError(f"not a {name}: {'; '.join(reasons)}") from error


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
