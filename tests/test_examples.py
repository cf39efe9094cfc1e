"""The example notebook runs from top to bottom, and is stored without outputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
PARAMETERS = """
from pathlib import Path
MODEL = "dummy:tiny-llama"
OPTIONS = dict(
    max_rows=4, context_tokens=256, step_tokens=16, kv_memory_bytes=4 * 2**20, dtype="float32",
    cache_dir=Path({cache!r}),
)
"""


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_stripped() -> None:
    for cell in read().cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_notebook_is_valid_and_asks_for_the_default_model() -> None:
    notebook = read()
    nbformat.validate(notebook)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert 'MODEL = "smollm2"' in parameters.source


@pytest.mark.slow
# The kernel runs in a process of its own; what its libraries think of each other is theirs.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = read()
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = PARAMETERS.format(cache=cache)
    client = NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [
        "".join(
            output.get("text", "") + "".join(output.get("data", {}).get("text/html", ""))
            for output in cell.outputs
        )
        for cell in code
    ]
    assert "<progress " in shown[1], "loading shows bars"
    assert "24 output tokens" in shown[2] or "stop &middot;" in shown[2]
    assert shown[3].count("\n") == 3
    assert "<span title=" in shown[5], "a score is coloured by token"
    assert len(shown[6].splitlines()) == 5
    assert "pages free" in shown[7]
