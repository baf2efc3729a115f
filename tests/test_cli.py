"""The command line itself: what it is called with, and what it says about what it cannot do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import trio

import stagetrio
from stagetrio.cli import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints it and ends well."""
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"stagetrio {stagetrio.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "run", "--version"]),
        (["demo", "--help"], ["--seconds", "--seed", "--json", "--plot", "--no-control", "--show-control", "186"]),
        (["run", "--help"], ["SCRIPT.py", "--bind", "--check", "--grace", "SIGTERM"]),
    ],
)
def test_help_names_every_option(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks is told, on standard output."""
    with pytest.raises(SystemExit, match=r"^0$"):
        main(arguments)
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["run"], "the following arguments are required: SCRIPT.py"),
        (["demo", "--seconds", "0"], "argument --seconds: must be above 0 and below 3600, not 0"),
        (["demo", "--seconds", "nan"], "argument --seconds: must be above 0 and below 3600, not nan"),
        (["demo", "--seconds", "long"], "argument --seconds: 'long' is not a number of seconds"),
        (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["run", "x.py", "--port", "80"], "stagetrio run: error: unrecognized arguments: --port 80"),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line names the argument and what is wrong with it."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_a_png_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is found out before the storm, in one line, with status 2."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--plot", str(tmp_path / "storm.png")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "stagetrio demo: --plot needs matplotlib for .png: pip install 'stagetrio[plot]'"
        " (or write .html, which needs nothing)\n"
    )


def test_a_plot_in_no_known_format_is_refused_before_the_storm(capsys: pytest.CaptureFixture[str]) -> None:
    """One line says which formats there are."""
    assert main(["demo", "--plot", "storm.gif"]) == 2
    assert capsys.readouterr().err == "stagetrio demo: --plot writes .png or .html, not '.gif': storm.gif\n"


def test_ctrl_c_in_a_script_that_is_being_loaded_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also outside of any event loop, the exit status is 130 and nothing is said."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt\n")
    assert main(["run", str(tmp_path / "slow.py")]) == 130
    (tmp_path / "group.py").write_text("raise BaseExceptionGroup('g', [ValueError(), KeyboardInterrupt()])\n")
    assert main(["run", str(tmp_path / "group.py")]) == 130
    assert capsys.readouterr() == ("", "")


async def test_a_reader_that_has_seen_enough_is_no_error_worth_words() -> None:
    """Output into a pipe that nobody reads any more ends the command quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "stagetrio", "demo", "--show-control"]
    buffered = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    try:
        done = await trio.run_process(command, env=buffered, stdout=writing, capture_stderr=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
