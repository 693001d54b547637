"""The first losses of training, kept in golden.json by TRAINING_VERSION: whoever moves them must raise it.

    python tests/golden.py      adds the numbers of this TRAINING_VERSION, if it has none yet

Numbers that are there are never replaced: other numbers for the same plan need another version
(`synthetic/identity.py`), or finished runs and new ones would differ under one name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from synthetic import trainer
from synthetic.config import TRAINING_VERSION, RunConfig, plan

PATH = Path(__file__).with_suffix(".json")
FAMILIES = ("transformer", "mamba", "mamba2", "hybrid")
STEPS = 5
# The defaults of a run, but five steps go through warm-up, clipping, decay and schedule.
CONFIG = RunConfig(
    seq_len=16, num_symbols=40, curriculum=8, steps=STEPS, warmup=2, schedule="cosine", weight_decay=0.1,
    batch_tokens=512, eval_every=1000, eval_examples=8, device="cpu", precision="float32",
)  # fmt: skip


def trajectory(family: str) -> list[float]:
    """Training losses of the first steps, by one thread: how sums are split depends on the threads."""
    losses: list[float] = []

    def listener(event: str, row: dict[str, Any]) -> None:
        if event == "step":
            losses.append(row["loss"])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / family).mkdir()
            session = trainer.Session(plan(CONFIG, family), Path(folder), listener)
            for _ in range(STEPS):
                session.step()
    finally:
        torch.set_num_threads(threads)
    return losses


def kept() -> dict[str, dict[str, list[float]]]:
    """{version: {family: losses}}"""
    return json.loads(PATH.read_text(encoding="utf-8"))


def main() -> int:
    known = kept() if PATH.exists() else {}
    if str(TRAINING_VERSION) in known:
        print(f"{PATH.name} has version {TRAINING_VERSION} already; raise TRAINING_VERSION for other numbers")
        return 1
    known[str(TRAINING_VERSION)] = {family: trajectory(family) for family in FAMILIES}
    PATH.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
