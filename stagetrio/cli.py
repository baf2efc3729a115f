"""The command line: ``stagetrio demo``, ``stagetrio run``.

Whatever the user can mend, in the command or in the script, is told in one line, with exit status 2 and without a
traceback. Everything heavy is imported when its command has been chosen, within reach of the handler for Ctrl-C.
"""

from __future__ import annotations

import argparse
import ast
import errno
import logging
import math
import os
import signal
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stagetrio.app import App
    from stagetrio.sockets import Address

INTERRUPTED = 130  # what shells make of an end by SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: What follows the command's name; None: those of the process.
    """
    try:
        options = _parser().parse_args(arguments)
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
    parser.set_defaults(command=_demo)


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
    parser.add_argument("--grace", type=_grace, default=10.0, metavar="S", help="seconds for draining (default: 10)")
    parser.add_argument("--check", action="store_true", help="load the script, print what it serves, and exit")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    import trio

    addresses = options.bind or ["tcp://127.0.0.1:8800"]
    try:
        _check_addresses(addresses)
        app = _load(options.script)
        if options.check:
            print(_described(app, options.script))
            return 0
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        return trio.run(_serve, app, options.script, addresses, options.grace)
    except _Mendable as error:
        _say(f"stagetrio run: {' '.join(str(error).split())}")
        return 2


class _Mendable(Exception):
    """What is wrong, where, and the mend: one line for the user."""


def _check_addresses(addresses: list[str]) -> None:
    from stagetrio.sockets import parse_address

    for address in addresses:
        try:
            parse_address(address)
        except ValueError as error:
            raise _Mendable(f"{error}; write for instance --bind tcp://127.0.0.1:8800") from None


def _load(path: Path) -> App:
    """Import a script and return the one `App` at its top level.

    Raises:
        _Mendable: There is no such script, it does not import, or it has no App, or several.
    """
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise _Mendable(f"{path}: no such file; give the path of the script that makes the App") from None
    except OSError as error:
        raise _Mendable(f"{path}: {error.strerror}; give the path of a script that can be read") from None
    module = types.ModuleType(_module_name(path))
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module  # whoever resolves the annotations of its classes looks for it there
    sys.path.insert(0, str(path.absolute().parent))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        where = f"{error.filename or path}:{error.lineno or 1}"
        raise _Mendable(f"{where}: {type(error).__name__}: {error.msg}; correct this line") from None
    except SystemExit as error:
        where = _where(error, path)
        raise _Mendable(f'{where}: the script exits; let it do so only under if __name__ == "__main__"') from None
    except ModuleNotFoundError as error:
        mend = f"install it, or put {error.name}.py beside the script"
        raise _Mendable(f"{_where(error, path)}: {type(error).__name__}: {error}; {mend}") from None
    except Exception as error:
        raise _Mendable(f"{_where(error, path)}: {type(error).__name__}: {error}; correct this line") from None
    return _only_app(path, source, module)


def _module_name(path: Path) -> str:
    """What its file is called, unless that name belongs to another module."""
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names or not path.stem.isidentifier()
    return f"stagetrio_script_{path.stem}" if taken else path.stem


def _where(error: BaseException, path: Path) -> str:
    """``file:line`` of the innermost step to the error that is the user's own: in the script or beside it."""
    own, home = f"{path}:1", path.absolute().parent
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if file == path:
            own = f"{path}:{frame.lineno}"
        elif file.is_relative_to(home) and "site-packages" not in file.parts:
            own = f"{file}:{frame.lineno}"
    return own


def _only_app(path: Path, source: bytes, module: types.ModuleType) -> App:
    from stagetrio.app import App

    named: dict[App, str] = {}
    for name, value in vars(module).items():
        if isinstance(value, App):
            named.setdefault(value, name)
    if not named:
        raise _Mendable(f'{path}: no App at its top level; add: app = App("{path.stem}"), from stagetrio.app')
    if len(named) > 1:
        lines = {name: f"{path}:{_line_of(name, source)}" for name in named.values()}
        places = " and ".join(f"{name} ({line})" for name, line in lines.items())
        raise _Mendable(f"{path}: {len(named)} Apps at its top level: {places}; keep one in a script")
    return next(iter(named))


def _line_of(name: str, source: bytes) -> int:
    """The line of the statement at the top level which binds a name last."""
    line = 1
    for statement in ast.parse(source).body:
        nodes = (node for node in ast.walk(statement) if isinstance(node, ast.Name | ast.alias))
        if any(name in (getattr(node, "id", None), getattr(node, "name", None)) for node in nodes):
            line = statement.lineno
    return line


def _described(app: App, path: Path) -> str:
    """What an app serves, for people."""
    try:
        about = app.describe()
    except (ValueError, TypeError) as error:
        raise _Mendable(f"{path}: {error}; correct the App") from None
    sections = {
        "stage": {about.name: f"{len(about.messages)} kinds of message"},
        "message": about.messages,
        "reply": dict.fromkeys(about.replies, ""),
        "ticket": {name: f"{tickets:g} at once" for name, tickets in about.tickets.items()},
        "job": {job: f"every {seconds:g} s" for job, seconds in about.jobs.items()},
        "procedure": dict.fromkeys(about.procedures, ""),
        "hook": dict.fromkeys(about.hooks, ""),
    }
    lines = [
        f"{section:<10} {name:<20} {said}".rstrip()
        for section, named in sections.items()
        for name, said in named.items()
    ]
    return "\n".join(lines)


_MENDS = {
    errno.EADDRINUSE: "stop the server that listens there, or choose another address with --bind",
    errno.EACCES: "choose another address with --bind, for instance a port above 1023",
    errno.EADDRNOTAVAIL: "choose an address of this machine with --bind",
    errno.ENOENT: "make that directory, or choose another address with --bind",
}


def _not_serving(error: BaseException, path: Path) -> _Mendable:
    """Why an app could not begin to serve; what is not the user's to mend is raised as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        mend = _MENDS.get(error.errno or 0, "choose another address with --bind")
        return _Mendable(f"{error.strerror or error}; {mend}")
    if isinstance(error, ValueError | TypeError):
        return _Mendable(f"{path}: {error}; correct the App")
    raise error


async def _serve(app: App, path: Path, addresses: list[str], grace: float) -> int:
    """Serve until a signal has drained the app; return the exit status."""
    import trio

    status, serving, draining = 0, False, False
    failure: Exception | None = None
    # Signals are received, not raised: a KeyboardInterrupt would end the loop in the middle of a handler.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def serve(*, task_status: trio.TaskStatus[list[Address]]) -> None:
                await app.serve(*addresses, task_status=task_status)
                nursery.cancel_scope.cancel()

            async def obey() -> None:
                nonlocal status, draining
                async for number in signals:
                    if draining or not serving:
                        status = 128 + number
                        nursery.cancel_scope.cancel()
                    else:
                        draining = True
                        _say(f"{app.name}: draining for up to {grace:g} s; another signal ends it at once")
                        nursery.start_soon(app.drain, grace)

            nursery.start_soon(obey)
            try:
                bound = await nursery.start(serve)
            except Exception as error:  # judged below, outside of the nursery, which would wrap it
                failure = error
                nursery.cancel_scope.cancel()
            else:
                serving = True
                _say(f"{app.name}: serving on {', '.join(map(str, bound))}; Ctrl-C or SIGTERM drains")
    if failure is not None:
        raise _not_serving(failure, path)
    return status


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
