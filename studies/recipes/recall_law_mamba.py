"""Accuracy of the full Mamba by width and state size: "On the Recall Scaling Laws in Mamba" (2609.07681).

    python -m synthetic.sweep studies/recipes/recall_law_mamba.py

The settings of config/MQAR__D_N__full_trained__regime_0.json5 of
github.com/yuvalko1/mamba-recall-scaling-laws, as published: MQAR with V = 512, 64 tokens and 16 pairs, all
of them queried, at uniform gaps; one Mamba block with a convolution of 2 taps; AdamW without weight decay,
20,000 steps of 128 sequences, 100 of them warm-up, 5,900 at the peak and 14,000 down a cosine; a run ends
at 0.999. The widths and state sizes are those of MQAR__D_N__full_trained__example.json5. This is work for a
GPU; `recall_law_mamba_long` is for two cores.

The measured accuracies are published as a picture, so `PUBLISHED` is what the authors say that they follow:
the law with a = 5/8.
"""

from __future__ import annotations

from analysis.capacity_law import CONSTANTS, recall_probability
from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = range(5)
CELL = ("d_model", "d_state")
SHAPES = [(D, N) for D in (16, 32, 48, 64) for N in (8, 16, 24, 32) if N <= D]
PUBLISHED = {
    shape: float(recall_probability(16, *shape, 512, a=CONSTANTS["mamba", "mqar"])) for shape in SHAPES
}
BASE = RunConfig(
    model=("mamba",),
    layers=1,
    d_conv=2,
    ssm_init="default",
    position="none",
    task="mqar",
    seq_len=64,
    num_symbols=512,
    num_pairs=16,
    task_options={"power": 1.0},
    queries=16,
    curriculum=0,
    batch_size=128,
    steps=20_000,
    lr=1e-2,
    betas=(0.9, 0.95),
    warmup=100,
    flat=5900,
    schedule="cosine",
    grad_clip=0.75,
    label_smoothing=0.1,
    stop_at=0.999,
    eval_every=1000,
    eval_examples=1000,
    final_eval_examples=10_000,
    precision="float32",
)


def get_config() -> Sweep:
    """Every cell with every seed, all cells of the first seed first."""
    return Sweep(
        runs=[
            run
            for seed in SEEDS
            for d_model, d_state in SHAPES
            for run in grid(BASE, d_model=d_model, d_state=d_state, seed=seed)
        ]
    )
