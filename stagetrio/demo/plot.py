"""The storm over time, as a picture: PNG by matplotlib, or an HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path

import attrs

from stagetrio.demo.measure import SLOT_SECONDS, Slot, percentile
from stagetrio.demo.report import rows_of, summary
from stagetrio.demo.runner import Figures
from stagetrio.demo.storm import Storm

_NAMES = {"control": "plain Trio", "staged": "stagetrio"}
_COLOURS = {"control": "#d1495b", "staged": "#00798c"}


@attrs.frozen
class Line:
    """One line of a panel.

    Args:
        label: What the legend calls it.
        colour: As ``#rrggbb``.
        dashed: Whether it is drawn in dashes.
        points: ``(seconds of the storm, value)``, where there is a value.
    """

    label: str
    colour: str
    dashed: bool
    points: tuple[tuple[float, float], ...]


@attrs.frozen
class Panel:
    """One diagram over the time of the storm.

    Args:
        title: Above it.
        unit: Of its values.
        lines: In it; their values are drawn on a logarithmic scale.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]


def check_target(path: Path) -> str | None:
    """Why a plot cannot be written to ``path``, in one line; None if it can, as far as can be told beforehand."""
    if path.suffix not in (".png", ".html"):
        return f"--plot writes .png or .html, not {path.suffix or 'a file without an ending'!r}: {path}"
    if not path.absolute().parent.is_dir():
        return f"--plot cannot write {path}: there is no directory {path.absolute().parent}"
    if path.is_dir():
        return f"--plot cannot write {path}: it is a directory"
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        return "--plot needs matplotlib for .png: pip install 'stagetrio[plot]' (or write .html, which needs nothing)"
    return None


def write(path: Path, storm: Storm, control: Figures | None, staged: Figures) -> None:
    """Write the plot to ``path``, in the format its ending names.

    Raises:
        OSError: The file cannot be written.
    """
    panels = panels_of(control, staged)
    if path.suffix == ".png":
        _write_png(path, storm, panels)
    else:
        path.write_text(_html(storm, panels, control, staged), encoding="utf-8")


def panels_of(control: Figures | None, staged: Figures) -> list[Panel]:
    """What is drawn: the latency of the polite ones' small questions, and the replies a second, both over time."""
    sides = [figures for figures in (control, staged) if figures is not None]
    latency = []
    for figures in sides:
        latency.append(_line(figures, "p99", False, lambda slot: percentile(slot.latencies, 0.99)))
        latency.append(_line(figures, "p50", True, lambda slot: percentile(slot.latencies, 0.5)))
    replies = [_line(figures, "all clients", False, _replies, ("polite", "hogs", "burners")) for figures in sides]
    return [
        Panel(
            "Latency of the polite who do not need the database, by when a message was due", "seconds", tuple(latency)
        ),
        Panel("Replies to all clients", "per second", tuple(replies)),
    ]


def _replies(slot: Slot) -> float | None:
    return slot.replies / SLOT_SECONDS or None  # a logarithmic scale has no zero


def _line(
    figures: Figures,
    label: str,
    dashed: bool,
    value_of: Callable[[Slot], float | None],
    names: tuple[str, ...] = ("asks",),
) -> Line:
    points = []
    for index in range(math.ceil(figures.seconds / SLOT_SECONDS)):
        merged = Slot()
        for name in names:
            merged.add(figures.tallies[name].at(index * SLOT_SECONDS))
        value = value_of(merged)
        if value is not None:
            points.append(((index + 0.5) * SLOT_SECONDS, value))
    return Line(f"{_NAMES[figures.side]}, {label}", _COLOURS[figures.side], dashed, tuple(points))


def _write_png(path: Path, storm: Storm, panels: Sequence[Panel]) -> None:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), sharex=True), panels, strict=True):
        axes.set_title(panel.title)
        axes.set_ylabel(panel.unit)
        axes.set_yscale("log")
        axes.set_xlim(0, storm.seconds)
        axes.axvspan(*storm.database_slow, color="#dddddd", label="database 20 times slower")
        for line in panel.lines:
            times, values = zip(*line.points, strict=True) if line.points else ((), ())
            axes.plot(times, values, color=line.colour, linestyle="--" if line.dashed else "-", label=line.label)
        axes.legend(loc="best", fontsize="small")
    axes.set_xlabel("seconds of the storm")
    figure.savefig(path, dpi=120)


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 860, 320, 70, 20, 40  # of a panel and its margins, in SVG units


def _html(storm: Storm, panels: Sequence[Panel], control: Figures | None, staged: Figures) -> str:
    rows = rows_of(control, staged)
    cells = "".join(
        f"<tr class='{row.verdict or ''}'><th>{escape(row.name)}</th><td>{row.text(row.control)}</td>"
        f"<td>{row.text(row.staged)}</td><td>{row.mark}</td></tr>"
        for row in rows
    )
    verdict = f"<p>{escape(summary(rows))}</p>" if control is not None else ""
    figures = "".join(f"<h2>{escape(panel.title)}</h2>{_legend(panel)}{_svg(storm, panel)}" for panel in panels)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>stagetrio demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .15em .8em; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child {{ text-align: left; font-weight: normal }} .better td:last-child {{ color: #00798c }}
.worse td:last-child {{ color: #d1495b; font-weight: bold }} h2 {{ font-size: 1.1em; margin-top: 2em }}
svg {{ width: 100%; font-size: 12px }} .key {{ margin-right: 1.5em }}
</style>
<h1>stagetrio demo</h1>
<p>200 clients, {storm.seconds:g} s, seed {storm.seed}. In the grey span the database is 20 times slower.</p>
<table><tr><th></th><th>plain Trio</th><th>stagetrio</th><th></th></tr>{cells}</table>
{verdict}
{figures}
</html>
"""


def _legend(panel: Panel) -> str:
    keys = []
    for line in panel.lines:
        sample = "- -" if line.dashed else "&mdash;"
        keys.append(f"<span class='key' style='color:{line.colour}'>{sample} {escape(line.label)}</span>")
    return f"<div>{''.join(keys)}</div>"


def _svg(storm: Storm, panel: Panel) -> str:
    values = [value for line in panel.lines for _, value in line.points] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)

    inner = _HEIGHT - _TOP - _BOTTOM

    def x(seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT) * seconds / storm.seconds

    def y(value: float) -> float:
        return _TOP + inner - inner * (math.log10(value) - low) / (high - low)

    begin, end = storm.database_slow
    parts = [
        f'<rect x="{x(begin):.1f}" y="{_TOP}" width="{x(end) - x(begin):.1f}" height="{inner:.1f}" fill="#eee"/>',
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for second in range(0, int(storm.seconds) + 1, max(1, round(storm.seconds / 10))):
        anchor = "end" if second == storm.seconds else "middle"
        parts.append(f'<text x="{x(second):.1f}" y="{_HEIGHT - 20}" text-anchor="{anchor}">{second} s</text>')
    parts.append(f'<text x="0" y="12">{escape(panel.unit)}</text>')
    for line in panel.lines:
        points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in line.points)
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(panel.title)}">{"".join(parts)}</svg>'
