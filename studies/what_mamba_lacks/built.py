"""Which of the ingredients does a model build up itself, and when in training?

    python -m studies.what_mamba_lacks.built [RUNS]     # after core.py and mamba2.py; RUNS has their folders

Trains Mamba and Mamba-2 with learned positions from their published first weights, at the learning rate that
the sweeps chose for that cell, and measures at every evaluation how far each ingredient is there. Writes
built.csv beside this file. 10 runs of at most 2,000 steps, about as many milliseconds each as config.py says:
ten minutes on two cores.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from probes.scan import layers_with, record_scans
from ssm_retrieval.cli import guarded
from ssm_retrieval.errors import UserError
from ssm_retrieval.models import LanguageModel
from ssm_retrieval.training import store
from ssm_retrieval.training.records import Row
from studies.what_mamba_lacks.config import LENGTH, POSITIONS_ALONE, SEEDS, ssm
from synthetic import trainer
from synthetic.config import RunConfig, plan
from synthetic.evaluate import heldout
from synthetic.tasks import Batch

RUNS = "runs/what_mamba_lacks"
TABLE = Path(__file__).with_name("built.csv")
SOURCES = {"mamba": "core", "mamba2": "mamba2"}  # sweep that chose the family's rate
STEPS, ROWS, WORKERS = 2000, 64, 2


def identity_share(model: LanguageModel) -> Tensor:
    """How far the convolution returns its input: the last tap's part of the squared weights of all taps.

    Args:
        model: A model with state space layers.

    Returns:
        (S,) for its S state space layers: 1 for the identity up to a factor per channel, on average
        1 / d_conv for the published first weights.
    """
    blocks: Any = model.blocks
    squares = [blocks[i].mixer.conv1d.weight.detach().square() for i in layers_with(model, "mixer.hook_dt")]
    return torch.stack([taps[..., -1].sum() / taps.sum() for taps in squares])


def half_life(model: LanguageModel, batch: Batch) -> Tensor:
    """Tokens of context after which half of a state is left.

    The state keeps prod_t exp(dt_t A) = exp(A sum_t dt_t), so that its half-life is log 2 / (-A mean dt).

    Args:
        model: A model with S state space layers of one shape.
        batch: Sequences of the suffix layout.

    Returns:
        (S, H, N), or (S, H, 1) where all states of a head decay alike: H is Mamba's number of channels or
        Mamba-2's number of heads.
    """
    scans = record_scans(model, batch.input_ids).values()
    steps = [scan.dt[:, 1 : 1 + batch.length].mean(dim=(0, 1)) for scan in scans]
    return torch.stack([math.log(2) / (-scan.A * dt[:, None]) for scan, dt in zip(scans, steps, strict=True)])


def alignment(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """How well a query's C points at what its symbol wrote: cosines of C with the B of context symbols.

    Args:
        model: A model with S state space layers.
        batch: Sequences of the suffix layout, of two symbols or more.

    Returns:
        Mean cosine with the B of the queried symbol, and with the B of all others; (S,) each.
    """
    found = []
    for scan in record_scans(model, batch.input_ids).values():
        B = scan.Bt[:, None, 1 : 1 + batch.length]  # (rows, 1, n, G, N)
        C = scan.Ct[:, batch.answer_at, None]  # (rows, K, 1, G, N)
        cosine = F.cosine_similarity(B, C, dim=-1).mean(-1)  # (rows, K, n)
        same = cosine.gather(2, batch.target_index[:, :, None])[:, :, 0]
        found.append([same.mean(), (cosine.sum(2) - same).mean() / (batch.length - 1)])
    same, others = torch.tensor(found).T
    return same, others


def measure(model: LanguageModel, batch: Batch) -> dict[str, float]:
    """All ingredients, averaged over layers.

    Args:
        model: A model with state space layers.
        batch: Sequences of the suffix layout.

    Returns:
        identity (a share), half_life (median over states, tokens), long (share of states with a half-life
        of `LENGTH` tokens or more), same and others (cosines).
    """
    lives = half_life(model, batch)
    same, others = alignment(model, batch)
    return dict(
        identity=float(identity_share(model).mean()),
        half_life=float(lives.median()),
        long=float((lives >= LENGTH).float().mean()),
        same=float(same.mean()),
        others=float(others.mean()),
    )


class Watched(trainer.Session):
    """A run whose ingredients are measured before the first step and at every evaluation."""

    def watch(self) -> None:
        """Add a row to `seen`: the ingredients on unseen sequences of the length in training."""
        now = self.progress
        (batch,) = heldout(self.task, ROWS, now.length, "validation")
        done: Row = dict(step=now.step, train_length=now.length, accuracy=now.validation)
        self.seen = [*getattr(self, "seen", []), done | measure(self.model, batch)]

    def evaluate(self, numbers: Row) -> None:
        """As every run, and the ingredients."""
        super().evaluate(numbers)
        self.watch()


def watched(config: RunConfig) -> list[Row]:
    """Train one model on one thread.

    Args:
        config: Its options.

    Returns:
        A row for every evaluation, the first before training.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        session = Watched(plan(config, config.model[0]), Path(folder), lambda event, row: None)
        session.watch()
        session.run()
    return [dict(model=config.model[0], seed=config.seed, lr=config.lr) | row for row in session.seen]


def rate(runs: Path, model: str) -> float:
    """The learning rate that a sweep chose for published first weights with learned positions.

    Args:
        runs: Folder of the sweeps' folders.
        model: A key of `SOURCES`.

    Returns:
        The rate.

    Raises:
        UserError: If the sweep has not chosen yet.
    """
    path = runs / SOURCES[model] / "learning_rates.json"
    command = f"python -m synthetic.sweep studies/what_mamba_lacks/{SOURCES[model]}.py"
    if not path.exists():
        raise UserError(f"RUNS {runs} has no {SOURCES[model]}/{path.name}; run {command} first")
    wanted: dict[str, Any] = dict(model=model, **POSITIONS_ALONE.options())
    for row in json.loads(path.read_text(encoding="utf-8")):
        if all(row[name] == value for name, value in wanted.items()) and row["lr"] is not None:
            return float(row["lr"])
    raise UserError(f"{path} has no rate for {wanted}; run {command} again")


def main(runs: str = RUNS) -> int:
    """Train everything and write built.csv; returns the exit status."""
    configs = [
        run
        for seed in SEEDS
        for model in SOURCES
        for run in ssm(model, [POSITIONS_ALONE], seed=seed, steps=STEPS, lr=rate(Path(runs), model))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        rows = [row for found in pool.map(watched, configs) for row in found]
    store.write_bytes(TABLE, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:2])))
