"""The value a benchmark module hands to the runner.

A module under ``benchmarks/`` that measures something has a ``CASES`` list of these, and nothing else is asked of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import attrs


def _check_target(case: Case, attribute: attrs.Attribute[float | None], value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"target must be a finite ratio above 0 or None, not {value!r}")


@attrs.frozen
class Case:
    """One thing measured in two ways: ours, and what a Trio programmer would write without us.

    Args:
        name: what is measured, unique among all cases; the runner selects by globs over it.
        ours: runs our way once, at a size of its own choice, and returns seconds per operation.
        plain: runs the plain way once and returns seconds per operation, in the same unit of work as ``ours``.
        target: the least ratio plain/ours that the project promises, or None where none is set.
        note: what a reader needs to know to trust the figure: the sizes, the peer, what is left out.
    """

    name: str
    ours: Callable[[], float]
    plain: Callable[[], float]
    target: float | None = attrs.field(default=None, validator=_check_target)
    note: str = ""
