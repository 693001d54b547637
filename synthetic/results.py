"""The results store: two tidy Parquet data sets beside the runs, with a file for every run.

    runs/results/<run>.parquet   one row per evaluation: what was run, how far, how well it did
    runs/targets/<run>.parquet   one row per evaluation and part of the context: right answers there

Any number of processes may write at once, on one machine or on many that share the folder: a file belongs to
one run, is made anew from the run's own records (`training.store`) and replaced as a whole.
Read them with `analysis.load("runs")`, `pandas.read_parquet("runs/results")`, or in DuckDB
`select * from 'runs/results/*.parquet'`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_retrieval.registry import ARCHITECTURES
from ssm_retrieval.training import store
from ssm_retrieval.training.parquet import to_parquet
from ssm_retrieval.training.records import environment, finished
from ssm_retrieval.training.store import Row
from synthetic import records
from synthetic.identity import Plan
from synthetic.options import NO_OPTION

if TYPE_CHECKING:
    import pandas as pd

    from ssm_retrieval.training.distributed import World
    from synthetic.config import RunConfig
    from synthetic.trainer import Listener

RESULTS, TARGETS = "results", "targets"  # folders beside the runs

# Column: (Arrow type, meaning). The first group says what was run; it is the same in both data sets.
CONFIG = {
    "run": ("string", "folder of the run: readable, and unique by the hash of its configuration"),
    "purpose": ("string", "report, or validation for runs that chose a learning rate"),
    "task": ("string", "registry name of the task"),
    "task_options": ("string", "all options of the task, as JSON"),
    "layout": ("string", "suffix, prefix, instruction or two-pass; missing for a task's own"),
    "seq_len": ("int64", "context symbols, the goal of the run"),
    "num_symbols": ("int64", "different symbols"),
    "model": ("string", "architecture: transformer, mamba, mamba2, hybrid, or a user's own"),
    "preset": ("string", "size"),
    "position": ("string", "how a model learns about order; missing for SSMs without positions"),
    "rotary_pct": ("float64", "share of a head's dimensions that RoPE rotates; missing without RoPE"),
    "n_layer": ("int64", "blocks"),
    "d_model": ("int64", "width"),
    "d_state": ("int64", "states per channel; missing for Transformers"),
    "parameters": ("int64", "weights, with embeddings"),
    "parameters_without_embeddings": ("int64", "weights, without embeddings"),
    "queries": ("int64", "queries per training sequence"),
    "curriculum": ("int64", "context length at the start of training; 0 = none"),
    "lr": ("float64", "peak learning rate"),
    "steps": ("int64", "optimiser steps at most; missing if the budget counts sequences"),
    "budget": ("int64", "training sequences at most; missing if it counts steps"),
    "stop_at": ("float64", "validation accuracy at seq_len that ends training"),
    "batch_tokens": ("int64", "tokens per batch"),
    "weight_decay": ("float64", "of AdamW"),
    "warmup": ("int64", "steps"),
    "schedule": ("string", "of the learning rate"),
    "eval_every": ("int64", "steps between evaluations"),
    "seed": ("int64", "of weights and training data"),
    "device": ("string", "cpu, cuda or mps"),
    "precision": ("string", "float32 or bfloat16"),
    "commit": ("string", "of this project, of every session of the run; + if files differed from it"),
}
# Also of what was run, but younger than the tables of some studies, which lack these columns.
RECIPE = {
    "options": ("string", "NAME=VALUE of the task's options without a column; missing if it has none"),
    "heads": ("int64", "of attention, or of Mamba-2; missing for models without"),
    "d_conv": ("int64", "taps of the short convolution; missing for Transformers"),
    "window": ("int64", "tokens that attention sees; missing if it sees all, and for models without"),
    "ssm_init": ("string", "first weights of state space models; missing where there is no choice"),
    "batch_size": ("int64", "sequences per batch; missing if batch_tokens decides"),
    "label_smoothing": ("float64", "of the training loss"),
    "betas": ("string", "of AdamW"),
    "ssm_lr": ("float64", "factor on the learning rate of a state space's own parameters"),
    "flat": ("int64", "steps between warm-up and decay; missing if the decay begins with the first step"),
    "growth": ("string", "how short contexts grow (`synthetic.curricula`); prefix without a curriculum"),
}
YOUNGER = ("label_smoothing", "ssm_lr", "flat", "growth")  # which plans leave out at their defaults
PROGRESS = {
    "kind": ("string", "during: in training; final: after it, on more sequences"),
    "split": ("string", "validation in training, heldout in final rows; they share no sequence"),
    "step": ("int64", "optimiser steps done"),
    "examples": ("int64", "training sequences seen"),
    "tokens": ("int64", "training tokens seen"),
    "seconds": ("float64", "wall-clock time spent so far; the one column that another run does not repeat"),
    "train_length": ("int64", "context length that was being trained"),
    "length": ("int64", "context length of this evaluation"),
}
EVALUATION = {
    **CONFIG,
    **RECIPE,
    **PROGRESS,
    "train_loss": ("float64", "loss of the last training batch in nats, smoothed; missing in final rows"),
    "train_accuracy": ("float64", "of the last training batch, several queries each; missing in final rows"),
    "loss": ("float64", "cross-entropy of the answers in nats, on the sequences of `split`"),
    "accuracy": ("float64", "on the sequences of `split`, 0 .. 1"),
    "correct": ("int64", "right answers"),
    "count": ("int64", "answers"),
    "ci_low": ("float64", "Wilson 95 % interval of this evaluation alone"),
    "ci_high": ("float64", "its upper end"),
    "chance": ("float64", "accuracy of a guess"),
    "longest_length": ("int64", "longest context whose training accuracy passed 0.95; in final rows only"),
    "confirm_correct": ("int64", "of the second look that a pass of stop_at has to stand; else missing"),
    "confirm_count": ("int64", "its answers"),
    "reached": ("bool", "stop_at was passed twice in a row, which ended training; in final rows only"),
    "heldout_reached": ("bool", "the final held-out accuracy is stop_at or more; in final rows only"),
}
TARGET = {
    **CONFIG,
    **RECIPE,
    **PROGRESS,
    "target_low": ("int64", "first place of this part of the context, 0-based"),
    "target_high": ("int64", "one past its last place"),
    "correct": ("int64", "right answers whose target lies there"),
    "count": ("int64", "answers whose target lies there"),
    "chance": ("float64", "accuracy of a guess"),
}


SIZES = ("preset", "n_layer")  # named in a label wherever runs of one label differ in them
# Columns that a label never names: what a figure shows anyway, and what only identifies a run.
SHOWN = ("run", "purpose", "commit", "task", "seq_len", "d_state", "seed", "task_options", "layout", "model",
         "parameters", "parameters_without_embeddings", "position", "rotary_pct")  # fmt: skip


def begin(folder: Path, config: RunConfig, plan: Plan, purpose: str = "report") -> None:
    """Make the folder of a run, or add a session to it. The caller holds the folder's lock.

    Args:
        folder: Folder of the run.
        config: What was asked for.
        plan: What `config` comes to.
        purpose: "report" or "validation".

    Raises:
        UserError: If the folder is of an older version.
    """
    import torch

    settings = {"run": vars(config.of(plan.family)), "plan": plan.to_dict(), "purpose": purpose}
    if (folder / store.CONFIG).exists():
        records.config(folder)
    store.prepare(folder, settings, torch.get_num_threads())


def record(folder: Path) -> None:
    """Write what a run's records say into the data sets beside the run.

    Raises UserError if `folder` is not a run's.
    """
    rows, targets = tables(folder)
    for name, columns, content in ((RESULTS, EVALUATION, rows), (TARGETS, TARGET, targets)):
        path = folder.parent / name / f"{folder.name}.parquet"
        path.parent.mkdir(exist_ok=True)
        store.write_bytes(path, to_parquet(content, columns))


def train_recorded(
    plan: Plan,
    folder: Path,
    listener: Listener = lambda event, row: None,
    should_stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> Row:
    """`synthetic.trainer.train`, with the data sets brought up to date at every evaluation and the end.

    Args:
        plan: Plan of one model.
        folder: Folder of the run.
        listener: Called as listener(event, row).
        should_stop: Asked after every step.
        world: The processes that train together; one if None.

    Returns:
        The final evaluation.
    """
    from ssm_retrieval.training.distributed import World
    from synthetic.trainer import train

    world = world or World()

    def recording(event: str, row: Row) -> None:
        listener(event, row)
        # an evaluation has a row for each length; the full length is its last
        if event == "evaluation" and row["length"] == plan.seq_len:
            record(folder)

    result = train(plan, folder, recording, should_stop, world)
    if world.main:
        record(folder)
    return result


def complete(folder: Path) -> bool:
    """Whether a run has everything that it ever will, and its tables too."""
    there = all((folder / name).exists() for name in (store.RESULT, store.CONFIG, store.ENVIRONMENT))
    return there and not behind(folder)


def behind(folder: Path, purpose: str | None = None) -> bool:
    """Whether the data sets lack the end of a finished run, because a process ended before `record` did.

    What they hold decides, not the time of a file: clocks can step back. A damaged file lacks everything, one
    of another purpose than `purpose` too.
    """
    import pyarrow as pa
    from pyarrow import parquet

    for name in (RESULTS, TARGETS):
        path = folder.parent / name / f"{folder.name}.parquet"
        if not path.exists():
            return True
        content = io.BytesIO(path.read_bytes())
        try:
            found = parquet.read_table(content, columns=["kind", "purpose"]).to_pydict()
        except (pa.ArrowException, ValueError, OSError):  # Arrow has all three for a damaged file
            return True
        if "final" not in found["kind"] or (purpose is not None and {*found["purpose"]} != {purpose}):
            return True
    return False


def tables(folder: Path) -> tuple[list[Row], list[Row]]:
    """Rows of both data sets. Raises UserError if `folder` is not a run's."""
    saved = records.config(folder)
    fixed = config_columns(saved["plan"]) | {
        "run": folder.name,
        "purpose": saved.get("purpose", "report"),
        "commit": _commits(folder),
    }
    rows, targets = [], []
    for row in records.metrics(folder):
        rows.append(fixed | {"kind": "during"} | row)
        for low, high, correct, count in row["targets"]:
            part = dict(target_low=low, target_high=high, correct=correct, count=count)
            targets.append(fixed | {"kind": "during"} | row | part)
    if finished(folder):
        final = fixed | {"kind": "final"} | records.result(folder)
        rows.append(final)
        for row in records.by_position(folder):
            low = row["position"]
            part = dict(target_low=low, target_high=low + 1, correct=row["correct"], count=row["count"])
            targets.append(final | part)
    return rows, targets


