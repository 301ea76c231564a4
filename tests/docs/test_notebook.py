"""The notebook of the docs runs from top to bottom."""

import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("torch")

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    """Outputs would be another run's, and bytes that no review reads."""
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat

    folder = tmp_path / "project"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "text/html" in kinds, "a comparison as a table"
    assert (folder / "pareto.svg").exists()
