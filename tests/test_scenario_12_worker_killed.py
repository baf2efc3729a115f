"""Scenario 12 (real): a worker is killed with a hundred calls outstanding. Outcomes, not times.

The storm at the end takes three seconds; ``STAGETRIO_STORM_SECONDS=60 pytest tests/test_scenario_12_worker_killed.py
-k storm -s`` runs it in full size and prints what it saw.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import subprocess
import sys
from math import inf
from pathlib import Path

import prefork_procedures
import prefork_targets
import pytest
import trio

from stagetrio.arbiter import Arbiter
from stagetrio.prefork import open_arbiter
from stagetrio.remote import Remote, WorkerLost, open_remote
from stagetrio.sockets import connect

STORM_SECONDS = float(os.environ.get("STAGETRIO_STORM_SECONDS", "3"))
TARGET = prefork_targets.__file__


def ready(arbiter: Arbiter) -> list[int]:
    """The process ids of the workers that are ready."""
    return [w.pid for w in arbiter.statistics().workers if w.state == "ready" and w.pid is not None]


def runs(journal: Path) -> list[tuple[str, int]]:
    """(call, process id) of every call that began, in order."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [(name, int(pid)) for name, pid in (line.split() for line in lines)]


async def test_callers_of_a_killed_worker_are_told_and_nobody_else_notices(tmp_path: Path) -> None:
    """Exactly the calls in flight there are lost; none hangs, none runs twice unless declared idempotent.

    No new connection is refused meanwhile, and the replacement is called only when it is ready.
    """
    journal = tmp_path / "journal"
    outcomes: dict[str, int | WorkerLost] = {}
    refused: list[OSError] = []
    with trio.fail_after(60):
        async with open_arbiter(
            f"{prefork_procedures.__file__}:remote",
            ["tcp://127.0.0.1:0"],
            processes=2,
            arguments=[str(journal)],
            heartbeat=0.1,
            hang_after=20,
        ) as arbiter:
            await arbiter.wait_ready()
            address = str(arbiter.addresses[0])
            done = trio.Event()

            async def call(name: str, remote: Remote) -> None:
                try:
                    outcomes[name] = await remote.call(prefork_procedures.hold, name, 1.5)
                except WorkerLost as lost:
                    outcomes[name] = lost

            async def connect_again_and_again() -> None:
                while not done.is_set():
                    try:
                        async with await connect(address):
                            pass
                    except OSError as error:
                        refused.append(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect_again_and_again)
                async with trio.open_nursery() as callers:

                    async def client(number: int) -> None:
                        async with open_remote(address) as remote, trio.open_nursery() as calls:
                            for n in range(5):
                                kind = "again" if n == 0 else "once"
                                options = remote.with_options(idempotent=n == 0)
                                calls.start_soon(call, f"{kind}-{number}-{n}", options)

                    for number in range(20):
                        callers.start_soon(client, number)
                    while len(runs(journal)) < 100:  # noqa: ASYNC110 - another process writes it
                        await trio.sleep(0.01)
                    before = ready(arbiter)
                    ran_at = collections.Counter(pid for _, pid in runs(journal))
                    victim = max(ran_at, key=lambda pid: ran_at[pid])
                    os.kill(victim, signal.SIGKILL)
                await arbiter.wait_ready()
                done.set()
            (replacement,) = set(ready(arbiter)) - set(before)
            journalled = runs(journal)
            first_at = dict(reversed(journalled))
    assert len(outcomes) == 100
    for name, outcome in outcomes.items():
        if first_at[name] != victim:
            assert outcome == first_at[name]
        elif name.startswith("once"):
            assert isinstance(outcome, WorkerLost)
            assert outcome.may_have_run
        else:
            assert isinstance(outcome, int)
            assert outcome != victim
    counts = collections.Counter(name for name, _ in journalled)
    for name, count in counts.items():
        assert count == (2 if name.startswith("again") and first_at[name] == victim else 1), name
    assert refused == []
    assert {pid for _, pid in journalled} <= {*before, replacement}


