"""The study of README.md beside this file: the quick start of vlm/configs/cpu_tiny.py with several seeds.

python -m vlm.train studies/vlm_pretrained/runs.py --out runs/vlm
python -m vlm.evaluate studies/vlm_pretrained/runs.py --out runs/vlm
"""

from __future__ import annotations

from vlm.config import Run
from vlm.configs.cpu_tiny import run
from vlm.configs.words import MODELS

SEEDS = (0, 1, 2)


def get_config() -> list[Run]:
    """Return all runs of the study: every seed of both families."""
    return [run(model, seed) for seed in SEEDS for model in MODELS]
