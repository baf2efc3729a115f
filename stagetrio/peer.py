"""One connection, from the bytes that come to the bytes that go.

Theory of operation. A peer is driven from three sides, all of them synchronous and in Trio's thread: its transport
hands it bytes, its host (the server) tells it what became of its messages, and the reaper looks whether it keeps its
rules. What it holds is bounded:

================= ==================================================== =======================================
held              bound                                                at the bound
================= ==================================================== =======================================
partial frame     the framing's ``max_bytes``                          the peer's mistake: the connection ends
queued messages   ``max_decoded``, those in hand included              the socket is not read
their bytes       ``max_input_bytes``, counted since none was queued   the socket is not read
frames read       those of one read (64 KiB), not queued yet           the socket is not read
output            ``max_outbox_bytes``, and the replies to what is     the socket is not read; ``send`` waits, what
                  queued; 64 KiB more where a stream has it in hand    ``send_nowait`` does is ``when_outbox_full``
================= ==================================================== =======================================

The states, and what leads from one to the next::

    OPEN ──close, mistake, rule broken──▶ CLOSING ──output written──▶ LINGERING ──the other side closes──▶ CLOSED
      ╰──the connection is lost, from any state─────────────────────────────────────────────────────────────▲
                                  CLOSING and LINGERING last at most ``linger`` seconds ────────────────────╯

Orderly ends (the peer has finished sending, a mistake after good frames, a drain) first serve what was received:
reading stops, and CLOSING follows when the last queued message is done. After that the farewell is written, the output
is shut down, and input is read and thrown away until the other side closes too: closing a socket with unread input
makes the kernel send a reset, which may overtake the last reply.
"""

from __future__ import annotations

import enum
import ssl
from collections.abc import Awaitable, Callable, Hashable
from itertools import count
from math import inf
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

from stagetrio.framing import FrameDecoder, ProtocolError
from stagetrio.host import Host, PeerStatistics
from stagetrio.limiter import Overloaded
from stagetrio.outbox import Outbox, WhenFull
from stagetrio.rules import CloseReason
from stagetrio.sockets import Address
from stagetrio.transport import HandshakeFailed, Transport

M = TypeVar("M")
Ts = TypeVarTuple("Ts")

_serial = count(1)


class _State(enum.IntEnum):
    OPEN = 0
    CLOSING = 1
    LINGERING = 2
    CLOSED = 3


