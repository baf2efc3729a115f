"""The floors of the design, proven from the imports of every module.

``FLOORS`` is the table of ``docs/design.md``; one test keeps the two the same, the others hold the package to it. A
room is a module or a subpackage of ``stagetrio``; a subpackage is one room, and its modules may import each other
as long as no cycle comes of it.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stagetrio"

BESIDE = "beside"  # may import any floor; no floor imports it

FLOORS: dict[str, int | str] = {
    "ranks": 0,
    "overload": 0,
    "knee": 0,
    "flow": 0,
    "line": 0,
    "borrow": 0,
    "framing": 0,
    "router": 0,
    "reaper": 0,
    "backstage": 0,
    "outbox": 0,
    "failures": 0,
    "broadcast": 0,
    "ticket_statistics": 0,
    "amounts": 0,
    "pace": 0,
    "stall": 0,
    "events": 0,
    "passes": 0,
    "stopping": 0,
    "turns": 0,
    "remote_output": 0,
    "interruption": 0,
    "jobs": 0,
    "calls": 0,
    "run_slots": 0,
    "prefork_worker": 0,
    "steering": 0,
    "service": 0,
    "backoff": 0,
    "addresses": 0,
    "snapshot": 1,
    "pacer": 1,
    "rules": 1,
    "alarm": 1,
    "preempt": 1,
    "lease": 1,
    "adaptive": 1,
    "retry": 1,
    "shed": 1,
    "progress": 1,
    "thread_worker": 1,
    "process_worker": 1,
    "sockets": 1,
    "codec": 1,
    "remote_wire": 1,
    "remote_values": 1,
    "hub": 1,
    "filing": 1,
    "intake": 1,
    "longest": 1,
    "limiter": 2,
    "lane": 2,
    "thread_crew": 2,
    "process_link": 2,
    "procedures": 2,
    "remote_hello": 2,
    "transport": 2,
    "prefork_sockets": 2,
    "worker_process": 2,
    "networks": 2,
    "proxy_header": 2,
    "host": 2,
    "sources": 2,
    "fair_order": 2,
    "sojourn": 2,
    "admission": 3,
    "tls": 3,
    "inflow": 3,
    "proxies": 3,
    "nursery_pool": 3,
    "ticket": 3,
    "arbiter": 3,
    "client": 3,
    "remote_replies": 3,
    "watchdog": 3,
    "remote_calling": 3,
    "peer": 3,
    "runs": 3,
    "priority": 3,
    "outlet": 3,
    "worker": 4,
    "fair_queue": 4,
    "accept": 4,
    "all_tickets": 4,
    "exchange": 4,
    "remote_serving": 4,
    "remote_link": 4,
    "backlog": 5,
    "door": 5,
    "stage": 5,
    "fair_channel": 5,
    "remote_workers": 5,
    "remote": 6,
    "thread_dispatch": 6,
    "process_dispatch": 6,
    "server": 6,
    "datagrams": 6,
    "remote_worker_process": 7,
    "cluster": 6,
    "prefork": 6,
    "redis": 6,
    "threads": 7,
    "processes": 7,
    "app": 7,
    "demo": 7,
    "script": 8,
    "script_workers": 9,
    "cli": 10,
    "__main__": 11,
    "testing": BESIDE,
    "dashboard": BESIDE,
    "notebook": BESIDE,
}

# Decisions only: they perform no I/O and know no event loop.
PURE = {"fair_order", "framing", "knee", "ranks", "router", "stopping", "turns"}
IO = {"trio", "trio_util", "asyncio", "anyio", "socket", "select", "selectors", "threading", "subprocess"}
ONLY_IN = {"rich": {"cli", "demo"}, "coredis": {"redis"}, "IPython": {"notebook"}, "matplotlib": {"notebook", "demo"}}


def imported_names(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Every absolute dotted name that ``source`` imports, wherever in it: functions and TYPE_CHECKING too.

    ``from a import b`` yields ``a.b``, since ``b`` may be a module; the caller knows which modules there are.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def modules() -> dict[str, Path]:
    """{dotted name: file} of every module in the package, the package's own ``__init__`` left out."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name != "stagetrio":
            found[name] = path
    return found


MODULES = modules()


def room(dotted: str) -> str:
    """The row of the table that ``stagetrio.x.y`` belongs to."""
    return dotted.split(".")[1]


def imports_of(path: Path, module: str) -> Iterator[str]:
    return imported_names(path.read_text(), module, is_package=path.name == "__init__.py")


