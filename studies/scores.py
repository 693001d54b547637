"""The committed scores of a study of VLMs, and what its models cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from vlm.config import Run
from vlm.results import COLUMNS, table_path


def collect(runs: Sequence[Run], out: Path, to: Path) -> None:
    """Write the scores of runs as one table. Runs of an earlier table that are not among them stay.

    So a study can be measured in parts, on machines that do not share a folder.

    Args:
        runs: Runs of the study, all of them evaluated.
        out: What `vlm.evaluate --out` named.
        to: Parquet file with the columns `vlm.results.COLUMNS`, there already or not.

    Raises:
        SystemExit: If a run has no results; one line says which.
    """
    from ssm_retrieval.training.parquet import rows_of, to_parquet
    from ssm_retrieval.training.tables import concatenated

    missing = [run.name for run in runs if not table_path(out, run.name).exists()]
    if missing:
        raise SystemExit(f"error: {out} has no results of {missing[0]}; run vlm.train and vlm.evaluate first")
    found = concatenated([table_path(out, run.name) for run in runs])
    assert found is not None
    rows = rows_of(found)
    if to.exists():
        new = {run.name for run in runs}
        rows = [row for row in rows_of(pd.read_parquet(to)) if row["run"] not in new] + rows
    store.write_bytes(to, to_parquet(rows, COLUMNS))


def cost(results: pd.DataFrame, families: Sequence[str]) -> str:
    """Return a Markdown table of weights, steps and seconds of the models.

    Args:
        results: Scores of runs that all have the same stages.
        families: Families, in the order of the rows.

    Returns:
        The table.
    """
    rows = []
    for family in families:
        mine = results[results["family"] == family]
        first = mine.iloc[0]
        seconds = f"{mine['seconds'].min():.0f} to {mine['seconds'].max():.0f}"
        rows.append([NAMES[family], f"{first['parameters']:,}", int(first["steps"]), seconds])
    return markdown(["model", "weights", "steps", "seconds of a model"], rows)
