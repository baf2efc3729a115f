"""One worker process as its arbiter sees it: starting, ready, draining, gone; and the ways to make it go.

::

    starting ──R──▶ ready ──SIGTERM──▶ draining ──▶ gone
        │             │                   │
        │ not ready   │ no heartbeat      │ grace over
        ▼ in time     ▼                   ▼
       SIGABRT: it writes its stacks ──▶ SIGKILL

Whatever state it is in, its heartbeat is watched. A process that has stopped being scheduled (SIGSTOP, or C code that
keeps the GIL) answers no signal that can be handled; SIGKILL ends it all the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import trio

from stagetrio.amounts import check_amount
from stagetrio.prefork_worker import command

logger = logging.getLogger("stagetrio.prefork")

DUMP_SECONDS = 2.0  # given to a process that hangs to write its stacks
FAREWELL_SECONDS = 5.0  # given to a process that has closed its channel to end
_ROOT = str(Path(__file__).absolute().parent.parent)


@attrs.frozen
class Timing:
    """The times of all workers of an arbiter, in seconds.

    Args:
        heartbeat: between two signs of life.
        hang_after: without one, after which a worker is taken for hung.
        start_within: from its start, in which a worker must be ready.
        grace: for draining.
    """

    heartbeat: float
    hang_after: float
    start_within: float
    grace: float


class WorkerProcess:
    """One worker process.

    Args:
        number: its slot.
        config: what it is told: target, arguments, and the like.
        sockets: descriptors it inherits.
        timing: see `Timing`.
        on_change: called when it has become ready, asks for a replacement, is lost, or is gone.
    """

    def __init__(
        self,
        number: int,
        config: dict[str, Any],
        sockets: Sequence[int],
        timing: Timing,
        on_change: Callable[[], object],
    ) -> None:
        self.number = number
        self.ready = False
        self.wants_replacement = False
        self.draining = False
        self.hung = False
        self.lost = False  # it is gone, or will be in a moment: its end of the channel is closed
        self.gone = trio.Event()
        self.status: int | None = None  # as of subprocess: negative for a signal
        self.born = trio.current_time()
        self._ready_since = math.inf
        self._config = config
        self._sockets = sockets
        self._timing = timing
        self._on_change = on_change
        self._process: trio.Process | None = None

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.pid})"

    @property
    def pid(self) -> int | None:
        """Its process id; None before it has one."""
        return None if self._process is None else self._process.pid

    @property
    def ready_seconds(self) -> float:
        """For how long it has been ready; 0 before it is."""
        return max(0.0, trio.current_time() - self._ready_since)

    async def run(self) -> None:
        """Start the process and stay with it until it is gone; cancelled, kill it.

        Checkpoints: throughout; in every case the process is gone in the end, and its descriptors are closed.
        """
        ours: socket.socket | None = None
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                theirs_fd = theirs.fileno()
                process = await trio.lowlevel.open_process(
                    command(theirs_fd, _ROOT),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs_fd, *self._sockets],
                    process_group=0,  # the terminal's Ctrl-C is for the arbiter alone
                )
            self._process = process
            try:
                if self.draining:  # said while there was nobody to tell
                    process.terminate()
                await self._accompany(process, trio.socket.from_stdlib_socket(ours))
            finally:
                with trio.CancelScope(shield=True):
                    if process.returncode is None:
                        process.kill()
                    self.status = await process.wait()
        except OSError as error:  # no more processes, or descriptors, for now
            self.status = os.EX_OSERR
            logger.error("%s cannot be started: %s", self, error)
        finally:
            if ours is not None:
                ours.close()
            self.lost = True
            self.gone.set()
            self._on_change()

    async def _accompany(self, process: trio.Process, channel: trio.socket.SocketType) -> None:
        told = {**self._config, "number": self.number, "sockets": list(self._sockets), "path": sys.path}
        told |= {"grace": self._timing.grace, "heartbeat": self._timing.heartbeat}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, process, channel)
            with contextlib.suppress(trio.BrokenResourceError):  # it has died at once, which is noticed below
                await trio.SocketStream(channel).send_all(json.dumps(told).encode() + b"\n")
            await process.wait()
            nursery.cancel_scope.cancel()

    async def _listen(self, process: trio.Process, channel: trio.socket.SocketType) -> None:
        while True:
            seconds = (
                self._timing.hang_after if self.ready else self.born + self._timing.start_within - trio.current_time()
            )
            with trio.move_on_after(max(0, seconds)) as patience:
                try:
                    said = await channel.recv(64)
                except ConnectionError:
                    said = b""
            if patience.cancelled_caught:
                if trio.current_time() > patience.deadline + self._timing.heartbeat:
                    continue  # this process has slept itself, and perhaps all have: a frozen container, a laptop
                await self._abort(process)
                return
            if not said:
                self.lost = True
                self._on_change()
                await trio.sleep(FAREWELL_SECONDS)
                process.kill()
                return
            self._hear(said)

    def _hear(self, said: bytes) -> None:
        if b"R" in said and not self.ready:
            self.ready = True
            self._ready_since = trio.current_time()
            self._on_change()
        if b"Q" in said and not self.wants_replacement:
            self.wants_replacement = True
            self._on_change()

    async def _abort(self, process: trio.Process) -> None:
        self.hung = self.lost = True
        self._on_change()
        what = f"has not been heard of for {self._timing.hang_after:g} s"
        if not self.ready:
            what = f"was not ready within {self._timing.start_within:g} s"
        logger.error("%s %s: its stacks follow on stderr, then it is killed", self, what)
        process.send_signal(signal.SIGABRT)
        await trio.sleep(DUMP_SECONDS)
        process.kill()

    async def drain(self) -> None:
        """Have the worker finish what it has; kill it when the grace is over.

        Checkpoints: always; cancelled, the worker goes on draining.
        """
        if self._process is not None and not self.draining:
            self._process.terminate()
        self.draining = True
        with trio.move_on_after(self._timing.grace) as grace:
            await self.gone.wait()
        if grace.cancelled_caught:
            logger.warning("%s did not end within the grace of %g s: killed", self, self._timing.grace)
            self.kill()
        await self.gone.wait()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()

    def resident_bytes(self) -> float:
        """The memory it has in RAM; 0 where that cannot be known."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def described_end(self) -> str:
        """How it ended, in words."""
        if self.hung:
            return "hung"
        if self.status is not None and self.status < 0:
            return f"was ended by {signal.Signals(-self.status).name}"
        return f"exited with status {self.status}"


def check_timing(timing: Timing) -> None:
    """Raise a `ValueError` that names the first time that makes no sense."""
    for name, value in attrs.asdict(timing).items():
        check_amount(name, value)
        least_ok = value >= 0 if name == "grace" else value > 0
        if not least_ok or (name == "heartbeat" and value == math.inf):
            raise ValueError(f"{name} must be a number of seconds, not {value!r}")
    if timing.hang_after <= timing.heartbeat:
        raise ValueError(
            f"hang_after must be more than the heartbeat of {timing.heartbeat!r} s, not {timing.hang_after!r}"
        )
