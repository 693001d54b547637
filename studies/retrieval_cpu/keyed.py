"""Query last, query first and the context twice, for layers with keys and Mamba-3 (config.py says more).

    python -m synthetic.sweep studies/retrieval_cpu/keyed.py --out runs/retrieval_keyed

`report.py` takes the folder as its second argument.
"""

from __future__ import annotations

from studies.retrieval_cpu import config
from synthetic.grid import Sweep


def get_config() -> Sweep:
    """The sweep."""
    return config.get_config(config.keyed)
