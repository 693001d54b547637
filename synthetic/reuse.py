"""A model that another command has trained to the end with the same plan is taken from there, not trained
again.

A run's folder is named by all its models, so `--model mamba` after `--model transformer mamba` is another
run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import distributed, records, store
from synthetic import train
from synthetic.identity import Plan, run_id

FILES = (train.SINGLE, "model.safetensors", "config.json", "result.json")  # the last marks it as finished


def take(plan: Plan, folder: Path) -> Path | None:
    """Copy plan.family into `folder` from a finished run beside it; returns that run, or None.

    A model that has begun in `folder` goes on there. The caller holds the folder's lock.
    """
    own = folder / plan.family
    if any((own / name).exists() for name in FILES) or distributed.saved(own) is not None:
        return None
    other = find(plan, folder)
    if other is not None:
        _copy(plan.family, other, folder)
    return other


def find(plan: Plan, folder: Path) -> Path | None:
    """Another run beside `folder` that has finished this very plan, under this version of the trainer."""
    for result in sorted(folder.parent.glob(f"*/{plan.family}/result.json")):
        other = result.parent.parent
        if other == folder or not all((result.parent / name).exists() for name in FILES):
            continue
        try:
            plans = [Plan(**saved) for saved in records.config(other)["plans"]]
        except (UserError, OSError):  # somebody else's trouble
            continue
        same = any(p.identity() == plan.identity() for p in plans)
        if same and run_id(plans) == other.name:  # which another TRAINING_VERSION would have named otherwise
            return other
    return None


def _copy(family: str, other: Path, folder: Path) -> None:
    for name in ("metrics.jsonl", "by_position.jsonl"):
        mine = [row for row in store.read_rows(folder / name) if row["model"] != family]
        theirs = [row for row in store.read_rows(other / name) if row["model"] == family]
        store.write_rows(folder / name, mine + theirs)
    if (other / "environment.json").exists():
        now = records.environment(folder)["sessions"]
        for session in (*records.environment(other)["sessions"], now[-1]):
            store.add_session(folder / "environment.json", session)
    (folder / family).mkdir(exist_ok=True)
    for name in FILES:
        with store.replacing(folder / family / name) as temporary:
            shutil.copyfile(other / family / name, temporary)
