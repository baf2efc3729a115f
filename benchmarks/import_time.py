"""What ``import stagetrio`` costs a fresh interpreter, beside ``import trio, attrs, cattrs``, which it stands on."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.case import Case

_IMPORTS = 5
_TIMED = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def _import(modules: str) -> float:
    # the best of a few: a cold file cache or a busy neighbour only ever adds
    code = _TIMED.format(modules)
    return min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        for _ in range(_IMPORTS)
    )


def ours() -> float:
    """Seconds for ``import stagetrio``."""
    return _import("stagetrio")


def plain() -> float:
    """Seconds for ``import trio, attrs, cattrs``."""
    return _import("trio, attrs, cattrs")


def trio_alone() -> float:
    """Seconds for ``import trio``."""
    return _import("trio")


CASES = [
    Case("import against trio and cattrs", ours, plain, note="fresh interpreters, best of 5 each"),
    Case("import against trio alone", ours, trio_alone, note="fresh interpreters, best of 5 each"),
]
