"""The study of README.md beside this file: `python -m synthetic.sweep studies/retrieval_cpu/config.py`.

Every model is 64 wide and has at most 1,000 steps of about 2,048 tokens, one thread, float32. All
architectures add the same kind of learned positions to their embedding, see contexts grow in the same way
(`--growth gap`), and choose among the same learning rates. State space models begin ready to recall
(`--ssm-init recall`), with two layers and 64 states a channel; attention has its preset's depth: two
layers, of the hybrid three, whose Mamba begins as published (ready to recall, it learned more slowly on the
validation seeds). Rows with other positions, and Mamba as its authors publish it, stand beside these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS = (0, 1, 2)
SSM = ("mamba", "mamba2")
KEYED = ("mamba3", "gla", "deltanet")
BASE = RunConfig(
    d_model=64,
    position="learned",
    growth="gap",
    steps=1000,
    eval_every=50,
    final_eval_examples=512,
    device="cpu",
    precision="float32",
)
STATE: dict[str, Any] = dict(layers=2, d_state=64, ssm_init="recall")
HYBRID: dict[str, Any] = dict(model="hybrid", ssm_init="default")
SINGLE: dict[str, Any] = dict(queries=1, seq_len=64)
PREFIX: dict[str, Any] = dict(growth="prefix")  # without learned positions contexts cannot lie elsewhere
ROPE: dict[str, Any] = dict(model="transformer", position="rope", rotary_pct=0.25, **PREFIX)
BARE: dict[str, Any] = dict(model="transformer", position="none", **PREFIX)
PUBLISHED: dict[str, Any] = dict(model="mamba", position="none", ssm_init="default", **PREFIX)


def runs(seed: int) -> list[RunConfig]:
    """All runs of one seed, the most telling first."""

    def some(**axes: Any) -> list[RunConfig]:
        return grid(BASE, seed=seed, **axes)

    return [
        # how far, at what cost: query last, many queries per sequence
        *some(seq_len=(64, 128, 16), model=SSM, **STATE),
        *some(seq_len=(64, 128, 16), model="transformer"),
        *some(seq_len=(64, 128, 16), **HYBRID),
        # query last or first: one query per sequence, so that a model told it first need keep nothing else
        *some(layout=("suffix", "prefix"), model=SSM, **STATE, **SINGLE),
        *some(layout=("suffix", "prefix"), model="transformer", **SINGLE),
        # the context twice, so that it can be read with the knowledge of what it holds
        *some(layout="two-pass", model=SSM, **STATE, **SINGLE),
        # other positions
        *some(seq_len=(64, 16), **ROPE),
        *some(seq_len=(64, 16), **BARE),
        *some(seq_len=(64, 16), **PUBLISHED),
    ]


def keyed(seed: int) -> list[RunConfig]:
    """Runs of one seed of layers with keys, and of Mamba-3: query last, first, and the context twice."""
    layouts = ("suffix", "prefix", "two-pass")
    runs = []
    for model in KEYED:  # a long memory, which the others have, slows Mamba-3 (studies/what_mamba_lacks)
        own = STATE | dict(ssm_init="tied" if model == "mamba3" else "recall")
        runs += grid(BASE, seed=seed, layout=layouts, model=model, **own, **SINGLE)
    return runs


def tune(run: RunConfig) -> RunConfig:
    """Learning rates are compared with the query last, in fewer steps.

    With learned positions at the longest context: rates that are fastest at 64 symbols fail at 128. Without
    them no model gets that far.
    """
    length = 128 if run.position == "learned" else 64
    return dataclasses.replace(run, seq_len=length, layout="suffix", queries=64, steps=600)


def get_config(made: Callable[[int], list[RunConfig]] = runs) -> Sweep:
    """The sweep: every run with three seeds, learning rates chosen on two others.

    Args:
        made: Makes the runs of a seed.

    Returns:
        The sweep.
    """
    return Sweep(
        runs=[run for seed in SEEDS for run in made(seed)],
        learning_rates=(1e-3, 2.5e-3, 6.3e-3),
        validation_seeds=(100, 101),
        tune=tune,
    )
