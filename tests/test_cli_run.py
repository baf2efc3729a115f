"""``stagetrio run`` as operators use it: real processes, sockets and signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from stagetrio.client import open_client
from stagetrio.codec import Codec
from stagetrio.remote import open_remote

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONWARNINGS": "error"}


@attrs.frozen
class Hold:
    """As in the script."""


@attrs.frozen
class Held:
    by: str


CODEC: Codec[Any] = Codec([Hold, Held])
RUN = [sys.executable, "-m", "stagetrio", "run"]

SCRIPT = '''
from __future__ import annotations

import sys
from pathlib import Path

import attrs
import trio

from stagetrio.app import App

app = App("holder")
alias = app
Name = str
release = trio.Event()
login = app.ticket("login", 3)


@attrs.frozen
class Hold:
    """Answered when a file called "release" appears beside the script."""


@attrs.frozen
class Held:
    by: Name


@app.on(Hold, ticket=login)
async def hold(peer, message) -> Held:
    print("holding", flush=True)
    await release.wait()
    return Held(__name__)


@app.every(0.01)
async def look():
    if Path(__file__).with_name("release").exists():
        release.set()


@app.on_connect
async def greet(peer):
    print("hello", flush=True)


@app.on_disconnect
async def part(peer):
    print("bye", flush=True)


@app.procedure
async def add(a: int, b: int) -> int:
    return a + b


if __name__ == "__main__":
    sys.exit("this is not run")
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "holder.py"
    path.write_text(SCRIPT)
    return path


class Output:
    """Reads what a process writes, line by line."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._pending = b""

    async def line(self) -> str:
        while b"\n" not in self._pending:
            data = await self._stream.receive_some()
            if not data:
                raise EOFError(self._pending.decode())
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    async def rest(self) -> str:
        async for data in self._stream:
            self._pending += data
        return self._pending.decode()


class Served:
    """A script that is being served."""

    def __init__(self, process: trio.Process, announced: str, said: Output, printed: Output) -> None:
        self.process = process
        self.announced = announced
        self.said = said
        self.printed = printed

    @property
    def address(self) -> str:
        return self.announced.split(" serving on ")[1].split(";")[0]


