"""What the working side answers: one answer for each request, whatever has become of it.

A result that cannot be encoded, or does not fit into the caller's frames, is an exception of that call; an exception
that does not fit is cut. So there is always an answer, and it is always counted.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed
from stagetrio.limiter import Overloaded
from stagetrio.procedures import Procedure, Procedures
from stagetrio.remote_output import Output

_MESSAGE_CHARACTERS = 500
_TRACEBACK_CHARACTERS = 8000
_OWN_FRAMES = str(Path(__file__).parent / "remote_")


class Replies:
    """The answers of one connection.

    Args:
        output: Where they go.
        max_frame_bytes: What the caller takes.
        procedures: Where they are counted.
    """

    def __init__(self, output: Output, max_frame_bytes: int, procedures: Procedures) -> None:
        self._output, self._procedures, self._tally = output, procedures, procedures.tally
        self._frame = LengthPrefixed(max_frame_bytes).encode
        self.wanted = True  # False when the caller has left

    def returned(self, request: wire.Request, procedure: Procedure, value: Any) -> None:
        """Answer with what the procedure returned; for a stream, that it has ended."""
        try:
            if type(request) is not wire.Call:
                value = None
            elif procedure.pack_result is not None:
                value = procedure.pack_result(value)
            frame = self._frame(wire.encode((1, request.id, value)))
        except Exception as error:  # whatever the codec finds in it
            self._tally.raised += 1
            said = f"the result of {procedure.name!r} cannot be sent: {_message_of(error)}"
            self._raised(request.id, type(error).__name__, said)
            return
        self._tally.returned += 1
        self._reply(frame)

    def value(self, id: int, procedure: Procedure, value: Any) -> None:
        """Send one value of a stream.

        Raises:
            Exception: Whatever the codec finds in it.
        """
        pack = procedure.pack_result
        self._output.add(self._frame(wire.encode((2, id, value if pack is None else pack(value)))))

    def failed(self, request: wire.Request, error: Exception) -> None:
        """Answer with what the procedure raised."""
        if isinstance(error, Overloaded):
            self.refused(request.id, error)
            return
        self._tally.raised += 1
        if isinstance(request, wire.Post):
            self._procedures.failures.record(error)  # or nobody would ever see it
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        self._raised(request.id, name, _message_of(error), _text_of(error))

    def cancelled(self, id: int, *, by_caller: bool) -> None:
        """Answer that the caller, or its deadline, has cancelled it."""
        self._tally.cancelled += 1
        if by_caller:
            self._raised(id, "Cancelled", "by the caller")
        else:
            self._raised(id, "TooSlowError", "the deadline passed before it ended")

    def rejected(self, id: int, type_name: str, message: str) -> None:
        """Answer that it could not begin."""
        self._tally.rejected += 1
        self._raised(id, type_name, message)

    def refused(self, id: int, refusal: Overloaded) -> None:
        """Answer that it met a bound."""
        self._tally.refused += 1
        retry_after = refusal.retry_after if refusal.retry_after >= 0 else 0.0  # a procedure may raise any nonsense
        self._reply(self._frame(wire.encode((4, id, _sendable(refusal.reason), retry_after))))

    def bye(self, reason: str) -> None:
        """Say why the connection ends."""
        self._output.add(self._frame(wire.encode((5, _sendable(reason)))))

    def _raised(self, id: int, type_name: str, message: str, text: str = "") -> None:
        message = _sendable(message)
        try:
            frame = self._frame(wire.encode((3, id, type_name, message, text)))
        except ValueError:  # it does not fit into the caller's frames
            frame = self._frame(wire.encode((3, id, type_name[:100], message[:100], "")))
        self._reply(frame)

    def _reply(self, frame: bytes) -> None:
        if not self.wanted:
            self._tally.undeliverable += 1
        self._output.add(frame)


def _sendable(words: str) -> str:
    return words[:_MESSAGE_CHARACTERS].encode(errors="replace").decode()


def _message_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # its own ``__str__`` raises
        return "(its text cannot be had)"


def _text_of(error: BaseException) -> str:
    """Return the traceback without the frames of the modules that brought it here, cut to its end."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OWN_FRAMES):
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    return text[-_TRACEBACK_CHARACTERS:].encode(errors="replace").decode()
