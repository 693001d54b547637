"""Measure the flow of information from an image's patches to the answers of trained VLMs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.errors import UserError
from ssm_retrieval.ops.memory import keep_freed_memory
from ssm_retrieval.terminal import plain_console
from ssm_retrieval.training import store
from ssm_retrieval.training.parquet import to_parquet
from vlm.folders import saved_run
from vlm.information_flow.targets import COLUMNS, target_ratios, target_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Options:
    """Measure what trained VLMs read from an image's patches, and what the patches write into the state.

    Each model answers grounding questions about held-out scenes. The patches of the object that the question
    asks for are compared with those of the scene's other shapes, layer by layer.
    """

    run: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Trained runs: folders that vlm.train printed."""
    out: Path
    """Parquet file to write: one row per run, layer, quantity and question."""
    examples: int = 100
    """Number of questions for each run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input."""
    keep_freed_memory()
    options = parse(Options, argv, "python -m vlm.information_flow")
    return guarded(lambda: measure(options), out=options.out)


def measure(options: Options) -> int:
    """Write the table of the command line's runs and print the ratios; returns the exit status.

    Raises:
        UserError: If no run is given, a run is not trained, or there are fewer than two examples.
    """
    import pandas as pd

    if not options.run:
        raise UserError("RUN is missing; give folders that vlm.train printed")
    if options.examples < 2:
        raise UserError(f"--examples {options.examples} must be at least 2, for an interval")
    table = pd.concat([target_table(*saved_run(path), options.examples) for path in options.run])
    rows: list[Any] = table.to_dict("records")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    store.write_bytes(options.out, to_parquet(rows, COLUMNS))
    show(target_ratios(table))
    print(options.out)
    return 0


def show(ratios: pd.DataFrame) -> None:
    """Print a table per run: a line per layer, quantity and place."""
    from rich import box
    from rich.table import Table

    console = plain_console()
    for run, part in ratios.groupby("run", sort=False):
        title = f"{run}: target's patches over other shapes' [95 % interval]"
        lines = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
        for name in ("layer", "quantity", "at", "at the same place", "as measured"):
            lines.add_column(name, no_wrap=True)
        for row in part.to_dict("records"):
            relative = f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            raw = f"{row['raw']:.2f} [{row['raw_low']:.2f}, {row['raw_high']:.2f}]"
            lines.add_row(str(row["layer"]), row["quantity"], row["at"], relative, raw)
        console.print(lines)


if __name__ == "__main__":
    sys.exit(main())
