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
    """Make a data set known by its name to configs and the evaluator.

    Returns:
        The same data set.

    Raises:
        UserError: If the name is taken.
    """
    if dataset.name in DATASETS:
        raise UserError(f"data set {dataset.name!r} is registered already; give yours another name")
    DATASETS[dataset.name] = dataset
    return dataset


for _known in datasets.OFFICIAL:
    register(_known)


def check(name: str, split: str) -> DataSet:
    """Return the data set of a name, after checking that it has a split.

    Args:
        name: Name of the data set.
        split: Split that it must have.

    Returns:
        The declaration.

    Raises:
        UserError: If the name or the split is unknown; lists the valid ones.
    """
    if name not in DATASETS:
        names = ", ".join(sorted(DATASETS))
        raise UserError(
            f"data set {name!r} is unknown; the names are {names}; a data set of your own needs --import and "
            "the module that registers it"
        )
    found = DATASETS[name]
    if split not in found.splits:
        raise UserError(f"split {split!r} of {name} is unknown; the splits are {', '.join(found.splits)}")
    return found


def asked_for(dataset: DataSet, regions: str) -> DataSet:
    """Return the declaration for what regions ask for.

    Args:
        dataset: A declaration.
        regions: "grounding", or "dense captioning", which asks for descriptions of boxes and has no metric.

    Returns:
        `dataset`, with another task if it has phrases and boxes and `regions` is "dense captioning".
    """
    if regions == "dense captioning" and dataset.task.record is Grounded:
        return dataclasses.replace(dataset, task=tasks.DENSE_CAPTIONING, metric=None)
    return dataset


def read(name: str, folder: str | Path, split: str, **options: str) -> Iterable[Record]:
    """Read one split of a data set, in the order of its official files.

    Args:
        name: Name of the data set.
        folder: Folder with its official files.
        split: Split of the data set.
        **options: Options of the reader, such as `expressions="last"` of RefCOCO.

    Returns:
        The records.

    Raises:
        UserError: If the name or the split is unknown, or a file is missing or malformed. Errors of files may
            come with the first record.
    """
    return check(name, split).reader(Path(folder), split, **options)


def table() -> str:
    """Return the data sets and their files as a table in Markdown; docs/data.md has it."""
    rows = [
        f"| `{name}` | {', '.join(d.splits)} | {', '.join(f'`{file}`' for file in d.files)} | "
        f"`{d.images}` | `{d.task.record.__name__}` |"
        for name, d in DATASETS.items()
    ]
    return "\n".join(["| data set | splits | files | pictures | record |", "|---|---|---|---|---|", *rows])


def asked_table() -> str:
    """Return tasks and metrics of the data sets as a table in Markdown; docs/data.md has it."""
    head = ["| data set | task | turns | answer | metric | right is | the paper's splits |", "|" + "---|" * 7]
    rows = []
    for name, d in DATASETS.items():
        scored = "- | -" if d.metric is None else f"`{d.metric.name}` | {d.metric.rule}"
        turns, asked = d.turns or "all", ", ".join(d.asked) or "-"
        rows.append(
            f"| `{name}` | {d.task.name} | {turns} | {d.max_new_tokens} tokens | {scored} | {asked} |"
        )
    return "\n".join([*head, *rows])
