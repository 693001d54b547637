"""Five ways to grow a context (`--growth`), for a Transformer and for Mamba, three seeds each.

    python -m synthetic.sweep studies/curricula/config.py
    python -m studies.curricula.report runs/curricula

128 symbols, query last, learned positions, width 64. Learning rates are chosen for every architecture and
growth by themselves, on a seed that is not reported. About 60 runs of 20 s on one thread, or 20 minutes of
one core in all.
"""

from __future__ import annotations

from typing import Any

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

SEEDS, TUNING_SEED = (0, 1, 2), 100
RATES = (1e-3, 2.5e-3, 6.3e-3)
GROWTHS = ("prefix", "gap", "window", "filled", "mixed")
LENGTH = 128
BASE = RunConfig(
    seq_len=LENGTH,
    position="learned",
    d_model=64,
    batch_tokens=1024,
    steps=800,
    eval_every=50,
    final_eval_examples=512,
    device="cpu",
    precision="float32",
)
FAMILIES: dict[str, dict[str, Any]] = {
    "transformer": {},
    "mamba": dict(layers=1, d_state=64, ssm_init="recall"),
}


def get_config() -> Sweep:
    """The sweep: all of the first seed first."""
    return Sweep(
        runs=[
            run
            for seed in SEEDS
            for model, shape in FAMILIES.items()
            for run in grid(BASE, seed=seed, model=model, growth=GROWTHS, **shape)
        ],
        learning_rates=RATES,
        validation_seeds=(TUNING_SEED,),
    )
