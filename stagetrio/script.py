"""An app from a script, from loading it to its last message: what ``stagetrio run`` does.

A script is imported, not run: it is a module of its own name, with its directory on ``sys.path``, so that what stands
under ``if __name__ == "__main__"`` stays undone. What its author can mend is told in one line (`Mendable`): what is
wrong, where, and the mend. Serving in several processes stands in ``script_workers.py``.
"""

from __future__ import annotations

import ast
import errno
import logging
import signal
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from pathlib import Path

import trio

from stagetrio.addresses import Address, parse_listening_address
from stagetrio.app import App
from stagetrio.service import notify, pid_file

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Mendable(Exception):
    """What is wrong with a script or an address, where, and the mend, in one line."""

    def __init__(self, problem: str) -> None:
        super().__init__(" ".join(problem.split()))


def check(path: Path, *, addresses: Sequence[str]) -> int:
    """Load a script and print what would be served.

    Returns:
        The exit status, 0.

    Raises:
        Mendable: The script, its app or an address is not as it must be.
    """
    check_addresses(addresses)
    print(described(load(path), path))
    return 0


def run(
    path: Path,
    *,
    addresses: Sequence[str],
    procedures_at: Sequence[str] = (),
    grace: float,
    pid_path: Path | None = None,
) -> int:
    """Load a script and serve its app until a signal ends it.

    Args:
        path: Of the script.
        addresses: Where to listen.
        procedures_at: Where other processes call the app's procedures.
        grace: Seconds for draining, 0 or more.
        pid_path: A file to keep the process id in.

    Returns:
        The exit status: 0 after a drain, 128 and the signal's number after a second signal.

    Raises:
        Mendable: The script, its app or an address is not as it must be.
    """
    check_addresses(addresses)
    check_addresses(procedures_at, "--procedures-at unix:///run/app")
    app = load(path)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    with kept(pid_path):
        return trio.run(serve, app, path, addresses, procedures_at, grace)


@contextmanager
def kept(pid_path: Path | None) -> Iterator[None]:
    """Keep the process id in a file, and have what is wrong with that file told."""
    with ExitStack() as stack:
        try:
            stack.enter_context(pid_file(pid_path))
        except FileExistsError as error:
            raise Mendable(str(error)) from None
        except OSError as error:
            raise Mendable(f"{pid_path}: {error.strerror}; choose another PID file with --pid") from None
        yield


def check_addresses(addresses: Sequence[str], example: str = "--bind tcp://127.0.0.1:8800") -> None:
    """Raise `Mendable` for the first address that makes no sense."""
    for address in addresses:
        try:
            parse_listening_address(address)
        except ValueError as error:
            raise Mendable(f"{error}; write for instance {example}") from None


def load(path: Path) -> App:
    """Import a script and return the one `App` at its top level.

    Raises:
        Mendable: There is no such script, it does not import, or it has no App, or several.
    """
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise Mendable(f"{path}: no such file; give the path of the script that makes the App") from None
    except OSError as error:
        raise Mendable(f"{path}: {error.strerror}; give the path of a script that can be read") from None
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise _not_python(error, path) from None
    except ValueError as error:  # null bytes, before Python 3.12
        raise Mendable(f"{path}:1: {error}; give the path of a Python script") from None
    module = types.ModuleType(_module_name(path))
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module  # whoever resolves the annotations of its classes looks for it there
    sys.path.insert(0, str(path.absolute().parent))
    try:
        exec(code, module.__dict__)
    except SyntaxError as error:
        raise _not_python(error, path) from None
    except SystemExit as error:
        where = _where(error, path)
        raise Mendable(f'{where}: the script exits; let it do so only under if __name__ == "__main__"') from None
    except ModuleNotFoundError as error:
        mend = f"install it, or put {error.name}.py beside the script"
        raise Mendable(f"{_where(error, path)}: {type(error).__name__}: {error}; {mend}") from None
    except Exception as error:
        raise Mendable(f"{_where(error, path)}: {type(error).__name__}: {error}; correct this line") from None
    return _only_app(path, source, module)


def _not_python(error: SyntaxError, path: Path) -> Mendable:
    where = f"{error.filename or path}:{error.lineno or 1}"
    return Mendable(f"{where}: {type(error).__name__}: {error.msg}; correct this line")


def _module_name(path: Path) -> str:
    """What its file is called, unless that name belongs to another module."""
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names or not path.stem.isidentifier()
    return f"stagetrio_script_{path.stem}" if taken else path.stem


def _where(error: BaseException, path: Path) -> str:
    return _own_step(error, path) or f"{path}:1"


def _own_step(error: BaseException, path: Path) -> str | None:
    """``file:line`` of the innermost step to the error that is the user's own: in the script or beside it."""
    where, home, ours = None, path.absolute().parent, Path(__file__).parent
    others = (ours, Path(sysconfig.get_path("stdlib")))
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        installed = any(map(file.is_relative_to, others)) or "site-packages" in file.parts
        beside = file.is_relative_to(home) and not installed
        if file == path or beside:
            where = f"{file}:{frame.lineno}"
    return where


