"""Datagrams from the socket to the handler and back: what `stagetrio.server` is for connections.

Theory of operation. A datagram is a message: it has no framing, and whatever is wrong with one concerns that one only.
Its source (`stagetrio.sources`) is its flow. All datagrams go undecoded into one fair queue, and are decoded and
handled by the workers of a `stagetrio.stage.Stage`; what the handler returns is sent back at once, one system call a
datagram. Messages of one source are handled in order, as they came.

Nobody can be made to wait, so what is too much is dropped, and counted by the bound it met:

========================= =========================================================================================
dropped as                when
========================= =========================================================================================
``too long``              it had more than ``max_bytes``
``not admitted``          its source is new, and was turned away by the admission (filter, sources per host, rate)
``too many sources``      its source is new, and ``max_sources`` verified ones are being served
``rate``                  it came faster than ``input_rates`` allow
``flow``, ``queue``       its source, or all together, had as many queued as they may
========================= =========================================================================================

With ``refuse`` and a codec the last three are answered by `stagetrio.codec.Refused`, as far as the guard against
amplification lets that pass. The socket is read all the while, so that it is the fair queue which decides whose
datagrams are dropped, and not the kernel; what the kernel had to drop nevertheless is counted too.

What is bounded: datagrams by ``max_bytes``, the queue by ``max_items`` and ``max_items_per_source``, sources by
``max_sources``. Output is not queued at all: what the kernel does not take is dropped and counted, as it might have
been anywhere on its way.

Anybody can send in anybody's name, so shares by address protect against carelessness, not against malice. Give all
strangers one share, and a source its own when it is verified::

    await serve_datagrams(handler, sockets, flow=lambda source: "strangers")
    ...
    if source.verify(message.token):
        source.flow = source.address
"""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Sequence
from math import inf
from struct import Struct
from typing import Any, Generic, TypeVar, cast

import attrs
import trio

from stagetrio.addresses import UdpAddress
from stagetrio.admission import Admission, AdmissionStatistics, TurnedAway
from stagetrio.codec import Codec
from stagetrio.exchange import Exchange
from stagetrio.fair_queue import FairQueue
from stagetrio.inflow import Inflow, InputRates
from stagetrio.limiter import Overloaded
from stagetrio.rules import CloseReason
from stagetrio.sources import Source, Sources
from stagetrio.stage import Stage, StageStatistics
from stagetrio.watchdog import Watchdog

M = TypeVar("M")
DatagramHandler = Callable[[Source[M], M], Coroutine[Any, Any, M | None]]

LONGEST = 65_507  # bytes of a datagram over IPv4
BATCH = 64  # datagrams received in one pass of the loop
_MEMINFO = Struct("9I")  # of Linux's SO_MEMINFO; the last one is the number of datagrams dropped
_SO_MEMINFO = 55


@attrs.frozen
class DatagramStatistics:
    """What a server of datagrams has done and is doing.

    Args:
        received: Datagrams received.
        sent: Datagrams sent.
        unsent: Datagrams which the kernel did not take.
        withheld: Datagrams not sent, because they were longer than ``max_bytes``, or more than an unverified source
            had sent.
        dropped: ``{why: datagrams}`` that were not handled; see `stagetrio.datagrams`.
        dropped_by_kernel: Datagrams that found the receive buffers full; 0 where that cannot be told.
        receive_errors: Times receiving failed.
        mistakes: Datagrams that were no messages.
        refused: Datagrams answered by a refusal.
        failed: Datagrams whose handler raised.
        sources: Sources remembered now.
        verified: Those of them that are verified.
        admission: Whom the admission has let in, and why not the others.
        stage: The statistics of the stage and, within, of its queue.
    """

    received: int
    sent: int
    unsent: int
    withheld: int
    dropped: dict[str, int]
    dropped_by_kernel: int
    receive_errors: int
    mistakes: int
    refused: int
    failed: int
    sources: int
    verified: int
    admission: AdmissionStatistics
    stage: StageStatistics


