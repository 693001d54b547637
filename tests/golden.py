"""The first losses of training, kept in golden.json by TRAINING_VERSION: whoever moves them must raise it.

"mamba" is what a run was by default when version 2 began: no positions for state space models, contexts at
the first positions. "mamba now" has today's defaults.

    python tests/golden.py      adds the numbers of this TRAINING_VERSION, if it has none yet

Numbers that are there are never replaced: other numbers for the same plan need another version
(`synthetic/identity.py`), or finished runs and new ones would differ under one name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from synthetic import trainer
from synthetic.config import TRAINING_VERSION, RunConfig, plan

PATH = Path(__file__).with_suffix(".json")
FAMILIES = ("transformer", "mamba", "mamba2", "hybrid")
NOW = " now"
STEPS = 5
# Five steps go through warm-up, clipping, decay and schedule.
CONFIG = RunConfig(
    seq_len=16, num_symbols=40, curriculum=8, steps=STEPS, warmup=2, schedule="cosine", weight_decay=0.1,
    batch_tokens=512, eval_every=1000, eval_examples=8, device="cpu", precision="float32",
)  # fmt: skip


def config(name: str) -> RunConfig:
    """The run of a name in golden.json."""
    if name.endswith(NOW):
        return CONFIG
    scheme = "learned" if name in ("transformer", "hybrid") else "none"
    return replace(CONFIG, position=scheme, ssm_init="default", growth="prefix")


def trajectory(name: str) -> list[float]:
    """Training losses of the first steps, by one thread: how sums are split depends on the threads."""
    family = name.removesuffix(NOW)
    losses: list[float] = []

    def listener(event: str, row: dict[str, Any]) -> None:
        if event == "step":
            losses.append(row["loss"])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / family).mkdir()
            session = trainer.Session(plan(config(name).of(family), family), Path(folder), listener)
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
    there = known.setdefault(str(TRAINING_VERSION), {})
    missing = [name + now for now in ("", NOW) for name in FAMILIES if name + now not in there]
    if not missing:
        print(f"{PATH.name} has version {TRAINING_VERSION} already; raise TRAINING_VERSION for other numbers")
        return 1
    there |= {name: trajectory(name) for name in missing}
    PATH.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
