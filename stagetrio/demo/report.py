"""From figures to rows: what is compared, which way is better, and who won, whoever it is.

A side wins a row when it is better by more than 5 % (shares: by more than half a point); closer than that is even.
Latencies are those of the served messages: what was never served has none, and shows as not served.
"""

from __future__ import annotations

import os
import platform
from typing import Any, Literal

import attrs

from stagetrio.demo.measure import Slot, percentile
from stagetrio.demo.runner import Figures
from stagetrio.demo.storm import GROUPS, Storm

Unit = Literal["share", "seconds", "per second", "bytes", "clients"]
Verdict = Literal["better", "worse", "even"]


@attrs.frozen
class Row:
    """One line of the table.

    Args:
        name: What was measured.
        unit: What the values are; shares are from 0 to 1.
        better: Which way is better; None where neither is, or where there is only one side.
        control: The plain server's value; None where there is none.
        staged: The value of the server on stagetrio; None where there is none.
        of: For clients: how many there are.
    """

    name: str
    unit: Unit
    better: Literal["higher", "lower"] | None
    control: float | None
    staged: float | None
    of: int = 0

    @property
    def verdict(self) -> Verdict | None:
        """How stagetrio did against plain Trio; None where there is nothing to compare or neither way is better.

        A side that has no value, because it served none of those messages, loses to one that has.
        """
        if self.better is None or (self.control is None and self.staged is None):
            return None
        if self.control is None or self.staged is None:
            return "worse" if self.staged is None else "better"
        gain = self.staged - self.control if self.better == "higher" else self.control - self.staged
        if abs(gain) <= self._even_within:
            return "even"
        return "better" if gain > 0 else "worse"

    @property
    def _even_within(self) -> float:
        if self.unit == "share":
            return 0.005
        return 0.05 * max(self.control or 0.0, self.staged or 0.0)

    @property
    def mark(self) -> str:
        """The verdict in words, with the size of the difference."""
        verdict = self.verdict
        if verdict is None or self.control is None or self.staged is None:
            return verdict or ""
        low, high = sorted((self.control, self.staged))
        if self.unit == "share" and verdict != "even":
            return f"{verdict} by {100 * (high - low):.3g} points"
        if verdict == "even" or self.unit == "clients" or low <= 0:
            return verdict
        return f"{verdict} {high / low:.1f}x" if high < 10 * low else f"{verdict} {high / low:,.0f}x"

    def text(self, value: float | None) -> str:
        """A value of this row as people read it."""
        if value is None:
            return "-"
        if self.unit == "share":
            return f"{100 * value:.1f} %"
        if self.unit == "seconds":
            return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
        if self.unit == "per second":
            return f"{value:,.0f} /s"
        if self.unit == "bytes":
            return f"{value / 2**20:.1f} MiB"
        return f"{value:.0f} of {self.of}"


_WHO = ("polite", "hogs", "burners")  # who sends, and reads the replies


def rows_of(control: Figures | None, staged: Figures) -> list[Row]:
    """The table, top to bottom."""
    left = None if control is None else _values(control)
    right = _values(staged)
    rows = []
    for name, unit, better in _ROWS:
        of = next((GROUPS[group] for group in GROUPS if name.startswith(group)), 0)
        if left is None:
            rows.append(Row(name, unit, None, None, right[name], of))
        else:
            rows.append(Row(name, unit, better, left[name], right[name], of))
    return rows


