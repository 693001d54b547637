"""Tables with declared columns as Parquet files."""

from __future__ import annotations

import io
from typing import Any

Row = dict[str, Any]


def to_parquet(rows: list[Row], columns: dict[str, tuple[str, str]]) -> bytes:
    """A Parquet file of `rows` with exactly these columns; missing values are null."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [
            pa.field(n, pa.type_for_alias(kind), metadata={"meaning": text})
            for n, (kind, text) in columns.items()
        ]
    )
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows], schema=schema)
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    return content.getvalue()


def rows_of(table: Any) -> list[Row]:
    """The rows of a pandas data frame, as `to_parquet` takes them: missing values are None."""
    return table.astype(object).where(table.notna(), None).to_dict("records")
