"""The tables of the results store (`synthetic.results`) as pandas data frames."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import UserError

if TYPE_CHECKING:  # seconds, which `import analysis` can spare
    import pandas as pd

ORDER = ["run", "model", "kind", "step", "length"]  # rows are sorted by these, so that files can be compared


def load(runs: str | Path | Iterable[str | Path], table: str = "results") -> pd.DataFrame:
    """All evaluations in one or several places, one row each, sorted by run and step.

    runs: a folder of runs (what --out names), or a Parquet file of the same columns, such as a study's
        committed results. table: "results", or "targets" for right answers by part of the context (of a
        file results.parquet: targets.parquet beside it). Columns and their meaning:
        `synthetic.results.EVALUATION` and `TARGET`.
    Raises UserError, in one line, if there is nothing to read, or it is not of the results store.
    """
    import pandas as pd

    places = [runs] if isinstance(runs, (str, Path)) else list(runs)
    frames = []
    for path in (path for place in places for path in files(Path(place), table)):
        frames.append(pd.read_parquet(path))
        missing = [name for name in (*ORDER, "purpose", "accuracy")[: None if table == "results" else -1]
                   if name not in frames[-1]]  # fmt: skip
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; it is not a file of the results store")
    if not frames:
        raise UserError(f"no {table} in {', '.join(map(str, places))}; train some, or give another folder")
    return _joined(frames)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """A document with what stands between `<!-- NAME -->` and `<!-- /NAME -->` replaced by tables[NAME]."""
    for name, made in tables.items():
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split(f"<!-- /{name} -->")[1]
        text = f"{before}<!-- {name} -->\n{made}\n<!-- /{name} -->{after}"
    return text


def markdown(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def between(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """A number and its interval: "0.42 [0.40, 0.44]"."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def files(place: Path, table: str = "results") -> list[Path]:
    """The Parquet files of a table of a results store: of `synthetic.results`, or of `vlm.results`.

    Raises UserError, in one line, where `place` is neither a folder nor a file.
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
    import pandas as pd

    frames = [pd.read_parquet(path) for path in paths]
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
    tables = [pa.Table.from_pandas(frame, preserve_index=False) for frame in frames]
    return pd.DataFrame(pa.concat_tables(tables, promote_options="permissive").to_pandas())
