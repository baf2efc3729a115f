"""What an operator's tools want of a long-running process: a PID file, and word of its state to systemd.

Source: ``sd_notify(3)``: a datagram of ``KEY=value`` lines to the socket that ``NOTIFY_SOCKET`` names.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path


def notify(**fields: object) -> bool:
    """Tell the service manager, if there is one: ``notify(READY=1, STATUS="2 workers")``.

    ``RELOADING`` gets the time stamp that systemd wants along with it.

    Returns:
        Whether there is one and it was told; without one nothing happens.
    """
    where = os.environ.get("NOTIFY_SOCKET")
    if not where:
        return False
    if "RELOADING" in fields:
        fields["MONOTONIC_USEC"] = time.monotonic_ns() // 1000
    text = "\n".join(f"{key}={value}" for key, value in fields.items())
    address = "\0" + where[1:] if where.startswith("@") else where
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.sendto(text.encode(), address)
        except OSError:  # gone, or not reading: no reason for the service to fail
            return False
    return True


@contextlib.contextmanager
def pid_file(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keep this process's id in a file while the block is open; None: in no file.

    The file is written whole or not at all, and removed at the end unless it has become another process's.

    Raises:
        FileExistsError: It holds the id of another process that is alive.
    """
    if path is None:
        yield
        return
    file = Path(path)
    owner = _owner(file)
    if owner not in (None, os.getpid()):
        raise FileExistsError(f"{file}: process {owner} is running; stop it, or choose another PID file")
    fresh = file.with_name(f"{file.name}.{os.getpid()}")
    fresh.write_text(f"{os.getpid()}\n")
    fresh.replace(file)
    try:
        yield
    finally:
        if _owner(file) == os.getpid():
            file.unlink()


def _owner(file: Path) -> int | None:
    """The living process whose id a file holds."""
    try:
        pid = int(file.read_text())
    except (OSError, ValueError):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, and is somebody else's
    return pid
