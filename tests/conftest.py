"""What a test run says at its end: how many inputs the fuzzing tests have tried."""

from __future__ import annotations

import pytest
from fuzzed import TRIED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, inputs in sorted(TRIED.items()):
        terminalreporter.write_line(f"fuzzed {what}: {inputs:,} inputs")
