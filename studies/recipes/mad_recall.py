"""In-context recall of MAD (Poli et al. 2024, arXiv 2403.17844), as far as `mqar` can express it.

    python -m synthetic.sweep studies/recipes/mad_recall.py

Source: configs/tasks/in-context-recall.yml and mad/configs.py of github.com/athms/mad-lab: vocabulary of
16, 8 keys and 8 values, 128 tokens, all repeated keys asked; two layers of width 128, Mamba with 4 states;
AdamW, batches of 128, 12,800 sequences for 200 epochs, a cosine.

What differs: MAD's sequence is pairs all along, whose keys repeat; in `mqar` 8 pairs come first and each
key is asked once, among fillers. Values of `mqar` differ from each other, so that its last one can be told
from the rest; MAD's may be equal. MAD puts an MLP behind every mixer. Here 3,000 steps of 64 new sequences
at a rate of 1e-3, one of MAD's three. A run ends at 0.99.
"""

from __future__ import annotations

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = range(5)
CELL = ("model", "d_state")
PUBLISHED = {("mamba", 4): None}  # the paper has its accuracies in figures only
BASE = RunConfig(
    model=("mamba",),
    layers=2,
    d_model=128,
    d_state=4,
    ssm_init="default",
    position="none",
    task="mqar",
    seq_len=128,
    num_symbols=16,
    num_pairs=8,
    task_options={"power": 1.0},
    queries=8,
    curriculum=0,
    batch_size=64,
    steps=3000,
    lr=1e-3,
    betas=(0.9, 0.999),
    warmup=50,
    schedule="cosine",
    stop_at=0.99,
    eval_every=250,
    device="cpu",
    precision="float32",
)


def get_config() -> Sweep:
    """Five seeds."""
    return Sweep(runs=grid(BASE, seed=SEEDS))
