"""Data sets by name: `read` gives their records; `register` adds one of yours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from ssm_retrieval.errors import UserError
from vlm.data import datasets, tasks
from vlm.data.declaration import DataSet
from vlm.data.records import Grounded, Record

DATASETS: dict[str, DataSet] = {}


def register(dataset: DataSet) -> DataSet:
    """Make a data set known by its name, to configs and to the evaluator; returns it.

    Raises UserError for a name that is taken.
    """
    if dataset.name in DATASETS:
        raise UserError(f"data set {dataset.name!r} is registered already; give yours another name")
    DATASETS[dataset.name] = dataset
    return dataset


for _known in datasets.OFFICIAL:
    register(_known)


def check(name: str, split: str) -> DataSet:
    """The data set of a name that has this split. Raises UserError, with the valid ones, for others."""
    if name not in DATASETS:
        raise UserError(f"data set {name!r} is unknown; the names are {', '.join(sorted(DATASETS))}")
    found = DATASETS[name]
    if split not in found.splits:
        raise UserError(f"split {split!r} of {name} is unknown; the splits are {', '.join(found.splits)}")
    return found


def asked_for(dataset: DataSet, regions: str) -> DataSet:
    """The data set, or, of phrases and boxes with regions "dense captioning", the boxes to be described.

    Descriptions have no metric.
    """
    if regions == "dense captioning" and dataset.task.record is Grounded:
        return dataclasses.replace(dataset, task=tasks.DENSE_CAPTIONING, metric=None)
    return dataset


def read(name: str, folder: str | Path, split: str, **options: str) -> Iterable[Record]:
    """Records of one split of a data set whose official files are in ``folder``, in the files' order.

    ``options`` are the reader's own, such as ``expressions="last"`` of RefCOCO. Raises UserError for unknown
    names and splits (listing the valid ones) and for malformed and
    missing files; those of files may come with the first record.
    """
    return check(name, split).reader(Path(folder), split, **options)


def table() -> str:
    """The data sets and their files as a table in Markdown; docs/data.md holds it."""
    rows = [
        f"| `{name}` | {', '.join(d.splits)} | {', '.join(f'`{file}`' for file in d.files)} | "
        f"`{d.task.record.__name__}` |"
        for name, d in DATASETS.items()
    ]
    return "\n".join(["| data set | splits | files | record |", "|---|---|---|---|", *rows])


def asked_table() -> str:
    """What is asked and how it is scored as a table in Markdown; docs/data.md holds it."""
    head = ["| data set | task | turns | answer | metric | right is | the paper's splits |", "|" + "---|" * 7]
    rows = []
    for name, d in DATASETS.items():
        scored = "- | -" if d.metric is None else f"`{d.metric.name}` | {d.metric.rule}"
        turns, asked = d.turns or "all", ", ".join(d.asked) or "-"
        rows.append(
            f"| `{name}` | {d.task.name} | {turns} | {d.max_new_tokens} tokens | {scored} | {asked} |"
        )
    return "\n".join([*head, *rows])
