"""The names at the top of the package: all there, each from its module, and no dearer than it must be."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import stagetrio

ROOT = Path(__file__).parent.parent


def declared() -> dict[str, str]:
    """{public name: its module} as type checkers read it from the source."""
    tree = ast.parse((ROOT / "stagetrio/__init__.py").read_text())
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("stagetrio.")
        for alias in node.names
    }


def loaded_by(statement: str) -> set[str]:
    """The modules a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_what_type_checkers_see_is_what_there_is() -> None:
    """The imports for type checkers and ``__all__`` name the same things."""
    assert sorted(declared()) == sorted(stagetrio.__all__)


@pytest.mark.parametrize("name", stagetrio.__all__)
def test_a_public_name_is_the_one_of_its_module(name: str) -> None:
    """Each name resolves to the very object that its module defines."""
    assert getattr(stagetrio, name) is getattr(importlib.import_module(declared()[name]), name)


def test_a_star_import_brings_every_name() -> None:
    """``from stagetrio import *`` works in a notebook."""
    namespace: dict[str, object] = {}
    exec("from stagetrio import *", namespace)
    assert set(stagetrio.__all__) <= set(namespace)


def test_tab_completion_finds_every_name() -> None:
    """``dir(stagetrio)`` lists what can be had, also before it has been imported."""
    assert set(stagetrio.__all__) <= set(dir(stagetrio))


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name says so, as for any module."""
    with pytest.raises(AttributeError, match="'stagetrio' has no attribute 'FairQeue'"):
        stagetrio.FairQeue  # noqa: B018


def test_importing_the_package_loads_no_room() -> None:
    """``import stagetrio`` alone costs next to nothing."""
    assert {name for name in loaded_by("import stagetrio") if name.startswith("stagetrio.")} == set()


@pytest.mark.parametrize(
    "name", ["FairQueue", "RateLimiter", "TicketStage", "Snapshot", "open_nursery_pool", "Pacer", "open_thread_pool"]
)
def test_a_primitive_loads_nothing_heavy(name: str) -> None:
    """Whoever imports one primitive does not pay for the codec, the stacks of the watchdog, or the server."""
    heavy = {"cattrs", "greenlet", "rich", "stagetrio.server", "stagetrio.watchdog", "stagetrio.codec"}
    assert not loaded_by(f"from stagetrio import {name}") & heavy


def test_no_public_name_needs_an_optional_dependency() -> None:
    """All of them together load none of the extras, nor the terminal of the command line."""
    optional = {"rich", "matplotlib", "IPython", "ipykernel", "coredis", "pytest", "hypothesis"}
    assert not loaded_by("from stagetrio import *") & optional


def test_no_public_name_is_also_a_module() -> None:
    """Importing a module binds its name in the package, which would hide a function of the same name."""
    assert not set(stagetrio.__all__) & {path.stem for path in (ROOT / "stagetrio").iterdir()}
