"""Selective copying: section 4.1 and appendix E.1 of Mamba (Gu and Dao 2023, arXiv 2312.00752).

    python -m synthetic.sweep studies/recipes/mamba_selective_copy.py

Mamba with two layers of width 64 and 16 states remembers 16 symbols, of 14 kinds, that stand among noise.
The paper has 4,096 tokens of context, batches of 64, a learning rate of 1e-4 and 400,000 steps, which is
work for a GPU. Here: 256 tokens, batches of 32, a rate of 1e-3 that falls along a cosine, 6,000 steps at
most. A run ends at 0.99.
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
    task="selective-copy",
    seq_len=256,
    num_symbols=14,
    num_tokens=16,
    curriculum=0,
    batch_size=32,
    steps=6000,
    lr=1e-3,
    betas=(0.9, 0.999),
    warmup=100,
    schedule="cosine",
    stop_at=0.99,
    eval_every=250,
    device="cpu",
    precision="float32",
)


def get_config() -> Sweep:
    """Five seeds."""
    return Sweep(runs=grid(BASE, seed=SEEDS))