_ROWS: tuple[tuple[str, Unit, Literal["higher", "lower"] | None], ...] = (
    ("polite: served", "share", "higher"),
    ("polite: refused", "share", "lower"),
    ("polite: latency p50", "seconds", "lower"),
    ("polite: latency p99", "seconds", "lower"),
    ("polite: p50, no database", "seconds", "lower"),
    ("polite: p99, no database", "seconds", "lower"),
    ("hogs: served", "share", "higher"),
    ("hogs: refused", "share", None),
    ("hogs: latency p50", "seconds", "lower"),
    ("hogs: latency p99", "seconds", "lower"),
    ("burners: served", "share", "higher"),
    ("burners: latency p50", "seconds", "lower"),
    ("throughput", "per second", "higher"),
    ("worst stall of the loop", "seconds", "lower"),
    ("memory, at the peak", "bytes", "lower"),
    ("memory, grown in the storm", "bytes", "lower"),
    ("silent clients disposed of", "clients", "higher"),
    ("slow clients disposed of", "clients", "higher"),
)


def _values(figures: Figures) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "throughput": _throughput(figures),
        "worst stall of the loop": figures.worst_stall,
        "memory, at the peak": float(figures.memory_peak),
        "memory, grown in the storm": float(figures.memory_peak - figures.memory_before),
        "silent clients disposed of": float(figures.disposed["silent"]),
        "slow clients disposed of": float(figures.disposed["slow"]),
    }
    asks = figures.tallies["asks"].total()
    values["polite: p50, no database"] = percentile(asks.latencies, 0.5)
    values["polite: p99, no database"] = percentile(asks.latencies, 0.99)
    for group in _WHO:
        total = figures.tallies[group].total()
        values[f"{group}: served"] = _share(total.served, total)
        values[f"{group}: refused"] = _share(total.refused, total)
        values[f"{group}: latency p50"] = percentile(total.latencies, 0.5)
        values[f"{group}: latency p99"] = percentile(total.latencies, 0.99)
    return values


def _share(count: int, total: Slot) -> float | None:
    return count / total.offered if total.offered else None


def _throughput(figures: Figures) -> float:
    """Replies a second, of all groups, that came while the storm lasted."""
    return sum(figures.tallies[group].total(figures.seconds).replies for group in _WHO) / figures.seconds


def summary(rows: list[Row]) -> str:
    """One line: how many rows were won, and which were lost."""
    won = [row for row in rows if row.verdict == "better"]
    lost = [row.name for row in rows if row.verdict == "worse"]
    judged = [row for row in rows if row.verdict is not None]
    if not lost:
        return f"stagetrio is better in {len(won)} of {len(judged)} rows and worse in none."
    return f"stagetrio is better in {len(won)} of {len(judged)} rows and worse in {len(lost)}: {'; '.join(lost)}."


def as_plain(storm: Storm, control: Figures | None, staged: Figures) -> dict[str, Any]:
    """Everything that was measured, as JSON can carry it; seconds and bytes throughout."""
    return {
        "storm": {
            "seconds": storm.seconds,
            "seed": storm.seed,
            "clients": GROUPS,
            "burn_rounds": storm.rounds,
            "database_slow": list(storm.database_slow),
        },
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "control": None if control is None else _plain_figures(control),
        "stagetrio": _plain_figures(staged),
        "rows": [{**attrs.asdict(row), "verdict": row.verdict} for row in rows_of(control, staged)],
    }


def _plain_figures(figures: Figures) -> dict[str, Any]:
    return {
        "groups": {group: _plain_total(tally.total()) for group, tally in figures.tallies.items()},
        "throughput": _throughput(figures),
        "worst_stall": figures.worst_stall,
        "worst_stall_of_the_clients": dict(zip(("all but the hogs", "hogs"), figures.client_stalls, strict=True)),
        "memory_before": figures.memory_before,
        "memory_peak": figures.memory_peak,
        "disposed": figures.disposed,
        "database": {"queries": figures.database_queries, "most_at_once": figures.database_most_at_once},
    }


def _plain_total(total: Slot) -> dict[str, Any]:
    return {
        "offered": total.offered,
        "served": total.served,
        "refused": total.refused,
        "failed": total.failed,
        "unanswered": total.offered - total.served - total.refused - total.failed,
        "latency_p50": percentile(total.latencies, 0.5),
        "latency_p99": percentile(total.latencies, 0.99),
    }
