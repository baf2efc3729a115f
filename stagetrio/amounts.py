"""Numbers that users give: one that is out of its range is refused by its name, at once, and not when it does harm."""

from __future__ import annotations


def check_amount(name: str, value: float, least: float = 0) -> float:
    """Return ``value``, or raise a `TypeError` or `ValueError` that names it unless it is a number ≥ ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not value >= least:
        raise ValueError(f"{name} must be >= {least}, not {value!r}")
    return value


def check_above_zero(name: str, value: float) -> float:
    """Return ``value``, or raise a `TypeError` or `ValueError` that names it unless it is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not value > 0:
        raise ValueError(f"{name} must be > 0, not {value!r}")
    return value


def check_count(name: str, value: float, least: int) -> int:
    """Return ``value``, or raise a `TypeError` or `ValueError` that names it unless it is an int ≥ ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, not {value!r}")
    return value
