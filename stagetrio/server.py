"""The way of a message, put together for listeners: socket, frame, fair queue, worker, handler, outbox, socket.

Theory of operation. Every connection is a `Peer`, all of them read by one hub (or by a task each, where there is no
plain socket). Frames go undecoded into one fair queue, under the flow of their peer, and are decoded by the worker that
serves them, so a flow pays for its own decoding. What the handler returns goes into the peer's outbox. Outboxes are
written when the slice of the stage's leader ends: one system call per connection and slice, however many replies; what
is sent from other tasks is written by a flusher in the next pass of Trio's loop.

Backpressure goes all the way to the sender: a peer whose messages the queue does not take is not read until there is
room, and its kernel tells its TCP. With ``refuse`` the message is answered by a refusal instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from functools import partial
from itertools import islice, repeat
from math import inf
from typing import Any, Generic, TypeVar, cast

import attrs
import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

from stagetrio.admission import Admission, AdmissionStatistics
from stagetrio.amounts import check_amount, check_count
from stagetrio.codec import Codec
from stagetrio.door import Door
from stagetrio.exchange import Exchange, Handler, Item
from stagetrio.fair_queue import FairQueue
from stagetrio.framing import Framing, LengthPrefixed
from stagetrio.hub import Hub
from stagetrio.inflow import Inflow, InputRates
from stagetrio.limiter import Overloaded
from stagetrio.nursery_pool import NurseryPool, open_nursery_pool
from stagetrio.pacer import Pacer
from stagetrio.peer import Peer
from stagetrio.proxies import Proxies, ProxyStatistics
from stagetrio.reaper import Reaper
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.sockets import Address
from stagetrio.stage import Stage, StageStatistics
from stagetrio.transport import Transport
from stagetrio.watchdog import Watchdog

M = TypeVar("M")
Hook = Callable[[Peer[M]], Awaitable[object]]

ROOM_BATCH = 16  # peers offered the room that a slice has made


@attrs.frozen
class ServerStatistics:
    """What a server has done and is doing.

    Args:
        connections: Open now, closing ones included.
        accepted: Connections accepted.
        refused_connections: Connections turned away, because there were ``max_connections`` or by the admission.
        admission: Whom the admission has let in, and why not the others.
        proxied: What became of connections from proxies; None without ``proxies``.
        accept_errors: Times `accept` failed, among them those without descriptors or memory.
        closed: ``{reason: connections}`` that ended so.
        discarded: Messages dropped unhandled because their connection had ended.
        refused: Messages answered by a refusal.
        throttled: Times a connection was left unread because its input came faster than ``input_rates``, and messages
            refused for that.
        failed: Messages whose handler raised.
        undeliverable: Replies whose connection had ended, and handlers that ended in the attempt to send to it.
        dropped: Messages sent to peers whose outbox was full, and left out.
        coalesced: Messages sent to peers, and replaced by a later one of the same key before they were written.
        stage: The statistics of the stage and, within, of its queue.
    """

    connections: int
    accepted: int
    refused_connections: int
    admission: AdmissionStatistics
    proxied: ProxyStatistics | None
    accept_errors: int
    closed: dict[CloseReason, int]
    discarded: int
    refused: int
    throttled: int
    failed: int
    undeliverable: int
    dropped: int
    coalesced: int
    stage: StageStatistics


class StageServer(Generic[M]):
    """A running server; `serve_stage` makes it and hands it over by ``task_status``."""

    def __init__(
        self,
        handler: Handler[M],
        *,
        framing: Framing,
        codec: Codec[M] | None,
        limits: PeerLimits,
        max_connections: float,
        admission: Admission | None,
        proxies: Proxies | None,
        max_items: int,
        workers: int,
        max_running: int,
        input_rates: InputRates | None,
        refuse: bool,
        flow: Callable[[Peer[M]], Hashable] | None,
        weight: Callable[[Any], float] | None,
        cost: Callable[[bytes], float] | None,
        max_handling: float,
        watchdog: Watchdog | None,
        budget: float,
        handler_of: Callable[[M], Callable[..., Any]] | None,
        cancel_on_disconnect: bool,
        tick: float,
        on_error: Callable[[Peer[M], Exception], None] | None,
        on_refused: Callable[[Peer[M], Overloaded], bytes | None] | None,
        on_connect: Hook[M] | None,
        on_disconnect: Hook[M] | None,
        ping: Callable[[Peer[M]], M] | None,
    ) -> None:
        _check_kinds(
            framing=(framing, Framing),
            codec=(codec, Codec | None),
            limits=(limits, PeerLimits),
            admission=(admission, Admission | None),
            proxies=(proxies, Proxies | None),
            input_rates=(input_rates, InputRates | None),
            watchdog=(watchdog, Watchdog | None),
        )
        _check_async_functions(
            handler=handler if handler_of is None else None, on_connect=on_connect, on_disconnect=on_disconnect
        )
        _check_sync_functions(flow=flow, weight=weight, cost=cost, handler_of=handler_of, ping=ping)
        _check_sync_functions(on_error=on_error, on_refused=on_refused)
        check_amount("max_connections", max_connections, 1)
        check_count("workers", workers, 1)
        check_count("max_running", max_running, 1)
        if check_amount("tick", tick) == inf:
            raise ValueError(f"tick must be finite, not {tick!r}")
        if limits.ping_after != inf and ping is None:
            raise ValueError(f"ping must say what is sent where limits.ping_after is {limits.ping_after!r}, not None")
        if limits.ping_after == inf and ping is not None:
            raise ValueError(f"ping is never sent where limits.ping_after is inf: {ping!r}")
        self.limits = limits
        self._ping = ping
        self._handler = handler
        self._framing = framing
        called = handler if watchdog is None or handler_of is None else partial(self._dispatch_on_lane, handler_of)
        self._exchange = Exchange(called, framing.encode, codec, on_error, on_refused)
        self._refuse = refuse
        self._flow = flow
        self._cancel_on_disconnect = cancel_on_disconnect
        self._on_error = on_error
        self._on_connect = on_connect
        self._on_disconnect = on_disconnect
        self._hub = Hub() if Hub.available else None
        self._queue: FairQueue[Any, Item] = FairQueue(max_items, weight=weight)
        self._stage = Stage(
            self._exchange.serve,
            queue=self._queue,
            workers=workers,
            order_key=_peer_of,
            overlap=max_running,
            on_error=self._exchange.failed_with,
            after_slice=self._after_slice,
            max_handling=max_handling,
            on_result=self._exchange.served,
            watchdog=watchdog,
            budget=budget,
            cost=None if cost is None else lambda item: cost(item[1]),
            inner=handler,
            source=self._hub,
        )
        self._pacer = Pacer(tick) if tick else None
        self._reaper = Reaper()
        self._inflow = None if input_rates is None else Inflow(input_rates, Peer.advance)
        self._peers: dict[Peer[M], None] = {}
        self._in_want_of_room: dict[Peer[M], None] = {}  # first come, first served
        self._touched: list[Peer[Any]] = []
        self._flusher: Task | None = None  # while it waits
        self._scope = trio.CancelScope()
        self._door = Door(
            self._hub,
            self._reaper,
            admission=admission,
            proxies=proxies,
            max_connections=max_connections,
            vanished_within=limits.vanished_within,
            take_in=self._take_in,
            let_in=self._let_in,
        )
        self._emptied = trio.Event()
        self._ended = trio.Event()
        self._pool: NurseryPool
        self._draining = False
        self._dropped = self._coalesced = 0  # of connections that are gone

    @property
    def peers(self) -> tuple[Peer[M], ...]:
        """The connections there are, oldest first."""
        return tuple(self._peers)

    def statistics(self) -> ServerStatistics:
        """Return a snapshot of the counts."""
        door = self._door
        return ServerStatistics(
            connections=len(self._peers),
            accepted=door.accepted,
            refused_connections=door.refused,
            admission=door.admission.statistics(),
            proxied=None if door.arrivals is None else door.arrivals.statistics(),
            accept_errors=door.acceptor.errors,
            closed=dict(door.closed),
            discarded=self._exchange.discarded,
            refused=self._exchange.refused,
            throttled=0 if self._inflow is None else self._inflow.throttled,
            failed=self._exchange.failed,
            undeliverable=self._exchange.undeliverable,
            dropped=self._dropped + sum(peer.outbox.dropped for peer in self._peers),
            coalesced=self._coalesced + sum(peer.outbox.coalesced for peer in self._peers),
            stage=self._stage.statistics(),
        )

    def broadcast(self, message: M, peers: Iterable[Peer[M]] | None = None, *, key: Hashable = None) -> list[Peer[M]]:
        """Send one message to many peers, encoded once.

        Args:
            message: What to send.
            peers: To whom; None: to every open connection.
            key: See `Peer.send_nowait`.

        Returns:
            The peers it was not queued for, because they are closed or their outbox is full.
        """
        frame = self.frame_of(message)
        missed: list[Peer[M]] = []
        for peer in self.peers if peers is None else peers:
            try:
                peer.send_frame_nowait(frame, key=key)
            except (trio.ClosedResourceError, Overloaded):
                missed.append(peer)
        return missed

    async def drain(self, grace: float) -> None:
        """Stop accepting and reading, serve what was received, say farewell, and end the server.

        Args:
            grace: Seconds within which that is done; what is left then is closed and cancelled. ≥ 0.

        A handler must not await this, as it would wait for itself: let a task of the owner's drain.

        Checkpoints: always. A cancellation leaves the server draining.
        """
        if not grace >= 0:
            raise ValueError(f"grace must be a number of seconds, 0 or more, not {grace!r}")
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + grace)
        if not self._draining:
            self._draining = True
            self._door.acceptor.close()
            for peer in self.peers:
                peer.end_when_served(CloseReason.DRAINED, "the server shuts down")
            if not self._peers:
                self._emptied.set()
        await self._ended.wait()

    async def wait_ended(self) -> None:
        """Wait until the server has ended, by `drain` or by cancellation.

        Checkpoints: always.
        """
        await self._ended.wait()

    async def run(self, listeners: Sequence[trio.abc.Listener[Any]], started: Callable[[StageServer[M]], None]) -> None:
        """Serve until drained or cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._flush_when_touched if self._pacer is None else self._pacer.run)
                    nursery.start_soon(self._reaper.run)
                    if self._inflow is not None:
                        nursery.start_soon(self._inflow.run)
                    await self._serve(listeners, started)
                    nursery.cancel_scope.cancel()
        finally:
            self._ended.set()
            if self._hub is not None:
                self._hub.close()

    async def _serve(
        self, listeners: Sequence[trio.abc.Listener[Any]], started: Callable[[StageServer[M]], None]
    ) -> None:
        async with open_nursery_pool(inf, on_error=self._on_error and self._hook_failed) as self._pool:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._stage.run)
                    nursery.start_soon(self._door.acceptor.run, listeners, self._pool)
                    started(self)
                    await self._emptied.wait()
                    self._queue.close()
                    self._wake_leader()
            finally:
                for peer in self.peers:
                    peer.abort(CloseReason.DRAINED)

    def _hook_failed(self, error: Exception, key: Hashable | None) -> None:
        assert self._on_error is not None
        self._on_error(cast("Peer[M]", key), error)

    def _take_in(self, transport: Transport, address: Address | None) -> Peer[M]:
        peer: Peer[M] = Peer(self, transport, address, self._framing.decoder())
        try:
            if self._flow is None:
                self.move(peer, peer.flow)
            else:
                peer.flow = self._flow(peer)
        except BaseException:  # the owner's flow or weight failed: the server ends
            transport.close()
            raise
        self._peers[peer] = None
        return peer

    def _let_in(self, peer: Peer[M]) -> None:
        if self._on_connect is None:
            peer.start()
        else:
            self._pool.spawn_nowait(self._connect, self._on_connect, peer, key=peer)

    async def _connect(self, on_connect: Hook[M], peer: Peer[M]) -> None:
        try:
            await on_connect(peer)
        except Exception:
            peer.end(CloseReason.FAILED, "the server failed to take the connection")
            raise
        finally:
            peer.start()

    # Slices and output.

    def _dispatch_on_lane(
        self, handler_of: Callable[[M], Callable[..., Any]], peer: Peer[M], message: M
    ) -> Coroutine[Any, Any, M | None]:
        """Tell the watchdog whose frames may be stopped, those of the message's own handler; then call."""
        lane = self._stage.lane
        assert lane is not None
        lane.handler = handler_of(message)
        return self._handler(peer, message)

    def _after_slice(self) -> None:
        self._flush()
        if self._in_want_of_room:
            for peer in tuple(islice(self._in_want_of_room, ROOM_BATCH)):
                del self._in_want_of_room[peer]
                peer.advance()

    def _flush(self) -> None:
        while self._touched:
            touched, self._touched = self._touched, []
            for peer in touched:
                peer.flush()

    async def _flush_when_touched(self) -> None:
        """Write what was sent outside of the leader's slices."""

        def abort(_: RaiseCancelT) -> Abort:
            self._flusher = None
            return Abort.SUCCEEDED

        while True:
            self._flusher = current_task()
            await wait_task_rescheduled(abort)
            self._flush()

    def _wake_leader(self) -> None:
        if self._hub is not None:
            self._hub.wake()

    # What a peer needs of its host.

    def admit(self, peer: Peer[Any], frames: list[bytes]) -> tuple[int, int]:
        if self._inflow is None:
            return self._enqueue(peer, frames)
        passed = self._inflow.take(peer, frames)
        queued, refused = self._enqueue(peer, frames[:passed]) if passed else (0, 0)
        through = queued + refused
        if through < passed or peer.closed:
            self._inflow.give_back(peer, frames[through:passed])
        elif passed < len(frames):
            if self._refuse:
                return queued, refused + self._refuse_for_rate(peer, self._inflow, frames[passed:])
            self._inflow.wait(peer)
        return queued, refused

    def _refuse_for_rate(self, peer: Peer[Any], inflow: Inflow, frames: list[bytes]) -> int:
        for frame in frames:
            self._exchange.refuse(peer, frame, inflow.refusal(peer))
            if peer.closed:
                break
        return len(frames)

    def _enqueue(self, peer: Peer[Any], frames: list[bytes]) -> tuple[int, int]:
        queued: int = peer.channel.send_many_nowait(list(zip(repeat(peer), frames)))
        # A leader that serves looks at the queue anyway; one that offers room where there is none must not be woken.
        if queued and not self._stage.serving:
            self._wake_leader()
        if queued == len(frames):
            return queued, 0
        if not self._refuse:
            self._in_want_of_room[peer] = None
            return queued, 0
        for refused, frame in enumerate(frames[queued:]):
            try:
                peer.channel.send_nowait((peer, frame))
            except Overloaded as overloaded:
                self._exchange.refuse(peer, frame, overloaded)
                if peer.closed:  # it was no message, or the owner has had enough of it
                    break
            else:
                self._wake_leader()
                return queued + 1, refused
        return queued, len(frames) - queued

    def touch(self, peer: Peer[Any]) -> None:
        if self._pacer is not None:
            self._pacer.touch(peer.flush)
            return
        self._touched.append(peer)
        if self._flusher is not None and not self._stage.serving:
            flusher, self._flusher = self._flusher, None
            reschedule(flusher)

    def check_at(self, peer: Peer[Any], when: float, check: Callable[[float], float]) -> None:
        self._reaper.watch(when, check)

    def ping(self, peer: Peer[Any]) -> None:
        assert self._ping is not None
        peer.put(self._exchange.frame_of(self._ping(peer)))

    def frame_of(self, message: M) -> bytes:
        return self._exchange.frame_of(message)

    def farewell(self, words: str, retry_after: float) -> bytes | None:
        return self._exchange.farewell(words, retry_after)

    def move(self, peer: Peer[Any], flow: Hashable) -> None:
        channel = self._queue.open_flow(flow)
        if peer.channel is not None:
            peer.channel.close()
        peer.channel = channel

    def spawn(self, peer: Peer[Any], fn: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
        self._pool.spawn_nowait(fn, *args, key=peer)

    def ending(self, peer: Peer[Any], reason: CloseReason) -> None:
        self._door.closed[reason] += 1
        self._in_want_of_room.pop(peer, None)
        if peer.has_own_flow:  # the queue of a flow shared with others stays; the worker drops this peer's from it
            self._exchange.discarded += len(self._queue.discard(peer.flow))
        peer.channel.close()
        if self._cancel_on_disconnect:
            self._stage.cancel(peer)

    def gone(self, peer: Peer[Any]) -> None:
        del self._peers[peer]
        self._dropped += peer.outbox.dropped
        self._coalesced += peer.outbox.coalesced
        if self._inflow is not None:
            self._inflow.forget(peer)
        self._pool.cancel(peer, "the connection ended")
        if self._door.left(peer) and self._on_disconnect is not None:
            self._pool.spawn_nowait(self._on_disconnect, peer)
        if self._draining and not self._peers:
            self._emptied.set()


def _check_kinds(**arguments: tuple[object, Any]) -> None:
    for name, (value, kind) in arguments.items():
        if isinstance(value, type) or not isinstance(value, kind):
            raise TypeError(f"{name} must be a {getattr(kind, '__name__', kind)}, not {value!r}")


def _check_async_functions(**functions: object) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):  # a sync one may return what an async one has begun
            raise TypeError(f"{name} must be an async function, not {function!r}")


