"""The side of a remote connection that runs procedures.

Theory of operation. Most procedures that are called remotely never block: they look something up and return. Spawning a
task for each would cost more than they do. So a connection has worker tasks of which one *leads*: it reads the
socket and runs the requests one after the other, each by the first step of its coroutine. Three things can happen in
that step:

- The coroutine returns or raises. The reply is collected, and the leader goes on. No task, no scope, no scheduler pass.
- It blocks, that is, it yields to the scheduler. It has begun in the leader's task and under the leader's cancel
  scope, and can live in no other; so the leader stays with it, and hands the lead to an idle worker or a new one.
- It holds the loop. That holds everyone, here as elsewhere; the watchdog is for that.

Invariants: exactly one worker leads until the connection ends; a worker's scope is reachable by others only while the
worker is with a request that blocked (`_Work` in ``_in_hand``), or, for the end of the connection, while it reads; a
worker that leads has no deadline on its scope except within the first step of a request that came with one. Each
request runs in a `contextvars` context of its own, as in a task of its own, although its worker has seen others.

Replies leave together when the leader has worked off what one read brought (`Output.flush`); those of requests that
blocked leave together with all others of their scheduler pass.

Bounds: ``max_in_flight`` requests that blocked per connection and ``max_running`` over all, more are refused; requests
that do not block need no bound, because the next one is only looked at when they are through. Undecoded requests: what
one read of 64 KiB brought, and one frame. When the caller does not fetch its replies, its requests are no longer read.

Source: Schmidt et al., "Leader/Followers", 2000; the hand-over at the first blocking step is ours.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import traceback
import types
from collections import deque
from collections.abc import Coroutine, Generator
from typing import Any

import attrs
import trio

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed, ProtocolError
from stagetrio.limiter import Overloaded
from stagetrio.procedures import Procedure, Procedures
from stagetrio.remote_hello import GOODBYE_SECONDS, see_off
from stagetrio.remote_output import Output

RECEIVE_BYTES = 65536
SLICE_REQUESTS = 64  # first steps between two checkpoints of a leader
SLICE_SECONDS = 0.002
MAX_IDLE = 64  # workers kept for the next request that blocks
_MESSAGE_CHARACTERS = 500
_TRACEBACK_CHARACTERS = 8000

_log = logging.getLogger("stagetrio.remote")


@attrs.define(eq=False)
class _Work:
    """A worker's place: its scope, and the request it is with once that has blocked."""

    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    request: wire.Request | None = None
    procedure: Procedure | None = None
    began: float = 0.0
    cancelled: bool = False  # by the caller, as opposed to its deadline
    credit: int = 0
    waiting_for_credit: trio.lowlevel.ParkingLot = attrs.Factory(trio.lowlevel.ParkingLot)


