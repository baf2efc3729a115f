"""The examples in the guide to remote calls print what stands below them."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_docs import Example, examples, run

GUIDE = Path(__file__).parent.parent / "docs/remote.rst"


def test_the_guide_has_examples() -> None:
    """A call, a stream and workers, each with what it prints."""
    assert [bool(example.output) for example in examples(GUIDE)] == [True, True, True]


@pytest.mark.parametrize("example", examples(GUIDE), ids=lambda example: example.id)
def test_an_example_of_the_guide_prints_what_stands_below_it(example: Example, tmp_path: Path) -> None:
    """Each Python block is a whole program."""
    script = tmp_path / "example.py"
    script.write_text(example.source)
    done = run(script.name, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == example.output
