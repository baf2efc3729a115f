"""Events of the interpreter, for stopping handlers where signals cannot, and for raising where signals must not.

Theory of operation. ``sys.monitoring`` (Python 3.12 and later) calls back where a function starts or goes on, where a
loop goes round, and when a C function has returned: the places where the interpreter looks for signals, and none of
them inside of C code. Two faults of the interpreter are worked around here:

- An exception raised where a loop goes round, by an event or a signal, is taken to come from the instruction before the
  loop, and misses the ``except`` and ``finally`` of a block that begins with the loop. `Events.raise_later` raises it
  at the frame's next instruction instead.
- A stack that is switched away inside of a callback leaves events off for everybody until it is switched back to.
  Whoever switches does it through ``sys.call_tracing``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

# What runs on handlers' stacks and is not theirs: events in it are nobody's.
MACHINERY = {f"stagetrio.{name}" for name in ("alarm", "events", "lane", "preempt", "watchdog")}


class Events:
    """A tool of ``sys.monitoring`` of our own, for the thread that makes it.

    Args:
        callback: Called with the frame at each event in the thread that made this.

    Raises:
        RuntimeError: No tool id is free.
    """

    def __init__(self, callback: Callable[[FrameType], object]) -> None:
        self._monitoring: Any = vars(sys)["monitoring"]  # not known to a type checker that checks for 3.11
        self._callback = callback
        self._thread = threading.get_ident()
        self._pending: tuple[FrameType, BaseException] | None = None
        self.only_in: FrameType | None = None
        tool = free_tool()
        if tool is None:
            raise RuntimeError("no tool id of sys.monitoring is free")
        self._tool = tool
        events = self._monitoring.events
        self._set = events.PY_START | events.PY_RESUME | events.JUMP | events.CALL  # CALL brings C_RETURN
        self._monitoring.use_tool_id(tool, "stagetrio")
        self._monitoring.register_callback(tool, events.INSTRUCTION, self._raise)
        self._monitoring.register_callback(tool, events.JUMP, self._handle_jump)
        self._monitoring.register_callback(tool, events.PY_RESUME, self._handle_resume)
        for event in (events.PY_START, events.C_RETURN):
            self._monitoring.register_callback(tool, event, self._handle)

    def _handle(self, code: CodeType, *_: object) -> None:
        self._tell(sys._getframe(1))

    def _handle_resume(self, code: CodeType, offset: int) -> None:
        # Bits 0 and 1: after a `yield` (1), `yield from` (2), `await` (3). The latter two have somebody below them, who
        # is still to get what is sent, or thrown, and would never be told of an exception raised here.
        if code.co_code[offset + 1] & 3 < 2:
            self._tell(sys._getframe(1))

    def _handle_jump(self, code: CodeType, offset: int, destination: int) -> None:
        if destination <= offset:
            frame = sys._getframe(1)
            try:
                self._tell(frame)
            except BaseException as error:
                self.raise_later(frame, error)

    def _tell(self, frame: FrameType) -> None:
        if threading.get_ident() == self._thread and frame.f_globals.get("__name__") not in MACHINERY:
            self._callback(frame)

    def switch_on(self) -> None:
        """Call back at every event, everywhere."""
        self._monitoring.set_events(self._tool, self._set)

    def switch_on_in(self, frame: FrameType) -> None:
        """Call back at every event in the code of a frame, which ``only_in`` is from then on."""
        self.switch_off()
        self.only_in = frame
        self._monitoring.set_local_events(self._tool, frame.f_code, self._set)

    def switch_off(self) -> None:
        """Do not call back."""
        if self.only_in is None:
            self._monitoring.set_events(self._tool, 0)
        else:
            self._monitoring.set_local_events(self._tool, self.only_in.f_code, 0)
            self.only_in = None

    def raise_later(self, frame: FrameType, error: BaseException) -> None:
        """Raise an exception in a frame, at its next instruction."""
        self._pending = (frame, error)
        self._monitoring.set_local_events(self._tool, frame.f_code, self._monitoring.events.INSTRUCTION)

    def _raise(self, code: CodeType, offset: int) -> None:
        if self._pending is not None and sys._getframe(1) is self._pending[0]:
            error, self._pending = self._pending[1], None
            self._monitoring.set_local_events(self._tool, code, 0)
            raise error

    def close(self) -> None:
        """Give the tool back."""
        self.switch_off()
        self._monitoring.free_tool_id(self._tool)


def free_tool() -> int | None:
    """Return a tool id of ``sys.monitoring`` that has no user and no well-known purpose; None without one."""
    monitoring: Any = getattr(sys, "monitoring", None)
    return None if monitoring is None else next((tool for tool in (3, 4) if monitoring.get_tool(tool) is None), None)
