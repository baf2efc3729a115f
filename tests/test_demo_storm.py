"""The demo as a command: real processes, real connections, real signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import trio

from stagetrio.demo import control
from stagetrio.demo.runner import ChildFailed, Progress, run_storm
from stagetrio.demo.storm import GROUPS, RATES, Storm

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
DEMO = [sys.executable, "-m", "stagetrio", "demo"]
OURS = 1000 * os.getpid()  # our storms are told by their seeds from those of another test run on this machine
GROUPS_THAT_READ = ("polite", "hogs", "burners")


async def processes_of(seed: int) -> list[str]:
    """The command lines of the processes that take part in the storm of this seed, the demo's own left out."""
    listed = await trio.run_process(["ps", "-A", "-ww", "-o", "args="], capture_stdout=True)
    lines = listed.stdout.decode(errors="replace").splitlines()
    return [line for line in lines if "stagetrio.demo." in line and f'"seed": {seed},' in line]


async def wait_for_processes(seed: int, count: int) -> None:
    with trio.fail_after(60):
        while len(await processes_of(seed)) < count:
            await trio.lowlevel.checkpoint()


@contextmanager
def demo(seed: int, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A demo that would go on for a minute, in a process that is gone when the block ends."""
    command = [*DEMO, "--seed", str(seed), "--seconds", "30", *arguments]
    with subprocess.Popen(command, **{"env": ENVIRONMENT, "stdout": PIPE, "stderr": PIPE, **options}) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_short_storm_as_json() -> None:
    """Both servers, all 200 clients: the counts add up, the database is kept to its limit, no process is left."""
    seed = OURS + 1
    arguments = ["--seconds", "2", "--seed", str(seed), "--json"]
    done = await trio.run_process([*DEMO, *arguments], env=ENVIRONMENT, capture_stdout=True, capture_stderr=True)
    assert done.stderr == b""
    figures = json.loads(done.stdout)
    assert figures["storm"]["clients"] == GROUPS
    assert (figures["storm"]["seconds"], figures["storm"]["seed"]) == (2, seed)
    for side in (figures["control"], figures["stagetrio"]):
        for group in side["groups"].values():
            answered = group["served"] + group["refused"] + group["failed"]
            assert answered + group["unanswered"] == group["offered"]
            assert group["unanswered"] >= 0
        for group in ("polite", "burners"):
            assert side["groups"][group]["offered"] == 2 * RATES[group] * GROUPS[group]
        for count in ("offered", "served"):
            kinds = side["groups"]["asks"][count] + side["groups"]["queries"][count]
            assert kinds == side["groups"]["polite"][count]
        assert side["groups"]["polite"]["served"] > 0
        assert side["groups"]["hogs"]["offered"] > 0
        assert side["throughput"] > 0
        assert 0 < side["worst_stall"] < 60
        assert 0 < side["memory_before"] <= side["memory_peak"]
        assert side["database"]["queries"] > 0
        assert 1 <= side["database"]["most_at_once"] <= 10
        assert set(side["disposed"]) == set(GROUPS)
        assert all(0 <= side["disposed"][group] <= GROUPS[group] for group in GROUPS)
        assert [side["disposed"][group] for group in GROUPS_THAT_READ] == [0, 0, 0]
    # The same clients, sending the same: only what became of it differs.
    assert figures["control"]["groups"]["queries"]["offered"] == figures["stagetrio"]["groups"]["queries"]["offered"]
    assert await processes_of(seed) == []


async def test_stagetrio_alone_in_a_table_and_a_plot(tmp_path: Path) -> None:
    """Without the plain server there is one column, no verdict and no claim; the picture is drawn as asked."""
    target = tmp_path / "storm.html"
    arguments = ["--seconds", "1", "--no-control", "--plot", str(target)]
    done = await trio.run_process([*DEMO, *arguments], env=ENVIRONMENT, capture_stdout=True, capture_stderr=True)
    table = done.stdout.decode()
    assert "plain Trio" not in table
    assert "better" not in table
    assert "polite: served" in table
    assert "<svg" in target.read_text(encoding="utf-8")
    assert done.stderr.decode().splitlines() == ["The storm against stagetrio ...", f"plot: {target}"]


@pytest.mark.parametrize("after", [1, 2, 3], ids=["server starting", "clients connecting", "storm"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
async def test_a_signal_ends_it_at_any_moment(after: int, number: signal.Signals, status: int) -> None:
    """Whatever is starting or running is killed and reaped; nothing is printed but what had been before."""
    seed = OURS + 100 * after + number
    with demo(seed, "--json") as process:
        await wait_for_processes(seed, after)
        process.send_signal(number)
        written, said = await trio.to_thread.run_sync(process.communicate, None, 30)
    assert process.returncode == status
    assert (written, said) == (b"", b"")
    assert await processes_of(seed) == []


async def test_ctrl_c_in_a_terminal_in_the_middle_of_the_storm() -> None:
    """With bars on the screen, replies coming in, and the children out of the terminal's reach: clean, and at once."""
    seed = OURS + 2
    terminal, theirs = pty.openpty()
    with demo(seed, env={**ENVIRONMENT, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"replies" not in shown:
            shown += await trio.to_thread.run_sync(os.read, terminal, 65536)
        process.send_signal(signal.SIGINT)
        shown += await trio.to_thread.run_sync(read_to_the_end, terminal)
        os.close(terminal)
        process.wait(30)
    assert process.returncode == 130
    assert b"plain Trio" in shown
    assert b"Traceback" not in shown
    assert b"\x1b[?25h" in shown[shown.rindex(b"replies") :], "the cursor is back"
    assert await processes_of(seed) == []


def read_to_the_end(terminal: int) -> bytes:
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux says so when nobody holds the other side any more
            return shown
        if not data:
            return shown
        shown += data


async def test_the_storm_outlives_nobody_who_is_killed() -> None:
    """SIGKILL leaves no time to clean up: the processes end because their input does."""
    seed = OURS + 3
    with demo(seed, "--json"):
        await wait_for_processes(seed, 3)
    with trio.fail_after(30):
        while await processes_of(seed):
            await trio.lowlevel.checkpoint()


async def test_a_process_that_dies_is_named_in_one_line() -> None:
    """When the server is killed in mid-storm, the demo says who ended early, fails, and leaves nobody."""
    seed = OURS + 4
    with demo(seed, "--json", "--no-control") as process:
        await wait_for_processes(seed, 3)
        listed = await trio.run_process(["ps", "-A", "-ww", "-o", "pid=,args="], capture_stdout=True)
        (hogs,) = [
            int(line.split()[0])
            for line in listed.stdout.decode(errors="replace").splitlines()
            if "demo.load hogs" in line and f'"seed": {seed},' in line
        ]
        os.kill(hogs, signal.SIGKILL)
        written, said = await trio.to_thread.run_sync(process.communicate, None, 30)
    assert process.returncode == 1
    assert written == b""
    assert said == b"stagetrio demo: the process of the hogs ended early: it did not say why\n"
    assert await processes_of(seed) == []


async def test_a_cancelled_storm_leaves_nobody() -> None:
    """The storm is a function like others: when it is cancelled, its processes are gone before it ends."""
    seed = OURS + 5
    storm = Storm(30, seed=seed)
    with trio.CancelScope() as scope:

        def on_progress(progress: Progress) -> None:
            if progress.replies:
                scope.cancel()

        await run_storm("staged", storm, on_progress)
    assert scope.cancelled_caught
    assert await processes_of(seed) == []


async def test_a_server_that_fails_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of its traceback says what happened, also when that is one of a group."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh
cat >&2 <<END
  + Exception Group Traceback (most recent call last):
  +-+---------------- 1 ----------------
    | MemoryError: there is none left
    +------------------------------------
END
""")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ChildFailed, match=r"^the plain Trio server ended early: MemoryError: there is none left$"):
        await run_storm("control", Storm(30), lambda _: None)


async def test_show_control_prints_the_source_of_the_plain_server() -> None:
    """What is compared with can be read, to the letter, and no storm is held."""
    done = await trio.run_process([*DEMO, "--show-control"], env=ENVIRONMENT, capture_stdout=True)
    assert done.stdout.decode() == Path(control.__file__).read_text(encoding="utf-8")
