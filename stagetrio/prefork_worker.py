"""The inside of a worker process: the program the arbiter starts, and what the served function is given.

A worker holds one end of a socket pair, the *channel*, whose other end is the arbiter's:

=========  ==================  ====================================================================================
direction  bytes               meaning
=========  ==================  ====================================================================================
down       one line of JSON    what to serve, and the numbers of the inherited listening sockets; first and only
down       end of file         the arbiter is gone: drain, and end
up         ``.``               the event loop runs; every ``heartbeat`` seconds
up         ``R``               ready for traffic
up         ``Q``               would like to be replaced
=========  ==================  ====================================================================================

The heartbeat is a task of the event loop, since it is the loop that hangs. A worker that hangs gets SIGABRT, at which
``faulthandler`` writes the stack of every thread to stderr, also where C code holds the GIL.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import trio

ORPHAN_SECONDS = 2.0  # given to a worker whose arbiter is gone to unwind what the grace has cut off
ENDLESS_SECONDS = 1e8  # what an infinite grace comes to there


class Worker:
    """What the function served by a worker process is given.

    Attributes:
        number: the worker's slot, from 0; its replacement has the same.
        listeners: where to accept connections, opened by the arbiter.
        grace: seconds from `wait_drain` on after which the arbiter kills this process.
    """

    def __init__(self, number: int, listeners: list[trio.SocketListener], grace: float, channel: Any) -> None:
        self.number = number
        self.listeners = listeners
        self.grace = grace
        self._channel = channel
        self._drain = trio.Event()

    def ready(self) -> None:
        """Tell the arbiter that connections are being accepted, so that it may let the predecessor go."""
        self._tell(b"R")

    def ask_replacement(self) -> None:
        """Ask the arbiter for a replacement; when that is ready, this worker is told to drain, as in a reload."""
        self._tell(b"Q")

    async def wait_drain(self) -> None:
        """Wait until this worker is to accept no more, finish what it has, and return from its function.

        Checkpoints: always; a cancelled wait changes nothing.
        """
        await self._drain.wait()

    def _tell(self, what: bytes) -> None:
        # what does not fit, or finds nobody, is of no use: a heartbeat follows, or the end
        with contextlib.suppress(OSError):
            self._channel.send(what)


Served = Callable[..., Awaitable[object]]


def resolve(target: str) -> Served:
    """Import the function that a target names.

    Args:
        target: ``"package.module:function"``, or ``"path/to/script.py:function"``.

    Raises:
        ValueError: It is not of that form.
        ImportError, AttributeError, FileNotFoundError: There is no such thing.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"target must be 'module:function' or 'script.py:function', not {target!r}")
    module: Any = _import_script(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    function: Served = getattr(module, name)
    return function


def _import_script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python script")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.absolute().parent))
    spec.loader.exec_module(module)
    return module


def main(channel_fd: int) -> None:
    """Serve what the arbiter says over the channel, until the function returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the arbiter, which then tells us
    faulthandler.enable()
    channel = socket.socket(fileno=channel_fd)
    channel.set_inheritable(False)
    config = json.loads(_read_line(channel))
    sys.path[:] = config["path"]
    function = resolve(config["target"])
    trio.run(_serve, function, config, channel)


def _read_line(channel: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        data = channel.recv(65536)
        if not data:
            raise SystemExit(1)  # the arbiter is gone already
        line += data
    return line


async def _serve(function: Served, config: dict[str, Any], channel: socket.socket) -> None:
    channel.setblocking(False)
    worker = Worker(config["number"], [_listener(fd) for fd in config["sockets"]], config["grace"], channel)
    failure: BaseException | None = None
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_beat, worker, config["heartbeat"])
            nursery.start_soon(_obey, worker, signals)
            _watch_arbiter(worker, channel, nursery.cancel_scope)
            try:
                await function(worker, *config["arguments"])
            except (Exception, SystemExit) as error:
                failure = error  # raised below, as it is: the nursery would wrap it, and a status be lost
            nursery.cancel_scope.cancel("the function has returned")
    if failure is not None:
        raise failure


def _listener(fd: int) -> trio.SocketListener:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


async def _beat(worker: Worker, heartbeat: float) -> None:
    while True:
        worker._tell(b".")
        await trio.sleep(heartbeat)


async def _obey(worker: Worker, signals: Any) -> None:
    async for _ in signals:
        worker._drain.set()


def _watch_arbiter(worker: Worker, channel: socket.socket, everything: trio.CancelScope) -> None:
    """End this process when the arbiter has: nobody would replace it, stop it, or hear of it."""
    token = trio.lowlevel.current_trio_token()
    poll = select.poll()
    poll.register(channel, 0)  # tells of its end and of nothing else

    def watch() -> None:  # in a thread, since the loop may hang, and nobody else would notice
        poll.poll()
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(worker._drain.set)
            time.sleep(min(worker.grace, ENDLESS_SECONDS))
            token.run_sync_soon(everything.cancel, "the arbiter is gone, and the grace over")
            time.sleep(ORPHAN_SECONDS)
        os._exit(os.EX_UNAVAILABLE)

    threading.Thread(target=watch, name="stagetrio arbiter watch", daemon=True).start()


def command(channel_fd: int, package_root: str) -> Sequence[str]:
    """The command line of a worker process.

    Args:
        channel_fd: of the worker's end of the channel, inherited.
        package_root: the directory this package is imported from.
    """
    code = f"import sys; sys.path.insert(0, {package_root!r})"
    code += f"; from stagetrio.prefork_worker import main; main({channel_fd})"
    return [sys.executable, "-P", "-c", code]  # -P: nothing in the working directory is taken for a module yet
