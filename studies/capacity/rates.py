"""Learning rates of the layers with keys in config.py: one seed that is not reported, D = 64, N = 4.

    python -m synthetic.sweep studies/capacity/rates.py

The rate of a family is the one with the highest validation accuracy at 64 facts when its steps end; of equal
ones the smallest.
"""

from __future__ import annotations

from studies.capacity.config import KEYED, POSITION
from synthetic.grid import Sweep, grid

SEED = 100
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2)


def get_config() -> Sweep:
    """Every family with every rate."""
    shape = dict(d_model=64, d_state=4, d_conv=2, heads=1, ssm_init="recall", seed=SEED)
    return Sweep(runs=[run for model in KEYED for run in grid(POSITION, model=model, lr=RATES, **shape)])
