"""Measure cases beside plain Trio, in the same process, alternately: ``python -m benchmarks.run [GLOB ...]``.

A single timing on a shared machine says little: a neighbour, a frequency step or a collection falls on one side
only. So the two sides of a case run in pairs, back to back, and the side that goes first changes with each pair.
The ratio of a case is the median of its pairs' ratios: whatever slows both halves of a pair cancels out of it.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import attrs

from benchmarks.case import Case

_HERE = Path(__file__).parent
_NO_CASES_IN = {"__init__", "case", "run"}


@attrs.frozen
class Result:
    """What came out of one case: seconds per operation, in the order they were measured."""

    case: Case
    ours: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over the pairs of plain/ours: above 1, ours is the faster."""
        return statistics.median(plain / ours for ours, plain in zip(self.ours, self.plain, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where none is set."""
        return None if self.case.target is None else self.ratio >= self.case.target

    def as_dict(self) -> dict[str, object]:
        """The result as JSON has it."""
        return {
            "name": self.case.name,
            "ours": _spread(self.ours),
            "plain": _spread(self.plain),
            "ratio": self.ratio,
            "target": self.case.target,
            "met": self.met,
            "note": self.case.note,
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _once(side: Callable[[], float]) -> float:
    gc.collect()  # the last side's garbage is not this side's cost
    seconds = side()
    if not seconds > 0:
        raise ValueError(f"a side must return seconds per operation, above 0, not {seconds!r}")
    return seconds


def measure(case: Case, runs: int) -> Result:
    """Run both sides of ``case`` ``runs`` times, in pairs; who goes first alternates."""
    ours, plain = [], []
    for run in range(runs):
        if run % 2 == 0:
            ours.append(_once(case.ours))
            plain.append(_once(case.plain))
        else:
            plain.append(_once(case.plain))
            ours.append(_once(case.ours))
    return Result(case, tuple(ours), tuple(plain))


def modules() -> list[str]:
    """The names of the modules beside this one that may hold ``CASES``."""
    return sorted(path.stem for path in _HERE.glob("*.py") if path.stem not in _NO_CASES_IN)


def cases_of(module: str) -> list[Case]:
    """The cases of one module; none when it measures by a command line of its own."""
    return list(getattr(importlib.import_module(f"benchmarks.{module}"), "CASES", ()))


def wanted(cases: Iterable[tuple[str, Case]], globs: Sequence[str]) -> list[Case]:
    """The cases whose name, module, or ``module:name`` matches one of ``globs``; all where none is given."""
    return [
        case
        for module, case in cases
        if not globs
        or any(
            fnmatch.fnmatchcase(name, glob) for glob in globs for name in (case.name, module, f"{module}:{case.name}")
        )
    ]


def machine() -> dict[str, object]:
    """What the figures depend on and cannot be read from them."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def seconds(value: float) -> str:
    """A duration with three significant digits in a unit that reads well."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def line_of(result: Result) -> str:
    """One case as a line of the table."""

    def spread(values: Sequence[float]) -> str:
        return " / ".join(f"{seconds(v):>8}" for v in (min(values), statistics.median(values), max(values)))

    verdict = {None: "", True: "met", False: "MISSED"}[result.met]
    target = "" if result.case.target is None else f">= {result.case.target:g} {verdict}"
    return f"{result.case.name:<44} {spread(result.ours)}   {spread(result.plain)}   {result.ratio:>6.2f}x  {target}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("globs", nargs="*", metavar="GLOB", help="cases, modules or module:case; all if none")
    parser.add_argument("--runs", type=int, default=5, help="pairs per case (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and measure nothing")
    return parser


def run(cases: Sequence[Case], *, runs: int, as_json: bool) -> list[Result]:
    """Measure ``cases`` in turn and print each as it is known (or all at the end, as JSON)."""
    if not as_json:
        where = machine()
        print(f"# {where['python']}, {where['cores']} cores, {where['system']}; {runs} pairs per case")
        sides = (f"{side} min / median / max" for side in ("ours", "plain"))
        print(f"{'case':<44} {next(sides):<30}   {next(sides):<30}   plain/ours  target")
    results = []
    for case in cases:
        results.append(measure(case, runs))
        if not as_json:
            print(line_of(results[-1]), flush=True)
            if case.note:
                print(f"    {case.note}", flush=True)
    if as_json:
        print(json.dumps({"machine": machine(), "runs": runs, "cases": [r.as_dict() for r in results]}, indent=2))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print. Status 2 for a request that selects nothing or makes no sense."""
    options = _parser().parse_args(arguments)
    if options.runs < 1:
        print(f"--runs must be 1 or more, not {options.runs}", file=sys.stderr)
        return 2
    cases = wanted(((module, case) for module in modules() for case in cases_of(module)), options.globs)
    if not cases:
        print(f"no case matches {' '.join(options.globs) or '(there are none)'}; see --list", file=sys.stderr)
        return 2
    if options.list:
        for case in cases:
            print(case.name)
        return 0
    run(cases, runs=options.runs, as_json=options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
