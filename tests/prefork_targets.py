"""What the worker processes of the prefork tests run, not imported by the arbiter; cheap to import, as many start."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from functools import partial

import trio

from stagetrio.prefork_worker import Worker


async def answer_pid(worker: Worker, stream: trio.SocketStream) -> None:
    """Answer every byte with the process id and the version in the environment, one line each."""
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):  # a client may vanish
            async for _ in stream:
                await stream.send_all(f"{os.getpid()} {worker.number}\n".encode())


async def pids(worker: Worker, *, ready: bool = True) -> None:
    """Serve `answer_pid` until told to drain; open connections are finished within the grace."""
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            await accepting.start(
                partial(
                    trio.serve_listeners, partial(answer_pid, worker), worker.listeners, handler_nursery=connections
                )
            )
            if ready:
                worker.ready()
            await worker.wait_drain()
            accepting.cancel_scope.cancel()


async def versioned(worker: Worker, path: str) -> None:
    """Like `pids`, but what stands in a file decides: "broken" exits, "slow" never gets ready."""
    with open(path) as file:  # noqa: ASYNC230 - before anything is served
        version = file.read().strip()
    if version == "broken":
        raise SystemExit(3)
    await pids(worker, ready=version != "slow")


async def exits(worker: Worker, status: int) -> None:
    """End at once."""
    raise SystemExit(status)


async def dies_when_ready(worker: Worker) -> None:
    """Get ready, and end unasked."""
    worker.ready()
    await trio.sleep(0.01)
    os.kill(os.getpid(), 9)


async def dies_in_slot_1(worker: Worker) -> None:
    """Like `pids`, but the worker of one slot ends as soon as it is ready."""
    if worker.number == 1:
        await dies_when_ready(worker)
    await pids(worker)


async def hangs_when_asked(worker: Worker) -> None:
    """Serve; a connection that sends "hang" gets the loop stuck in a function called `stuck_here`."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                if data == b"hang":
                    stuck_here()
                await stream.send_all(f"{os.getpid()}\n".encode())

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, worker.listeners)
        worker.ready()
        await worker.wait_drain()
        nursery.cancel_scope.cancel()


def stuck_here() -> None:
    """Hold the loop for longer than any test lasts."""
    print("stuck", file=sys.stderr, flush=True)
    time.sleep(600)


async def ignores_drain(worker: Worker) -> None:
    """Get ready and stay, whatever is said."""
    worker.ready()
    await trio.sleep_forever()


async def asks_replacement(worker: Worker) -> None:
    """Ask to be replaced when a client connects, and drain when told to."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(f"{os.getpid()}\n".encode())
        worker.ask_replacement()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, worker.listeners)
        worker.ready()
        await worker.wait_drain()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":  # an arbiter in a process of its own: target, processes, grace, pid file or "", *arguments
    import logging

    from stagetrio import prefork

    logging.basicConfig(level=logging.INFO, format="%(message)s")

    async def main() -> int:
        """Serve, and say where on stdout once all are ready."""
        target, processes, grace, pid_path, *arguments = sys.argv[1:]
        options = prefork.Options(arguments=arguments, grace=float(grace), heartbeat=0.1, hang_after=5)
        status = 0

        async def serve(*, task_status: trio.TaskStatus[object]) -> None:
            nonlocal status
            status = await prefork.serve(
                target,
                ["tcp://127.0.0.1:0"],
                processes=int(processes),
                pid_path=pid_path or None,
                task_status=task_status,
                **options,
            )

        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(serve)
            print(*addresses, flush=True)
        return status

    raise SystemExit(trio.run(main))
