"""Execute notebooks: `python notebooks/execute.py [NAME ...]` writes each .ipynb anew from its .py.

The .py is what one edits; outputs come from a fresh kernel, with a temporary folder of its own for what is
trained, and without the Hugging Face hub, so that they do not depend on what a machine has.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

from ssm_retrieval.training.store import write_bytes

HERE = Path(__file__).parent
TIMEOUT = 600  # seconds of one cell


def names() -> list[str]:
    """The notebooks in their order."""
    return sorted(path.stem for path in HERE.glob("[0-9][0-9]_*.py"))


@contextmanager
def laboratory() -> Iterator[dict[str, str]]:
    """Environment of kernels whose trained models live until the end of the `with` statement."""
    with tempfile.TemporaryDirectory(prefix="notebooks-") as folder:
        yield os.environ | {
            "TMPDIR": folder,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(Path(folder) / "hub"),
            "PYTHONHASHSEED": "0",
        }


def execute(name: str, environment: dict[str, str]) -> Any:
    """The notebook with the outputs of a fresh kernel. Raises nbclient's CellExecutionError."""
    notebook = jupytext.read(HERE / f"{name}.py")
    client = NotebookClient(
        notebook, timeout=TIMEOUT, record_timing=False, resources={"metadata": {"path": str(HERE)}}
    )
    client.execute(env=environment)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # else they are random, and every execution changes the file
    return notebook


def main(chosen: list[str]) -> int:
    unknown = [name for name in chosen if name not in names()]
    if unknown:
        print(f"error: no notebook {unknown[0]}; there are {', '.join(names())}", file=sys.stderr)
        return 2
    with laboratory() as environment:
        for name in chosen or names():
            path = HERE / f"{name}.ipynb"
            write_bytes(path, nbformat.writes(execute(name, environment)).encode() + b"\n")
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
