"""Imports go one way, and the commands do not mind what else a folder holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOTTOM = tuple(f"ssm_retrieval.{path.stem}" for path in (ROOT / "ssm_retrieval").glob("[a-z]*.py"))
TOOLS = ("synthetic", "vlm", "probes")
# what a layer may import: itself and the layers before it
LAYERS = (BOTTOM, ("ssm_retrieval.ops",), ("ssm_retrieval.models",), ("ssm_retrieval.training",), TOOLS,
          ("analysis",))  # fmt: skip


def layer(module: str) -> int | None:
    """The number of a module's layer; None for other people's, and for the package that holds the library."""
    return next(
        (n for n, names in enumerate(LAYERS) for m in names if f"{module}.".startswith(f"{m}.")),
        None,
    )


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it: `from a import b` may be of a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports by dots"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    wrong = set()
    for file in (f for top in ("ssm_retrieval", *TOOLS, "analysis") for f in (ROOT / top).rglob("*.py")):
        name = file.relative_to(ROOT)
        mine = layer(".".join(name.with_suffix("").parts))
        above = (module for module in imported(file) if mine is not None and (layer(module) or 0) > mine)
        wrong |= {(name.as_posix(), module.partition(".")[0]) for module in above}
    assert not wrong


@pytest.mark.slow
def test_a_run_in_a_folder_with_packages_of_its_own(tmp_path):
    for name in ("models", "analysis", "benchmarks", "tests", "training", "ops", "studies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise AssertionError('{name} of this folder')\n")
    command = [sys.executable, "-m", "synthetic.run", "--seq-len", "8", "--steps", "1", "--model", "mamba"]
    # as after an installation: the project behind the working folder, which python -m puts first
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").glob("*/outcome.png"))
