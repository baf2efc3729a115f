"""PID files and word to systemd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stagetrio.service import notify, pid_file


def test_a_pid_file_holds_the_process_id_while_the_block_is_open(tmp_path: Path) -> None:
    """It is there with a newline, nothing else lies beside it, and it is gone afterwards."""
    path = tmp_path / "server.pid"
    with pid_file(path):
        assert path.read_text() == f"{os.getpid()}\n"
        assert list(tmp_path.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == []


def test_no_pid_file_is_no_file() -> None:
    """None keeps none."""
    with pid_file(None):
        pass


def test_the_pid_file_of_a_living_process_is_respected(tmp_path: Path) -> None:
    """Starting twice by mistake names the process that is there, and leaves its file alone."""
    path = tmp_path / "server.pid"
    path.write_text(f"{os.getppid()}\n")
    with pytest.raises(FileExistsError, match=str(os.getppid())):
        with pid_file(path):
            raise AssertionError("unreachable")
    assert path.read_text() == f"{os.getppid()}\n"


@pytest.mark.parametrize("content", ["", "no number", None])
def test_a_stale_pid_file_is_replaced(tmp_path: Path, content: str | None) -> None:
    """What a crash or a stranger left behind does not keep a server from starting."""
    path = tmp_path / "server.pid"
    if content is None:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        content = str(dead.pid)
    path.write_text(content)
    with pid_file(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_file_that_became_anothers_is_left(tmp_path: Path) -> None:
    """A successor may have written its own by the time we end."""
    path = tmp_path / "server.pid"
    with pid_file(path):
        path.write_text(f"{os.getppid()}\n")
    assert path.exists()


def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One datagram per call, a line per field; a reload carries the time systemd asks for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert notify(READY=1, STATUS="two words")
        assert manager.recv(4096) == b"READY=1\nSTATUS=two words"
        assert notify(RELOADING=1)
        first, second = manager.recv(4096).split(b"\n")
        assert first == b"RELOADING=1"
        assert second.startswith(b"MONOTONIC_USEC=")


def test_an_abstract_socket_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name starts with @ in the environment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0stagetrio-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@stagetrio-test-{os.getpid()}")
        assert notify(READY=1)
        assert manager.recv(4096) == b"READY=1"


def test_nobody_to_tell_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a service manager, or with one that is gone, nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify(READY=1)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify(READY=1)
