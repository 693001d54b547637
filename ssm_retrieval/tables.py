"""Tables as files and as text, for all that reads or writes them: probes, figures, studies."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssm_retrieval.errors import UserError

if TYPE_CHECKING:  # seconds, which `import analysis` can spare
    import pandas as pd


def read(path: Path) -> pd.DataFrame:
    """A Parquet file's rows, all of one moment: a run may replace the file meanwhile.

    Raises:
        FileNotFoundError: If there is no such file.
        UserError: If it is not Parquet; names the file and what to do.
    """
    import pandas as pd
    from pyarrow import ArrowException

    try:
        return pd.read_parquet(io.BytesIO(path.read_bytes()))
    except FileNotFoundError:
        raise
    except (ArrowException, ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot be read as Parquet ({reason}); delete it and run the command that made it again"
        ) from error


def markdown(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
