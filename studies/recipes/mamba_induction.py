"""Induction heads: section 4.1 and appendix E.1 of Mamba (Gu and Dao 2023, arXiv 2312.00752).

    python -m synthetic.sweep studies/recipes/mamba_induction.py

Mamba with two layers of width 64 and 16 states, trained at 256 symbols of 16 kinds with a constant learning
rate of 1e-3 and batches of 8. The paper trains 25 epochs of 8,192 steps; here a run ends as soon as it
passes 0.999 on validation sequences, within the same budget. The paper's table then asks about longer
contexts, up to 2^20: `synthetic.evaluate.extrapolate` does it.
"""

from __future__ import annotations

from studies.recipes import GOAL
from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = range(5)
CELL = ("model", "seq_len")
PUBLISHED = {("mamba", 256): GOAL}
BASE = RunConfig(
    model=("mamba",),
    layers=2,
    d_model=64,
    d_state=16,
    ssm_init="default",
    position="none",
    task="induction",
    seq_len=256,
    num_symbols=16,
    curriculum=0,
    batch_size=8,
    steps=25 * 8192,
    lr=1e-3,
    betas=(0.9, 0.999),
    warmup=0,
    schedule="constant",
    stop_at=0.999,
    eval_every=512,
    eval_examples=512,
    device="cpu",
    precision="float32",
)


def get_config() -> Sweep:
    """Five seeds."""
    return Sweep(runs=grid(BASE, seed=SEEDS))
