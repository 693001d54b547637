"""Notebooks: what is committed is an execution of the paired .py, whole, without errors and machine paths.

.ci/run executes them all anew (`python notebooks/execute.py`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed; .ci/run installs it")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; .ci/run installs it")

FOLDER = Path(__file__).parents[2] / "notebooks"
PAIRS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def outputs(cell) -> str:
    texts = [output for output in cell.get("outputs", ()) if output["output_type"] != "error"]
    return json.dumps([{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in texts])


@pytest.mark.parametrize("source", PAIRS, ids=lambda path: path.stem)
def test_a_notebook_is_an_execution_of_its_source(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    paired = jupytext.read(source)
    shown, written = ([(c.cell_type, c.source) for c in book.cells] for book in (notebook, paired))
    assert shown == written
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not any(output["output_type"] == "error" for output in cell.outputs)
        assert not re.search(r"/(tmp|home|root|work)/", outputs(cell)), cell.source
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2
    assert source.with_suffix(".ipynb").stat().st_size < 600_000


def test_there_are_notebooks_and_the_list_names_each():
    assert {path.name[:2] for path in PAIRS} >= {f"{number:02}" for number in range(1, 9)}
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d\d\]\((.*?)\.ipynb\)", listed, re.M) == [path.stem for path in PAIRS]


@pytest.mark.parametrize("source", PAIRS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_in_one_sitting(source):
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 400
