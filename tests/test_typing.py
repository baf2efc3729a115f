"""The types that users see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_public_api_is_typed_as_users_write_it() -> None:
    """Right uses of the API pass ``mypy --strict``, and each marked mistake in them is caught."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "tests/typing_api.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
