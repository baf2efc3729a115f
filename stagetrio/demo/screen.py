"""The demo in a terminal: bars while it works, one table when it is done."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from stagetrio.demo import control
from stagetrio.demo.report import Row, summary
from stagetrio.demo.runner import Progress
from stagetrio.demo.storm import Storm

_NAMES = {"control": "plain Trio", "staged": "stagetrio"}
_STYLES = {"better": "green", "worse": "bold red", "even": "dim", None: ""}


@contextmanager
def bars(console: Console, sides: list[str], *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a bar for each side while the block runs; yields what to call with each `Progress`.

    Where nobody can watch a bar, a line says which storm begins, unless it shall be ``quiet``.
    """
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as shown:
        tasks = {side: shown.add_task(_NAMES[side], total=1.0, start=False, said="") for side in sides}

        def show(progress: Progress) -> None:
            task = tasks[progress.side]
            if progress.fraction == 0.0:
                shown.start_task(task)
                if not (console.is_terminal or quiet):
                    console.print(f"The storm against {_NAMES[progress.side]} ...")
            shown.update(task, completed=progress.fraction, said=_said(progress))
            if progress.fraction == 1.0:
                shown.stop_task(task)

        yield show


def _said(progress: Progress) -> str:
    if progress.polite_p99 is None:
        return "starting"
    return f"{progress.replies:,} replies, polite p99 {1000 * progress.polite_p99:,.0f} ms"


def print_table(console: Console, storm: Storm, rows: list[Row], *, with_control: bool) -> None:
    """Print what came out, side by side, with a mark on each row."""
    table = Table(title=f"200 clients, {storm.seconds:g} s, seed {storm.seed}", title_justify="left")
    table.add_column("")
    if with_control:
        table.add_column("plain Trio", justify="right")
    table.add_column("stagetrio", justify="right")
    if with_control:
        table.add_column("stagetrio is")
    section = _section(rows[0])
    for row in rows:
        if _section(row) != section:
            table.add_section()
            section = _section(row)
        mark = Text(row.mark, style=_STYLES[row.verdict])
        sides = (row.text(row.control), row.text(row.staged), mark) if with_control else (row.text(row.staged),)
        table.add_row(row.name, *sides)
    console.print(table)
    if with_control:
        console.print(summary(rows), highlight=False)


def _section(row: Row) -> str:
    return row.name.partition(":")[0] if ":" in row.name else ""


def print_control(console: Console) -> None:
    """Print the source of the plain server."""
    source = inspect.getsource(control)
    if console.is_terminal:
        console.print(Syntax(source, "python"))
    else:
        console.file.write(source)
