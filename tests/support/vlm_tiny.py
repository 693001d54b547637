"""A VLM's run of a few steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import vlm_runs

from vlm.config import Run, Scenes, Stage


def tiny(lr: float = 1e-3, steps: int = 4, **more: Any) -> Run:
    """Return a run that learns to count in a few steps.

    Args:
        lr: Learning rate.
        steps: Steps of its stage.
        **more: Other fields of the stage.

    Returns:
        The run.
    """
    stage = Stage({"count": Scenes("count", 8)}, steps=steps, batch_size=4, lr=lr, warmup=0.0, **more)
    return dataclasses.replace(vlm_runs.run("mamba-tiny"), stages=(stage,), cache=True)