class DatagramServer(Generic[M]):
    """A running server; `serve_datagrams` makes it and hands it over by ``task_status``."""

    def __init__(
        self,
        handler: DatagramHandler[M],
        *,
        codec: Codec[M] | None,
        max_bytes: int,
        amplification: float,
        max_sources: float,
        idle_within: float,
        max_items: int,
        max_items_per_source: float,
        workers: int,
        max_running: int,
        input_rates: InputRates | None,
        admission: Admission | None,
        refuse: bool,
        flow: Callable[[Source[M]], Hashable] | None,
        weight: Callable[[Any], float] | None,
        cost: Callable[[bytes], float] | None,
        max_handling: float,
        watchdog: Watchdog | None,
        budget: float,
        on_error: Callable[[Source[M], Exception], None] | None,
        on_refused: Callable[[Source[M], Overloaded], bytes | None] | None,
    ) -> None:
        self.max_bytes = max_bytes
        self._refuse = refuse
        self._flow = flow
        self._sources = Sources(self, amplification, max_sources, idle_within, self._forgotten)
        self._admission = Admission() if admission is None else admission
        self._inflow = None if input_rates is None else Inflow(input_rates, _nobody_waits)
        self._exchange: Exchange[Any] = Exchange(
            cast(Any, handler), _whole, codec, cast(Any, on_error), cast(Any, on_refused)
        )
        self._queue: FairQueue[Any, Any] = FairQueue(max_items, max_items_per_flow=max_items_per_source, weight=weight)
        self._stage: Stage[Any] = Stage(
            self._exchange.serve,
            queue=self._queue,
            workers=workers,
            order_key=_address_of,
            overlap=max_running,
            on_error=self._exchange.failed_with,
            max_handling=max_handling,
            on_result=self._exchange.served,
            watchdog=watchdog,
            budget=budget,
            cost=None if cost is None else lambda item: cost(item[1]),
            inner=handler,
        )
        self._sockets: list[socket.socket] = []
        self._receiving = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._dropped: Counter[str] = Counter()
        self._received = self._sent = self._unsent = self._receive_errors = self._mistakes = 0

    def statistics(self) -> DatagramStatistics:
        """Return a snapshot of the counts."""
        return DatagramStatistics(
            received=self._received,
            sent=self._sent,
            unsent=self._unsent,
            withheld=self._sources.withheld,
            dropped=dict(self._dropped),
            dropped_by_kernel=sum(_dropped_by_kernel(sock) for sock in self._sockets),
            receive_errors=self._receive_errors,
            mistakes=self._mistakes,
            refused=self._exchange.refused,
            failed=self._exchange.failed,
            sources=len(self._sources),
            verified=self._sources.verified_count,
            admission=self._admission.statistics(),
            stage=self._stage.statistics(),
        )

    async def drain(self, grace: float) -> None:
        """Stop receiving, serve what was received, and end the server.

        Args:
            grace: Seconds within which that is done; what is left then is cancelled. ≥ 0.

        A handler must not await this, as it would wait for itself: let a task of the owner's drain.

        Checkpoints: always. A cancellation leaves the server draining.
        """
        if not grace >= 0:
            raise ValueError(f"grace must be a number of seconds, 0 or more, not {grace!r}")
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + grace)
        self._receiving.cancel()
        await self._ended.wait()

    async def run(
        self, sockets: Sequence[trio.socket.SocketType], started: Callable[[DatagramServer[M]], None]
    ) -> None:
        """Serve until drained or cancelled."""
        try:
            for sock in sockets:
                # Trio's socket receives one datagram per checkpoint; its double receives all that wait.
                self._sockets.append(socket.socket(fileno=os.dup(sock.fileno())))
                self._sockets[-1].setblocking(False)
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._stage.run)
                    started(self)
                    with self._receiving:
                        async with trio.open_nursery() as receivers:
                            for sock, double in zip(sockets, self._sockets, strict=True):
                                receivers.start_soon(self._receive, sock, double)
                    self._queue.close()
        finally:
            self._ended.set()
            self._sources.clear()
            for sock in sockets:
                sock.close()
            for double in self._sockets:
                double.close()
            self._sockets.clear()

    async def _receive(self, sock: trio.socket.SocketType, double: socket.socket) -> None:
        longest = self.max_bytes + 1
        while True:
            await trio.lowlevel.wait_readable(sock)
            for _ in range(BATCH):
                try:
                    data, name = double.recvfrom(longest)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError:  # what became of an earlier datagram of ours
                    self._receive_errors += 1
                    break
                self._received += 1
                why = self._take(double, data, name)
                if why is not None:
                    self._dropped[why] += 1

    def _take(self, sock: socket.socket, data: bytes, name: tuple[Any, ...]) -> str | None:
        """Queue a datagram, or say why it is dropped."""
        if len(data) > self.max_bytes:
            return "too long"
        now = trio.current_time()
        source: Source[M] | None = self._sources.get(sock, name, now)
        if source is None:
            refused = self._admission_of(UdpAddress(name[0], name[1]), now)
            if refused is not None:
                self._say_farewell(sock, data, name, refused)
                return "not admitted"
            if not self._sources.make_room():
                self._admission.leave(UdpAddress(name[0], name[1]))
                return "too many sources"
            source = self._sources.add(sock, name, now)
            if self._flow is not None:
                source.flow = self._flow(source)
        source.heard(len(data))
        overloaded = self._enqueue(source, data)
        if overloaded is None:
            return None
        if self._refuse:
            self._exchange.refuse(cast(Any, source), data, overloaded)
        return overloaded.reason

    def _admission_of(self, address: UdpAddress, now: float) -> TurnedAway | None:
        self._sources.expire(now)  # or they would count among their host's
        return self._admission.enter(address)

    def _say_farewell(self, sock: socket.socket, data: bytes, name: tuple[Any, ...], refused: TurnedAway) -> None:
        farewell = self._exchange.farewell(refused.words, refused.retry_after)
        if farewell is not None and len(farewell) <= self._sources.worth(len(data)):
            self._send(sock, farewell, name)

    def _enqueue(self, source: Source[M], data: bytes) -> Overloaded | None:
        if self._inflow is not None and not self._inflow.take(source, (data,)):
            return self._inflow.refusal(source)
        try:
            self._queue.send_nowait(source.flow, (source, data))
        except Overloaded as overloaded:
            if self._inflow is not None:
                self._inflow.give_back(source, (data,))
            return overloaded
        return None

    def _forgotten(self, source: Source[M]) -> None:
        self._admission.leave(source.address)
        if self._inflow is not None:
            self._inflow.forget(source)

    # What a source needs of its host.

    def frame_of(self, message: M) -> bytes:
        frame = self._exchange.frame_of(message)
        if len(frame) > self.max_bytes:
            raise ValueError(f"message of {len(frame)} bytes exceeds max_bytes={self.max_bytes}")
        return frame

    def transmit(self, source: Source[Any], data: bytes) -> None:
        self._send(source.sock, data, source.name)

    def _send(self, sock: socket.socket, data: bytes, name: tuple[Any, ...]) -> None:
        try:
            sock.sendto(data, name)
        except OSError:  # no room, no way, or nobody there
            self._unsent += 1
        else:
            self._sent += 1

    def mistaken(self, source: Source[Any], reason: CloseReason) -> None:
        self._mistakes += reason is CloseReason.PROTOCOL


