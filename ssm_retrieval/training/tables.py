"""The tables of a results store, of `synthetic.results` or `vlm.results`, as pandas data frames."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_retrieval import tables
from ssm_retrieval.errors import UserError
from ssm_retrieval.style import FAMILIES
from ssm_retrieval.training import records, store

if TYPE_CHECKING:  # seconds, which whoever imports this can spare
    import pandas as pd

ORDER = ["run", "model", "kind", "step", "length"]  # rows are sorted by these, so that files can be compared
NEEDED = {
    "results": (*ORDER, "purpose", "accuracy"),
    "targets": (
        *ORDER,
        "purpose",
        "task",
        "seq_len",
        "target_low",
        "target_high",
        "correct",
        "count",
        "chance",
    ),
}
# Columns of the results store that have to be numbers, and the least and largest they may be.
RANGES = {
    "seq_len": (1, None), "length": (1, None), "step": (0, None), "accuracy": (0, 1), "chance": (0, 1),
    "target_low": (0, None), "target_high": (1, None), "correct": (0, None), "count": (0, None),
}  # fmt: skip


def load(runs: str | Path | Iterable[str | Path], table: str = "results") -> pd.DataFrame:
    """All evaluations in one or several places, one row each, sorted by run and step.

    Args:
        runs: A folder of runs (what --out names), or a Parquet file of the same columns, such as a study's
            committed results; or several of them.
        table: "results", or "targets" for right answers by part of the context (of a file results.parquet:
            targets.parquet beside it).

    Returns:
        Columns and their meaning: `synthetic.results.EVALUATION` and `TARGET`.

    Raises:
        UserError: If there is nothing to read, a file is damaged, or it is not of the results store.
    """
    places = [runs] if isinstance(runs, (str, Path)) else list(runs)
    found = {path: read(path) for place in places for path in files(Path(place), table)}
    for path, frame in found.items():
        missing = [name for name in NEEDED[table] if name not in frame]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; it is not a file of the results store")
    if not found:
        where = ", ".join(map(str, places))
        for place in map(Path, places):
            if (place / store.CONFIG).is_file():
                raise UserError(
                    f"{place} is the folder of one run; give the one that it lies in, {place.parent}"
                )
        if any(_begun(Path(place)) for place in places):
            raise UserError(f"no {table} in {where} yet; wait for the first evaluation")
        raise UserError(f"no {table} in {where}; train some, or give another folder")
    if all(frame.empty for frame in found.values()):
        raise UserError(f"{', '.join(map(str, found))}: no rows; delete it and run the command that made it")
    return _joined(list(found.values()))


def _begun(place: Path) -> bool:
    """Whether a run in this folder has begun."""
    return place.is_dir() and any(place.glob("*/config.json"))


def read(path: Path) -> pd.DataFrame:
    """The rows of a file of the results store, as `ssm_retrieval.tables.read`.

    Raises:
        UserError: For a damaged file, numbers that are out of range, and models that are not registered.
    """
    from pandas.api.types import is_numeric_dtype

    frame = tables.read(path)
    for name, (least, most) in RANGES.items() if "seq_len" in frame else ():
        if name not in frame or frame.empty:
            continue
        column = frame[name]
        good = is_numeric_dtype(column) and column.notna().all()
        if not good or column.min() < least or (most is not None and column.max() > most):
            allowed = f"at least {least}" if most is None else f"between {least} and {most}"
            raise UserError(
                f"{path}: column {name} must be numbers {allowed}; delete it and run the command that made it"
            )
    families = set(frame.get("model", ())) if "seq_len" in frame else set()
    if families - set(FAMILIES):
        _use_modules_of(frame, path.parent.parent)
    unknown = sorted(map(str, families - set(FAMILIES)))
    if unknown:
        raise UserError(
            f"{path}: model {unknown[0]} is unknown; valid: {', '.join(FAMILIES)}; a model of your own needs "
            "--import and the module that registers it (or is this a newer version's file?)"
        )
    return frame


def _use_modules_of(frame: pd.DataFrame, folder: Path) -> None:
    """Import what the runs in a folder were made with (`--import`)."""
    for run in frame["run"].unique() if "run" in frame else ():
        path = folder / str(run) / store.CONFIG
        if path.exists():
            records.use_modules(records.read_file(path, records.Record), path)


def files(place: Path, table: str = "results") -> list[Path]:
    """The Parquet files of a table of a results store: of `synthetic.results`, or of `vlm.results`.

    Args:
        place: A folder of runs or of a study's results, or a Parquet file.
        table: "results" or "targets".

    Returns:
        Their paths, sorted; none if nothing was evaluated yet.

    Raises:
        UserError: If `place` is neither a folder nor a file.
    """
    if place.is_file():
        if table == "results":
            return [place]
        beside = place.with_name(f"{table}.parquet")
        return [beside] if place.name == "results.parquet" and beside.exists() else []
    if not place.is_dir():
        raise UserError(f"{place} does not exist; give a folder of runs or a Parquet file")
    own = place / f"{table}.parquet"
    return sorted((place / table).glob("*.parquet")) or ([own] if own.exists() else [])


def concatenated(paths: Iterable[Path]) -> pd.DataFrame | None:
    """The rows of several Parquet files of one kind, sorted as by `load`; None without files."""
    frames = [read(path) for path in paths]
    return _joined(frames) if frames else None


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    frame = _concat(frames)
    keys = [name for name in (*ORDER, "target_low") if name in frame]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def _concat(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """One frame; a column that is empty in some files keeps the type it has in the others."""
    import pandas as pd
    import pyarrow as pa

    if len(frames) == 1:
        return frames[0]
    try:
        parts = [pa.Table.from_pandas(frame, preserve_index=False) for frame in frames]
        return pd.DataFrame(pa.concat_tables(parts, promote_options="permissive").to_pandas())
    except pa.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"files of one folder differ in their columns' types ({reason}); read them apart"
        ) from error
