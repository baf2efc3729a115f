"""What importing stagetrio costs a fresh interpreter, beside importing what it stands on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from benchmarks.case import Case

_IMPORTS = 5
_TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def _seconds(statement: str) -> Callable[[], float]:
    code = _TIMED.format(statement)

    def side() -> float:
        # the best of a few: a cold file cache or a busy neighbour only ever adds
        runs = (subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(_IMPORTS))
        return min(float(run.stdout) for run in runs)

    return side


_NOTE = "fresh interpreters, best of 5 each"

CASES = [
    Case(
        "import stagetrio, against import trio",
        _seconds("import trio, stagetrio"),
        _seconds("import trio"),
        note=f"{_NOTE}; trio is imported on both sides, as every user has it",
    ),
    Case(
        "import one primitive, against import trio, attrs",
        _seconds("from stagetrio import FairQueue"),
        _seconds("import trio, attrs"),
        note=_NOTE,
    ),
    Case(
        "import every name, against trio, cattrs, msgspec",
        _seconds("from stagetrio import *"),
        _seconds("import trio, attrs, cattrs, msgspec, greenlet, ssl"),
        note=_NOTE,
    ),
]