def _check_sync_functions(**functions: object) -> None:
    for name, function in functions.items():
        if function is not None and (not callable(function) or _is_async(function)):
            raise TypeError(f"{name} must be a sync function, not {function!r}")


def _is_async(function: object) -> bool:
    # Also an object whose call is, and what functools.wraps says to stand for an async function.
    if not callable(function):
        return False
    called = inspect.unwrap(function)
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(type(called).__call__)


def _peer_of(item: Item) -> Peer[Any]:
    return item[0]


async def serve_stage(
    handler: Handler[M],
    listeners: Sequence[trio.abc.Listener[Any]],
    *,
    framing: Framing | None = None,
    codec: Codec[M] | None = None,
    flow: Callable[[Peer[M]], Hashable] | None = None,
    weight: Callable[[Any], float] | None = None,
    cost: Callable[[bytes], float] | None = None,
    workers: int = 100,
    max_running: int = 1,
    input_rates: InputRates | None = None,
    max_items: int = 10_000,
    max_connections: float = 10_000,
    admission: Admission | None = None,
    proxies: Proxies | None = None,
    refuse: bool = False,
    max_handling: float = inf,
    watchdog: Watchdog | None = None,
    budget: float = inf,
    handler_of: Callable[[M], Callable[..., Any]] | None = None,
    cancel_on_disconnect: bool = False,
    tick: float = 0.0,
    limits: PeerLimits | None = None,
    on_connect: Hook[M] | None = None,
    on_disconnect: Hook[M] | None = None,
    on_error: Callable[[Peer[M], Exception], None] | None = None,
    on_refused: Callable[[Peer[M], Overloaded], bytes | None] | None = None,
    ping: Callable[[Peer[M]], M] | None = None,
    task_status: trio.TaskStatus[StageServer[M]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve connections: each gets its fair share of the handler, and none can hurt the others.

    Args:
        handler: Called with a peer and each of its messages, in order, one at a time per peer. What it returns is the
            reply; None is none (a message with an id is then answered by `stagetrio.codec.Done`). A handler that raises
            `Overloaded` refuses the message.
        listeners: Where connections come from, as `stagetrio.sockets.open_listeners` or trio opens them. They are
            closed at the end.
        framing: How messages lie on the wire; by default `LengthPrefixed` with up to 1 MiB.
        codec: What the messages are; None: the handler gets and returns the ``bytes`` of the frames.
        flow: Whose share a new peer's messages take from, for instance its address; by default each connection is a
            flow. A handler that learns who the peer is sets `Peer.flow`.
        weight: The share of a flow relative to others; by default 1.
        cost: What a message costs, in any unit, judged by its payload (``len``; ``lambda payload: 1.0``); by default
            the seconds its handler holds the loop, as measured. With declared costs no clock decides who is next.
        workers: Handlers that may be waiting for something at once.
        max_running: Handlers of one peer that may be waiting for something at once. With 1 a peer's messages are
            handled and answered in order; with more, an answer comes as soon as it is ready, and the codec's ids tell
            what it answers.
        max_items: Messages queued, of all peers.
        max_connections: Connections at once; one more is closed with a farewell.
        admission: Who may connect: how many per address, how fast, and a filter. By default everybody; who finds the
            server full is told to come back within 10 seconds.
        proxies: Who opens connections for others, and says for whom by a PROXY header. By default nobody.
        input_rates: How many messages and bytes per second may come, of each connection and of all.
        refuse: Answer messages for which the queue has no room, or which come faster than ``input_rates``, by a
            refusal, instead of leaving their socket unread.
        max_handling: Seconds from a handler's first wait after which it is cancelled.
        watchdog: What forces handlers that hold the loop to a checkpoint. Read first who must not be forced:
            `stagetrio.watchdog`.
        budget: Seconds a handler may hold the loop in all before it is cancelled; needs a watchdog.
        handler_of: With a watchdog and a ``handler`` that only dispatches: the function a message is dispatched to, in
            whose module checkpoints may be forced.
        cancel_on_disconnect: Whether a handler is cancelled when its connection ends; by default it finishes.
        tick: Seconds between two rounds of output; 0 writes at the end of every slice.
        limits: The rules for every peer.
        on_connect: Called with a new peer; nothing is read from it before this returns. `Peer.start_soon` starts what
            shall live as long as the connection.
        on_disconnect: Called with a peer that is gone, unless it had been turned away at the door.
        on_error: Called with a peer and what its handler, or a hook, raised. The peer is told that it failed (by
            `stagetrio.codec.Failed`, or, without a codec, by the end of its connection). Without ``on_error``, the
            exception ends the server.
        on_refused: Without a codec: what to answer to a refused message; None: nothing.
        ping: What to send to a peer that has been silent for ``limits.ping_after``: something to which the other side
            answers, with whatever it likes. The kernel's own probes tell of a host that is gone
            (``limits.vanished_within``), this of a program that is.
        task_status: Gets the `StageServer` once it listens.

    Raises:
        ValueError, TypeError: An argument is out of range.

    Checkpoints: throughout. A cancellation closes every connection without ceremony; `StageServer.drain` is the
        orderly end, after which this returns.

    Cost: about 2 µs of processor per message and direction when many are under way; one system call for reading and one
        for writing per connection and slice.
    """
    server = StageServer(
        handler,
        framing=LengthPrefixed(1 << 20) if framing is None else framing,
        codec=codec,
        limits=PeerLimits() if limits is None else limits,
        max_connections=max_connections,
        admission=admission,
        proxies=proxies,
        max_items=max_items,
        workers=workers,
        max_running=max_running,
        input_rates=input_rates,
        refuse=refuse,
        flow=flow,
        weight=weight,
        cost=cost,
        max_handling=max_handling,
        watchdog=watchdog,
        budget=budget,
        handler_of=handler_of,
        cancel_on_disconnect=cancel_on_disconnect,
        tick=tick,
        on_error=on_error,
        on_refused=on_refused,
        on_connect=on_connect,
        on_disconnect=on_disconnect,
        ping=ping,
    )
    are_listeners = isinstance(listeners, Sequence) and all(isinstance(one, trio.abc.Listener) for one in listeners)
    if not are_listeners:
        raise TypeError(f"listeners must be a sequence of listeners, as of open_listeners, not {listeners!r}")
    if not listeners:
        raise ValueError(f"listeners must be one at least, not {listeners!r}")
    await server.run(listeners, task_status.started)
