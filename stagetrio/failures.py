"""What went wrong, counted by cause, and logged once per cause.

A handler that fails for every message of a storm would fill a disk with the same traceback. `Failures` logs the first
of each cause with its traceback and counts the others.
"""

from __future__ import annotations

import logging
import traceback

MAX_CAUSES = 100  # causes told apart; further ones are counted together


class Failures:
    """Counts exceptions by their type and the place that raised them.

    Args:
        logger: Where the first of each cause goes, as an error.
        name: What failed, for the log.
    """

    def __init__(self, logger: logging.Logger, name: str) -> None:
        self._logger = logger
        self._name = name
        #: ``{"ValueError in function (file:line)": how often}``
        self.counts: dict[str, int] = {}

    def record(self, error: BaseException) -> None:
        """Count an exception, and log it if it is the first of its cause."""
        cause = _cause(error)
        if cause not in self.counts and len(self.counts) >= MAX_CAUSES:
            cause = "other causes"
        self.counts[cause] = self.counts.get(cause, 0) + 1
        if self.counts[cause] == 1:
            self._logger.error("%s: %s (further ones are counted, not logged)", self._name, cause, exc_info=error)


def _cause(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].name} ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{where}"
