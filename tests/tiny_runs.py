"""Runs of a few steps, for tests of what reads run folders."""

from __future__ import annotations

from pathlib import Path

from synthetic import run


def tiny_run(folder: Path, task: str, *more: str) -> Path:
    """Train two steps in a folder that has no run yet; returns the run's own folder."""
    arguments = ["--task", task, "--steps", "2", "--eval-every", "1", "--eval-examples", "4"]
    arguments += ["--final-eval-examples", "32", "--batch-tokens", "64", *more, "--out", str(folder)]
    assert run.main(arguments) == 0
    (path,) = (p for p in folder.iterdir() if (p / "config.json").exists())
    return path