class Peer(Generic[M]):
    """The other side of one connection, as handlers see it.

    Made by the server.

    Attributes:
        data: Whatever the app keeps of this connection; the library does not look at it.
        closed: Whether the connection is closed or about to be: nothing sent from now on arrives.
    """

    __slots__ = (
        "__weakref__",
        "_address",
        "_backlog",
        "_blocked",
        "_bytes_received",
        "_bytes_sent",
        "_decoder",
        "_end_after",
        "_eof",
        "_flow",
        "_frame_began",
        "_frames_received",
        "_heard",
        "_host",
        "_input_mark",
        "_last_frame",
        "_leftover",
        "_output_mark",
        "_paused",
        "_pinged",
        "_reason",
        "_room",
        "_started",
        "_state",
        "_touched",
        "_transport",
        "_watching_frame",
        "_watching_output",
        "channel",
        "closed",
        "data",
        "has_own_flow",
        "outbox",
    )

    def __init__(self, host: Host, transport: Transport, address: Address | None, decoder: FrameDecoder) -> None:
        self.data: Any = None
        self.closed = False
        self.channel: Any = None  # the host's: where this peer's messages go
        self._host = host
        self._transport = transport
        self._address = address
        self._decoder = decoder
        # Not the peer itself: the queue remembers flows for longer than their connections last.
        self._flow: Hashable = f"connection {next(_serial)}"
        self.has_own_flow = True
        self._state = _State.OPEN
        self._reason: CloseReason | None = None
        self._end_after: tuple[CloseReason, str] | None = None
        self._eof = False
        self._backlog = 0
        self._leftover: list[bytes] = []
        self._started = False
        self._paused = False
        self.outbox = Outbox()
        self._touched = False
        self._blocked = True  # the kernel has no room for output, or `start` is still to come
        self._room: trio.Event | None = None  # what `send` waits for
        self._frames_received = self._bytes_received = self._bytes_sent = 0
        self._input_mark = 0  # bytes that had come when no message was queued or in hand
        self._last_frame = -inf
        self._heard = 0  # bytes that had come when it was last looked whether any came
        self._pinged = False  # since then
        self._frame_began = (0.0, 0)  # when the partial frame began, and how many bytes had been received before it
        self._watching_frame = self._watching_output = False
        self._output_mark = 0  # bytes the other side had read when its reading was last looked at

    def __repr__(self) -> str:
        return f"<Peer {self._address} {self._state.name.lower()}>"

    @property
    def address(self) -> Address | None:
        """Where the other side is, or None for a stream that cannot tell."""
        return self._address

    @property
    def tls(self) -> ssl.SSLObject | None:
        """What knows the other side's certificate and the cipher; None if the connection is not encrypted, or not yet.

        It is there for reading (``getpeercert()``, ``selected_alpn_protocol()``).
        """
        tls: ssl.SSLObject | None = getattr(self._transport, "tls", None)
        return tls

    @property
    def close_reason(self) -> CloseReason | None:
        """Why the connection ended, or None while it is open."""
        return self._reason

    @property
    def flow(self) -> Hashable:
        """Whose share this peer's messages take from; set it when the other side has said who it is.

        Until then it is a flow of the connection's own. Messages already queued stay where they are.
        """
        return self._flow

    @flow.setter
    def flow(self, flow: Hashable) -> None:
        try:
            hash(flow)
        except TypeError:
            raise TypeError(f"flow must be hashable, not {flow!r}") from None
        if not self.closed:
            self._host.move(self, flow)
        self._flow = flow
        self.has_own_flow = False

    def statistics(self) -> PeerStatistics:
        """Return a snapshot of the counts."""
        return PeerStatistics(
            frames_received=self._frames_received,
            bytes_received=self._bytes_received,
            bytes_sent=self._bytes_sent,
            backlog=self._backlog + len(self._leftover),
            outbox_bytes=self.outbox.size,
            dropped=self.outbox.dropped,
            coalesced=self.outbox.coalesced,
            paused=self._paused,
        )

    def send_nowait(self, message: M, *, key: Hashable = None) -> None:
        """Queue a message for the other side; it is written when the current slice ends.

        At the bound of the outbox `PeerLimits.when_outbox_full` says what becomes of it.

        Args:
            message: What to send.
            key: What the message is the latest news of: it takes the place of an earlier one with the same key which
                has not been written yet. None: it is news of its own.

        Raises:
            Overloaded: The outbox is full; its reason is ``"outbox"``.
            trio.ClosedResourceError: The connection has ended.
            TypeError: The codec does not know the message.
            ValueError: The message is longer than a frame.
        """
        self.send_frame_nowait(self._host.frame_of(message), key=key)

    def send_frame_nowait(self, frame: bytes, *, key: Hashable = None) -> None:
        """Queue the bytes of a whole frame, as `send_nowait` would; for one message to many peers, encoded once."""
        if self._state:
            raise trio.ClosedResourceError(f"the connection has ended ({self._reason_value()})")
        outbox = self.outbox
        if key is not None and outbox.replace(key, frame):
            return
        if outbox.size >= self._host.limits.max_outbox_bytes and not self._make_room():
            outbox.dropped += 1
            return
        outbox.push(frame, key)
        self._touch()

    def _make_room(self) -> bool:
        limits = self._host.limits
        if limits.when_outbox_full is WhenFull.REFUSE:
            raise Overloaded("outbox")
        if limits.when_outbox_full is WhenFull.DISCONNECT:
            self.abort(CloseReason.OUTBOX_FULL)  # a farewell would only join what is not being read
            raise trio.ClosedResourceError("more was sent than the other side has read; the connection was closed")
        return limits.when_outbox_full is WhenFull.DROP_OLDEST and self.outbox.drop_oldest(limits.max_outbox_bytes)

    async def send(self, message: M) -> None:
        """Queue a message for the other side as soon as its outbox has room.

        Raises:
            trio.ClosedResourceError: The connection has ended, or ends while this waits.
            TypeError: The codec does not know the message.
            ValueError: The message is longer than a frame.

        Checkpoints: always; cancelled, the message was not queued.
        """
        frame = self._host.frame_of(message)
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._state and self.outbox.size >= self._host.limits.max_outbox_bytes:
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()
        if self._state:
            raise trio.ClosedResourceError(f"the connection has ended ({self._reason_value()})")
        self.put(frame)
        await trio.lowlevel.cancel_shielded_checkpoint()

    def start_soon(self, fn: Callable[[*Ts], Awaitable[object]], *args: *Ts) -> None:
        """Start a task that lives at most as long as the connection: it is cancelled when that ends.

        Raises:
            trio.ClosedResourceError: The connection has ended.
        """
        if self._state:
            raise trio.ClosedResourceError(f"the connection has ended ({self._reason_value()})")
        self._host.spawn(self, fn, args)

    def close(self, reason: str = "closed by the server") -> None:
        """End the connection: what is queued of its messages is dropped, what was sent to it still arrives.

        Args:
            reason: Told to the other side where the wire has words for it.
        """
        self.end(CloseReason.CLOSED, reason)

    # What follows is for the host.

    def start(self) -> None:
        """Begin to read and to write."""
        if self._state is _State.CLOSED:
            return
        limits = self._host.limits
        now = trio.current_time()
        self._host.check_at(self, now + limits.first_frame_within, self._check_silence)
        if limits.idle_within != inf:
            self._last_frame = now
            self._host.check_at(self, now + limits.idle_within, self._check_idle)
        if limits.ping_after != inf:
            self._host.check_at(self, now + limits.ping_after, self._check_ping)
        self._started = True
        self._transport.start(self._on_data, self._on_end, self._on_writable)
        if self._paused and not self._state:  # one that is closing reads on, to hear of the other side's end
            self._transport.pause()
        self._on_writable()

    def put(self, frame: bytes) -> None:
        """Append to the outbox whatever its size: replies, which the messages in hand bound."""
        self.outbox.put(frame)
        self._touch()

    def reply(self, frame: bytes) -> bool:
        """Put the reply to a message taken by `Host.admit`, which is done with it; False where nobody will get it."""
        if self._state:
            return False
        self.outbox.put(frame)
        if not self._touched:
            self._touched = True
            self._host.touch(self)
        self._backlog -= 1
        if self._paused or self._end_after is not None:
            self.advance()
        return True

    def done(self) -> None:
        """One of the messages taken by `Host.admit` has been handled or dropped."""
        self._backlog -= 1
        if self._paused or self._end_after is not None:
            self.advance()

    def advance(self) -> None:
        """Go on with what had to wait: frames read before, the socket, the end."""
        if self._state:
            return
        limits = self._host.limits
        if self._backlog > limits.max_decoded // 2:
            return
        if self._leftover:
            frames, self._leftover = self._leftover, []
            self._admit(frames)
        if self._leftover:
            return
        if self._end_after is not None:
            if not self._backlog:
                self.end(*self._end_after)
        elif (
            self._paused
            and self.outbox.size <= limits.max_outbox_bytes
            and (not self._backlog or self._bytes_received - self._input_mark <= limits.max_input_bytes)
        ):
            self._paused = False
            self._transport.resume()

    def end_when_served(self, reason: CloseReason, words: str) -> None:
        """Stop reading, and end the connection when everything received before has been served."""
        if self._state or self._end_after is not None:
            return
        self._end_after = (reason, words)
        self._pause()
        self.advance()

    def end(self, reason: CloseReason, words: str, retry_after: float = 0.0) -> None:
        """Say farewell and close, within the linger time."""
        if self._state:
            return
        self._leave(_State.CLOSING, reason)
        if reason is not CloseReason.ENDED:
            farewell = self._host.farewell(words, retry_after)
            if farewell is not None:
                self.put(farewell)
        if self._paused and self._started and not self._eof:
            self._transport.resume()
        self._host.check_at(self, trio.current_time() + self._host.limits.linger, self._check_linger)
        self._touch()

    def abort(self, reason: CloseReason) -> None:
        """Close at once, whatever is pending."""
        if self._state is _State.CLOSED:
            return
        if not self._state:
            self._leave(_State.CLOSED, reason)
        self._state = _State.CLOSED
        self._blocked = True
        self.outbox.clear()
        self._transport.close()
        self._host.gone(self)

    def flush(self) -> None:
        """Write as much of the outbox as the kernel takes."""
        self._touched = False
        if self._blocked:
            return
        outbox = self.outbox
        while outbox.size:
            piece = outbox.joined()
            try:
                sent = self._transport.write(piece)
            except OSError:
                self.abort(CloseReason.RESET)
                return
            self._bytes_sent += sent
            outbox.written(sent)
            if sent < len(piece):
                self._output_blocked()
                return
        if self._room is not None and outbox.size < self._host.limits.max_outbox_bytes:
            self._room.set()
            self._room = None
        if self._state:
            self._end_output()
        elif self._paused:
            self.advance()

    def _end_output(self) -> None:
        if self._state is _State.CLOSING:
            self._blocked = self._transport.busy
            if not self._blocked:
                self._linger()

    def _reason_value(self) -> str:
        return "" if self._reason is None else self._reason.value

    def _leave(self, state: _State, reason: CloseReason) -> None:
        self._state = state
        self.closed = True
        self._reason = reason
        self._leftover.clear()
        if self._room is not None:
            self._room.set()
            self._room = None
        self._host.ending(self, reason)

    def _linger(self) -> None:
        self._state = _State.LINGERING
        try:
            self._transport.end_output()
        except OSError:
            self._eof = True
        if self._eof:
            self.abort(CloseReason.ENDED)

    def _touch(self) -> None:
        if not self._touched:
            self._touched = True
            self._host.touch(self)

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            if self._started:
                self._transport.pause()

    def _on_data(self, data: bytes) -> None:
        if self._state:
            return
        decoder = self._decoder
        partial = decoder.buffered
        if not (self._backlog or self._leftover):
            self._input_mark = self._bytes_received - partial
        self._bytes_received += len(data)
        try:
            frames = decoder.receive_data(data)
        except ProtocolError as error:
            if error.frames:
                self._received(error.frames)
            self.end_when_served(CloseReason.PROTOCOL, error.reason)
            return
        if (rest := decoder.buffered) and (frames or not partial):
            self._frame_begins(rest)
        if frames:
            self._received(frames)

    def _frame_begins(self, size: int) -> None:
        self._frame_began = (trio.current_time(), self._bytes_received - size)
        if not self._watching_frame:
            self._watching_frame = True
            when = self._frame_began[0] + self._host.limits.frame_within
            self._host.check_at(self, when, self._check_frame)

    def _received(self, frames: list[bytes]) -> None:
        limits = self._host.limits
        self._frames_received += len(frames)
        if limits.idle_within != inf:
            self._last_frame = trio.current_time()
        self._admit(frames)
        # A full backlog alone does not pause: most peers have sent all they have in flight, and pausing costs two
        # system calls. What one more read brings is held.
        held = self._bytes_received - self._input_mark
        if (
            self._leftover
            or self.outbox.size > limits.max_outbox_bytes
            or (held > limits.max_input_bytes and self._backlog)
        ):
            self._pause()

    def _admit(self, frames: list[bytes]) -> None:
        while True:
            room = self._host.limits.max_decoded - self._backlog
            if room <= 0:
                break
            queued, refused = self._host.admit(self, frames if len(frames) <= room else frames[:room])
            self._backlog += queued
            if queued == len(frames) or self._state:
                return
            frames = frames[queued + refused :]
            if not (frames and refused):
                break
        self._leftover = frames

    def _on_end(self, error: OSError | None) -> None:
        self._eof = True
        if error is not None:
            self.abort(CloseReason.HANDSHAKE if isinstance(error, HandshakeFailed) else CloseReason.RESET)
        elif self._state is _State.LINGERING:
            self.abort(CloseReason.ENDED)
        elif not self._state:
            self._paused = True
            try:
                self._decoder.receive_eof()
            except ProtocolError as mistake:
                self.end_when_served(CloseReason.PROTOCOL, mistake.reason)
            else:
                self.end_when_served(CloseReason.ENDED, "")

    def _on_writable(self) -> None:
        self._blocked = self._state is _State.CLOSED
        self.flush()

    def _output_blocked(self) -> None:
        self._blocked = True
        limits = self._host.limits
        if self.outbox.size > limits.max_outbox_bytes and not self._state:
            self._pause()
        if not self._watching_output:
            self._watching_output = True
            self._output_mark = self._bytes_sent - self._transport.unacknowledged()
            self._host.check_at(self, trio.current_time() + limits.send_grace, self._check_output)

    def _check_output(self, now: float) -> float:
        if self._state is _State.CLOSED or not self._blocked:
            self._watching_output = False
            return inf
        limits = self._host.limits
        read = self._bytes_sent - self._transport.unacknowledged()
        if read - self._output_mark < limits.min_send_rate * limits.send_grace:
            self.abort(CloseReason.SLOW_READER)  # a farewell would only join what is not being read
            return inf
        self._output_mark = read
        return now + limits.send_grace

    def _check_frame(self, now: float) -> float:
        if self._state or not self._decoder.buffered:
            self._watching_frame = False
            return inf
        limits = self._host.limits
        if self._paused:  # it is we who are not reading
            self._frame_began = (now, self._bytes_received)
        began, mark = self._frame_began
        if now < began + limits.frame_within:
            return began + limits.frame_within
        if limits.min_receive_rate and self._bytes_received - mark >= limits.min_receive_rate * (now - began):
            return now + 1.0
        self.end(CloseReason.SLOW_FRAME, f"a frame took longer than {limits.frame_within:g} s")
        return inf

    def _check_silence(self, now: float) -> float:
        within = self._host.limits.first_frame_within
        if self._paused and not self._state:
            return now + within  # it is we who are not reading
        # A frame that has begun is the affair of the next rule.
        if not (self._state or self._frames_received or self._decoder.buffered):
            self.end(CloseReason.SILENT, f"no message came within {within:g} s")
        return inf

    def _check_idle(self, now: float) -> float:
        if self._state:
            return inf
        within = self._host.limits.idle_within
        if self._backlog or self._paused:
            return now + within
        if now < self._last_frame + within:
            return self._last_frame + within
        self.end(CloseReason.IDLE, f"no message came for {within:g} s")
        return inf

    def _check_ping(self, now: float) -> float:
        if self._state:
            return inf
        limits = self._host.limits
        if self._paused or self._bytes_received != self._heard:  # paused: it is we who are not reading
            self._heard = self._bytes_received
            self._pinged = False
            return now + limits.ping_after
        if self._pinged:
            self.end(CloseReason.VANISHED, f"nothing came within {limits.pong_within:g} s after a ping")
            return inf
        self._pinged = True
        self._host.ping(self)
        return now + limits.pong_within

    def _check_linger(self, now: float) -> float:
        self.abort(CloseReason.RESET)
        return inf
