"""The side of a remote connection that calls.

Theory of operation. A call takes a place among ``max_in_flight``, writes one frame, and parks its task under the id of
that (``_pending``). One task reads (`CallingConnection.run`), and wakes the parked tasks by the ids of the answers.

Who leaves early (its scope was cancelled) says so with a `Cancel` and leaves its place *abandoned*: the worker answers
every request exactly once, so the place is free again when the late answer has come, and that answer finds nobody to
go to. Ids rise and are never used twice, so an answer can never reach another caller.

Frames of one scheduler pass leave in one write. A call that is alone is written at once, since there is nothing to wait
for (as in Nagle's algorithm, it only pays to collect with something in flight): alone means that no other place is
taken and that the last read brought no more than one answer, or 64 callers in step would each time send the first of
them ahead of the rest.

Invariant: ``_places`` = requests in ``_pending`` + tasks that have been given a place and have not written yet; a place
that falls free goes straight to the longest waiting caller, so nobody overtakes.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import outcome
import trio
from msgspec import Raw

from stagetrio import remote_wire as wire
from stagetrio.framing import LengthPrefixed, ProtocolError
from stagetrio.limiter import Overloaded
from stagetrio.remote_hello import GOODBYE_SECONDS
from stagetrio.remote_output import Output
from stagetrio.remote_values import Values
from stagetrio.remote_wire import RemoteError, WorkerLost

RECEIVE_BYTES = 65536
CLOSED_HERE = "this side has closed the connection"
_CALL, _POST, _OPEN = 1, 2, 3

_ABANDONED: Final = "abandoned"  # stands for a caller that has left
_POSTED: Final = "posted"  # stands for a caller that never waited


@attrs.define
class CallingTally:
    """The numbers behind the statistics of a calling side, counted by its connections."""

    sent: int = 0
    late: int = 0
    posts_failed: int = 0
    connections: int = 0


class CallingConnection:
    """One connection to a worker, from its welcome to its end.

    Args:
        stream: The connection; `run` closes it.
        welcome: What the worker said.
        tally: Where to count.
        max_frame_bytes: The longest answer.
        max_buffered_bytes: Requests collected for a worker that does not fetch them; callers wait beyond it.
        why: Asked when the connection has ended, with what was seen of that here, for what is to be told to callers in
            flight. Meanwhile the connection refuses others.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        welcome: wire.Welcome,
        tally: CallingTally,
        *,
        max_frame_bytes: int,
        max_buffered_bytes: int,
        why: Callable[[str], Awaitable[str]] | None = None,
    ) -> None:
        self._stream, self._tally, self._why = stream, tally, why
        self._scope = trio.CancelScope()
        self._decoder = LengthPrefixed(max_frame_bytes).decoder()
        self._frame = LengthPrefixed(welcome.max_frame_bytes).encode
        self._output = Output(stream, max_buffered_bytes, self._hear_the_rest)
        self._pending: dict[int, trio.lowlevel.Task | Values | str] = {}
        self._waiting = trio.lowlevel.ParkingLot()
        self._places = 0
        self._last_id = 0
        self._answers = 0  # in the last read
        self._closing = self._over = False
        self.heard = False  # whether anything has been answered
        self.max_in_flight = welcome.max_in_flight
        self.lost: str | None = None  # why this connection takes nothing more

    @property
    def in_flight(self) -> int:
        """Requests whose answer is outstanding."""
        return len(self._pending)

    @property
    def waiting(self) -> int:
        """Callers that wait for a place."""
        return len(self._waiting)

    # Callers

    async def call(self, name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Raw:
        """Run a procedure over there and return what it returned, still encoded.

        Raises:
            RemoteError: It raised, or could not begin.
            Overloaded: The worker refused.
            WorkerLost: The connection ended first.
            TypeError: An argument cannot be encoded.
            ValueError: The arguments do not fit into a frame.

        Checkpoints: always. A cancellation while it waits for its place means it did not happen; after that it may.
        """
        deadline = trio.current_effective_deadline()
        if deadline == -math.inf:
            await trio.lowlevel.checkpoint()  # which raises Cancelled: a call is a checkpoint by waiting for its answer
        if self._places >= self.max_in_flight or self._output.full or self.lost is not None:
            await self._wait_for_place()
        else:
            self._places += 1
        id = self._say(_CALL, name, None, arguments, keywords, trio.lowlevel.current_task(), deadline)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._pending[id] = _ABANDONED  # at once: the answer may come before this task has run
            return trio.lowlevel.Abort.SUCCEEDED

        try:
            answer = await trio.lowlevel.wait_task_rescheduled(abort)
        except BaseException:  # cancelled, interrupted, or lost: then nothing is outstanding any more
            self.abandon(id)
            raise
        if type(answer) is not wire.Result:
            raise _error_of(answer)
        return answer.value

    async def post(self, name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Have a procedure run over there, and wait for nothing but a place for it.

        Raises:
            WorkerLost: The connection has ended before.
            TypeError: An argument cannot be encoded.
            ValueError: The arguments do not fit into a frame.

        Checkpoints: only where it has to wait for its place. A cancellation means it did not happen.
        """
        await self._wait_for_place()
        self._say(_POST, name, None, arguments, keywords, _POSTED, math.inf)

    async def open(self, name: str, arguments: Sequence[Any], keywords: Mapping[str, Any], window: int) -> Values:
        """Have a procedure run over there that yields; the caller owes it to `abandon` what it opened.

        Raises:
            WorkerLost: The connection has ended before.
            TypeError: An argument cannot be encoded.
            ValueError: The arguments do not fit into a frame.

        Checkpoints: only where it has to wait for its place. A cancellation means it did not happen.
        """
        await self._wait_for_place()
        values = Values(window, self._grant)
        values.id = self._say(_OPEN, name, window, arguments, keywords, values, trio.current_effective_deadline())
        return values

    async def _wait_for_place(self) -> None:
        """Take a place as soon as there is one, and room for what will be said."""
        self._check_alive()
        if self._places >= self.max_in_flight:
            await self._waiting.park()
        else:
            self._places += 1
        try:
            await self._output.room()
            self._check_alive()
        except BaseException:
            self._free_place()
            raise

    def _check_alive(self) -> None:
        if self._closing:
            raise trio.ClosedResourceError(CLOSED_HERE)
        if self.lost is not None:
            raise WorkerLost(self.lost, may_have_run=False)

    def _free_place(self) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._places -= 1

    def _say(
        self,
        kind: int,
        name: str,
        credit: int | None,
        arguments: Sequence[Any],
        keywords: Mapping[str, Any],
        waiter: trio.lowlevel.Task | Values | str,
        deadline: float,
    ) -> int:
        """Write a request into the place that the caller holds; return its id."""
        remaining = None if deadline == math.inf else max(0.0, deadline - trio.current_time())
        self._last_id = id = self._last_id + 1
        body = (arguments, keywords) if keywords else (arguments,)
        try:
            if credit is None:
                frame = self._frame(wire.encode((kind, id, name, remaining, *body)))
            else:
                frame = self._frame(wire.encode((kind, id, name, remaining, credit, *body)))
        except BaseException:
            self._free_place()
            raise
        self._pending[id] = waiter
        self._tally.sent += 1
        self._output.add(frame)
        if self._places == 1 and self._answers <= 1:
            self._output.flush()
        else:
            self._output.flush_soon()
        return id

    def abandon(self, id: int) -> None:
        """Wait no longer for the answer to a request; whatever runs for it over there is cancelled."""
        if id in self._pending:
            self._pending[id] = _ABANDONED
            self._output.add(self._frame(wire.encode((5, id))))
            self._output.flush_soon()

    def _grant(self, id: int, values: int) -> None:
        if id in self._pending:
            self._output.add(self._frame(wire.encode((4, id, values))))
            self._output.flush_soon()

    # The connection

    async def run(self) -> None:
        """Read until the connection ends, and tell whoever waits.

        Checkpoints: yes; a cancellation ends the connection.
        """
        reason = "the connection broke"
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._output.run)
                    reason = await self._read()
                    self._refuse(reason)
                    if self._why is not None:
                        reason = await self._why(reason)
                    nursery.cancel_scope.cancel()
        finally:
            self._lose(reason)
            await trio.aclose_forcefully(self._stream)

    def _hear_the_rest(self) -> None:
        """The other side takes nothing any more, but what it said last, answers or a reason, may still come."""
        self._scope.deadline = trio.current_time() + GOODBYE_SECONDS

    async def say_the_rest(self) -> None:
        """Hand over what has been said, as far as it is taken within ``GOODBYE_SECONDS``.

        Checkpoints: yes.
        """
        with trio.move_on_after(GOODBYE_SECONDS):
            await self._output.drained()

    def close(self) -> None:
        """End the connection from this side; whoever waits gets ``trio.ClosedResourceError``."""
        self._closing = True
        self._lose(CLOSED_HERE)
        self._scope.cancel()

    async def _read(self) -> str:
        """Deal out answers until the end; return why it ended."""
        while True:
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return "the connection broke"
            if not data:
                return "the other side closed the connection"
            try:
                frames = self._decoder.receive_data(bytes(data))
                self._answers = len(frames)
                self.heard = True
                for frame in frames:
                    self._take(wire.read_from_worker(frame))
            except ProtocolError as error:
                return f"the other side broke the rules: {error.reason}"
            except _Farewell as farewell:
                return f"the other side ended the connection: {farewell}"

    def _take(self, message: Any) -> None:
        kind = type(message)
        if kind is wire.Result or kind is wire.Raised or kind is wire.Refusal:
            self._answer(message, kind is wire.Result)
        elif kind is wire.Bye:
            raise _Farewell(message.reason)
        elif kind is wire.Welcome:
            raise ProtocolError("welcome was said before")
        else:
            waiter = self._pending.get(message.id)
            if isinstance(waiter, Values):
                waiter.add(message.value)
            elif waiter is _ABANDONED:
                self._tally.late += 1
            else:
                raise ProtocolError(f"a value for id {message.id}, which is not a stream")

    def _answer(self, message: Any, good: bool) -> None:
        """Give an answer to whoever waits for it, and its place to the next."""
        waiter = self._pending.pop(message.id, None)
        if waiter is None:
            raise ProtocolError(f"an answer to id {message.id}, which is not outstanding")
        self._free_place()
        if isinstance(waiter, trio.lowlevel.Task):
            trio.lowlevel.reschedule(waiter, outcome.Value(message))
        elif isinstance(waiter, Values):
            waiter.end(None if good else _error_of(message))
        elif waiter is _POSTED:
            self._tally.posts_failed += not good
        else:
            self._tally.late += 1

    def _refuse(self, reason: str) -> None:
        """Take nothing more; who waits for a place has certainly not called."""
        self.lost = reason
        self._output.lift_bound()
        self._waiting.unpark_all()

    def _lose(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        self._refuse(reason)
        pending, self._pending = self._pending, {}
        for waiter in pending.values():
            error = trio.ClosedResourceError(reason) if self._closing else WorkerLost(reason, may_have_run=True)
            if isinstance(waiter, Values):
                waiter.end(error)
            elif isinstance(waiter, trio.lowlevel.Task):
                trio.lowlevel.reschedule(waiter, outcome.Error(error))
            elif waiter is _POSTED:
                self._tally.posts_failed += 1


class _Farewell(Exception):
    """The worker said why it ends the connection."""


def _error_of(answer: Any) -> Exception:
    if isinstance(answer, wire.Refusal):
        return Overloaded(answer.reason, answer.retry_after)
    return RemoteError(answer.type_name, answer.message, answer.traceback)
