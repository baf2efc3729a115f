"""The runner of the benchmarks: what it selects, pairs, computes and prints. Nobody's speed is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.case import Case

ROOT = Path(__file__).parent.parent


def scripted(log: list[str], name: str, *seconds: float) -> Case:
    """A case whose sides return the given seconds in turn (ours, then twice as long for plain) and log their call."""
    ours, plain = list(seconds), [2 * value for value in seconds]

    def side(label: str, values: list[float]) -> float:
        log.append(label)
        return values.pop(0)

    return Case(name, lambda: side("ours", ours), lambda: side("plain", plain), target=1.5)


def test_the_sides_alternate_in_pairs() -> None:
    """Each run is a pair, and the side that goes first changes, so that neither always gets the warm caches."""
    log: list[str] = []
    run.measure(scripted(log, "x", 1e-6, 2e-6, 3e-6), 3)
    assert log == ["ours", "plain", "plain", "ours", "ours", "plain"]


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    """A disturbance that hits one pair alone does not move the ratio."""
    ours, plain = [1.0, 1.0, 9.0, 1.0, 1.0], [3.0, 3.0, 3.0, 90.0, 3.0]
    case = Case("x", lambda: ours.pop(0), lambda: plain.pop(0), target=3.5)
    result = run.measure(case, 5)
    assert result.ratio == 3.0
    assert result.met is False


def test_the_table_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The interpreter, the cores, both sides' spread, the ratio, the target and the verdict are printed."""
    run.run([scripted([], "echo", 1e-6, 2e-6, 3e-6)], runs=3, as_json=False)
    out = capsys.readouterr().out
    assert "CPython" in out or "PyPy" in out
    assert "cores" in out
    line = next(line for line in out.splitlines() if line.startswith("echo"))
    assert " ".join(line.split()) == "echo 1 us / 2 us / 3 us 2 us / 4 us / 6 us 2.00x >= 1.5 met"


def test_json_carries_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """``--json`` prints one document with the machine and every case."""
    run.run([scripted([], "echo", 1e-6, 2e-6, 3e-6)], runs=3, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["machine"]["cores"]
    (case,) = document["cases"]
    assert (case["name"], case["ratio"], case["target"], case["met"]) == ("echo", 2.0, 1.5, True)
    assert case["ours"] == {"min": 1e-6, "median": 2e-6, "max": 3e-6}


@pytest.mark.parametrize(
    ("globs", "names"),
    [([], ["a", "b"]), (["a"], ["a"]), (["second"], ["b"]), (["first:*"], ["a"]), (["?"], ["a", "b"]), (["c"], [])],
)
def test_globs_select_by_name_or_module(globs: list[str], names: list[str]) -> None:
    """A glob is matched with the case's name, its module's, and both joined by a colon; none selects all."""
    cases = [("first", scripted([], "a")), ("second", scripted([], "b"))]
    assert [case.name for case in run.wanted(cases, globs)] == names


def test_every_case_has_a_name_of_its_own() -> None:
    """All modules under benchmarks/ import, and no two cases share a name."""
    names = [case.name for module in run.modules() for case in run.cases_of(module)]
    assert names
    assert len(names) == len(set(names))


def test_the_command_lists_the_cases() -> None:
    """``python -m benchmarks.run --list`` works from the root of the project."""
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "import_time", "--list"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert listed == [case.name for case in run.cases_of("import_time")]


@pytest.mark.parametrize(
    ("arguments", "said"), [(["no such case"], "no such case"), (["--runs", "0"], "--runs must be 1 or more, not 0")]
)
def test_a_request_for_nothing_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What selects no case, or measures it no time, ends with status 2 and a line that says which."""
    assert run.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_side_that_measured_nothing_is_an_error() -> None:
    """A zero would make any ratio."""
    with pytest.raises(ValueError, match="seconds per operation"):
        run.measure(Case("x", lambda: 0.0, lambda: 1.0), 1)


def test_a_target_is_a_ratio() -> None:
    """A target that no ratio can be compared with is refused by name."""
    with pytest.raises(ValueError, match=r"target must be .* not -1"):
        Case("x", lambda: 1.0, lambda: 1.0, target=-1)
