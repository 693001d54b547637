"""Copying a string: Repeat After Me (Jelassi et al. 2024, arXiv 2402.01032), small.

    python -m synthetic.sweep studies/recipes/repeat_after_me.py

Source: synthetic_exps/main.py of github.com/sjelassi/transformers_ssm_copy: strings of 5 to 20 letters are
copied, models of 12 layers and width 1,024. The paper's result is an order: a Transformer learns to copy
from fewer sequences than a Mamba. Here two models of width 128 copy 20 of 26 letters, the Transformer with
2 layers and the Mamba with 4, whose learning rate is chosen among three on a seed that is not reported.

What differs: one length, and the task is `selective-copy` without noise, in which the model sees a marker
where the paper's model sees the letter that it has just written. So a letter has to be found by its place,
not by the letters before it, which is harder for both.
"""

from __future__ import annotations

from typing import Any

from studies.recipes import GOAL
from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = range(5)
CELL = ("model", "seq_len")
PUBLISHED: dict[tuple[str, int], str | None] = {("transformer", 20): GOAL, ("mamba", 20): None}
BASE = RunConfig(
    task="selective-copy",
    seq_len=20,
    num_symbols=26,
    num_tokens=20,
    curriculum=0,
    batch_size=64,
    steps=3000,
    betas=(0.9, 0.999),
    weight_decay=0.1,
    warmup=100,
    schedule="linear",
    stop_at=0.99,
    device="cpu",
    precision="float32",
)


def get_config() -> Sweep:
    """Both families, five seeds each."""
    own: dict[str, dict[str, Any]] = {
        "transformer": dict(position="learned"),
        "mamba": dict(position="none", ssm_init="default", d_state=32),
    }
    return Sweep(
        runs=[
            run for seed in SEEDS for model in own for run in grid(BASE, model=model, seed=seed, **own[model])
        ],
        learning_rates=(3e-4, 1e-3, 3e-3),
        validation_seeds=(100,),
    )
