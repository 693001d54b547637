"""Accuracy of the linear SSM by width and state size: "On the Recall Scaling Laws in Mamba" (2609.07681).

    python -m synthetic.sweep studies/recipes/recall_law_linear.py

Source: config/MQAR__D_N__linear_trained__example.json5 of github.com/yuvalko1/mamba-recall-scaling-laws, and
the accuracies in its README (one seed, 1,000 validation sequences, cells with more states than channels left
out). MQAR with V = 512, 64 tokens and 16 pairs, all of them queried, at uniform gaps. AdamW without weight
decay, 2,000 steps of 32 sequences; the rate rises for 100 steps, stays for 400 and falls to 0 along a cosine.

Two things differ. Theirs draws fillers among all symbols, ours among those that are no key of the row. Theirs
reports the best of eight evaluations, ours the last one, on other sequences.
"""

from __future__ import annotations

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = range(5)
CELL = ("d_model", "d_state")
PUBLISHED = {  # (d_model, d_state): accuracy
    (16, 8): 0.24, (16, 16): 0.32,
    (32, 8): 0.64, (32, 16): 0.89, (32, 24): 0.94, (32, 32): 0.95,
    (48, 8): 0.82, (48, 16): 0.98, (48, 24): 1.00, (48, 32): 1.00,
    (64, 8): 0.89, (64, 16): 1.00, (64, 24): 1.00, (64, 32): 1.00,
}  # fmt: skip
BASE = RunConfig(
    model=("linear",),
    position="none",
    task="mqar",
    seq_len=64,
    num_symbols=512,
    num_pairs=16,
    task_options={"power": 1.0},
    queries=16,
    curriculum=0,
    batch_size=32,
    steps=2000,
    lr=1e-2,
    betas=(0.9, 0.95),
    warmup=100,
    flat=400,
    schedule="cosine",
    grad_clip=1.5,
    label_smoothing=0.1,
    stop_at=1.01,
    eval_every=250,
    eval_examples=256,
    final_eval_examples=1024,
    device="cpu",
    precision="float32",
)


def get_config() -> Sweep:
    """Every published cell with every seed, all cells of the first seed first."""
    return Sweep(
        runs=[
            run
            for seed in SEEDS
            for d_model, d_state in PUBLISHED
            for run in grid(BASE, d_model=d_model, d_state=d_state, seed=seed)
        ]
    )
