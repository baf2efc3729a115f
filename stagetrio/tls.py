"""TLS below a peer: handshakes under a deadline and a bound, ciphertext on one side, plain bytes on the other.

`secure` wraps a listener. A server accepts from it as from the plain one, with no task per connection: a
`TlsTransport` lies between the peer and its socket and runs OpenSSL on memory buffers. Alone, say with
``trio.serve_listeners``, the listener gives `trio.SSLStream`\\ s as `trio.SSLListener` does.

Theory of operation. What strangers can do before they have said who they are must be bounded apart from all else:

- *Waiting costs nothing.* A connection that has not sent a byte holds no place among the handshakes, no buffer and no
  OpenSSL state. Accepting never waits for a handshake.
- *At most* ``max_handshakes`` *are under way.* Who sends its first bytes when all places are taken is not read until
  one is free, in order of arrival.
- *The deadline is absolute*: ``handshake_within`` seconds after the connection, whatever it has sent and even if it
  has waited for a place, it is closed, with `stagetrio.rules.CloseReason.HANDSHAKE`.

Output is encrypted only as far as the socket takes it, a chunk at a time, so that what is held stays in the peer's
outbox, where it is bounded and watched. The end of input must be announced by the other side (``close_notify``); a
connection cut off without it counts as lost, since anyone between the two could have cut it.

The minimum is TLS 1.2. Who must show a certificate, and which are trusted, is the context's affair
(``ssl_context.verify_mode = ssl.CERT_REQUIRED``); a handler reads it by ``peer.tls.getpeercert()``.

What is rejected: a thread for handshakes (about 1 ms of processor each with an elliptic key, and the loop goes round
between any two), and kernel TLS (Python has no way to hand the keys over).
"""

from __future__ import annotations

import ssl
from collections import OrderedDict
from contextlib import suppress
from math import inf
from typing import Any

import attrs
import trio

from stagetrio.reaper import Reaper
from stagetrio.transport import HandshakeFailed, OnData, OnEnd, OnWritable, Transport

CHUNK = 65536  # bytes encrypted at a time


@attrs.frozen
class HandshakeStatistics:
    """What became of the handshakes of one listener.

    Args:
        waiting: Connections that have begun to speak, and wait for a place.
        under_way: Handshakes now, at most ``max_handshakes``.
        completed: Handshakes that succeeded.
        failed: Handshakes that did not, those given up by the other side included.
        overdue: Connections that had not completed theirs at the deadline.
    """

    waiting: int
    under_way: int
    completed: int
    failed: int
    overdue: int


class TlsListener(trio.abc.Listener[trio.SSLStream[Any]]):
    """A listener whose connections are encrypted; made by `secure`."""

    def __init__(
        self, inner: trio.abc.Listener[Any], ssl_context: ssl.SSLContext, handshake_within: float, max_handshakes: int
    ) -> None:
        self.inner = inner
        self._context = ssl_context
        self.handshake_within = handshake_within
        self._max = max_handshakes
        self._under_way: set[TlsTransport] = set()
        self._waiting: OrderedDict[TlsTransport, bytes] = OrderedDict()  # {transport: its first bytes}
        self._completed = self._failed = self._overdue = 0

    async def accept(self) -> trio.SSLStream[Any]:
        """Accept a connection; its handshake is made by the first task that uses it, and is bound by that task only.

        Checkpoints: always; cancelled, no connection was taken.
        """
        return trio.SSLStream(await self.inner.accept(), self._context, server_side=True)

    async def aclose(self) -> None:
        """Close the listener within.

        Checkpoints: once.
        """
        await self.inner.aclose()

    def statistics(self) -> HandshakeStatistics:
        """Return a snapshot of the counts of `wrap`\\ ped connections."""
        return HandshakeStatistics(
            waiting=len(self._waiting),
            under_way=len(self._under_way),
            completed=self._completed,
            failed=self._failed,
            overdue=self._overdue,
        )

    def wrap(self, transport: Transport, reaper: Reaper) -> TlsTransport:
        """Put TLS on a connection that was accepted from ``inner``.

        Args:
            transport: What carries the ciphertext.
            reaper: What looks after the deadline.
        """
        return TlsTransport(transport, self, reaper)

    # What follows is for the transports.

    def admit(self, transport: TlsTransport, data: bytes) -> ssl.SSLContext | None:
        """Give a place to a connection which has begun to speak, or None, and later call its ``begin``."""
        if len(self._under_way) >= self._max:
            self._waiting[transport] = data
            return None
        self._under_way.add(transport)
        return self._context

    def is_waiting(self, transport: TlsTransport) -> bool:
        """Whether a connection waits for a place."""
        return transport in self._waiting

    def leave(self, transport: TlsTransport, *, completed: bool, overdue: bool = False) -> None:
        """Take a place back, and give it to whoever has waited longest."""
        self._completed += completed
        self._overdue += overdue
        self._failed += not (completed or overdue)
        self._waiting.pop(transport, None)
        self._under_way.discard(transport)
        while self._waiting and len(self._under_way) < self._max:
            other, data = self._waiting.popitem(last=False)
            self._under_way.add(other)
            other.begin(self._context, data)


