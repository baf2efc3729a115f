"""What the documents promise: commands that exist, links that lead somewhere, examples that print what they say."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from stagetrio.overload import Overloaded
from stagetrio.rules import PeerLimits

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SET_UP_AND_RUN = "python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/stagetrio demo"
SET_UP_AND_TEST = 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[test]" && .venv/bin/pytest'
SECONDS_PER_EXAMPLE = 120  # an example that hangs ends its test; no example's speed is judged here


@attrs.frozen
class Example:
    """A Python block of a document, and the text block right below it: what it prints."""

    id: str
    source: str
    output: str

    @property
    def is_app(self) -> bool:
        """Whether it is a script for ``stagetrio run``, not for ``python``."""
        return "App(" in self.source and "trio.run(" not in self.source


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """The (language, text) of every code block in ``path``, Markdown or reStructuredText, in order."""
    text = path.read_text()
    if path.suffix == ".md":
        yield from re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    else:
        for language, body in re.findall(r"^\.\. code-block:: (\w+)\n\n((?:(?:   .*)?\n)+)", text, re.M):
            yield language, textwrap.dedent(body).strip("\n") + "\n"


def examples(path: Path) -> list[Example]:
    """The Python blocks of ``path``, each with what it prints; nothing where no text block follows."""
    found = list(blocks(path))
    return [
        Example(
            id=f"{path.stem}-{number}",
            source=source,
            output=following[1] if following[0] == "text" else "",
        )
        for number, ((language, source), following) in enumerate(zip(found, [*found[1:], ("", "")], strict=True))
        if language == "python"
    ]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS_PER_EXAMPLE,
        check=False,
    )


@pytest.mark.parametrize(
    "example", [*examples(README), *examples(ROOT / "docs/tutorial.rst")], ids=lambda example: example.id
)
def test_an_example_prints_what_stands_below_it(example: Example, tmp_path: Path) -> None:
    """Each Python block is a whole program; an app's block is checked as ``stagetrio run --check`` does."""
    script = tmp_path / "example.py"
    script.write_text(example.source)
    command = ["-m", "stagetrio", "run", "--check", script.name] if example.is_app else [script.name]
    done = run(*command, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == example.output


def test_the_readme_has_an_example_of_each_primitive() -> None:
    """A newcomer sees a queue, a ticket, a watchdog, an app and a remote call at work."""
    sources = "".join(example.source for example in examples(README))
    for name in ("FairQueue(", "TicketStage(", "open_watchdog(", "App(", "open_remote"):
        assert name in sources


def test_the_readme_gives_the_two_commands() -> None:
    """Setting up and running, setting up and testing: a line each, once, alone in its block."""
    assert [text for language, text in blocks(README) if "python3 -m venv" in text and language == "sh"] == [
        f"{SET_UP_AND_RUN}\n",
        f"{SET_UP_AND_TEST}\n",
    ]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/design.md"])
def test_links_between_the_documents_lead_somewhere(name: str) -> None:
    """Every relative link names a file of the project."""
    document = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_contributors_are_told_of_every_size_that_can_be_set() -> None:
    """Each environment variable that the tests and benchmarks read has its row, and no row has lost its variable."""
    sources = "".join(path.read_text() for folder in ("tests", "benchmarks") for path in (ROOT / folder).glob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\s*\"(STAGETRIO_\w+)\"", sources))
    assert read
    assert read == set(re.findall(r"^\| `(STAGETRIO_\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M))


def test_every_module_is_documented() -> None:
    """Each module stands in the reference or underneath it; the demo's readers read its source (``--show-control``)."""
    pages = [*(ROOT / "docs/reference").glob("*.rst"), ROOT / "docs/internals.rst"]
    text = "".join(page.read_text() for page in pages)
    documented = set(re.findall(r"^\.\. auto\w+:: stagetrio\.(\w+)", text, re.M))
    modules = {path.stem for path in (ROOT / "stagetrio").glob("*.py") if not path.name.startswith("__")}
    assert sorted(modules - documented) == []


def test_what_stands_before_a_colon_is_not_taken_for_the_type_of_a_property() -> None:
    """Napoleon does, in the first line of a property's docstring, unless the colon is in code."""
    garbled = []
    for path in (ROOT / "stagetrio").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and "property" in map(ast.unparse, node.decorator_list):
                (first, *_) = (ast.get_docstring(node) or "").splitlines() or [""]
                if ":" in re.sub("`[^`]*`", "", first):
                    garbled.append(f"{path.name}: {node.name}")
    assert garbled == []


def test_the_defaults_of_attrs_classes_are_shown() -> None:
    """Not the expressions by which their generated ``__init__`` gets them."""
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs/conf.py")
    assert spec is not None
    assert spec.loader is not None
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    generated = inspect.getsource(PeerLimits.__init__).splitlines()[0]
    signature, _ = conf._attrs_defaults(None, "class", "PeerLimits", PeerLimits, None, generated, None)
    assert "max_decoded=64, " in signature
    assert "attr_dict" in generated
    assert "attr_dict" not in signature


def test_every_reason_of_a_refusal_is_documented() -> None:
    """Who catches `Overloaded` can tell the bounds apart."""
    sources = "".join(path.read_text() for path in (ROOT / "stagetrio").rglob("*.py"))
    reasons = set(re.findall(r'Overloaded\("(\w+)"', sources))
    assert len(reasons) > 3
    assert sorted(reason for reason in reasons if f'``"{reason}"``' not in str(Overloaded.__doc__)) == []
