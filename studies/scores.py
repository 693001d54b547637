"""The committed scores of a study of VLMs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ssm_retrieval.training import store
from vlm.config import Run
from vlm.results import COLUMNS, table_path


def collect(runs: Sequence[Run], out: Path, to: Path) -> None:
    """Write the scores of runs as one table.

    Args:
        runs: The study's runs, all of them evaluated.
        out: What `vlm.evaluate --out` named.
        to: Parquet file with the columns `vlm.results.COLUMNS`.

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
    store.write_bytes(to, to_parquet(rows_of(found), COLUMNS))
