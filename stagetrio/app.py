"""All of it from a script: an app is what its decorators say it is.

An `App` collects message types and their handlers, tickets, periodic jobs and hooks; `App.serve` puts the parts
together and serves them. The wire is length-prefixed frames of `stagetrio.codec.Codec` payloads.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from math import inf
from typing import Any, TypeVar

import attrs
import trio

from stagetrio.amounts import check_above_zero, check_amount, check_count
from stagetrio.codec import Codec
from stagetrio.failures import Failures
from stagetrio.framing import LengthPrefixed
from stagetrio.peer import Peer
from stagetrio.remote import Procedures, serve_remote
from stagetrio.rules import CloseReason, PeerLimits
from stagetrio.server import ServerStatistics, StageServer, serve_stage
from stagetrio.sockets import Address, SocketListener, address_of, open_listeners
from stagetrio.ticket import TicketStage
from stagetrio.watchdog import Watchdog, open_watchdog

M = TypeVar("M")
OnMessage = Callable[[Peer[Any], Any], Coroutine[Any, Any, Any]]
Hook = Callable[[Peer[Any]], Awaitable[object]]
Job = Callable[[], Awaitable[object]]
Lifespan = Callable[[], AbstractAsyncContextManager[object]]
HookT = TypeVar("HookT", bound=Hook)
JobT = TypeVar("JobT", bound=Job)
LifespanT = TypeVar("LifespanT", bound=Lifespan)
OnMessageT = TypeVar("OnMessageT", bound=OnMessage)

logger = logging.getLogger("stagetrio.app")


@attrs.frozen
class AppDescription:
    """What an app consists of, as `stagetrio run --check` prints it.

    Args:
        name: Of the app.
        messages: ``{message type: handler}``, by name.
        replies: Names of the message types that the server sends.
        tickets: ``{ticket: how many}``.
        jobs: ``{job: seconds between two starts}``.
        procedures: Names of the procedures.
        hooks: Names of the functions called for connections that come and go.
    """

    name: str
    messages: dict[str, str]
    replies: list[str]
    tickets: dict[str, float]
    jobs: dict[str, float]
    procedures: list[str]
    hooks: list[str]


@attrs.frozen
class AppStatistics:
    """What an app has done and is doing.

    Args:
        server: The statistics of its server.
        tickets: ``{name: statistics of the ticket stage}``.
        failures: ``{"Type in function": how often}`` an exception left a handler, a hook or a job.
    """

    server: ServerStatistics
    tickets: dict[str, Any]
    failures: dict[str, int]


class App:
    """A server, put together by decorators::

        app = App("echo")

        @app.on(Say)
        async def echo(peer: Peer[Any], message: Say) -> Say:
            return message

    ``stagetrio run script.py`` serves the one app of a script. A handler that fails is logged, once per cause, and its
    peer gets `stagetrio.codec.Failed`; an app does not end because one of its functions raised.

    Args:
        name: For people: in logs and listings.
        sends: Message types the app sends besides those that its handlers say they return.
        workers: Handlers that may be waiting for something at once.
        max_items: Messages queued, of all peers.
        max_connections: Connections at once.
        max_frame_bytes: The longest message, encoded.
        max_handling: Seconds from a handler's first wait after which it is cancelled.
        flow: Whose share a new peer's messages take from; by default each connection is a flow.
        refuse: Answer messages for which there is no room by `stagetrio.codec.Refused`, instead of not reading them.
        limits: The rules for every connection.
        quantum: Seconds a handler may hold the loop before it is forced to a checkpoint. By default handlers are not
            forced: see the warning in `stagetrio.watchdog` before switching it on.
        budget: Seconds a handler may hold the loop in all before it is cancelled; only with a finite quantum.
        preemptible: Modules, besides each handler's own, in which a handler may be forced to a checkpoint.

    Raises:
        ValueError, TypeError: An argument is out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        sends: typing.Iterable[type] = (),
        workers: int = 100,
        max_items: int = 10_000,
        max_connections: float = 10_000,
        max_frame_bytes: int = 65536,
        max_handling: float = inf,
        flow: Callable[[Peer[Any]], Hashable] | None = None,
        refuse: bool = False,
        limits: PeerLimits | None = None,
        quantum: float = inf,
        budget: float = inf,
        preemptible: tuple[Any, ...] = (),
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty str, not {name!r}")
        if not 1 <= check_count("max_frame_bytes", max_frame_bytes, 1) < 2**32:
            raise ValueError(f"max_frame_bytes must be below 2**32, not {max_frame_bytes!r}")
        if flow is not None and not callable(flow):
            raise TypeError(f"flow must be a function of a peer, not {flow!r}")
        if limits is not None and not isinstance(limits, PeerLimits):
            raise TypeError(f"limits must be a PeerLimits, not {limits!r}")
        if limits is not None and limits.ping_after != inf:
            raise ValueError(f"limits.ping_after must be inf, as an App sends no pings, not {limits.ping_after!r}")
        if check_above_zero("budget", budget) != inf and check_above_zero("quantum", quantum) == inf:
            raise ValueError(f"budget is kept only with a finite quantum: budget={budget!r}, quantum={quantum!r}")
        self.name = name
        self._sends = list(sends)
        self._workers = check_count("workers", workers, 1)
        self._max_items = check_count("max_items", max_items, 1)
        self._max_connections = check_amount("max_connections", max_connections, 1)
        self._framing = LengthPrefixed(max_frame_bytes)
        self._max_handling = check_above_zero("max_handling", max_handling)
        self._flow = flow
        self._refuse = refuse
        self._limits = limits
        self._quantum = check_above_zero("quantum", quantum)
        self._budget = budget
        self._preemptible = preemptible
        self._handlers: dict[type, OnMessage] = {}
        self._tickets: dict[str, TicketStage] = {}
        self._jobs: list[tuple[float, Job]] = []
        self._connect_hooks: list[Hook] = []
        self._disconnect_hooks: list[Hook] = []
        self._lifespans: list[Lifespan] = []
        self._procedures = Procedures()
        self._procedure_names: list[str] = []
        self._failures = Failures(logger, name)
        self._is_served = False
        self._server: StageServer[Any] | None = None  # as soon as it accepts

    def __repr__(self) -> str:
        return f"<App {self.name!r}>"

    # What the decorators collect.

    def on(self, message_type: type, *, ticket: TicketStage | None = None) -> Callable[[OnMessageT], OnMessageT]:
        """Make an async function ``(peer, message) -> reply or None`` the handler of a message type.

        Args:
            message_type: An attrs class. What the function's annotation says it returns is known to the wire as well.
            ticket: What each message needs before its handler starts; one that waits too long is refused.

        Raises:
            TypeError: The type is not an attrs class, the ticket no `TicketStage`, or the handler not an async function
                of a peer and a message.
            ValueError: The type has a handler already.
        """
        if not (isinstance(message_type, type) and attrs.has(message_type)):
            raise TypeError(f"message_type must be an attrs class, not {message_type!r}")
        if ticket is not None and not isinstance(ticket, TicketStage):
            raise TypeError(f"ticket must be what app.ticket(...) has returned, not {ticket!r}")

        def register(handler: OnMessageT) -> OnMessageT:
            _check_async("a handler", handler, "peer", "message")
            if message_type in self._handlers:
                raise ValueError(f"{message_type.__name__} has a handler already: {self._handlers[message_type]!r}")
            self._handlers[message_type] = handler if ticket is None else _with_ticket(ticket, handler)
            return handler

        return register

    def ticket(self, name: str, tickets: int | trio.CapacityLimiter, **options: Any) -> TicketStage:
        """Make a ticket stage that belongs to this app; the arguments are those of `TicketStage`.

        Raises:
            ValueError: There is one of that name.
        """
        if name in self._tickets:
            raise ValueError(f"name must be unique: there is a ticket {name!r} already")
        stage = self._tickets[name] = TicketStage(name, tickets, **options)
        return stage

    def every(self, seconds: float) -> Callable[[JobT], JobT]:
        """Call an async function without arguments again and again while the app is served.

        Starts lie on a grid of ``seconds``, which does not drift; those that fall into a running call are left out.

        Raises:
            ValueError, TypeError: ``seconds`` is not positive and finite, or the job not an async function.
        """
        if callable(seconds):
            raise TypeError(f"seconds must be a number, not {seconds!r}; write for instance @app.every(60)")
        if check_above_zero("seconds", seconds) == inf:
            raise ValueError(f"seconds must be positive and finite, not {seconds!r}")

        def register(job: JobT) -> JobT:
            _check_async("a job", job)
            self._jobs.append((seconds, job))
            return job

        return register

    def procedure(self, fn: Any) -> Any:
        """Make a function callable from other processes; see `stagetrio.remote.Procedures`."""
        registered = self._procedures.procedure(fn)
        self._procedure_names.append(fn.__name__)
        return registered

    def on_connect(self, hook: HookT) -> HookT:
        """Call an async function with each new peer, before anything is read from it."""
        _check_async("a hook", hook, "peer")
        self._connect_hooks.append(hook)
        return hook

    def on_disconnect(self, hook: HookT) -> HookT:
        """Call an async function with each peer that is gone."""
        _check_async("a hook", hook, "peer")
        self._disconnect_hooks.append(hook)
        return hook

    def lifespan(self, context: LifespanT) -> LifespanT:
        """Enter an async context manager before the app serves, and leave it afterwards: what handlers need open.

        Args:
            context: A function without arguments that returns one, such as ``@asynccontextmanager`` makes.

        Raises:
            TypeError: It is none.
        """
        if not callable(context) or _is_undecorated(context):
            mend = "write @asynccontextmanager between @app.lifespan and the function"
            raise TypeError(
                f"a lifespan must be a function that returns an async context manager, not {context!r}; {mend}"
            )
        _check_parameters("a lifespan", context)
        self._lifespans.append(context)
        return context

    @property
    def codec(self) -> Codec[Any]:
        """The messages of this app, for its clients too.

        Raises:
            TypeError: A handler's annotation says that it returns what no message is, or what cannot be looked up.
            ValueError: Two messages have the same name.
        """
        messages: dict[type, None] = dict.fromkeys((*self._handlers, *self._sends))
        known = tuple(messages)
        for handler in self._handlers.values():
            messages.update(dict.fromkeys(_returned(handler, known)))
        return Codec(messages)

    def describe(self) -> AppDescription:
        """Return what the decorators have collected."""
        return AppDescription(
            name=self.name,
            messages={cls.__name__: handler.__qualname__ for cls, handler in self._handlers.items()},
            replies=[cls.__name__ for cls in self.codec.types if cls not in self._handlers],
            tickets={name: stage.statistics().tickets for name, stage in self._tickets.items()},
            jobs={getattr(job, "__qualname__", repr(job)): seconds for seconds, job in self._jobs},
            procedures=list(self._procedure_names),
            hooks=[
                getattr(hook, "__qualname__", repr(hook)) for hook in (*self._connect_hooks, *self._disconnect_hooks)
            ],
        )

    # Serving.

    async def serve(
        self,
        *addresses: str | Address,
        procedures_at: typing.Sequence[str | Address] = (),
        task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `drain`, or until cancelled.

        Args:
            addresses: Where clients connect.
            procedures_at: Where other processes call the app's procedures; keep these addresses from strangers.
            task_status: Gets the addresses listened on, when all are open.

        Raises:
            OSError: An address cannot be had; its message names it.
            ValueError: An address, or an argument of the app, makes no sense.
            RuntimeError: The app is being served already.

        Checkpoints: throughout. A cancellation closes every connection without ceremony.
        """
        if self._is_served:
            raise RuntimeError(f"{self!r} is being served already")
        if not addresses:
            raise ValueError("addresses must name at least one place to listen, not ()")
        listeners = await open_listeners(*addresses)
        try:
            inner = await open_listeners(*procedures_at) if procedures_at else []
        except BaseException:
            await _close(listeners)
            raise
        await self.serve_listeners(listeners, procedures_at=inner, task_status=task_status)

    async def serve_listeners(
        self,
        listeners: typing.Sequence[SocketListener],
        *,
        procedures_at: typing.Sequence[SocketListener] = (),
        task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve on sockets that listen already, as the workers of `stagetrio.prefork` are given.

        Args:
            listeners: Where clients connect; closed in the end.
            procedures_at: Where other processes call the app's procedures; closed in the end.
            task_status: As for `serve`, whose errors are raised here as well.

        Checkpoints: throughout. A cancellation closes every connection without ceremony.
        """
        if self._is_served:
            await _close((*listeners, *procedures_at))
            raise RuntimeError(f"{self!r} is being served already")
        self._is_served = True
        try:
            async with self._open() as watchdog, trio.open_nursery() as nursery:
                self._server = await nursery.start(self._serve_clients, listeners, watchdog)
                if procedures_at:
                    await nursery.start(serve_remote, self._procedures, procedures_at)
                for seconds, job in self._jobs:
                    nursery.start_soon(self._repeat, seconds, job)
                task_status.started([address_of(listener.socket) for listener in listeners])
                await self._server.wait_ended()
                nursery.cancel_scope.cancel()
        finally:
            self._is_served, self._server = False, None
            await _close((*listeners, *procedures_at))  # where serving did not come to begin

    async def drain(self, grace: float) -> None:
        """Stop accepting, finish what was received within the grace, and end `serve`.

        Args:
            grace: Seconds after which what is left is cancelled. ≥ 0.

        Raises:
            RuntimeError: The app is not being served.

        Checkpoints: always.
        """
        await self._running().drain(grace)

    @property
    def peers(self) -> tuple[Peer[Any], ...]:
        """The connections there are, oldest first."""
        return self._running().peers

    def broadcast(self, message: Any, peers: typing.Iterable[Peer[Any]] | None = None) -> list[Peer[Any]]:
        """Send one message to many peers, encoded once; see `StageServer.broadcast`."""
        return self._running().broadcast(message, peers)

    def statistics(self) -> AppStatistics:
        """Return a snapshot of the counts, while the app is served."""
        return AppStatistics(
            server=self._running().statistics(),
            tickets={name: stage.statistics() for name, stage in self._tickets.items()},
            failures=dict(self._failures.counts),
        )

    def _running(self) -> StageServer[Any]:
        if self._server is None:
            raise RuntimeError(f"{self!r} is not being served")
        return self._server

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Watchdog | None]:
        async with AsyncExitStack() as stack:
            for lifespan in self._lifespans:
                await stack.enter_async_context(lifespan())
            watchdog = None
            if self._quantum != inf:
                opened = open_watchdog(quantum=self._quantum, preemptible=self._preemptible)
                watchdog = await stack.enter_async_context(opened)
            yield watchdog

    async def _serve_clients(
        self,
        listeners: typing.Sequence[trio.abc.Listener[Any]],
        watchdog: Watchdog | None,
        *,
        task_status: trio.TaskStatus[StageServer[Any]],
    ) -> None:
        await serve_stage(
            self._dispatch,
            listeners,
            framing=self._framing,
            codec=self.codec,
            flow=self._flow,
            workers=self._workers,
            max_items=self._max_items,
            max_connections=self._max_connections,
            refuse=self._refuse,
            max_handling=self._max_handling,
            limits=self._limits,
            watchdog=watchdog,
            budget=self._budget,
            handler_of=self._handler_of,
            on_connect=self._connected if self._connect_hooks else None,
            on_disconnect=self._disconnected if self._disconnect_hooks else None,
            on_error=self._failed,
            task_status=task_status,
        )

    def _handler_of(self, message: Any) -> Callable[..., Any]:
        return self._handlers.get(type(message), _turn_away)

    def _dispatch(self, peer: Peer[Any], message: Any) -> Coroutine[Any, Any, Any]:
        handler: OnMessage = self._handlers.get(type(message), _turn_away)
        return handler(peer, message)

    async def _connected(self, peer: Peer[Any]) -> None:
        for hook in self._connect_hooks:
            await hook(peer)

    async def _disconnected(self, peer: Peer[Any]) -> None:
        for hook in self._disconnect_hooks:
            await hook(peer)

    async def _repeat(self, seconds: float, job: Job) -> None:
        start, point = trio.current_time(), 0
        while True:
            try:
                await job()
            except Exception as error:
                self._failures.record(error)
            # The next point of the grid that is still to come, and later than this one, however quotients are rounded.
            passed = int((trio.current_time() - start) // seconds)
            point = max(point, passed) + 1
            await trio.sleep_until(start + point * seconds)

    def _failed(self, peer: Peer[Any], error: Exception) -> None:
        self._failures.record(error)


async def _close(listeners: typing.Sequence[SocketListener]) -> None:
    for listener in listeners:
        await trio.aclose_forcefully(listener)


async def _turn_away(peer: Peer[Any], message: Any) -> None:
    peer.end(CloseReason.PROTOCOL, f"{type(message).__name__} is not a message for this server")


def _with_ticket(ticket: TicketStage, handler: OnMessage) -> OnMessage:
    @functools.wraps(handler)
    async def with_ticket(peer: Peer[Any], message: Any) -> Any:
        async with ticket.ticket(peer.flow):
            return await handler(peer, message)

    return with_ticket


def _check_async(what: str, fn: object, *parameters: str) -> None:
    if not inspect.iscoroutinefunction(fn):
        raise TypeError(f"{what} must be an async function, not {fn!r}")
    _check_parameters(what, fn, *parameters)


def _check_parameters(what: str, fn: Callable[..., object], *parameters: str) -> None:
    signature = inspect.signature(fn)
    try:
        signature.bind(*parameters)
    except TypeError:
        raise TypeError(f"{what} must take ({', '.join(parameters)}), not {signature}: {fn!r}") from None


def _is_undecorated(context: Callable[..., object]) -> bool:
    kinds = (inspect.isasyncgenfunction, inspect.iscoroutinefunction, inspect.isgeneratorfunction)
    return any(is_one(context) for is_one in kinds)


def _returned(handler: OnMessage, known: tuple[type, ...]) -> list[type]:
    """The attrs classes that a handler's annotation says it returns; a class above those known adds nothing."""
    annotation = _return_annotation(handler)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    said = typing.get_args(annotation) if is_union else (annotation,)
    classes = [cls for cls in said if isinstance(typing.get_origin(cls) or cls, type) and cls is not types.NoneType]
    for cls in classes:
        if not (attrs.has(cls) or cls is Any or any(cls in message.__mro__ for message in known)):
            raise TypeError(f"what {handler.__qualname__} returns must be an attrs class or None, not {cls!r}")
    return [cls for cls in classes if attrs.has(cls)]


def _return_annotation(handler: OnMessage) -> Any:
    # Alone, since the others may stand for what is imported only under TYPE_CHECKING.
    function: Any = inspect.unwrap(handler)
    said = function.__annotations__.get("return")
    try:
        alone = types.SimpleNamespace(__annotations__={"return": said})
        return typing.get_type_hints(alone, getattr(function, "__globals__", {}))["return"]
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        mend = "let it be a name of its module, imported not only under TYPE_CHECKING"
        raise TypeError(
            f"what {handler.__qualname__} returns, {said!r}, cannot be looked up: {error}; {mend}"
        ) from None
