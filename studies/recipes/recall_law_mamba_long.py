"""The recall law of the full Mamba (2609.07681) on two cores: `recall_law_mamba` in a fiftieth of its budget.

    python -m synthetic.sweep studies/recipes/recall_law_mamba_long.py

Three things differ from the published settings. A run has 1,500 steps of 32 sequences, 100 of them warm-up,
400 at the peak and 1,000 down a cosine. None ends early. And the state forgets nothing at first
(`--ssm-init long`: A near 0, dt = 1, which the authors' linear model has all the time). With the published
first weights, 2,000 steps of 32 sequences stay near chance (0.05 at D = 64, N = 8, one seed).
"""

from __future__ import annotations

import dataclasses

from studies.recipes import recall_law_mamba
from synthetic.grid import Sweep, grid

SEEDS = range(5)
CELL = recall_law_mamba.CELL
FIRST = [(32, 8), (32, 16), (64, 8), (64, 16)]
SHAPES = [*FIRST, *(shape for shape in recall_law_mamba.SHAPES if shape not in FIRST)]
PUBLISHED = {shape: recall_law_mamba.PUBLISHED[shape] for shape in SHAPES}
BASE = dataclasses.replace(
    recall_law_mamba.BASE,
    ssm_init="long",
    batch_size=32,
    steps=1500,
    flat=400,
    stop_at=1.01,
    eval_every=250,
    eval_examples=256,
    final_eval_examples=1024,
    device="cpu",
)


def get_config() -> Sweep:
    """Every cell with every seed; of the four first shapes all seeds first."""
    return Sweep(
        runs=[
            run
            for shapes in (FIRST, SHAPES[len(FIRST) :])
            for seed in SEEDS
            for d_model, d_state in shapes
            for run in grid(BASE, d_model=d_model, d_state=d_state, seed=seed)
        ]
    )