def _only_app(path: Path, source: bytes, module: types.ModuleType) -> App:
    named: dict[App, str] = {}
    for name, value in vars(module).items():
        if isinstance(value, App):
            named.setdefault(value, name)
    if not named:
        raise Mendable(f'{path}: no App at its top level; add: app = App("{path.stem}"), from stagetrio.app')
    if len(named) > 1:
        lines = {name: f"{path}:{_line_of(name, source)}" for name in named.values()}
        places = " and ".join(f"{name} ({line})" for name, line in lines.items())
        raise Mendable(f"{path}: {len(named)} Apps at its top level: {places}; keep one in a script")
    return next(iter(named))


def _line_of(name: str, source: bytes) -> int:
    """The line of the statement at the top level which binds a name last."""
    line = 1
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue  # what they bind within is their own
        for node in ast.walk(statement):
            stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name
            imported = isinstance(node, ast.alias) and name == (node.asname or node.name)
            if stored or imported:
                line = statement.lineno
    return line


def described(app: App, path: Path) -> str:
    """Say what an app serves, one thing a line, for people.

    Raises:
        Mendable: Its messages do not go together.
    """
    try:
        about = app.describe()
    except (ValueError, TypeError) as error:
        raise Mendable(f"{path}: {error}; correct the App") from None
    sections = {
        "stage": {about.name: f"serves {', '.join(about.messages) or 'no message'}"},
        "message": {message: f"handled by {handler}" for message, handler in about.messages.items()},
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


def unlistenable(error: OSError, procedures_at: Sequence[str] = ()) -> Mendable:
    """Why an address cannot be had."""
    mend = _MENDS.get(error.errno or 0, "choose another address with --bind")
    if any(f" {address}: " in f"{error.strerror}" for address in procedures_at):
        mend = mend.replace("--bind", "--procedures-at")
    return Mendable(f"{error.strerror or error}; {mend}")


def not_serving(error: BaseException, path: Path, procedures_at: Sequence[str] = ()) -> Mendable:
    """Why an app could not begin to serve; what is not the user's to mend is raised as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    where = _own_step(error, path)
    if where is not None and isinstance(error, Exception):  # in a lifespan, as nothing else of the script has run
        return Mendable(f"{where}: {type(error).__name__}: {error}; see to that, or correct this line")
    if isinstance(error, OSError):
        return unlistenable(error, procedures_at)
    if isinstance(error, ValueError | TypeError):
        return Mendable(f"{path}: {error}; correct the App")
    raise error


# The last is a terminal's that has gone; Windows has none.
_ENDING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


async def serve(app: App, path: Path, addresses: Sequence[str], procedures_at: Sequence[str], grace: float) -> int:
    """Serve an app until SIGINT or SIGTERM has drained it, or a second one has ended it; return the exit status.

    Args:
        app: What is served.
        path: Of the script it came from, for messages.
        addresses: Where to listen.
        procedures_at: Where other processes call the app's procedures.
        grace: Seconds for draining, 0 or more.

    Raises:
        Mendable: An address cannot be had, a lifespan failed, or the app was made with arguments that make no sense.

    Checkpoints: throughout. A cancellation closes every connection without ceremony.
    """
    status, serving, draining = 0, False, False
    failure: Exception | None = None
    # Signals are received, not raised: a KeyboardInterrupt would end the loop in the middle of a handler.
    with trio.open_signal_receiver(*_ENDING) as signals:
        async with trio.open_nursery() as nursery:

            async def serve_app(*, task_status: trio.TaskStatus[list[Address]]) -> None:
                await app.serve(*addresses, procedures_at=procedures_at, task_status=task_status)
                nursery.cancel_scope.cancel()

            async def obey() -> None:
                nonlocal status, draining
                async for number in signals:
                    if draining or not serving:
                        status = 128 + number
                        nursery.cancel_scope.cancel()
                    else:
                        draining = True
                        within = "" if grace == inf else f" for up to {grace:g} s"
                        say(f"{app.name}: draining{within}; another signal ends it at once")
                        notify(STOPPING=1)
                        nursery.start_soon(app.drain, grace)

            nursery.start_soon(obey)
            try:
                bound = await nursery.start(serve_app)
            except Exception as error:  # judged below, outside of the nursery, which would wrap it
                failure = error
                nursery.cancel_scope.cancel()
            else:
                serving = True
                where = ", ".join(map(str, bound))
                say(f"{app.name}: serving on {where}; Ctrl-C or SIGTERM drains")
                notify(READY=1, STATUS=f"serving on {where}")
    if failure is not None:
        raise not_serving(failure, path, procedures_at)
    return status


def say(line: str) -> None:
    """Tell the operator."""
    print(line, file=sys.stderr, flush=True)
