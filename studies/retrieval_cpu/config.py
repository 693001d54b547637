"""The study of README.md beside this file: `python -m synthetic.sweep studies/retrieval_cpu/config.py`.

Every model is of the tiny preset and has at most 1,000 steps of about 2,048 tokens, one thread, bfloat16.
Lengths go as far as an architecture gets, and one further where the budget allows. README.md says how long it
takes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = (0, 1, 2)
BASE = RunConfig(
    steps=1000,
    eval_every=50,
    final_eval_examples=512,
    device="cpu",
    precision="bfloat16",
    schedule="constant",
    growth="prefix",
)
# As published: state space models without positions, and with their authors' first weights.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mamba": dict(position="none"),
    "mamba2": dict(position="none"),
    "hybrid": dict(ssm_init="default"),
}
LONG: dict[str, Any] = dict(eval_every=100)  # evaluations of long contexts cost as much as many steps
SINGLE: dict[str, Any] = dict(queries=1)
ROPE: dict[str, Any] = dict(model="transformer", position="rope", rotary_pct=0.25)


def runs(seed: int) -> list[RunConfig]:
    """All runs of one seed, the longest first."""

    def some(**axes: Any) -> list[RunConfig]:
        found = grid(BASE, seed=seed, **axes)
        return [dataclasses.replace(run, **PUBLISHED.get(run.model[0], {})) for run in found]

    attention, ssm = ("transformer", "hybrid"), ("mamba", "mamba2")
    return [
        # how far, at what cost: query last, many queries per sequence
        *some(seq_len=(1024, 256), model=attention, **LONG),
        *some(seq_len=(64, 16), model=attention),
        *some(seq_len=(32, 16), **ROPE),
        *some(seq_len=(32, 16, 8), model=ssm),
        # query last or first: one query per sequence, so that a model told it first need keep nothing else
        *some(layout=("suffix", "prefix"), seq_len=16, model=(*ssm, *attention), **SINGLE),
        *some(layout="prefix", seq_len=32, model=ssm, **SINGLE),
        # the size of the state
        *some(seq_len=16, model=ssm, d_state=(4, 16, 64)),
    ]


def tune(run: RunConfig) -> RunConfig:
    """Learning rates are compared at the longest context that the architecture is known to learn.

    At shorter ones the Transformer learns fastest with 4e-3, which then fails at 1,024.
    """
    if run.model[0] in ("transformer", "hybrid") and run.position is None:
        return dataclasses.replace(run, seq_len=1024)
    return dataclasses.replace(run, seq_len=16, steps=600)


def get_config() -> Sweep:
    """The sweep: every run with three seeds, learning rates chosen on two others."""
    return Sweep(
        runs=[run for seed in SEEDS for run in runs(seed)],
        learning_rates=(1e-3, 2e-3, 4e-3),
        validation_seeds=(100, 101),
        tune=tune,
    )
