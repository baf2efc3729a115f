"""How long to wait before something that has failed is tried again: twice as long each time, up to a bound."""

from __future__ import annotations

FIRST_BACKOFF = 0.25  # seconds
MAX_BACKOFF = 30.0


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, ≥ 1; however many they are."""
    return min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** min(failures - 1, 1000))
