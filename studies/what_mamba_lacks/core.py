"""Mamba with all ingredients, each one removed, and none, at both lengths (config.py says more)."""

from __future__ import annotations

from studies.what_mamba_lacks.config import sweep
from synthetic.grid import Sweep


def get_config() -> Sweep:
    """The sweep."""
    return sweep("core")
