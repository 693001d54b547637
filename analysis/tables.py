"""The tables of the results store (`synthetic.results`) as pandas data frames."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # seconds, which `import analysis` can spare
    import pandas as pd

ORDER = ["run", "model", "kind", "step", "length"]  # rows are sorted by these, so that files can be compared


def load(runs: str | Path | Iterable[str | Path], table: str = "results") -> pd.DataFrame:
    """All evaluations below one or several places, one row each, sorted by run and step.

    runs: a folder of runs (what --out names), or a Parquet file of the same columns, such as a study's
        committed results. table: "results", or "targets" for right answers by part of the context.
        Columns and their meaning: `synthetic.results.EVALUATION` and `TARGET`.
    Raises ValueError, in one line, if there is nothing to read.
    """
    import pandas as pd

    places = [runs] if isinstance(runs, (str, Path)) else list(runs)
    frames = [pd.read_parquet(path) for place in places for path in _files(Path(place), table)]
    if not frames:
        raise ValueError(f"no runs in {', '.join(map(str, places))}; train some, or give another folder")
    frame = _concat(frames)
    keys = [name for name in (*ORDER, "target_low") if name in frame]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def _files(place: Path, table: str) -> list[Path]:
    if place.is_file():
        # a study's other table lies beside the one that is named
        other = place.with_name(place.name.replace("results", table))
        return [other] if other.exists() else []
    if not place.is_dir():
        raise ValueError(f"{place} does not exist; give a folder of runs or a Parquet file")
    own = place / f"{table}.parquet"
    return sorted((place / table).glob("*.parquet")) or ([own] if own.exists() else [])


def _concat(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """One frame; a column that is empty in some files keeps the type it has in the others."""
    import pandas as pd
    import pyarrow as pa

    if len(frames) == 1:
        return frames[0]
    tables = [pa.Table.from_pandas(frame, preserve_index=False) for frame in frames]
    return pd.DataFrame(pa.concat_tables(tables, promote_options="permissive").to_pandas())
