"""Runs of a few steps, for tests of what reads run folders."""

from __future__ import annotations

from pathlib import Path

from ssm_retrieval.training import store
from synthetic import records, run


def tiny_run(folder: Path, task: str, *more: str) -> Path:
    """Train one model for two steps in a folder that has no run yet; returns the run's own folder."""
    (path,) = tiny_runs(folder, task, *more).values()
    return path


def tiny_runs(folder: Path, task: str, *more: str) -> dict[str, Path]:
    """The same of several models: family -> folder."""
    arguments = ["--task", task, "--steps", "2", "--eval-every", "1", "--eval-examples", "4"]
    arguments += ["--final-eval-examples", "32", "--batch-tokens", "64", *more, "--out", str(folder)]
    assert run.main(arguments) == 0
    return by_family(folder)


def by_family(folder: Path) -> dict[str, Path]:
    """The runs in a folder, which has one of a family."""
    return {records.config(path)["plan"]["family"]: path for path in store.runs_in(folder)}