class ServedConnection:
    """One caller, from its welcome to its end.

    Args:
        procedures: What it may call.
        stream: The connection; closed by whoever opened it.
        hello: What the caller said.
        max_in_flight: Requests in hand at a time for this caller that did not end in their first step.
        max_running: The same for all callers of these procedures together.
        max_frame_bytes: The longest request.
        max_buffered_bytes: Replies collected for a caller that does not fetch them.
    """

    def __init__(
        self,
        procedures: Procedures,
        stream: trio.abc.Stream,
        hello: wire.Hello,
        *,
        max_in_flight: int,
        max_running: float,
        max_frame_bytes: int,
        max_buffered_bytes: int,
    ) -> None:
        self._procedures, self._tally = procedures, procedures.tally
        self._stream = stream
        self._max_in_flight, self._max_running = max_in_flight, max_running
        self._decoder = LengthPrefixed(max_frame_bytes).decoder()
        self._frame = LengthPrefixed(hello.max_frame_bytes).encode
        self._output = Output(stream, max_buffered_bytes, self._stop_waiting_for_callers)
        self._inbox: deque[bytes] = deque()
        self._in_hand: dict[int, _Work] = {}  # requests that have blocked, by id
        self._idle: list[trio.lowlevel.Task] = []
        self._reading: _Work | None = None
        self._logged: set[tuple[str, type]] = set()
        self._last_id = 0
        self._ended = False
        self._fault: str | None = None  # what the caller did wrong
        self._seconds = 0.01  # how long requests that block take, a moving average
        self._context = contextvars.copy_context()

    async def run(self) -> None:
        """Serve until the caller leaves or breaks the rules; what it posted before is finished then.

        Checkpoints: yes; a cancellation cancels what is in hand.
        """
        async with trio.open_nursery() as writers:
            writers.start_soon(self._output.run)
            async with trio.open_nursery() as self._workers:
                self._workers.start_soon(self._work)
            if self._fault is not None:
                self._tally.broken += 1
                self._output.add(self._frame(wire.encode((5, self._fault[:_MESSAGE_CHARACTERS]))))
            with trio.move_on_after(GOODBYE_SECONDS):
                await self._output.drained()
            writers.cancel_scope.cancel()
        if self._fault is not None:
            await see_off(self._stream)

    # Workers

    async def _work(self) -> None:
        """Lead; stay with a request that blocks; rest until this worker is to lead again."""
        while not self._ended:
            work = _Work()
            try:
                await self._serve(work)
            finally:
                if work.request is not None:
                    del self._in_hand[work.request.id]
                    self._tally.running -= 1
            if len(self._idle) >= MAX_IDLE:
                return
            await self._rest()

    async def _serve(self, work: _Work) -> None:
        """Lead until a request blocks, and see that one through; or lead until the end."""
        value: Any = None
        error: Exception | None = None
        try:
            with work.scope:
                value = await self._lead(work)
        except Exception as raised:
            if work.request is None:
                raise
            error = raised
        if work.request is None:
            self._end()
        else:
            await self._settle(work, value, error)

    async def _rest(self) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        if not self._ended:
            task = trio.lowlevel.current_task()
            self._idle.append(task)
            await trio.lowlevel.wait_task_rescheduled(abort)

    def _hand_over(self) -> None:
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop())
        else:
            self._workers.start_soon(self._work)

    async def _lead(self, work: _Work) -> Any:
        """Read and run requests until one has blocked, and return what that one returns."""
        requests, pause = SLICE_REQUESTS, trio.current_time() + SLICE_SECONDS
        while not self._ended:
            if not self._inbox:
                await self._read(work)
                requests, pause = SLICE_REQUESTS, trio.current_time() + SLICE_SECONDS
                continue
            if self._output.full:
                self._output.flush()
                await self._output.room()
            blocked = self._take(self._inbox.popleft(), work)
            if blocked is not None:
                self._hand_over()
                return await _rest_of(*blocked)
            requests -= 1
            if requests <= 0 or trio.current_time() > pause:
                self._output.flush()
                await trio.lowlevel.checkpoint()
                requests, pause = SLICE_REQUESTS, trio.current_time() + SLICE_SECONDS
        return None

    async def _read(self, work: _Work) -> None:
        self._output.flush()
        if self._fault is not None or self._ended:
            self._end()
            return
        if self._output.broken:
            work.scope.deadline = trio.current_time() + GOODBYE_SECONDS
        self._reading = work
        try:
            data = await self._stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        finally:
            self._reading = None
        if self._output.broken:
            if work.scope.cancel_called:
                self._end()
                return
            work.scope.deadline = math.inf
        try:
            if data:
                self._inbox.extend(self._decoder.receive_data(bytes(data)))
            else:
                self._end()
                self._decoder.receive_eof()
        except ProtocolError as error:
            self._inbox.extend(error.frames)
            self._fault = error.reason

    def _stop_waiting_for_callers(self) -> None:
        """Cancel what nobody waits for any longer; what was posted goes on, and what was posted last may still come."""
        self._output.lift_bound()
        for work in self._in_hand.values():
            if not isinstance(work.request, wire.Post):
                work.scope.cancel()
        if self._reading is not None:
            self._reading.scope.deadline = trio.current_time() + GOODBYE_SECONDS

    def _end(self) -> None:
        """Let nobody lead any more."""
        self._ended = True
        self._stop_waiting_for_callers()
        for task in self._idle:
            trio.lowlevel.reschedule(task)
        self._idle.clear()

    # Requests

    def _take(self, payload: bytes, work: _Work) -> _Blocked | None:
        """Do what one frame asks for, as far as that goes without blocking."""
        try:
            message = wire.read_from_caller(payload)
            kind = type(message)
            if kind is wire.Call or kind is wire.Post or kind is wire.Open:
                return self._begin(message, work)
            if kind is wire.Cancel:
                self._cancel(message.id)
            elif kind is wire.Credit:
                self._add_credit(message)
            else:
                raise ProtocolError("hello was said before")
        except ProtocolError as error:
            self._fault = error.reason
            self._inbox.clear()
        return None

    def _cancel(self, id: int) -> None:
        work = self._in_hand.get(id)
        if work is not None:
            work.cancelled = True
            work.scope.cancel()

    def _add_credit(self, message: wire.Credit) -> None:
        work = self._in_hand.get(message.id)
        if work is not None:
            work.credit += message.values
            work.waiting_for_credit.unpark_all()

    def _begin(self, request: wire.Request, work: _Work) -> _Blocked | None:
        """Run the first step of a request; reply if that was all, else return what is left of it."""
        if request.id <= self._last_id:
            raise ProtocolError(f"id {request.id} does not rise above {self._last_id}")
        self._last_id = request.id
        if self._output.broken and not isinstance(request, wire.Post):
            self._tally.cancelled += 1
            return None
        procedure = self._procedures.get(request.name)
        if procedure is None or procedure.streams is not isinstance(request, wire.Open):
            self._reject(request.id, "LookupError", _no_such(request, procedure))
            return None
        if len(self._in_hand) >= self._max_in_flight or self._tally.running >= self._max_running:
            bound = "flow" if len(self._in_hand) >= self._max_in_flight else "queue"
            self._refuse(request.id, Overloaded(bound, self._seconds))
            return None
        try:
            arguments, keywords = procedure.read_arguments(request.arguments, request.keywords)
        except TypeError as error:
            self._reject(request.id, "TypeError", str(error))
            return None
        if request.remaining is not None:
            if request.remaining == 0:
                self._tally.cancelled += 1
                self._raised(request.id, "TooSlowError", "the deadline had passed before it began")
                return None
            work.scope.deadline = trio.current_time() + request.remaining
        coroutine: Coroutine[Any, Any, Any]
        if isinstance(request, wire.Open):
            work.credit = request.credit
            coroutine = self._feed(request.id, procedure, work, arguments, keywords)
        else:
            coroutine = procedure.function(*arguments, **keywords)
        context = self._context.copy()
        try:
            trap = context.run(coroutine.send, None)
        except StopIteration as stop:
            self._returned(request, procedure, stop.value)
        except Exception as error:
            self._failed(request, procedure, error)
        else:
            work.request, work.procedure, work.began = request, procedure, trio.current_time()
            self._in_hand[request.id] = work
            self._tally.running += 1
            return coroutine, context, trap
        if request.remaining is not None:
            work.scope.deadline = math.inf
        return None

    async def _feed(
        self, id: int, procedure: Procedure, work: _Work, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Send what a generator yields, as far as the caller has given credit."""
        source = procedure.function(*arguments, **keywords)
        pack = procedure.pack_result
        async with contextlib.aclosing(source) if hasattr(source, "aclose") else source as values:
            async for value in values:
                while not work.credit:
                    await work.waiting_for_credit.park()
                work.credit -= 1
                await self._output.room()
                self._output.add(self._frame(wire.encode((2, id, value if pack is None else pack(value)))))
                self._output.flush_soon()

    async def _settle(self, work: _Work, value: Any, error: Exception | None) -> None:
        """Reply for a request that had blocked; it holds its place until there is room for that."""
        assert work.request is not None
        assert work.procedure is not None
        await self._output.room()
        self._seconds += (trio.current_time() - work.began - self._seconds) / 8
        if error is not None:
            self._failed(work.request, work.procedure, error)
        elif work.scope.cancelled_caught:
            self._tally.cancelled += 1
            if work.cancelled:
                self._raised(work.request.id, "Cancelled", "by the caller")
            else:
                self._raised(work.request.id, "TooSlowError", "the deadline passed before it ended")
        else:
            self._returned(work.request, work.procedure, value)
        self._output.flush_soon()

    # Replies

    def _returned(self, request: wire.Request, procedure: Procedure, value: Any) -> None:
        try:
            packed = value if procedure.pack_result is None or procedure.streams else procedure.pack_result(value)
            frame = self._frame(wire.encode((1, request.id, None if isinstance(request, wire.Post) else packed)))
        except Exception as error:  # whatever the codec finds in it
            self._tally.raised += 1
            self._raised(request.id, type(error).__name__, f"the result of {procedure.name!r} cannot be sent: {error}")
            return
        self._tally.returned += 1
        self._reply(frame)

    def _failed(self, request: wire.Request, procedure: Procedure, error: Exception) -> None:
        if isinstance(error, Overloaded):
            self._refuse(request.id, error)
            return
        self._tally.raised += 1
        kind = type(error)
        if isinstance(request, wire.Post) and (procedure.name, kind) not in self._logged:
            self._logged.add((procedure.name, kind))  # once for each cause; the rest is in the statistics
            _log.warning("posted procedure %r raised", procedure.name, exc_info=error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        self._raised(request.id, name, str(error), _text_of(error))

    def _reject(self, id: int, type_name: str, message: str) -> None:
        self._tally.rejected += 1
        self._raised(id, type_name, message)

    def _refuse(self, id: int, refusal: Overloaded) -> None:
        self._tally.refused += 1
        self._reply(self._frame(wire.encode((4, id, refusal.reason[:_MESSAGE_CHARACTERS], refusal.retry_after))))

    def _raised(self, id: int, type_name: str, message: str, text: str = "") -> None:
        message = message[:_MESSAGE_CHARACTERS].encode(errors="replace").decode()
        try:
            frame = self._frame(wire.encode((3, id, type_name, message, text)))
        except ValueError:  # it does not fit into the caller's frames
            frame = self._frame(wire.encode((3, id, type_name[:100], message[:100], "")))
        self._reply(frame)

    def _reply(self, frame: bytes) -> None:
        if self._ended or self._output.broken:
            self._tally.undeliverable += 1
        self._output.add(frame)


_Blocked = tuple[Coroutine[Any, Any, Any], contextvars.Context, Any]


@types.coroutine
def _rest_of(coroutine: Coroutine[Any, Any, Any], context: contextvars.Context, trap: Any) -> Generator[Any, Any, Any]:
    """Await a coroutine whose first step has been taken, in its own context: ``yield from``, but for a begun one."""
    run = context.run
    while True:
        try:
            try:
                answer = yield trap
            except BaseException as error:  # the coroutine is torn down, or awaited something foreign
                trap = run(coroutine.throw, error)
            else:
                trap = run(coroutine.send, answer)
        except StopIteration as stop:
            return stop.value


def _no_such(request: wire.Request, procedure: Procedure | None) -> str:
    if procedure is None:
        return f"there is no procedure {request.name[:100]!r}"
    return f"procedure {procedure.name!r} {'yields: stream it' if procedure.streams else 'returns: call it'}"


def _text_of(error: BaseException) -> str:
    """Return the traceback without the frames of this module, cut to its end."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    return text[-_TRACEBACK_CHARACTERS:].encode(errors="replace").decode()
