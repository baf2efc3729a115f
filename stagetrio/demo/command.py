"""What ``stagetrio demo`` does, once its arguments are known."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import trio
from rich.console import Console

from stagetrio.demo import plot, screen
from stagetrio.demo.report import as_plain, rows_of
from stagetrio.demo.runner import ChildFailed, Figures, Progress, run_storm
from stagetrio.demo.storm import BURN_SECONDS, Storm, rounds_of


def show_control() -> int:
    """Print the source of the plain server; return the exit status."""
    screen.print_control(Console())
    return 0


def demo(*, seconds: float, seed: int, with_control: bool, as_json: bool, plot_to: Path | None) -> int:
    """Run the storm against both servers, or against stagetrio alone, and show what came out.

    Args:
        seconds: How long one storm lasts; above 0.
        seed: Of what is sent and when.
        with_control: Whether the plain server is put through it too.
        as_json: Print JSON instead of the table.
        plot_to: Also draw it over time, as ``.png`` or ``.html``.

    Returns:
        The exit status: 0; 1 when the storm could not be held or its plot not be written; 2 for arguments that make no
        sense; 128 and the signal's number when interrupted.
    """
    problem = None if plot_to is None else plot.check_target(plot_to)
    if problem is not None:
        return _complain(problem, 2)
    storm = Storm(seconds, seed, rounds_of(BURN_SECONDS))
    sides = ["control", "staged"] if with_control else ["staged"]
    with screen.bars(Console(stderr=True), sides, quiet=as_json) as on_progress:
        outcome = trio.run(_storms, storm, sides, on_progress)
    if isinstance(outcome, ChildFailed):
        return _complain(str(outcome), 1)
    if isinstance(outcome, signal.Signals):
        return 128 + outcome
    control, staged = outcome.get("control"), outcome["staged"]
    if as_json:
        print(json.dumps(as_plain(storm, control, staged), indent=2))
    else:
        screen.print_table(Console(), storm, rows_of(control, staged), with_control=with_control)
    if plot_to is not None:
        try:
            plot.write(plot_to, storm, control, staged)
        except OSError as error:
            return _complain(f"cannot write {plot_to}: {error.strerror or error}", 1)
        print(f"plot: {plot_to}", file=sys.stderr)
    return 0


def _complain(problem: str, status: int) -> int:
    print(f"stagetrio demo: {problem}", file=sys.stderr)
    return status


async def _storms(
    storm: Storm, sides: list[str], on_progress: Callable[[Progress], None]
) -> dict[str, Figures] | signal.Signals | ChildFailed:
    """The figures of each side, or what ended it early; either way no process is left."""
    outcome: dict[str, Figures] | signal.Signals | ChildFailed
    figures: dict[str, Figures] = {}
    outcome = figures
    # Signals are received, not raised: a KeyboardInterrupt could strike between a process and its owner.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                nonlocal outcome
                async for number in signals:
                    outcome = signal.Signals(number)
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop_on_signal)
            try:
                for side in sides:
                    figures[side] = await run_storm(side, storm, on_progress)
            except ChildFailed as error:
                outcome = error
            nursery.cancel_scope.cancel()
    return outcome
