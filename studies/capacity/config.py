"""Trainings of the study of what a state holds: widths and state sizes of every family, on two tasks.

    python -m synthetic.sweep studies/capacity/config.py
    python -m synthetic.sweep studies/recipes/recall_law_linear.py
    python -m synthetic.sweep studies/recipes/recall_law_mamba_long.py
    python -m studies.capacity.measure runs/capacity runs/recall_law_linear runs/recall_law_mamba_long
    python -m studies.capacity.report

One block, one thread, float32. A training gives a whole curve, because its model is asked about fewer facts,
too.

*   position: contexts grow from 4 facts to 64 and queries keep the positions that they have behind 64
    (`--growth gap`), with learned positions and, for state spaces, the first weights that help retrieval. A
    run ends with its accuracy at 4, 8, 16, 32 and 64 facts. By the law with a = 1/2, which its authors give
    for Mamba, and 131 tokens, 0.95 is reached up to 7 facts (D = 32, N = 4), 29 (D = 32, N = 16), 11 (D = 64,
    N = 2) or 89 (D = 64, N = 16).
*   mqar: 16 pairs in 64 tokens, V = 512, as in the recall laws. The linear model and Mamba have recipes of
    their own (studies/recipes); here are the others. Attention needs two layers to find what followed a
    symbol.

Measured, seconds of one thread of an AMD Zen 5: position linear 618, Mamba 467, Mamba-2 673, Transformer
170, hybrid 372; mqar Mamba-2 557, Transformer 312, hybrid 306. That is an hour in all. The recipe of the
linear model on mqar takes another half.

The first seeds of all families come first, so that a sweep that is stopped has curves of each.
"""

from __future__ import annotations

from typing import Any

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = range(5)
SHAPES = ((64, 4), (64, 16), (32, 4), (32, 16), (64, 8), (64, 2))  # D, N: the most telling first
WIDTHS = (64, 32)
COMMON: dict[str, Any] = dict(
    layers=1,
    steps=1000,
    betas=(0.9, 0.95),
    warmup=100,
    schedule="cosine",
    label_smoothing=0.1,
    stop_at=1.01,
    eval_every=250,
    eval_examples=256,
    final_eval_examples=512,
    device="cpu",
    precision="float32",
)
POSITION = RunConfig(task="position", seq_len=64, position="learned", curriculum=4, growth="gap", **COMMON)
MQAR = RunConfig(
    task="mqar",
    seq_len=64,
    num_symbols=512,
    num_pairs=16,
    task_options={"power": 1.0},
    queries=16,
    curriculum=0,
    batch_size=32,
    grad_clip=0.75,
    flat=400,
    **COMMON | dict(steps=1500),
)
OWN: dict[str, dict[str, Any]] = {  # on the position task; the linear model takes off later than the others
    "linear": dict(lr=1e-2, steps=2000),
    "mamba": dict(lr=5e-3, ssm_init="recall"),
    "mamba2": dict(lr=5e-3, ssm_init="recall", heads=1),
}
# Layers with keys, one head wide, at the first four shapes, with the learning rates that rates.py chooses
KEYED: dict[str, dict[str, Any]] = {
    "gla": dict(lr=5e-3),
    "deltanet": dict(lr=1e-2, d_conv=2),
    "gated-deltanet": dict(lr=1e-2, d_conv=2),
    "kda": dict(lr=2e-3, d_conv=2),
    "mamba3": dict(lr=1e-2, ssm_init="tied"),  # it learns less with a long memory, as rates.py found
}


def position(seed: int) -> list[RunConfig]:
    """The runs of a seed on position retrieval."""
    runs = [
        run
        for d_model, d_state in SHAPES
        for model, own in OWN.items()
        for run in grid(POSITION, model=model, d_model=d_model, d_state=d_state, d_conv=2, seed=seed, **own)
    ]
    keyed: dict[str, Any] = dict(ssm_init="recall", heads=1, seed=seed)
    runs += [
        run
        for d_model, d_state in SHAPES[:4]
        for model, own in KEYED.items()
        for run in grid(POSITION, model=model, d_model=d_model, d_state=d_state, **(keyed | own))
    ]
    runs += grid(POSITION, model="transformer", d_model=WIDTHS, heads=1, lr=2e-3, seed=seed)
    hybrid = dict(model="hybrid", layers=3, heads=1, d_conv=2, ssm_init="recall", lr=2e-3, seed=seed)
    return runs + grid(POSITION, d_model=WIDTHS, d_state=4, **hybrid)


def mqar(seed: int) -> list[RunConfig]:
    """The runs of a seed on associative recall that have no recipe."""
    state = dict(position="none", d_conv=2, ssm_init="long", seed=seed)
    runs = [
        run
        for d_model, d_state in SHAPES[:4]
        for run in grid(MQAR, model="mamba2", d_model=d_model, d_state=d_state, heads=1, lr=1e-2, **state)
    ]
    attention = dict(model="transformer", layers=2, heads=1, position="learned", lr=2e-3)
    runs += grid(MQAR, d_model=WIDTHS, seed=seed, **attention)
    return runs + grid(MQAR, model="hybrid", layers=3, heads=1, d_model=64, d_state=4, lr=2e-3, **state)


def get_config() -> Sweep:
    """Position retrieval of a seed, then associative recall, then the next seed."""
    return Sweep(runs=[run for seed in SEEDS for run in (*position(seed), *mqar(seed))])
