"""Every notebook runs from top to bottom, and is kept without its outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 120  # a cell that hangs ends its test; no cell's speed is judged here

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in a kernel of this very interpreter, started in the root of the project.

    Raises:
        CellExecutionError: A cell raised, whatever it raised.
    """
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(ROOT)}},
    ).execute()


@by_name
def test_a_notebook_runs(path: Path) -> None:
    """No cell raises, and every picture a cell promises is drawn."""
    notebook = nbformat.read(path, as_version=4)
    execute(notebook)
    drawn = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    plotting = [cell for cell in notebook.cells if cell.cell_type == "code" and ".subplots(" in cell.source]
    assert len(drawn) >= len(plotting)


@by_name
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    """A change to a notebook is a change to its text: no outputs, counts or interpreter versions in git."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert "version" not in notebook.metadata.get("language_info", {})


@pytest.mark.parametrize(
    "source",
    ["raise ValueError('alone')", "raise ExceptionGroup('several', [ValueError('one'), KeyError('two')])"],
    ids=["one exception", "a group"],
)
def test_a_cell_that_raises_fails_its_notebook(source: str) -> None:
    """A group of exceptions is as much a failure as one."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with pytest.raises(CellExecutionError):
        execute(notebook)
