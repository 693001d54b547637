"""Learning rates of the layers with keys in config.py: one seed that is not reported, D = 64, N = 4.

    python -m synthetic.sweep studies/capacity/rates.py

The rate of a family is the one with the highest validation accuracy at 64 facts when its steps end; of equal
ones the smallest. Mamba-3 also chooses between the first weights of the others and equal B and C alone.
"""

from __future__ import annotations

from typing import Any

from studies.capacity.config import KEYED, POSITION
from synthetic.grid import Sweep, grid

SEED = 100
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)


def get_config() -> Sweep:
    """Every family with every rate."""
    shape: dict[str, Any] = dict(d_model=64, d_state=4, heads=1, ssm_init="recall", seed=SEED)
    runs = []
    for model, own in KEYED.items():
        inits = ("recall", "tied") if model == "mamba3" else "recall"
        runs += grid(POSITION, model=model, **(shape | own | dict(lr=RATES, ssm_init=inits)))
    return Sweep(runs=runs)
