"""The time between two attempts."""

from __future__ import annotations

import pytest

from stagetrio.backoff import backoff


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0.25), (2, 0.5), (3, 1.0), (7, 16.0), (8, 30.0), (100_000, 30.0)]
)
def test_it_doubles_up_to_its_bound(failures: int, seconds: float) -> None:
    """Also after the failures of a whole night, at which a power of two is no float any more."""
    assert backoff(failures) == seconds
