"""Every family at 2.8 B, query first and last, three seeds; a GPU of 80 GB a run:

python -m synthetic.sweep configs/sweep_2.8b.py --executor ray     # on a Ray cluster
python -m synthetic.sweep configs/sweep_2.8b.py --executor slurm   # a SLURM job a run
"""

from __future__ import annotations

from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid

BASE = RunConfig(preset="2.8b", device="cuda", precision="bfloat16", checkpointing=True, accumulate=8)


def get_config() -> Sweep:
    axes = dict(model=("mamba", "mamba2", "transformer", "hybrid"), layout=("suffix", "prefix"))
    return Sweep(
        runs=[
            run
            for seed in (0, 1, 2)
            for run in grid(BASE, seed=seed, seq_len=(256, 1024), batch_tokens=65536, **axes)
        ]
    )
