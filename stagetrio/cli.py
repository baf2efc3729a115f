"""The command line: ``stagetrio demo``, ``stagetrio run``.

Whatever the user can mend, in the command or in the script, is told in one line, with exit status 2 and without a
traceback. Everything heavy is imported when its command has been chosen, within reach of the handler for Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # what shells make of an end by SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: What follows the command's name; None: those of the process.
    """
    try:
        options, unknown = _parser().parse_known_args(arguments)
        if unknown:
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not find out again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is None:
            raise
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagetrio",
        description="Servers on Trio that keep their pace.",
        epilog="stagetrio COMMAND --help tells more about a command.",
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_run(commands)
    return parser


class _PrintVersion(argparse.Action):
    """Like argparse's own, but looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"stagetrio {sys.modules['stagetrio'].__version__}")
        parser.exit()


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="let a storm of 200 clients loose on plain Trio, then on stagetrio, and compare",
        description="Let a storm of 200 clients loose on a plain Trio server, then on the same server on stagetrio: "
        "186 polite ones, 4 hogs that write as fast as they can, 4 whose questions burn 200 ms of CPU, 3 that hardly "
        "read and 3 that say nothing. Everything runs on this machine, over TCP, in processes of its own, and is "
        "measured; at the end stands one table, side by side. Takes about 20 s.",
    )
    parser.add_argument("--seconds", type=_seconds, default=8.0, help="length of one storm (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="decides who sends what and when (default: 0)")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON instead of the table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it over time, to FILE.html or FILE.png")
    parser.add_argument("--no-control", action="store_true", help="skip the plain Trio server")
    parser.add_argument("--show-control", action="store_true", help="print the plain Trio server's source and exit")
    parser.set_defaults(command=_demo, parser=parser)


def _seconds(text: str) -> float:
    """A length of time on the command line."""
    seconds = _number(text)
    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 3600, not {text}")
    return seconds


def _grace(text: str) -> float:
    """A length of time that may be 0 or inf."""
    seconds = _number(text)
    if not 0 <= seconds <= math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return seconds


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None


def _demo(options: argparse.Namespace) -> int:
    from stagetrio.demo import command

    if options.show_control:
        return command.show_control()
    return command.demo(
        seconds=options.seconds,
        seed=options.seed,
        with_control=not options.no_control,
        as_json=options.json,
        plot_to=options.plot,
    )


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run",
        help="serve the App of a script",
        description="Serve the App that a script makes at its top level. SIGTERM and Ctrl-C drain: accept nobody else, "
        "finish what is in hand within the grace, then cancel; a second signal cancels at once.",
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT.py", help="a Python file with one App at its top level")
    parser.add_argument(
        "--bind",
        action="append",
        metavar="ADDRESS",
        help="where to listen: tcp://HOST:PORT or unix:///PATH; may be repeated (default: tcp://127.0.0.1:8800)",
    )
    parser.add_argument(
        "--procedures-at",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="where other processes call the app's procedures, away from strangers; may be repeated (default: nowhere)",
    )
    parser.add_argument("--grace", type=_grace, default=10.0, metavar="S", help="seconds for draining (default: 10)")
    parser.add_argument("--pid", type=Path, metavar="FILE", help="keep the process id in FILE while it runs")
    parser.add_argument("--check", action="store_true", help="load the script, print what it serves, and exit")
    _add_processes(parser)
    parser.set_defaults(command=_run, parser=parser)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "An arbiter holds the sockets and keeps worker processes alive, each of which loads the script. SIGHUP "
        "replaces them one by one, without a refused connection; SIGTTIN and SIGTTOU add and remove one.",
    )
    group.add_argument("--processes", type=_count, metavar="N", help="serve in N worker processes")
    for option, default, help in (
        ("--hang-after", 30, "replace a worker whose event loop has not turned for so many seconds"),
        ("--start-within", 60, "replace a worker that is not ready after so many seconds"),
        ("--max-age", math.inf, "replace a worker after about so many seconds"),
    ):
        group.add_argument(option, type=_lifetime, metavar="S", help=f"{help} (default: {default:g})")
    group.add_argument(
        "--max-memory",
        type=_megabytes,
        dest="max_memory_bytes",
        metavar="MB",
        help="replace a worker that takes about so much (default: inf)",
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text}")
    return int(text)


def _lifetime(text: str) -> float:
    seconds = _number(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return seconds


def _megabytes(text: str) -> float:
    try:
        megabytes = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of megabytes") from None
    if not megabytes > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return megabytes * 1e6


def _run(options: argparse.Namespace) -> int:
    from stagetrio import script

    flags = ("--hang-after", "--start-within", "--max-age", "--max-memory")
    names = ("hang_after", "start_within", "max_age", "max_memory_bytes")
    given: Any = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    addresses = options.bind or ["tcp://127.0.0.1:8800"]
    try:
        if options.check:
            return script.check(options.script, addresses=addresses)
        if options.processes is not None:
            if options.procedures_at:
                raise script.Mendable("--procedures-at is for an app in one process; leave out --processes")
            from stagetrio import script_workers

            return script_workers.run(
                options.script,
                addresses=addresses,
                grace=options.grace,
                processes=options.processes,
                pid_path=options.pid,
                options=given,
            )
        for flag, name in zip(flags, names, strict=True):
            if name in given:
                raise script.Mendable(f"{flag} is about worker processes; add --processes N")
        return script.run(
            options.script,
            addresses=addresses,
            procedures_at=options.procedures_at,
            grace=options.grace,
            pid_path=options.pid,
        )
    except script.Mendable as error:
        print(f"stagetrio run: {error}", file=sys.stderr)
        return 2
