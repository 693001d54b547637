"""Recall of attention and Mamba by width: figure 2 of Zoology (Arora et al. 2023, arXiv 2312.04927).

    python -m synthetic.sweep studies/recipes/zoology_figure2.py

Source: zoology/experiments/paper_configs/iclr24_zoology_figure2/configs.py of
github.com/HazyResearch/zoology, its two shortest settings: MQAR with V = 8,192 at 64 tokens with 4 pairs
and 128 tokens with 8, `<white>` as filler, queries close behind the pairs (power 0.01); two layers of width
64, 128, 256 or 512, here 64 and 128.

What differs: 1,500 steps of 128 sequences instead of 64 passes over 100,000 sequences (12,500 steps of
512); the best learning rate is chosen among three on a seed that is not reported, theirs among four on the
reported one; no dropout; the Transformer has an MLP in every block, theirs has none. A run ends at 0.99, as
there.
"""

from __future__ import annotations

from typing import Any

from studies.recipes import GOAL
from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = range(5)
CELL = ("model", "seq_len", "d_model")
PUBLISHED: dict[tuple[str, int, int], str | None] = {  # no number of Mamba's is at hand
    (model, seq_len, d_model): GOAL if model == "transformer" else None
    for model in ("transformer", "mamba")
    for seq_len in (64, 128)
    for d_model in (64, 128)
}
PAIRS = {64: 4, 128: 8}
BASE = RunConfig(
    task="mqar",
    num_symbols=8192,
    task_options={"power": 0.01, "random_fillers": False},
    layers=2,
    curriculum=0,
    batch_size=128,
    steps=1500,
    betas=(0.9, 0.999),
    weight_decay=0.1,
    warmup=50,
    schedule="cosine",
    stop_at=0.99,
    eval_every=125,
    device="cpu",
    precision="float32",
)


def get_config() -> Sweep:
    """The shorter setting first; a learning rate for each family and width."""
    own: dict[str, dict[str, Any]] = {
        "transformer": dict(position="learned", heads=1),
        "mamba": dict(position="none", ssm_init="default"),
    }
    return Sweep(
        runs=[
            run
            for seq_len in PAIRS
            for seed in SEEDS
            for model in own
            for run in grid(
                BASE, model=model, d_model=(64, 128), seq_len=seq_len, num_pairs=PAIRS[seq_len],
                queries=PAIRS[seq_len], seed=seed, **own[model],
            )
        ],
        learning_rates=(4.6e-4, 2.2e-3, 1e-2),
        validation_seeds=(100,),
    )  # fmt: skip