async def test_control_a_server_that_owns_its_socket_refuses_while_it_is_restarted() -> None:
    """The naive way: start it again when it has died. Between the two, clients are refused."""
    program = (
        "import sys, trio\n"
        "async def serve(stream): await stream.send_all(b'!')\n"
        "async def main():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        serving = lambda task_status: trio.serve_tcp(serve, int(sys.argv[1]), task_status=task_status)\n"
        "        listeners = await nursery.start(serving)\n"
        "        print(listeners[0].socket.getsockname()[1], flush=True)\n"
        "trio.run(main)\n"
    )

    async def start(port: int) -> tuple[trio.Process, int]:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", program, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        return process, int(await process.stdout.receive_some())

    with trio.fail_after(60):
        process, port = await start(0)
        try:
            process.kill()
            await process.wait()
            with pytest.raises(OSError, match="connect"):
                await trio.open_tcp_stream("127.0.0.1", port)
            process, _ = await start(port)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                assert await stream.receive_some() == b"!"
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def test_a_storm_of_kills_leaves_every_client_served_and_nothing_behind() -> None:
    """A random worker is killed again and again: clients reconnect and are served, and no descriptor is left over."""
    chance = random.Random(12)
    clients = 20
    served = collections.Counter[int]()
    failed = 0
    in_flight = again = 0.0  # the longest time to an answer or an error, of a connection once answered; of a new one
    kills = 0
    with trio.fail_after(60 + 2 * STORM_SECONDS):
        async with open_arbiter(
            f"{TARGET}:pids", ["tcp://127.0.0.1:0"], processes=3, heartbeat=0.1, hang_after=20
        ) as arbiter:
            await arbiter.wait_ready()
            descriptors = len(os.listdir("/proc/self/fd"))

            async def client(number: int) -> None:
                nonlocal failed, in_flight, again
                lost = trio.current_time()
                while not over.cancel_called:
                    since = inf
                    try:
                        async with await connect(arbiter.addresses[0]) as stream:
                            while True:
                                await stream.send_all(b"?")
                                if not await stream.receive_some():
                                    raise trio.BrokenResourceError("the worker is gone")
                                served[number] += 1
                                now = trio.current_time()
                                in_flight, again = max(in_flight, now - since), max(again, now - lost)
                                await trio.sleep(0.02)
                                since, lost = trio.current_time(), inf
                    except trio.BrokenResourceError:
                        failed += 1
                        in_flight = max(in_flight, trio.current_time() - since)
                        lost = min(lost, trio.current_time())

            with trio.CancelScope() as over:
                async with trio.open_nursery() as nursery:
                    for number in range(clients):
                        nursery.start_soon(client, number)
                    end = trio.current_time() + STORM_SECONDS
                    while trio.current_time() < end:
                        await trio.sleep(min(1.0, STORM_SECONDS / 5))
                        if victims := ready(arbiter):
                            os.kill(chance.choice(victims), signal.SIGKILL)
                            kills += 1
                    await arbiter.wait_ready()
                    before = dict(served)
                    while any(served[number] <= before.get(number, 0) for number in range(clients)):  # noqa: ASYNC110
                        await trio.sleep(0.01)
                    over.cancel()
            while arbiter.statistics().crashed < kills:  # noqa: ASYNC110 - processes end when they end
                await trio.sleep(0.01)
            await arbiter.wait_ready()
            assert len(os.listdir("/proc/self/fd")) == descriptors
            assert arbiter.statistics().crashed == kills
            await arbiter.stop()
    print(f"{kills} kills: {served.total()} answers, {failed} lost connections")
    print(f"at most {in_flight:.3f} s to an answer or an error in flight, {again:.2f} s from a loss to the next answer")
    assert failed > 0