def modules_imported(module: str) -> set[str]:
    """The modules of this package that ``module`` imports, ``stagetrio`` standing for a name from its top."""
    known = {*MODULES, *(f"stagetrio.{name}" for name in FLOORS)}
    found = set()
    for name in imports_of(MODULES[module], module):
        if name.split(".")[0] == "stagetrio" and name != "stagetrio.__version__":
            parts = name.split(".")
            prefixes = (".".join(parts[:end]) for end in range(len(parts), 1, -1))
            found.add(next((prefix for prefix in prefixes if prefix in known), "stagetrio"))
    return found


def design_table() -> dict[str, int | str]:
    """The floor of each room as the table of ``docs/design.md`` has it."""
    floors: dict[str, int | str] = {}
    for floor, names in re.findall(r"^\| (\d+|beside) \| (`[^|]+`) \|", (ROOT / "docs/design.md").read_text(), re.M):
        for name in re.findall(r"`(\w+)(?:\.py|/)`", names):
            assert name not in floors, f"{name} stands twice in the table"
            floors[name] = floor if floor == BESIDE else int(floor)
    return floors


def test_an_import_is_found_wherever_it_hides() -> None:
    """Imports in functions, under TYPE_CHECKING, relative ones and literal import_module calls are all seen."""
    source = """
import a.b
if TYPE_CHECKING:
    from .near import thing
def f():
    from ..far import other
    import_module("c.d")
    importlib.import_module("e")
"""
    assert set(imported_names(source, "top.sub.mod")) == {"a.b", "top.sub.near.thing", "top.far.other", "c.d", "e"}
    assert set(imported_names("from . import x", "top.sub", is_package=True)) == {"top.sub.x"}


def test_the_table_of_the_design_is_the_table_here() -> None:
    """``docs/design.md`` lists the same rooms on the same floors."""
    assert design_table() == FLOORS


def test_the_table_says_what_is_still_to_come() -> None:
    """A row ends in ``(to come)`` exactly as long as its room does not exist."""
    rows = re.findall(r"^\| \S+ \| `(\w+)(?:\.py|/)` \|(.*)\|$", (ROOT / "docs/design.md").read_text(), re.M)
    promised = {name for name, line in rows if line.rstrip().endswith("(to come)")}
    assert promised == set(FLOORS) - {room(module) for module in MODULES}


def test_every_module_has_a_floor() -> None:
    """A new module is entered in the table in the commit that brings it."""
    homeless = {room(module) for module in MODULES} - set(FLOORS)
    assert not homeless, f"enter these in FLOORS and in docs/design.md: {sorted(homeless)}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_floors(module: str) -> None:
    """Imports point strictly downwards; nobody goes through the package's top, and nobody imports what is beside."""
    own = FLOORS[room(module)]
    for imported in modules_imported(module):
        assert imported != "stagetrio", f"{module} imports from the top of the package; name the module instead"
        if room(imported) == room(module):
            continue
        floor = FLOORS[room(imported)]
        if own == BESIDE:
            continue
        assert floor != BESIDE, f"{module} imports {imported}, which is beside the floors"
        assert isinstance(floor, int)
        assert isinstance(own, int)
        assert floor < own, f"{module} (floor {own}) imports {imported} (floor {floor})"


def test_modules_within_a_subpackage_do_not_import_in_circles() -> None:
    """A subpackage is one room, but not one knot."""
    graph = {
        module: {other for other in modules_imported(module) if other in MODULES and other != module}
        for module in MODULES
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_the_dashboard_imports_no_primitive() -> None:
    """It renders the statistics of what it is handed, whatever that is."""
    for module in MODULES:
        if room(module) == "dashboard":
            assert {room(other) for other in modules_imported(module)} <= {"dashboard"}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in PURE])
def test_a_pure_room_performs_no_io(module: str) -> None:
    """Decisions can be tested, simulated and reused without an event loop."""
    assert not {name.split(".")[0] for name in imports_of(MODULES[module], module)} & IO


@pytest.mark.parametrize("dependency", ONLY_IN)
def test_a_heavy_dependency_is_known_to_few(dependency: str) -> None:
    """Who imports one primitive does not pay for a terminal, a plot or an engine."""
    users = {
        room(module)
        for module, path in MODULES.items()
        if any(name.split(".")[0] == dependency for name in imports_of(path, module))
    }
    assert users <= ONLY_IN[dependency]


def test_the_top_of_the_package_exports_floors_0_to_6_and_the_pools() -> None:
    """``import stagetrio`` brings the primitives, not the app, the engine or the command line."""
    names = set(imports_of(PACKAGE / "__init__.py", "stagetrio"))
    rooms = {name.split(".")[1] for name in names if name.split(".")[0] == "stagetrio"}
    floors = [FLOORS[name] for name in rooms - {"threads", "processes"}]
    assert all(isinstance(floor, int) and floor <= 6 for floor in floors), rooms
