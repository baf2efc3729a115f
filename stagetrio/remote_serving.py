"""The side of a remote connection that runs procedures.

Theory of operation. Most procedures that are called remotely never block: they look something up and return. Spawning a
task for each would cost more than they do. So a connection has worker tasks of which one *leads*: it reads the
socket and runs the requests one after the other, each by the first step of its coroutine. Three things can happen in
that step:

- The coroutine returns or raises. The reply is collected, and the leader goes on. No task, no scope, no scheduler pass.
- It blocks, that is, it yields to the scheduler. It has begun in the leader's task and under the leader's cancel
  scope, and can live in no other; so the leader stays with it, and hands the lead to an idle worker or a new one.
- It holds the loop. That holds everyone, here as elsewhere; the watchdog is for that.

A hand-over takes one scheduler pass, so 64 requests that block would take 64 passes to begin. That is why each
procedure has a moving average of how often it blocks: one that often does, with more requests behind it, is handed out
to an idle worker or a new one before it begins, and the leader goes on in the same pass. A wrong guess costs a few
microseconds.

Invariants: exactly one worker leads until the connection ends. A worker has one cancel scope for as long as nobody
cancels it; others reach it only through the request that it is with (`_Work` in ``_in_hand``), or, for the end of the
connection, while it reads. It has a deadline only while it is with a request that came with one. Each request
runs in a `contextvars` context of its own, as in a task of its own, although its worker has seen others.

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
import math
import types
from collections import deque
from collections.abc import Coroutine, Generator
from typing import Any

import attrs
import outcome
import trio

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed, ProtocolError
from stagetrio.limiter import Overloaded
from stagetrio.procedures import Procedure, Procedures
from stagetrio.remote_hello import GOODBYE_SECONDS, see_off
from stagetrio.remote_output import Output
from stagetrio.remote_replies import Replies

RECEIVE_BYTES = 65536
SLICE_REQUESTS = 64  # first steps between two checkpoints of a leader
SLICE_SECONDS = 0.002
MAX_IDLE = 64  # workers kept for the next request that blocks
MOSTLY = 0.25  # how often a procedure has to block to be handed out: a hand-over costs some four times a hand-out


@attrs.define(eq=False)
class _Work:
    """A request that has blocked, or has been handed out and may."""

    request: wire.Request
    procedure: Procedure
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    deadline: float
    scope: trio.CancelScope | None = None  # of the worker that is with it
    rest: tuple[Coroutine[Any, Any, Any], contextvars.Context, Any] | None = None  # what its first step has left
    answered: bool = False
    began: float = 0.0
    cancelled: bool = False  # by the caller, as opposed to its deadline
    credit: int = 0
    waiting_for_credit: trio.lowlevel.ParkingLot | None = None

    def cancel(self) -> None:
        """Cancel it where it waits, or before it begins."""
        self.cancelled = True
        if self.scope is not None:
            self.scope.cancel()


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
        self._output = Output(stream, max_buffered_bytes, self._stop_waiting_for_caller)
        self._replies = Replies(self._output, hello.max_frame_bytes, procedures)
        self._inbox: deque[bytes] = deque()
        self._in_hand: dict[int, _Work] = {}  # by id
        self._idle: list[trio.lowlevel.Task] = []
        self._reading: trio.CancelScope | None = None
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
                self._workers.start_soon(self._work, None)
            if self._fault is not None:
                self._replies.bye(self._fault)
            with trio.move_on_after(GOODBYE_SECONDS):
                await self._output.drained()
            writers.cancel_scope.cancel()
        if self._fault is not None:
            await see_off(self._stream)

    # Workers

    async def _work(self, work: _Work | None) -> None:
        """Serve a request that was handed out, or lead until one blocks and serve that; then rest, and again."""
        while True:
            value: Any = None
            error: Exception | None = None
            try:
                with trio.CancelScope() as scope:
                    if work is None:
                        work = await self._lead(scope)
                    elif not work.cancelled:
                        self._step(work, scope)
                    if work is not None and work.rest is not None:
                        value = await _rest_of(*work.rest)
            except Exception as raised:
                if work is None:
                    raise
                error = raised
            finally:
                if work is not None:
                    self._leave(work)
            if work is None:
                self._end()
                return
            if not work.answered:
                await self._settle(work, value, error, cancelled=scope.cancelled_caught or work.rest is None)
            if self._ended or len(self._idle) >= MAX_IDLE:
                return
            work = await self._rest()

    async def _rest(self) -> _Work | None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        task = trio.lowlevel.current_task()
        self._idle.append(task)
        work: _Work | None = await trio.lowlevel.wait_task_rescheduled(abort)
        return work

    def _occupy(self, work: _Work | None) -> None:
        """Have another worker serve ``work``, or lead."""
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop(), outcome.Value(work))
        else:
            self._workers.start_soon(self._work, work)

    def _enter(self, work: _Work) -> None:
        work.began = trio.current_time()
        self._in_hand[work.request.id] = work
        self._tally.running += 1

    def _leave(self, work: _Work) -> None:
        del self._in_hand[work.request.id]
        self._tally.running -= 1

    async def _lead(self, scope: trio.CancelScope) -> _Work | None:
        """Read and run requests until one has blocked, and return that; None at the end of the connection."""
        requests, pause = SLICE_REQUESTS, trio.current_time() + SLICE_SECONDS
        while not self._ended:
            if not self._inbox:
                await self._read(scope)
                requests, pause = SLICE_REQUESTS, trio.current_time() + SLICE_SECONDS
                continue
            if self._output.full:
                self._output.flush()
                await self._output.room()
            work = self._take(self._inbox.popleft())
            if work is not None:
                if self._inbox and work.procedure.blocking > MOSTLY:
                    self._enter(work)
                    self._occupy(work)
                elif self._step(work, scope):
                    self._enter(work)
                    self._occupy(None)
                    return work
            requests -= 1
            if requests <= 0 or trio.current_time() > pause:
                self._output.flush()
                await trio.lowlevel.checkpoint()
                requests, pause = SLICE_REQUESTS, trio.current_time() + SLICE_SECONDS
        return None

    async def _read(self, scope: trio.CancelScope) -> None:
        self._output.flush()
        if self._fault is not None or self._ended:
            self._end()
            return
        if self._output.broken:
            scope.deadline = trio.current_time() + GOODBYE_SECONDS
        self._reading = scope
        try:
            data = await self._stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        finally:
            self._reading = None
        if self._output.broken:
            if scope.cancel_called:
                self._end()
                return
            scope.deadline = math.inf
        try:
            if data:
                self._inbox.extend(self._decoder.receive_data(bytes(data)))
            else:
                self._end()
                self._decoder.receive_eof()
        except ProtocolError as error:
            self._inbox.extend(error.frames)
            self._blame(error)

    def _stop_waiting_for_caller(self) -> None:
        """Cancel what nobody waits for any longer; what was posted goes on, and what was posted last may still come."""
        self._replies.wanted = False
        self._output.lift_bound()
        for work in self._in_hand.values():
            if not isinstance(work.request, wire.Post):
                work.cancel()
        if self._reading is not None:
            self._reading.deadline = trio.current_time() + GOODBYE_SECONDS

    def _blame(self, error: ProtocolError) -> None:
        """End this connection when what came before the mistake has been done."""
        self._fault = error.reason
        self._tally.broken += 1
        self._procedures.mistakes.record(error)

    def _end(self) -> None:
        """Let nobody lead any more."""
        self._ended = True
        self._stop_waiting_for_caller()
        for task in self._idle:
            trio.lowlevel.reschedule(task)
        self._idle.clear()

    # Requests

    def _take(self, payload: bytes) -> _Work | None:
        """Do what one frame asks for; return the request if it is one that can begin."""
        try:
            message = wire.read_from_caller(payload)
            kind = type(message)
            if kind is wire.Call or kind is wire.Post or kind is wire.Open:
                return self._admit(message)
            if kind is wire.Hello:
                raise ProtocolError("hello was said before")
        except ProtocolError as error:
            self._inbox.clear()
            self._blame(error)
            return None
        work = self._in_hand.get(message.id)
        if work is None:
            pass  # its answer is on its way, or it was never here
        elif kind is wire.Cancel:
            work.cancel()
        else:
            work.credit += message.values
            if work.waiting_for_credit is not None:
                work.waiting_for_credit.unpark_all()
        return None

    def _admit(self, request: wire.Request) -> _Work | None:
        """Return the request, ready to begin, or answer why it cannot."""
        id = request.id
        if id <= self._last_id:
            raise ProtocolError(f"id {id} does not rise above {self._last_id}")
        self._last_id = id
        if self._output.broken and not isinstance(request, wire.Post):
            self._tally.cancelled += 1
            return None
        procedure = self._procedures.get(request.name)
        if procedure is None or procedure.streams is not (type(request) is wire.Open):
            self._replies.rejected(id, "LookupError", _no_such(request, procedure))
            return None
        if len(self._in_hand) >= self._max_in_flight or self._tally.running >= self._max_running:
            bound = "flow" if len(self._in_hand) >= self._max_in_flight else "queue"
            self._replies.refused(id, Overloaded(bound, self._seconds))
            return None
        try:
            arguments, keywords = procedure.read_arguments(request.arguments, request.keywords)
        except TypeError as error:
            self._replies.rejected(id, "TypeError", str(error))
            return None
        deadline = math.inf
        if request.remaining is not None:
            deadline = trio.current_time() + request.remaining
            if request.remaining == 0:
                self._replies.cancelled(id, by_caller=False)
                return None
        return _Work(request, procedure, arguments, keywords, deadline)

    def _step(self, work: _Work, scope: trio.CancelScope) -> bool:
        """Take the first step of a request; answer if that was all; whether it has blocked."""
        procedure = work.procedure
        work.scope = scope
        if work.deadline != math.inf:
            scope.deadline = work.deadline
        context = self._context.copy()
        try:
            coroutine = self._coroutine(work)
            trap = context.run(coroutine.send, None)
        except StopIteration as stop:
            self._replies.returned(work.request, procedure, stop.value)
        except Exception as error:
            self._replies.failed(work.request, error)
        else:
            work.rest = (coroutine, context, trap)
            procedure.blocking += (1 - procedure.blocking) / 8
            return True
        work.answered = True
        procedure.blocking -= procedure.blocking / 8
        if work.deadline != math.inf:
            scope.deadline = math.inf
        return False

    def _coroutine(self, work: _Work) -> Coroutine[Any, Any, Any]:
        if isinstance(work.request, wire.Open):
            return self._feed(work, work.request)
        coroutine: Coroutine[Any, Any, Any] = work.procedure.function(*work.arguments, **work.keywords)
        return coroutine

    async def _feed(self, work: _Work, request: wire.Open) -> None:
        """Send what a generator yields, as far as the caller has given credit."""
        work.credit += request.credit
        work.waiting_for_credit = trio.lowlevel.ParkingLot()
        source = work.procedure.function(*work.arguments, **work.keywords)
        async with contextlib.aclosing(source) if hasattr(source, "aclose") else source as values:
            async for value in values:
                while not work.credit:
                    await work.waiting_for_credit.park()
                work.credit -= 1
                await self._output.room()
                self._replies.value(request.id, work.procedure, value)
                self._output.flush_soon()

    async def _settle(self, work: _Work, value: Any, error: Exception | None, *, cancelled: bool) -> None:
        """Answer for a request that had blocked, or was cancelled before it began."""
        self._seconds += (trio.current_time() - work.began - self._seconds) / 8
        await self._output.room()
        if error is not None:
            self._replies.failed(work.request, error)
        elif cancelled:
            self._replies.cancelled(work.request.id, by_caller=work.cancelled)
        else:
            self._replies.returned(work.request, work.procedure, value)
        self._output.flush_soon()


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
