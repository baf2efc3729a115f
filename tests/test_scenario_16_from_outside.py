"""Scenario 16, the last rung: C code that keeps the GIL, which only another process can end.

Real worker processes under an arbiter. Outcomes are tested; how soon, ``benchmarks/watchdog.py`` measures. The control
is the same server, with the same watchdog and budget, without the arbiter: it stays stuck.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from functools import partial

import gil_holder
import pytest
import trio

from stagetrio.arbiter import Arbiter
from stagetrio.prefork import open_arbiter
from stagetrio.sockets import connect

GIVE_UP = 60.0  # seconds, for what should take one


async def ask(stream: trio.abc.Stream, line: bytes = b"?\n") -> bytes:
    """What a server answers; nothing where it closed the connection."""
    try:
        await stream.send_all(line)
        return await stream.receive_some()
    except trio.BrokenResourceError:
        return b""


async def connect_to_each(arbiter: Arbiter, streams: contextlib.AsyncExitStack) -> dict[int, trio.abc.Stream]:
    """{process id: a connection to that worker} of both."""
    found: dict[int, trio.abc.Stream] = {}
    while len(found) < 2:
        stream = await streams.enter_async_context(await connect(arbiter.addresses[0]))
        found.setdefault(int(await ask(stream)), stream)
    return found


async def test_a_worker_that_holds_the_gil_is_replaced_from_outside(capfd: pytest.CaptureFixture[str]) -> None:
    """Its peer is told by the end of the connection, its sibling serves all the while, the dump names the line."""
    target = f"{gil_holder.__file__}:serve"
    timing = {"heartbeat": 0.1, "hang_after": 1.5}
    with trio.fail_after(GIVE_UP):
        async with open_arbiter(target, ["tcp://127.0.0.1:0"], processes=2, **timing) as arbiter:
            await arbiter.wait_ready()
            async with contextlib.AsyncExitStack() as streams, trio.open_nursery() as nursery:
                (holder, one), (sibling, other) = (await connect_to_each(arbiter, streams)).items()
                answers: list[bytes] = []

                async def use_the_sibling() -> None:
                    while True:
                        answers.append(await ask(other))
                        await trio.sleep(0.01)

                nursery.start_soon(use_the_sibling)
                assert await ask(one, b"hold\n") == b""
                assert len(answers) > 1
                assert set(answers) == {b"%d\n" % sibling}
                while not arbiter.statistics().hung:  # noqa: ASYNC110 – the client may know of it first
                    await trio.sleep(0.02)
                await arbiter.wait_ready()
                serving = {worker.pid for worker in arbiter.statistics().workers if worker.state == "ready"}
                assert set(await connect_to_each(arbiter, streams)) == serving
                nursery.cancel_scope.cancel()
            assert sibling in serving
            assert holder not in serving
            assert len(serving) == 2
            assert (arbiter.statistics().hung, arbiter.statistics().crashed) == (1, 0)
    assert "in hold_the_gil" in capfd.readouterr().err


async def test_the_control_stays_stuck() -> None:
    """Neither its own watchdog nor Ctrl-C ends what holds the GIL, and nobody is served; SIGKILL does."""
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, [sys.executable, gil_holder.__file__], stdout=subprocess.PIPE, check=False)
        process: trio.Process = await nursery.start(start)
        assert process.stdout is not None
        with trio.fail_after(GIVE_UP):
            port = int(await process.stdout.receive_some())
            async with await trio.open_tcp_stream("127.0.0.1", port) as stuck:
                async with await trio.open_tcp_stream("127.0.0.1", port) as other:
                    assert int(await ask(other)) == process.pid
                    await stuck.send_all(b"hold\n")
                    with trio.move_on_after(gil_holder.BUDGET + 1) as waiting:
                        while True:  # the first may come before the GIL is held
                            await ask(other)
                    assert waiting.cancelled_caught
                    process.send_signal(signal.SIGINT)
                    with trio.move_on_after(0.2) as waiting:
                        await stuck.receive_some()
                    assert waiting.cancelled_caught
                    assert process.poll() is None
                    process.kill()
                    assert await ask(stuck) == b""
        await process.wait()