def secure(
    listener: trio.abc.Listener[Any],
    ssl_context: ssl.SSLContext,
    *,
    handshake_within: float = 10.0,
    max_handshakes: int = 100,
) -> TlsListener:
    """Put TLS on whatever a listener accepts.

    Args:
        listener: Where connections come from; closed with the returned one.
        ssl_context: For the server's side, with its certificate; at least TLS 1.2.
        handshake_within: Seconds from the connection to the end of its handshake, > 0; ``math.inf`` for any.
        max_handshakes: Handshakes under way at once, ≥ 1.

    Raises:
        ValueError, TypeError: An argument is out of range, or the context allows older versions of TLS.
    """
    if not isinstance(ssl_context, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext, not {ssl_context!r}")
    if ssl_context.minimum_version < ssl.TLSVersion.TLSv1_2:
        version = ssl_context.minimum_version
        raise ValueError(f"ssl_context must have a minimum_version of TLSv1_2 or later, not {version!r}")
    if not handshake_within > 0:
        raise ValueError(f"handshake_within must be positive, not {handshake_within!r}")
    if isinstance(max_handshakes, bool) or not isinstance(max_handshakes, int):
        raise TypeError(f"max_handshakes must be an int, not {max_handshakes!r}")
    if max_handshakes < 1:
        raise ValueError(f"max_handshakes must be at least 1, not {max_handshakes!r}")
    return TlsListener(listener, ssl_context, handshake_within, max_handshakes)


class TlsTransport:
    """TLS between a peer and the transport of its ciphertext."""

    __slots__ = (
        "__weakref__",
        "_closed",
        "_inner",
        "_input",
        "_input_ended",
        "_listener",
        "_on_data",
        "_on_end",
        "_on_writable",
        "_open",
        "_output",
        "_pending",
        "_reaper",
        "_settled",
        "tls",
    )

    def __init__(self, inner: Transport, listener: TlsListener, reaper: Reaper) -> None:
        #: What knows the other side's certificate, the cipher and the like; None until the handshake begins.
        self.tls: ssl.SSLObject | None = None
        self._inner = inner
        self._listener = listener
        self._reaper = reaper
        self._settled = False  # the handshake has succeeded, failed, or been given up
        self._open = False  # it has succeeded, and our side has not said its last word
        self._input_ended = False  # the peer was told, or wants no more
        self._closed = False
        self._pending = b""  # ciphertext the socket did not take

    def start(self, on_data: OnData, on_end: OnEnd, on_writable: OnWritable) -> None:
        self._on_data, self._on_end, self._on_writable = on_data, on_end, on_writable
        self._reaper.watch(trio.current_time() + self._listener.handshake_within, self._check_deadline)
        self._inner.start(self._receive, self._receive_end, self._writable)

    def begin(self, context: ssl.SSLContext, data: bytes) -> None:
        """Make the handshake, after having waited for a place."""
        self._inner.resume()
        self._handshake(context, data)

    def _check_deadline(self, now: float) -> float:
        if not self._settled:
            self._settle(overdue=True)
            self._end_input(HandshakeFailed("the handshake took too long"))
        return inf

    def _settle(self, *, completed: bool = False, overdue: bool = False) -> None:
        if not self._settled:
            self._settled = True
            self._open = completed
            self._listener.leave(self, completed=completed, overdue=overdue)

    def _end_input(self, error: OSError | None) -> None:
        if not self._input_ended:
            self._input_ended = True
            self._on_end(error)

    def _receive(self, data: bytes) -> None:
        if self._input_ended:
            return
        if self.tls is None:
            context = self._listener.admit(self, data)
            if context is None:
                self._inner.pause()
            else:
                self._handshake(context, data)
            return
        self._input.write(data)
        if self._open:
            self._decrypt()
        else:
            self._proceed()

    def _handshake(self, context: ssl.SSLContext, data: bytes) -> None:
        self._input, self._output = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._input, self._output, server_side=True)
        self._input.write(data)
        self._proceed()

    def _proceed(self) -> None:
        assert self.tls is not None
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except OSError as error:
            self._flush()  # an alert that says why
            self._settle()
            self._end_input(HandshakeFailed(str(error)))
        else:
            self._settle(completed=True)
            self._writable()
            self._decrypt()

    def _decrypt(self) -> None:
        """Hand on all that has come in whole records."""
        assert self.tls is not None
        plain: list[bytes] = []
        ended = True
        error: OSError | None = None
        try:
            while data := self.tls.read(CHUNK):
                plain.append(data)
        except ssl.SSLWantReadError:
            ended = False
        except OSError as raised:
            error = raised
        if plain and not self._input_ended:
            self._on_data(b"".join(plain))
        self._flush()  # alerts, and answers to a change of keys
        if ended and not self._input_ended:
            self._inner.pause()
            self._end_input(error)

    def _receive_end(self, error: OSError | None) -> None:
        if self._input_ended:  # by us: the peer lingers until the other side closes too
            self._on_end(error)
        elif self._settled:
            self._end_input(error or ConnectionResetError("the connection was cut off"))
        else:
            self._settle()
            self._end_input(HandshakeFailed("the connection ended in the handshake"))

    def _flush(self) -> None:
        """Hand ciphertext on as far as there is room."""
        if self.tls is None or self._closed:
            return
        try:
            while data := self._pending or self._output.read():
                sent = self._inner.write(data)
                self._pending = data[sent:]
                if self._pending:
                    return
        except OSError:
            self._pending = b""  # reading tells of it too

    def _writable(self) -> None:
        self._flush()
        if self._settled and not self._pending and not self._closed:
            self._on_writable()

    def write(self, data: bytes) -> int:
        taken = 0
        if not self._settled:
            return 0
        if self.tls is None or not self._open:
            raise ConnectionResetError("there is no connection to write to")
        while taken < len(data) and not self.busy:
            taken += self.tls.write(data[taken : taken + CHUNK])
            self._flush()
        return taken

    @property
    def busy(self) -> bool:
        return bool(self._pending) or self._inner.busy

    def unacknowledged(self) -> int:
        return len(self._pending) + self._inner.unacknowledged()

    def pause(self) -> None:
        self._inner.pause()

    def resume(self) -> None:
        if not self._listener.is_waiting(self):
            self._inner.resume()

    def end_output(self) -> None:
        if self._open:
            assert self.tls is not None
            self._open = False
            with suppress(ssl.SSLError):  # that the other side has not said its last word yet
                self.tls.unwrap()
            self._flush()
        self._input_ended = True
        self._inner.end_output()

    def close(self) -> None:
        if not self._closed:
            self._closed = self._input_ended = True
            self._settle()
            self._inner.close()