@asynccontextmanager
async def served(script: Path, *arguments: str) -> AsyncIterator[Served]:
    command = [*RUN, str(script), *arguments]
    pipe = subprocess.PIPE
    process = await trio.lowlevel.open_process(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    assert process.stderr is not None
    said, printed = Output(process.stderr), Output(process.stdout)
    try:
        with trio.fail_after(60):
            yield Served(process, await said.line(), said, printed)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            await process.stdout.aclose()
            await process.stderr.aclose()


async def connect_until_refused(address: str) -> None:
    while True:
        async with open_client(address, CODEC):
            pass


async def test_the_app_of_a_script_is_served_as_a_module_of_its_own_name(script: Path) -> None:
    """Messages, hooks, tickets and jobs work over a real connection; the script's main part is not run."""
    async with served(script, "--bind", "tcp://127.0.0.1:0") as server:
        assert server.announced == f"holder: serving on {server.address}; Ctrl-C or SIGTERM drains"
        async with open_client(server.address, CODEC) as client:
            assert await server.printed.line() == "hello"
            script.with_name("release").touch()
            assert (await client.ask(Hold())).by == "holder"
            assert await server.printed.line() == "holding"
        assert await server.printed.line() == "bye"


async def test_several_addresses_at_once(script: Path, tmp_path: Path) -> None:
    """--bind may be repeated, and the kinds of address may differ."""
    script.with_name("release").touch()
    path = tmp_path / "s"
    async with served(script, "--bind", "tcp://127.0.0.1:0", "--bind", f"unix://{path}") as server:
        tcp, unix = server.address.split(", ")
        assert unix == f"unix://{path}"
        for address in (tcp, unix):
            async with open_client(address, CODEC) as client:
                assert (await client.ask(Hold())).by == "holder"
        server.process.terminate()
        assert await server.process.wait() == 0
        assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
async def test_a_signal_drains(script: Path, number: signal.Signals) -> None:
    """Nobody else is accepted, the message in hand is answered, and the exit status is 0."""
    async with served(script, "--bind", "tcp://127.0.0.1:0", "--grace", "60") as server:
        async with open_client(server.address, CODEC) as client, trio.open_nursery() as nursery:

            async def ask() -> None:
                assert (await client.ask(Hold())).by == "holder"
                nursery.cancel_scope.cancel()

            nursery.start_soon(ask)
            assert [await server.printed.line(), await server.printed.line()] == ["hello", "holding"]
            server.process.send_signal(number)
            assert await server.said.line() == "holder: draining for up to 60 s; another signal ends it at once"
            with pytest.raises(OSError, match="all attempts to connect"):
                await connect_until_refused(server.address)
            script.with_name("release").touch()
        assert await server.process.wait() == 0
        assert await server.said.rest() == ""


async def test_what_is_not_done_within_the_grace_is_cancelled(script: Path) -> None:
    """With no grace at all, a message in hand is given up, its client hears that, and the exit status is still 0."""
    async with served(script, "--bind", "tcp://127.0.0.1:0", "--grace", "0") as server:
        async with open_client(server.address, CODEC) as client, trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await client.ask(Hold())
                nursery.cancel_scope.cancel()

            nursery.start_soon(ask)
            assert [await server.printed.line(), await server.printed.line()] == ["hello", "holding"]
            server.process.terminate()
        assert await server.process.wait() == 0
        assert "Traceback" not in await server.said.rest()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
async def test_a_second_signal_cancels_at_once(script: Path, number: signal.Signals, status: int) -> None:
    """Whoever has no time need not wait for the grace; the exit status tells that it was not a drain."""
    async with served(script, "--bind", "tcp://127.0.0.1:0", "--grace", "inf") as server:
        async with open_client(server.address, CODEC) as client, trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await client.ask(Hold())
                nursery.cancel_scope.cancel()

            nursery.start_soon(ask)
            assert [await server.printed.line(), await server.printed.line()] == ["hello", "holding"]
            server.process.send_signal(number)
            assert await server.said.line() == "holder: draining; another signal ends it at once"
            server.process.send_signal(number)
        assert await server.process.wait() == status
        assert "Traceback" not in await server.said.rest()


async def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(60):
        return await trio.run_process(
            [*RUN, *arguments], env=ENVIRONMENT, cwd=cwd, capture_stdout=True, capture_stderr=True, check=False
        )


async def test_check_prints_what_would_be_served(script: Path, tmp_path: Path) -> None:
    """Stage, messages, tickets, jobs, procedures and hooks, one a line; nothing is bound or served."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        done = await run(script.name, "--check", "--bind", taken, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = [line.split(maxsplit=2) for line in done.stdout.decode().splitlines()]
    for line in (
        ["stage", "holder", "serves Hold"],
        ["message", "Hold", "handled by hold"],
        ["reply", "Held"],
        ["ticket", "login", "3 at once"],
        ["job", "look", "every 0.01 s"],
        ["procedure", "add"],
        ["hook", "greet"],
        ["hook", "part"],
    ):
        assert line in lines


async def complaint(*arguments: str, cwd: Path) -> str:
    """What the command says about a mistake that its user can mend: one line, and status 2."""
    done = await run(*arguments, cwd=cwd)
    assert done.returncode == 2
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    prefix, _, said = line.partition("stagetrio run: ")
    assert prefix == ""
    return said


NEEDS_APP = "from stagetrio.app import App\n"
BAD_SCRIPTS = {
    "does not parse": ("a = 1\nb = (\n", "bad.py:2: SyntaxError: '(' was never closed", "correct this line"),
    "is indented wrongly": ("a = 1\n  b = 2\n", "bad.py:2: IndentationError: unexpected indent", "correct this line"),
    "raises": (
        "\ndef f():\n    1 / 0\n\nf()\n",
        "bad.py:3: ZeroDivisionError: division by zero",
        "correct this line",
    ),
    "raises many lines": ("raise ValueError('one\\n  two')\n", "bad.py:1: ValueError: one two", "correct this line"),
    "raises in the module beside it": (
        "import broken\n",
        "{home}/broken.py:2: RuntimeError: no good",
        "correct this line",
    ),
    "imports what does not parse": (
        "import garbled\n",
        "{home}/garbled.py:1: SyntaxError: invalid syntax",
        "correct this line",
    ),
    "imports what is not there": (
        "\nimport nowhere_to_be_found\n",
        "bad.py:2: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        "install it, or put nowhere_to_be_found.py beside the script",
    ),
    "raises in our own code": (
        NEEDS_APP + 'App("")\n',
        "bad.py:2: ValueError: name must be a non-empty str, not ''",
        "correct this line",
    ),
    "exits": (
        "import sys\nsys.exit(0)\n",
        "bad.py:2: the script exits",
        'let it do so only under if __name__ == "__main__"',
    ),
    "has no App": (
        NEEDS_APP + "def f():\n    app = App('hidden')\n",
        "bad.py: no App at its top level",
        'add: app = App("bad"), from stagetrio.app',
    ),
    "has two": (
        NEEDS_APP + "one = App('one')\n\ntwo = App('two')\n\ndef f():\n    one = 1\n\nf(); one\n",
        "bad.py: 2 Apps at its top level: one (bad.py:2) and two (bad.py:4)",
        "keep one in a script",
    ),
}


@pytest.mark.parametrize(("source", "problem", "mend"), BAD_SCRIPTS.values(), ids=BAD_SCRIPTS)
async def test_a_script_that_is_no_good_is_told_in_one_line(
    tmp_path: Path, source: str, problem: str, mend: str
) -> None:
    """What is wrong, in which line of whose file, and the mend."""
    (tmp_path / "bad.py").write_text(source)
    (tmp_path / "broken.py").write_text("\nraise RuntimeError('no good')\n")
    (tmp_path / "garbled.py").write_text("?\n")
    assert await complaint("bad.py", "--check", cwd=tmp_path) == f"{problem}; {mend}".format(home=tmp_path)


async def test_what_is_not_python_is_told(tmp_path: Path) -> None:
    """Whatever the bytes are, there is one line, and it names the file."""
    for content in (b"\x89PNG\r\n\x1a\n\0\0", b"a\0b", b"\xff\xfe"):
        (tmp_path / "bad.py").write_bytes(content)
        assert (await complaint("bad.py", cwd=tmp_path)).startswith("bad.py:1: ")


async def test_a_script_that_is_not_there_or_not_a_file_is_told(tmp_path: Path) -> None:
    """The path is named as it was given."""
    told = await complaint("none.py", cwd=tmp_path)
    assert told == "none.py: no such file; give the path of the script that makes the App"
    told = await complaint(".", cwd=tmp_path)
    assert told == ".: Is a directory; give the path of a script that can be read"


async def test_a_script_may_bear_the_name_of_another_module(tmp_path: Path) -> None:
    """A script called json.py neither takes json's place nor is taken for it."""
    (tmp_path / "json.py").write_text(NEEDS_APP + "app = App('mine')\nname = __name__\nprint(name)\n")
    done = await run("json.py", "--check", cwd=tmp_path)
    assert done.stdout.splitlines()[0] == b"stagetrio_script_json"
    assert b"stage      mine" in done.stdout


async def test_messages_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    """Two classes of one name cannot be told apart on the wire."""
    (tmp_path / "bad.py").write_text(
        NEEDS_APP
        + "import attrs\napp = App('a')\nfor _ in range(2):\n    @attrs.frozen\n    class Same: pass\n"
        + "    @app.on(Same)\n    async def handle(peer, message): pass\n"
    )
    for arguments in (["--check"], ["--bind", "tcp://127.0.0.1:0"]):
        told = await complaint("bad.py", *arguments, cwd=tmp_path)
        assert told.startswith("bad.py: types must have distinct names: there are two called 'Same'; correct the App")


ANNOTATED = """
from __future__ import annotations
from typing import TYPE_CHECKING
import attrs
from stagetrio.app import App
if TYPE_CHECKING:
    from stagetrio import Peer
    from nowhere import Reply
app = App("annotated")
@attrs.frozen
class Hi: pass
@app.on(Hi)
async def hi(peer: Peer, m: Hi) -> {returned}: return m
"""


async def test_what_only_the_type_checker_sees_is_no_traceback(tmp_path: Path) -> None:
    """Parameters may be annotated so; what is returned must be known, and is said to be missing in one line."""
    path = tmp_path / "annotated.py"
    path.write_text(ANNOTATED.format(returned="Hi"))
    done = await run(path.name, "--check", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    path.write_text(ANNOTATED.format(returned="Reply"))
    for arguments in (["--check"], ["--bind", "tcp://127.0.0.1:0"]):
        told = await complaint(path.name, *arguments, cwd=tmp_path)
        assert told.startswith(
            "annotated.py: what hi returns, 'Reply', cannot be looked up: name 'Reply' is not defined;"
        )


async def test_a_lifespan_that_fails_is_told_by_its_line(tmp_path: Path) -> None:
    """It is not the address that is to be mended."""
    (tmp_path / "down.py").write_text(
        "from contextlib import asynccontextmanager\n"
        + NEEDS_APP
        + "app = App('down')\n@app.lifespan\n@asynccontextmanager\nasync def database():\n"
        + "    raise ConnectionError('database is down')\n    yield\n"
    )
    for arguments in ([], ["--processes", "1"]):
        told = await complaint("down.py", "--bind", "tcp://127.0.0.1:0", *arguments, cwd=tmp_path)
        assert told == "down.py:7: ConnectionError: database is down; see to that, or correct this line"


async def test_procedures_are_served_at_an_address_of_their_own(script: Path, tmp_path: Path) -> None:
    """--procedures-at says where; clients' addresses do not serve them."""
    inner = f"unix://{tmp_path}/inner"
    async with (
        served(script, "--bind", "tcp://127.0.0.1:0", "--procedures-at", inner) as server,
        open_remote(inner) as remote,
    ):
        assert await remote.call("add", 1, 2) == 3
        assert inner not in server.announced


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["unix:///nowhere/at/all"], "make that directory, or choose another address with --procedures-at"),
        (["h:1"], "write for instance --procedures-at unix:///run/app"),
        (["unix://x", "--processes", "1"], "is for an app in one process; leave out --processes"),
    ],
)
async def test_where_procedures_cannot_be_served_is_told(
    script: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    """The mend names this option, and not --bind."""
    said = await complaint(str(script), "--bind", "tcp://127.0.0.1:0", "--procedures-at", *arguments, cwd=tmp_path)
    assert said.endswith(told)


async def test_a_port_in_use_is_told(script: Path, tmp_path: Path) -> None:
    """The address is named, and what to do about it; nothing stays bound."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        free = f"unix://{tmp_path}/free"
        told = await complaint(str(script), "--bind", free, "--bind", taken, cwd=tmp_path)
    assert told == (
        f"cannot listen on {taken}: Address already in use; "
        "stop the server that listens there, or choose another address with --bind"
    )
    assert not (tmp_path / "free").exists()


EXAMPLE = "write for instance --bind tcp://127.0.0.1:8800"


@pytest.mark.parametrize(
    ("address", "problem", "mend"),
    [
        ("udp://h:1", "addresses must be ones to accept connections on, not udp://h:1", EXAMPLE),
        ("h:8800", "address must start with tcp://, udp://, unix:// or fd://, not 'h:8800'", EXAMPLE),
        (
            "tcp://h:99999",
            "address must be tcp://host:port, not 'tcp://h:99999': Port out of range 0-65535",
            EXAMPLE,
        ),
        (
            "tcp://192.0.2.1:1",
            "cannot listen on tcp://192.0.2.1:1: Cannot assign requested address",
            "choose an address of this machine with --bind",
        ),
        (
            "unix:///nowhere/at/all",
            "cannot listen on unix:///nowhere/at/all: No such file or directory",
            "make that directory, or choose another address with --bind",
        ),
    ],
)
async def test_an_address_that_cannot_be_had_is_told(
    script: Path, tmp_path: Path, address: str, problem: str, mend: str
) -> None:
    """Unknown schemes, bad ports, other machines' addresses, paths that lead nowhere."""
    assert await complaint(str(script), "--bind", address, cwd=tmp_path) == f"{problem}; {mend}"


async def test_a_path_that_may_not_be_written_is_told(script: Path, tmp_path: Path) -> None:
    """Also to root, nobody may make a socket in /sys."""
    told = await complaint(str(script), "--bind", "unix:///sys/stagetrio", cwd=tmp_path)
    assert told.startswith("cannot listen on unix:///sys/stagetrio: ")
    assert told.endswith("with --bind")


@pytest.mark.parametrize("grace", ["-1", "nan", "soon"])
async def test_a_grace_that_makes_no_sense_is_told(script: Path, tmp_path: Path, grace: str) -> None:
    """Usage errors are argparse's: status 2, and the argument is named."""
    done = await run(str(script), f"--grace={grace}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("stagetrio run: error: argument --grace: ")
