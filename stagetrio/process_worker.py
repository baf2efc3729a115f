"""The inside of a worker process for jobs: it reads a call from a socket, makes it, and writes what came of it.

It is one thread and blocking system calls, without an event loop, and imports as little as it can: a worker is started
in the time a job may wait for it. Frames on the socket, both ways::

    kind     1 byte
    length   8 bytes, little endian, of the payload
    payload  a pickle

Pickles cross here, and functions by their names in them, since both ends are one program: the parent started this
process itself, and nobody else holds an end of this socket.
"""

from __future__ import annotations

import math
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import process, spawn
from struct import Struct
from typing import Any, TypeVar

from stagetrio.jobs import bind

T = TypeVar("T")

SETUP, CALL, BATCH = 0, 1, 2  # to the worker
READY, FAILED, VALUE, ERROR, PROGRESS, UNREAD = 0, 1, 2, 3, 4, 5  # from the worker
RETIRE = 0x80  # added to VALUE, ERROR and UNREAD: this worker has grown too big
HEADER = Struct("<BQ")
SLICE = 0.01  # seconds after which the rest of a batch is given back
ORPHAN_SECONDS = 2.0  # given to a job whose parent is gone


def frame(kind: int, message: object) -> bytes:
    """One message, ready to be sent."""
    payload = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(kind, len(payload)) + payload


def _receive(sock: socket.socket) -> tuple[int, Any] | None:
    """The next message, or why it is `UNREAD`; None: the other side is gone, or wants no more of this worker."""
    data = sock.recv(65536)
    while len(data) < HEADER.size:
        if not data:
            return None
        data += sock.recv(65536)
    kind, length = HEADER.unpack_from(data)
    missing = HEADER.size + length - len(data)
    if not missing:
        return _read(kind, memoryview(data)[HEADER.size :])
    whole = bytearray(data)
    whole.extend(bytes(missing))
    view, at = memoryview(whole), len(data)
    while at < len(whole):
        got = sock.recv_into(view[at:])
        if not got:
            return None
        at += got
    return _read(kind, view[HEADER.size :])


def _read(kind: int, payload: memoryview) -> tuple[int, Any]:
    try:
        return kind, pickle.loads(payload)
    except BaseException as error:  # a function that is not found here, a module that cannot be imported
        return UNREAD, _described(error)


class _Reporter:
    """What `stagetrio.jobs` finds in a worker process."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def report(self, value: object) -> None:
        self._sock.sendall(frame(PROGRESS, value))

    def check_cancelled(self) -> None:
        """Nothing to check: the process of a cancelled job is killed."""

    def give_way(self) -> None:
        """Nobody else runs here."""

    def pause(self) -> None:
        """Nobody else would run meanwhile."""

    def resume(self) -> None:
        """So nothing was given away."""


def get_ready(fd: int, make: Callable[[dict[str, Any]], T]) -> tuple[socket.socket, T] | None:
    """Get ready as the parent at the other end of a socket says; None: it is gone, or has been told why that failed.

    Args:
        fd: The socket.
        make: What else is to be done; gets what the parent said.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    received = _receive(sock)
    if received is None:
        return None
    # As in a process of multiprocessing: a main module that does its work when it is imported, and would start workers
    # of its own in here, is told how to guard it.
    inheriting = process.current_process()
    inheriting._inheriting = True  # type: ignore[attr-defined]
    try:
        setup = received[1]
        spawn.prepare(setup["main"])
        for module in setup["preload"]:
            __import__(module)
        made = make(setup)
    except BaseException:
        _tell(sock, FAILED, traceback.format_exc())
        return None
    finally:
        del inheriting._inheriting  # type: ignore[attr-defined]
    threading.Thread(target=_watch_parent, args=(sock.fileno(),), name="stagetrio parent watch", daemon=True).start()
    return (sock, made) if _tell(sock, READY, None) else None


def _tell(sock: socket.socket, kind: int, message: object) -> bool:
    """Tell the parent something; whether it is still there."""
    try:
        sock.sendall(frame(kind, message))
    except OSError:
        return False
    return True


def main(fd: int) -> None:
    """Serve the parent at the other end of a socket until it closes its end."""
    ready = get_ready(fd, lambda setup: setup["max_memory_bytes"])
    if ready is None:
        return
    sock, max_memory_bytes = ready
    bind(_Reporter(sock))
    try:
        while (received := _receive(sock)) is not None:
            sock.sendall(_answer(*received, max_memory_bytes))
            received = None  # an idle worker holds on to nothing
    except (BrokenPipeError, ConnectionResetError):
        return  # the parent is gone


def _watch_parent(fd: int) -> None:
    """End the process when the parent is gone, also in the middle of a job that would never notice."""
    poll = select.poll()
    poll.register(fd, 0)
    poll.poll()
    time.sleep(ORPHAN_SECONDS)
    os._exit(os.EX_UNAVAILABLE)


def _answer(kind: int, message: Any, max_memory_bytes: float) -> bytes:
    if kind == UNREAD:
        answer = frame(UNREAD, message)
    else:
        function, what = message
        try:
            answer = frame(VALUE, function(*what) if kind == CALL else _batch(function, what))
        except BaseException as error:
            answer = frame(ERROR, _described(error))
    if max_memory_bytes < math.inf and resident_bytes() > max_memory_bytes:
        answer = bytes([answer[0] | RETIRE]) + answer[1:]
    return answer


def _batch(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """Results of as many items as can be had in a while, at least of one."""
    until = time.perf_counter() + SLICE
    results = []
    for item in items:
        results.append(function(item))
        if time.perf_counter() > until:
            break
    return results


def _described(error: BaseException) -> tuple[str, str, str, bytes | None]:
    """Type, message, traceback, and the exception itself where it can be pickled."""
    below = error.__traceback__
    while below is not None and below.tb_frame.f_code.co_filename == __file__:
        below = below.tb_next
    text = "".join(traceback.format_exception(type(error), error, below))
    try:
        message = str(error)
        pickled = pickle.dumps(error) if isinstance(error, Exception) else None
    except Exception:
        message, pickled = "(its text cannot be had)", None
    module = "" if type(error).__module__ == "builtins" else f"{type(error).__module__}."
    return f"{module}{type(error).__qualname__}", message, text, pickled


def resident_bytes() -> float:
    """The memory of this process in RAM; 0 where that cannot be known."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def command(fd: int, package_root: str, module: str) -> list[str]:
    """The command line of a worker process.

    Args:
        fd: its end of the socket, inherited.
        package_root: the directory this package is imported from.
        module: the one whose ``main`` is the worker.
    """
    code = f"import sys; sys.path.insert(0, {package_root!r}); from {module} import main; main({fd})"
    return [sys.executable, "-P", "-c", code]  # -P: nothing in the working directory is taken for a module yet


def preparation() -> dict[str, Any]:
    """What a worker needs to import what this program can: its path, its working directory, its main module."""
    data = spawn.get_preparation_data("stagetrio worker")
    data.pop("authkey", None)  # it must not leave this process, and is of no use there
    return data
