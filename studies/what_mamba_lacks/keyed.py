"""Layers with keys, and Mamba-3: all ingredients, each removed, positions alone (config.py says more)."""

from __future__ import annotations

from studies.what_mamba_lacks.config import sweep
from synthetic.grid import Sweep


def get_config() -> Sweep:
    """The sweep."""
    return sweep("keyed")
