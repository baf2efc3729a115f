"""One worker process for jobs as its pool sees it: a socket to ask it, and a way to end it.

A worker has one call at a time, and the task that waits for the call talks to the worker itself: one send, one wait,
one receive, and no other task in between. Whoever gives up in the middle leaves a worker that nobody knows the state
of; so it is killed. That also is what stops a job: there is no way to ask a process that computes to stop.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trio

from stagetrio.process_worker import HEADER, PROGRESS, READY, SETUP, command, frame
from stagetrio.remote_wire import RemoteError, WorkerLost

_ROOT = str(Path(__file__).absolute().parent.parent)
T = TypeVar("T")
MAX_WORDS = 500  # characters of an error that are told
DYING_SECONDS = 1.0  # given to a process that has closed its socket to be gone, before it is killed
OnProgress = Callable[[bytes], Awaitable[object]]


class ProcessLink:
    """A worker process that is ready; made by `start_worker`."""

    def __init__(self, process: trio.Process, sock: socket.socket) -> None:
        self.process = process
        self.scope = trio.CancelScope()  # of whoever waits for the end of the process
        self.born = self.idle_since = trio.current_time()
        self.calls = 0
        self.retired = False
        self._killed = False
        self._sock = sock
        self._received = bytearray()

    async def exchange(self, message: bytes, on_progress: OnProgress | None = None) -> tuple[int, bytes]:
        """Send a frame, and return the kind and the payload of the answer.

        Args:
            message: a frame.
            on_progress: called with the payload of each progress value before the answer; None: they are dropped.

        Raises:
            WorkerLost: The process has ended.

        Checkpoints: always; cancelled, the worker must be killed.
        """
        self.calls += 1
        await self._step(self._send(message), told=False)
        while True:
            kind, payload = await self._step(self._receive(), told=True)
            if kind != PROGRESS:
                return kind, payload
            if on_progress is not None:
                await on_progress(payload)

    async def _step(self, step: Awaitable[T], *, told: bool) -> T:
        """Await one step of an exchange; whatever is wrong with the socket means that the worker is gone."""
        try:
            return await step
        except trio.ClosedResourceError:  # by `end`, though its end of the socket may be held by a child of its own
            why = "was ended with its pool" if self._killed else ending(await self.process.wait())
        except (OSError, EOFError):
            with trio.move_on_after(DYING_SECONDS, shield=True):
                await self.process.wait()
            await self.end()
            why = ending(await self.process.wait())
        raise WorkerLost(f"the worker process {why}", may_have_run=told)

    async def _send(self, message: bytes) -> None:
        at = 0
        with memoryview(message) as view:
            while at < len(view):
                try:
                    at += self._sock.send(view[at:])  # the first one almost always takes it all
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)

    async def _receive(self) -> tuple[int, bytes]:
        received = self._received
        while len(received) < HEADER.size:
            await self._more()
        kind, length = HEADER.unpack_from(received)
        end = HEADER.size + length
        while len(received) < end:
            await self._more()
        payload = bytes(memoryview(received)[HEADER.size : end])
        del received[:end]
        return kind, payload

    async def _more(self) -> None:
        await trio.lowlevel.wait_readable(self._sock)
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        if not data:
            raise EOFError
        self._received += data

    def retire(self, seconds: float) -> None:
        """Let an idle worker end; it is killed when it has not after so many seconds."""
        self.retired = True
        self.scope.deadline = trio.current_time() + seconds
        with contextlib.suppress(OSError):  # it is gone already
            self._sock.shutdown(socket.SHUT_WR)

    def stream(self) -> trio.SocketStream:
        """The socket as a stream, for a worker that is talked to in other ways than by `exchange`."""
        return trio.SocketStream(trio.socket.from_stdlib_socket(self._sock))

    async def end(self) -> None:
        """Kill the process if it is there, and close the socket.

        Checkpoints: waits for the process, whatever is cancelled.
        """
        with trio.CancelScope(shield=True):
            if self.process.returncode is None:
                self._killed = True
                self.process.kill()
            await self.process.wait()
        if self._sock.fileno() != -1:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


async def start_worker(
    setup: dict[str, Any], start_within: float, module: str = "stagetrio.process_worker"
) -> ProcessLink:
    """Start a worker process and wait until it is ready.

    Args:
        setup: what it is told first.
        start_within: seconds it is given.
        module: the one whose ``main`` is the worker.

    Raises:
        WorkerLost: It was not ready in time, or could not make itself ready; its traceback is a note.

    Checkpoints: always; cancelled or failed, no process is left.
    """
    ours, theirs = socket.socketpair()
    try:
        ours.setblocking(False)
        with theirs:
            process = await trio.lowlevel.open_process(
                command(theirs.fileno(), _ROOT, module),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # the terminal's Ctrl-C is for this process alone
            )
    except BaseException:
        ours.close()
        raise
    link = ProcessLink(process, ours)
    try:
        with trio.move_on_after(start_within):
            kind, payload = await link.exchange(frame(SETUP, setup))
            if kind == READY:
                link.born = trio.current_time()
                link.calls = 0
                return link
            raise _could_not(pickle.loads(payload))
        raise WorkerLost(f"the worker process was not ready within {start_within:g} s", may_have_run=False)
    except BaseException as error:
        if isinstance(error, WorkerLost):
            error.may_have_run = False  # it has been told to get ready, and nothing else
        await link.end()
        raise


def _could_not(why: str) -> WorkerLost:
    # What was raised begins in the last line with a name and a colon at its start; what it says may go on for many.
    named = [match.start() for match in re.finditer(r"^[\w.]+(:|$)", why, re.MULTILINE)]
    words = " ".join(why[named[-1] if named else 0 :].split())
    lost = WorkerLost(f"the worker process could not get ready: {words[:MAX_WORDS]}", may_have_run=False)
    lost.add_note(f"In the worker process:\n{why}")
    return lost


def unwrap_error(payload: bytes) -> Exception:
    """The exception a job raised, with its remote traceback as a note; `RemoteError` where it cannot be had itself."""
    type_name, message, text, pickled = pickle.loads(payload)
    error: object = None
    if pickled is not None:
        try:
            error = pickle.loads(pickled)
        except Exception:  # its class cannot be made from its arguments, or is not here
            error = None
    if not isinstance(error, Exception):
        return RemoteError(type_name, message, text)
    error.add_note(f"In the worker process:\n{text}")
    return error


def unread(function: str, payload: bytes) -> TypeError:
    """What the caller of a function is told that the worker could not have, or whose arguments it could not."""
    type_name, message, text, _ = pickle.loads(payload)
    error = TypeError(
        f"{function} and its arguments must be importable in a worker process: {type_name}: {message}; "
        "define them in a module, which the cells of a notebook and a prompt are not"
    )
    error.add_note(f"In the worker process:\n{text}")
    return error


def ending(status: int) -> str:
    """How a process ended, in words."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
