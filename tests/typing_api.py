"""The public API as users write it: checked by ``mypy --strict`` (in CI, and by ``test_typing.py``), never run.

A ``# type: ignore[code]`` below marks a mistake that the types must catch: where they do not, mypy reports the comment
as unused.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, assert_type, cast

import attrs
import trio

from stagetrio import (
    AdaptiveLimiter,
    Again,
    BudgetExceeded,
    CloseReason,
    Codec,
    DatagramServer,
    Delivery,
    FairQueue,
    FlowRateLimiter,
    InputRates,
    JobInterrupted,
    LeaseLost,
    LengthPrefixed,
    Lines,
    NurseryPool,
    Overloaded,
    Pacer,
    Peer,
    PeerLimits,
    Procedures,
    ProcessPool,
    Proxies,
    Rate,
    RateLimiter,
    RemoteError,
    RequestFailed,
    RetryBudget,
    Snapshot,
    Source,
    Stage,
    StageServer,
    Stall,
    ThreadPool,
    Ticket,
    TicketRequest,
    TicketStage,
    WorkerLost,
    jobs,
    no_preempt,
    open_client,
    open_datagram_sockets,
    open_listeners,
    open_nursery_pool,
    open_process_pool,
    open_remote,
    open_remote_stream,
    open_remote_workers,
    open_thread_pool,
    open_watchdog,
    serve_datagrams,
    serve_remote,
    serve_remote_stream,
    serve_stage,
)
from stagetrio.all_tickets import all_tickets
from stagetrio.app import App
from stagetrio.fair_channel import open_fair_channel
from stagetrio.fair_queue import CoDel, FlowChannel, PriorityClass


@attrs.frozen
class Move:
    player: str
    field: int


@attrs.frozen
class Verdict:
    winner: str | None


# A queue knows the types of its flows and items.


async def fair_queue() -> None:
    queue: FairQueue[str, Move] = FairQueue(1000, max_items_per_flow=100, weight=lambda player: len(player))
    await queue.send("ada", Move("ada", 3), cost=2.5)
    queue.send_nowait("ada", Move("ada", 4))
    assert_type(await queue.receive(), Move)
    assert_type(queue.receive_nowait(), Move)
    assert_type(await queue.receive_batch(64), list[Move])
    delivery = await queue.receive_delivery()
    assert_type(delivery, Delivery[str, Move])
    assert_type(delivery.flow, str)
    assert_type(delivery.item, Move)
    delivery.settle(0.003)
    queue.charge("ada", 0.5)
    assert_type(queue.discard("ada"), list[Move])
    async for move in queue:
        assert_type(move, Move)
    assert_type(queue.open_flow("ada", weight=2.0), FlowChannel[str, Move])
    channel: trio.abc.SendChannel[Move] = queue.open_flow("ada")
    await channel.send(Move("ada", 5))
    assert_type(queue.statistics().items, int)
    queue.send_nowait(7, Move("ada", 5))  # type: ignore[arg-type]
    queue.send_nowait("ada", "not a move")  # type: ignore[arg-type]
    FairQueue()  # type: ignore[call-arg]


# The ends of a fair channel stand where a memory channel's stood.


async def fair_channel() -> None:
    queue: FairQueue[Any, Move] = FairQueue(
        100, overflow="refuse", classes=[PriorityClass("only", codel=CoDel())], class_of=lambda _: "only"
    )
    send, receive = open_fair_channel(queue)
    sender: trio.abc.SendChannel[Move] = send.clone()
    receiver: trio.abc.ReceiveChannel[Move] = receive.clone()
    await sender.send(Move("ada", 5))
    assert_type(await receiver.receive(), Move)
    assert_type(receive.receive_nowait(), Move)
    send.send_nowait(7)  # type: ignore[arg-type]
    FairQueue(100, overflow="drop")  # type: ignore[arg-type]


# A rate cannot be confused with a number, nor a burst be forgotten.


async def limits() -> None:
    limiter = RateLimiter(Rate(100), burst=20)
    await limiter.acquire()
    assert_type(limiter.delay(3.0), float)
    flows = FlowRateLimiter(Rate(5, per=60.0), burst=5, max_flows=10_000, parent=limiter)
    try:
        limiter.acquire_nowait(2)
    except Overloaded as refusal:
        assert_type(refusal.reason, str)
        assert_type(refusal.retry_after, float)
    refusal_of_trio: type[trio.WouldBlock] = Overloaded
    assert_type(refusal_of_trio, type[trio.WouldBlock])
    RateLimiter(100, burst=20)  # type: ignore[arg-type]
    RateLimiter(Rate(100))  # type: ignore[call-arg]
    assert_type(flows.statistics().flows, int)


# Tickets: what is asked for can be awaited only by `async with`, what is held can be read.


async def tickets() -> None:
    stage = TicketStage("login", 50, max_waiting=1000, lease=1.0, max_wait=math.inf)
    shared = TicketStage("database", trio.CapacityLimiter(10), revocable=True)
    request = stage.ticket("ada", cost=2, key="ada", lease=0.5)
    assert_type(request, TicketRequest)
    try:
        async with request as ticket:
            assert_type(ticket, Ticket)
            assert_type(ticket.fence, int)
            assert_type(ticket.deadline, float)
            ticket.extend(2.0)
            ticket.release()
    except LeaseLost as lost:
        assert_type(lost.reason, str)
    with stage.ticket_nowait() as ticket:
        shared.revoke(ticket, "for a reason")
    stage.broadcast("the database is slow")
    stage.close_after(10)


async def several_tickets(tables: TicketStage, rooms: TicketStage) -> None:
    async with all_tickets(tables.ticket("ada"), rooms.ticket("ada")) as held:
        assert_type(held, tuple[Ticket, ...])


# An adaptive limiter stands where Trio's did; Trio's own class is final, so that needs a cast.


async def adaptive_limits(limiter: AdaptiveLimiter) -> None:
    async with limiter:
        pass
    await trio.to_thread.run_sync(len, "ada", limiter=cast("trio.CapacityLimiter", limiter))
    TicketStage("database", limiter)


# A retried call keeps its type.


async def retries() -> None:
    budget = RetryBudget(0.2, retry_on=(Overloaded, trio.TooSlowError))
    assert_type(await budget.call(look_up, "ada"), int)
    await budget.call(look_up, 7)  # type: ignore[arg-type]


async def look_up(name: str) -> int:
    return len(name)


# A pool stands where a nursery stood, by a cast as well.


async def handle(stream: trio.SocketStream) -> None:
    await stream.aclose()


async def greet(name: str, times: int) -> None: ...


async def pools(listeners: list[trio.SocketListener]) -> None:
    async with open_nursery_pool(1000) as pool:
        assert_type(pool, NurseryPool)
        await pool.spawn(greet, "ada", 3, key="ada")
        pool.spawn_nowait(greet, "ada", 3)
        pool.start_soon(greet, "ada", 3)
        pool.cancel("ada", "she left")
        await pool.drain(5.0)
        await pool.spawn(greet, "ada", "three")  # type: ignore[arg-type]
        await trio.serve_listeners(handle, listeners, handler_nursery=cast("trio.Nursery", pool))


# Snapshots keep the type of their value through every update.


async def snapshots() -> None:
    players: Snapshot[frozenset[str]] = Snapshot(frozenset())
    view = players.update(lambda names: names | {"ada"})
    assert_type(view.value, frozenset[str])
    assert_type(view.version, int)
    assert_type(players.compare_and_set(view.version, frozenset()), bool)
    assert_type((await players.wait_changed(view.version)).value, frozenset[str])
    players.update(lambda names: 7)  # type: ignore[arg-type, return-value]


# A remote call is typed by the procedure's own signature; by name it is not.

procedures = Procedures()


@procedures.procedure
async def judge(moves: list[Move], *, strict: bool = False) -> Verdict:
    return Verdict(moves[-1].player)


@procedures.procedure
async def replay(game: int) -> AsyncIterator[Move]:
    yield Move("ada", game)


async def remote(stream: trio.abc.Stream) -> None:
    assert_type(await judge([], strict=True), Verdict)
    async with open_remote("unix:///run/judge.sock", token="secret") as there:
        assert_type(await there.call(judge, [Move("ada", 1)], strict=True), Verdict)
        await there.post(judge, [])
        async with there.stream(replay, 7) as values:
            async for move in values:
                assert_type(move, Move)
        assert_type(await there.with_options(idempotent=True).call(judge, []), Verdict)
        await there.call("judge", anything="goes")
        await there.call(judge, [1, 2])  # type: ignore[call-overload]
        await there.call(judge)  # type: ignore[call-overload]
    async with open_remote_stream(stream) as there:
        try:
            await there.call(judge, [])
        except WorkerLost as lost:
            assert_type(lost.may_have_run, bool)
        except RemoteError:
            pass
    async with open_remote_workers(procedures, 4, max_in_flight=10) as workers:
        assert_type(await workers.call(judge, []), Verdict)
        assert_type(workers.statistics().ready, int)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_remote, procedures, await open_listeners("tcp://127.0.0.1:0"))
        nursery.start_soon(serve_remote_stream, procedures, stream)


def pacing() -> None:
    pacer = Pacer(0.02)
    pacer.touch(lambda: None)


# A stage takes what its queue holds; the server is typed by its codec's messages.


async def verdict_of(move: Move) -> Verdict:
    return Verdict(move.player)


async def stages(moves: FairQueue[str, Move], names: FairQueue[str, str]) -> None:
    stage = Stage(verdict_of, queue=moves, workers=10, order_key=lambda move: move.player)
    assert_type(stage, Stage[Move])
    await stage.run()
    assert_type(stage.statistics().handled, int)
    Stage(verdict_of, queue=names, workers=10)  # type: ignore[arg-type]
    Stage(verdict_of, queue=moves)  # type: ignore[call-arg]


async def answer(peer: Peer[Move | Verdict], message: Move | Verdict) -> Move | Verdict | None:
    peer.flow = "ada"
    peer.send_nowait(Move("ada", 1))
    await peer.send(Verdict(None))
    peer.send_nowait("not a message")  # type: ignore[arg-type]
    return Verdict("ada") if isinstance(message, Move) else None


async def tell(source: Source[Move | Verdict], message: Move | Verdict) -> Move | Verdict | None:
    assert_type(source.verify(source.token()), bool)
    source.send_nowait("not a message")  # type: ignore[arg-type]
    return message


def note(source: Source[Move | Verdict], error: Exception) -> None:
    source.data = error


codec: Codec[Move | Verdict] = Codec([Move, Verdict])


async def servers() -> None:
    limits = PeerLimits(idle_within=60.0, max_outbox_bytes=1 << 20)
    listeners = await open_listeners("tcp://127.0.0.1:0", "unix:///run/game.sock")
    async with trio.open_nursery() as nursery:
        serve = partial(serve_stage, answer, listeners, codec=codec, framing=Lines(4096), limits=limits, tick=0.02)
        server: StageServer[Move | Verdict] = await nursery.start(serve)
        assert_type(server.broadcast(Verdict("ada")), list[Peer[Move | Verdict]])
        assert_type(server.statistics().closed, dict[CloseReason, int])
        await server.drain(5.0)
    await serve_stage(answer, listeners, framing=LengthPrefixed(1 << 16), codec=codec, flow=lambda peer: peer.address)
    await serve_stage(answer, listeners, codec=codec, proxies=Proxies(["10.0.0.0/8", "unix"], header_within=5))
    sockets = await open_datagram_sockets("udp://127.0.0.1:0", reuse_port=True)
    async with trio.open_nursery() as nursery:
        receive = partial(serve_datagrams, tell, sockets, codec=codec, flow=lambda source: source.data, on_error=note)
        receiver: DatagramServer[Move | Verdict] = await nursery.start(receive)
        assert_type(receiver.statistics().dropped, dict[str, int])
    rates = InputRates(message_rate=Rate(100), total_byte_rate=Rate(1e8), burst=0.5)
    await serve_stage(answer, listeners, codec=codec, input_rates=rates, max_running=4, refuse=True)


async def clients() -> None:
    async with open_client("tcp://127.0.0.1:8800", codec) as client:
        try:
            await client.ask(Move("ada", 1))
        except RequestFailed as failure:
            print(failure)
        await client.send(Verdict(None))


# What runs under the watchdog keeps its return type.


async def watchdogs() -> None:
    def report(stall: Stall) -> None:
        assert_type(stall.seconds, float)

    async with open_watchdog(quantum=0.005, on_stall=report, preemptible=("json",)) as watchdog:
        assert_type(await watchdog.run(verdict_of, Move("ada", 1), flow="ada", budget=0.1), Verdict)
        assert_type(await watchdog.watch(verdict_of, Move("ada", 1)), Verdict)
        async with trio.open_nursery() as nursery:
            watchdog.start_soon(nursery, verdict_of, Move("ada", 1))
        try:
            await watchdog.run(verdict_of, Move("ada", 1), budget=0.1)
        except BudgetExceeded as error:
            assert_type(error.handler, str)
        with no_preempt():
            pass
        assert_type(watchdog.statistics().forced, int)


# Pools know what a function takes and returns; a job says what it has to say by its module's functions.


def job(size: int, name: str) -> bytes | Again:
    jobs.report(size)
    jobs.check_cancelled()
    jobs.give_way()
    try:
        with jobs.blocking():
            return Again(1.5)
    except JobInterrupted:
        return name.encode()


async def worker_pools() -> None:
    async with open_thread_pool(4, max_running=1) as threads, open_process_pool(2, warm=1) as processes:
        assert_type(threads, ThreadPool)
        assert_type(processes, ProcessPool)
        assert_type(await threads.call(len, "four", flow="ada", key="four", interrupt=True), int)
        assert_type(await processes.call(len, "four"), int)
        assert_type(await threads.call_batch(len, ["a", "b"]), list[int])
        assert_type(await processes.call_batch(len, ["a", "b"]), list[int])
        async with threads.run(job, 3, "x") as progress:
            async for _ in progress:
                pass
        assert_type(await progress.result(), bytes | Again)
        await threads.call(job, "3", "x")  # type: ignore[arg-type]
        await processes.call(job, 3)  # type: ignore[arg-type]


# An app is what its decorators collect; they leave the functions as they are.

app = App("arena", sends=[Verdict], quantum=0.005)
login = app.ticket("login", 50, max_waiting=100)


@app.on(Move, ticket=login)
async def on_move(peer: Peer[Move], message: Move) -> Verdict:
    return Verdict(message.player)


@app.every(0.5)
async def tick() -> None:
    app.broadcast(Verdict(None))


@app.on_connect
async def hello(peer: Peer[Verdict]) -> None:
    peer.send_nowait(Verdict(None))


@app.on_disconnect
async def goodbye(peer: Peer[Verdict]) -> None: ...


async def apps() -> None:
    assert_type(await on_move(app.peers[0], Move("ada", 1)), Verdict)
    await tick()
    async with trio.open_nursery() as nursery:
        await nursery.start(app.serve, "tcp://127.0.0.1:0")
        await app.drain(5.0)


def not_async() -> None: ...


app.every(0.5)(not_async)  # type: ignore[type-var]