def _whole(payload: bytes) -> bytes:
    """A datagram is a frame."""
    return payload


def _nobody_waits(sender: object) -> None:
    """A datagram over the rate is dropped."""


def _address_of(item: tuple[Source[Any], bytes]) -> Hashable:
    return item[0].address


def _dropped_by_kernel(sock: socket.socket) -> int:
    if sys.platform != "linux":
        return 0
    return int(_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[8])


async def serve_datagrams(
    handler: DatagramHandler[M],
    sockets: Sequence[trio.socket.SocketType],
    *,
    codec: Codec[M] | None = None,
    flow: Callable[[Source[M]], Hashable] | None = None,
    weight: Callable[[Any], float] | None = None,
    cost: Callable[[bytes], float] | None = None,
    max_bytes: int = 1200,
    amplification: float = 1.0,
    max_sources: float = 10_000,
    idle_within: float = 60.0,
    workers: int = 100,
    max_running: int = 1,
    max_items: int = 10_000,
    max_items_per_source: float = 64,
    input_rates: InputRates | None = None,
    admission: Admission | None = None,
    refuse: bool = False,
    max_handling: float = inf,
    watchdog: Watchdog | None = None,
    budget: float = inf,
    on_error: Callable[[Source[M], Exception], None] | None = None,
    on_refused: Callable[[Source[M], Overloaded], bytes | None] | None = None,
    task_status: trio.TaskStatus[DatagramServer[M]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve datagrams: each source gets its fair share of the handler, and nobody is hit by way of this server.

    Args:
        handler: Called with a source and each of its messages, in order. What it returns is sent back; None is not (a
            message with an id is then answered by `stagetrio.codec.Done`). A handler that raises `Overloaded` refuses
            the message.
        sockets: Where datagrams come in, as `stagetrio.sockets.open_datagram_sockets` opens them. They are closed at
            the end.
        codec: What the messages are; None: the handler gets and returns the ``bytes`` of the datagrams.
        flow: Whose share a new source's messages take from; by default its address. A handler that learns who it is
            sets `Source.flow`.
        weight: The share of a flow relative to others; by default 1.
        cost: What a message costs, judged by its payload; by default the seconds its handler held the loop.
        max_bytes: The longest datagram, in both directions, 1 to 65,507; an answer that is longer is withheld. 1,200
            pass nearly everywhere in one piece.
        amplification: Bytes an unverified source may be sent for each that came in its name; ``math.inf`` turns the
            guard off, which is for networks where no address can be forged.
        max_sources: Sources remembered at once.
        idle_within: Seconds after which a silent source is forgotten.
        workers: Handlers that may be waiting for something at once.
        max_running: Handlers of one source that may be waiting for something at once; 1 keeps its messages in order.
        max_items: Messages queued, of all sources.
        max_items_per_source: Messages queued, of one flow.
        input_rates: How many messages and bytes per second may come, of each source and of all.
        admission: Which new sources are let in: how many per host, how fast, and a filter. Who is turned away gets the
            farewell, if there is a codec and the farewell is no longer than what came.
        refuse: Answer messages for which there is no room by a refusal, instead of dropping them silently.
        max_handling: Seconds from a handler's first wait after which it is cancelled.
        watchdog: What forces handlers that hold the loop to a checkpoint. Read first who must not be forced:
            `stagetrio.watchdog`.
        budget: Seconds a handler may hold the loop in all before it is cancelled; needs a watchdog.
        on_error: Called with a source and what its handler raised; with a codec the source is told by
            `stagetrio.codec.Failed`. Without ``on_error``, the exception ends the server.
        on_refused: With ``refuse`` and without a codec: what to answer to a refused message; None: nothing.
        task_status: Gets the `DatagramServer` once it receives.

    Raises:
        ValueError, TypeError: An argument is out of range.

    Checkpoints: throughout. `DatagramServer.drain` is the orderly end, after which this returns.

    Cost: one system call for each datagram in each direction.
    """
    if not sockets:
        raise ValueError("sockets must be one or more, not none")
    if not (isinstance(sockets, Sequence) and all(isinstance(sock, trio.socket.SocketType) for sock in sockets)):
        raise TypeError(f"sockets must be a sequence of sockets, as of open_datagram_sockets, not {sockets!r}")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes must be an int, not {max_bytes!r}")
    if not 1 <= max_bytes <= LONGEST:
        raise ValueError(f"max_bytes must be between 1 and {LONGEST}, not {max_bytes!r}")
    server = DatagramServer(
        handler,
        codec=codec,
        max_bytes=max_bytes,
        amplification=amplification,
        max_sources=max_sources,
        idle_within=idle_within,
        max_items=max_items,
        max_items_per_source=max_items_per_source,
        workers=workers,
        max_running=max_running,
        input_rates=input_rates,
        admission=admission,
        refuse=refuse,
        flow=flow,
        weight=weight,
        cost=cost,
        max_handling=max_handling,
        watchdog=watchdog,
        budget=budget,
        on_error=on_error,
        on_refused=on_refused,
    )
    await server.run(sockets, task_status.started)