def _commits(folder: Path) -> str | None:
    """Of all sessions, each once and in order."""
    if not (folder / store.ENVIRONMENT).exists():
        return None
    commits = [session.get("commit") for session in environment(folder)["sessions"]]
    return ", ".join(dict.fromkeys(commit for commit in commits if commit)) or None


def config_columns(plan: Row) -> Row:
    """The CONFIG and RECIPE columns that a plan (as a dictionary) determines."""
    from ssm_retrieval import models

    options, family = plan["task_options"], plan["family"]
    shape: Any = models.config(plan["model"], **plan["model_overrides"])
    named = {*CONFIG, NO_OPTION}  # options that have a column, and what --init decides
    schemes = ARCHITECTURES[family].positions
    scheme = shape.position if schemes and {schemes[0], shape.position} != {"none"} else None
    return {name: plan[name] for name in CONFIG if name in plan} | {
        "task_options": json.dumps(options, sort_keys=True),
        "layout": options.get("layout"),
        "options": " ".join(f"{n}={v}" for n, v in sorted(options.items()) if n not in named) or None,
        "num_symbols": _num_symbols(plan["task"], json.dumps(options)),
        "model": family,
        # models from one checkpoint are of one size, and to be told from those of a preset
        "preset": plan["init"]["path"] if "init" in plan else plan["model"].removeprefix(f"{family}-"),
        "position": scheme,
        "rotary_pct": shape.rotary_pct if scheme == "rope" else None,
        "n_layer": shape.n_layer,
        "d_model": shape.d_model,
        "d_state": getattr(shape, "d_state", None),
        "heads": getattr(shape, "n_head", None),
        "d_conv": getattr(shape, "d_conv", None) if getattr(shape, "short_conv", True) else None,
        "ssm_init": getattr(shape, "ssm_init", None),
        "window": getattr(shape, "window", 0) or None,
        "batch_size": plan["batch_size"],
        "betas": " ".join(map(str, plan["betas"])),
        **{name: plan.get(name, getattr(Plan, name)) for name in YOUNGER},
    }


@lru_cache(maxsize=64)
def _num_symbols(task: str, options: str) -> int:
    from synthetic import tasks

    return tasks.build(task, **json.loads(options)).vocabulary.num_symbols


def apart(table: pd.DataFrame, cell: list[str]) -> list[str]:
    """Columns of the configuration that differ within a cell, so that a seed stands in it more than once."""
    others = [name for name in CONFIG if name not in cell and name not in SHOWN and name not in SIZES]
    others += [name for name in RECIPE if name in table]
    counts = table.groupby(cell, dropna=False)[others].nunique(dropna=False)
    return [name for name in others if (counts[name] > 1).any()]


def cell_of(table: pd.DataFrame) -> list[str]:
    """Columns that make cells in which a seed stands once: `outcomes.CELL` and all that differs within it."""
    from ssm_retrieval.training.outcomes import CELL

    cell = list(CELL)
    return [*cell, *apart(table, [*cell, "seed"])]
