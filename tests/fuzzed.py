"""How many inputs the fuzzing tests have tried; `conftest.py` prints it at the end of a run."""

from __future__ import annotations

from collections import Counter

#: ``{what was fuzzed: inputs tried}``
TRIED: Counter[str] = Counter()
