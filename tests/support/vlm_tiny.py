"""A VLM's run of a few steps."""

from __future__ import annotations

import dataclasses

import vlm_runs

from vlm.config import Scenes, Stage


def tiny(lr=1e-3, steps=4, **more):
    """Return a run that learns to count in a few steps.

    Args:
        lr: learning rate.
        steps: of its stage.
        **more: other fields of the stage.

    Returns:
        The run.
    """
    stage = Stage({"count": Scenes("count", 8)}, steps=steps, batch_size=4, lr=lr, warmup=0.0, **more)
    return dataclasses.replace(vlm_runs.run("mamba-tiny"), stages=(stage,), cache=True)
