"""Scores of predictions, and the tidy table that they go to.

runs/vlm/results/<run>.parquet   a row per task and metric of an evaluated run
runs/vlm/results/<run>.jsonl     what was asked and answered, example by example
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_retrieval.errors import UserError
from vlm.data.declaration import Scored
from vlm.data.samples import Sample
from vlm.metrics import Row, catalogue
from vlm.schema import remove_left, shortened

if TYPE_CHECKING:
    from vlm.config import Run

VERSION = 3  # raise it when the same answers lead to other rows
RESULTS = "results"
COLUMNS = {
    "run": ("string", "name in the config file"),
    "stage": ("string", "folder of the trained weights"),
    "evaluation": ("string", "hash of what was asked, how, and how it was scored"),
    "family": ("string", "mamba, transformer, ..."),
    "model": ("string", "preset"),
    "init": ("string", "pretrained language model that it began with; empty = none"),
    "layout": ("string", "where the image stands: `vlm.prompts.LAYOUTS`"),
    "image_size": ("int64", "pixels a side that the encoder sees"),
    "image_tokens": ("int64", "places of an image in the sequence"),
    "seed": ("int64", "of weights and order of data"),
    "task": ("string", "name in the run's evaluation"),
    "split": ("string", "of the evaluation data"),
    "metric": ("string", "accuracy, iou@0.5, mean_iou, cider, ..."),
    "value": ("float64", "0 .. 1 (CIDEr: 0 .. 10)"),
    "ci_low": ("float64", "Wilson 95 % interval of shares, of this evaluation alone"),
    "ci_high": ("float64", "its upper end"),
    "count": ("int64", "examples"),
    "chance": ("float64", "of a guess among the answers that a question allows; missing where there is none"),
    "question_only": ("float64", "of the best answer without the image, learned from training questions"),
    "image_only": (
        "float64",
        "of the best answer to the scene, whichever object is asked for; main metric only",
    ),
    "tokenizer": ("string", "of captions: ptb, the official one, which needs Java, or regex, close to it"),
    "parameters": ("int64", "of language model and connector"),
    "steps": ("int64", "optimiser steps of all stages"),
    "seconds": ("float64", "of training, all stages"),
    "commit": ("string", "of this project; + if files differed from it"),
}
GUESSES = ("chance", "question_only", "image_only")  # what a model must do better than
NEEDED = ("run", "stage", "evaluation", "family", "task", "metric", "value")  # never missing


def table_path(out: Path, run: str) -> Path:
    """Where a run's rows go; runs that share their last stage have a table each."""
    return out / RESULTS / f"{run}.parquet"


def answers_path(out: Path, run: str) -> Path:
    """Where a run's answers go."""
    return out / RESULTS / f"{run}.jsonl"


def declared(sample: Sample) -> Scored:
    """How answers to a sample are scored, as its source declares it.

    Raises:
        UserError: For a source that is none of the scenes' and no registered data set.
    """
    from vlm.data import registry
    from vlm.scenes.declared import SCENES

    if sample.source in SCENES:
        return SCENES[sample.source]
    if sample.source not in registry.DATASETS:
        raise UserError(f"data set {sample.source!r} is not registered; use vlm.data.registry.register")
    return registry.asked_for(registry.DATASETS[sample.source], sample.task)


def right(sample: Sample, said: str) -> bool | None:
    """Whether an answer is right by its data set's metric.

    None where that is no matter of yes or no, or where the right answer is hidden.
    """
    if not sample.target:  # nobody knows, as of a user's own question
        return None
    metric = declared(sample).metric
    return None if metric is None else metric.right(sample.target, said)


def score(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    """Rows (metric, value, count, and ci_low, ci_high of shares) of one data set's answered samples.

    [] for data sets without a metric, such as conversations, for captions of official files where
    pycocoevalcap is missing, and for hidden answers.
    """
    metric = declared(samples[0]).metric if samples[0].target else None
    return [] if metric is None else metric.rows(samples, answers)


def fingerprint(run: Run) -> str:
    """Hash of what a table of this run depends on beside its weights: what is asked, how, and the scores."""
    from vlm.data.sources import VERSION as FILES
    from vlm.scenes import VERSION as SCENES

    asked = []
    for name, data in run.evaluation.items():
        scored = data.declared()
        metric = scored.metric and scored.metric.name
        how = dataclasses.asdict(data), data.stamps(), scored.max_new_tokens, metric, scored.chance
        asked.append((name, *how))
    scores = catalogue.caption_tokenizer()
    said = [VERSION, SCENES, FILES, asked, run.layout, run.max_new_tokens, scores]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def write(out: Path, run: str, rows: Sequence[Mapping[str, Any]], answers: Sequence[Row]) -> Any:
    """Write one run's rows as Parquet with exactly COLUMNS, and its answers.

    Args:
        out: The folder of all stages.
        run: The run's name.
        rows: Rows of the table.
        answers: What was asked and answered, a row each.

    Returns:
        The table, as `read` gives it.
    """
    from filelock import FileLock

    from ssm_retrieval.training import store
    from ssm_retrieval.training.parquet import to_parquet

    table, said = table_path(out, run), answers_path(out, run)
    table.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(table.with_name(f".{run}.lock")):
        remove_left(said)
        store.write_rows(said, answers)
        remove_left(table)
        store.write_bytes(table, to_parquet([dict(row) for row in rows], COLUMNS))
    return read(table)


def read(path: Path) -> Any:
    """A table that `write` has made, as a data frame.

    Raises:
        UserError: For a damaged one.
    """
    import pyarrow as pa
    from pyarrow import compute, parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({shortened(str(error))})") from None
    for name, (kind, _) in COLUMNS.items():
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r}: it is damaged, or of another version")
        column = table[name]
        if column.type != pa.type_for_alias(kind):
            raise UserError(f"{path} is damaged (column {name!r} is {column.type}, not {kind})")
        if name in NEEDED and (
            column.null_count or (kind == "float64" and compute.any(compute.is_nan(column)).as_py())
        ):
            raise UserError(f"{path} is damaged (column {name!r} has missing values)")
    return table.to_pandas()
