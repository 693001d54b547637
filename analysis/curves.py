"""`python -m analysis.curves RUNS --out figures/`: the figures of a sweep as PNG, PDF and CSV."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro

from ssm_retrieval.cli import guarded, parse
from ssm_retrieval.errors import UserError

DIGITS = 10  # of numbers in CSV files

Table = pd.DataFrame
Drawn = tuple[str, Table, Callable[[], Any] | None]  # name, table behind it, figure (None: a table only)


@dataclass(frozen=True)
class Options:
    """Draw the learning curves, thresholds, state sizes and position maps of runs, and write their tables.

    RUNS is a folder of runs (the --out of synthetic.sweep or synthetic.run) or the results.parquet of a
    study, which has everything but the trained models: the geometry of position tokens needs the folder.
    """

    runs: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Folder of runs, or a results.parquet."""
    out: Path = Path("figures")
    """Folder for the figures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input gives one line and status 2."""
    options = parse(Options, argv, "python -m analysis.curves")
    return guarded(lambda: _print_all(options), out=options.out)


def _print_all(options: Options) -> int:
    import matplotlib

    matplotlib.use("Agg")
    for name in write(options.runs, options.out):
        print(name)
    return 0


def write(runs: Path, out: Path) -> Iterator[str]:
    """Write all figures and tables; yields a line on each. Raises UserError if there are no runs."""
    from analysis.settings import DENSE
    from ssm_retrieval.style import theme
    from ssm_retrieval.training.tables import files, load

    evaluations = load(runs)
    targets = load(runs, "targets") if files(runs, "targets") else None
    if targets is None:
        yield "no targets beside the results: figures by position are left out"
    evaluations, targets, early = reported(evaluations, targets)
    if evaluations.empty and not early:
        raise UserError(f"{runs} has no reported runs yet, only validation; let the sweep go on")
    out.mkdir(parents=True, exist_ok=True)
    if early:
        yield f"{early} runs have no evaluation at their full length yet and are left out"
    if evaluations.empty:
        return
    tasks = sorted(evaluations["task"].unique())
    with theme():
        for task in tasks:
            mine = evaluations[evaluations["task"] == task], targets[targets["task"] == task]
            prefix = f"{task}-" if len(tasks) > 1 else ""
            for name, table, draw in figures(*mine):
                yield _write(out / f"{prefix}{name}", table, draw)
            if runs.is_dir() and task in DENSE:  # the tasks whose answers are positions
                for name, table, draw in _geometry(runs, task):
                    yield _write(out / f"{prefix}{name}", table, draw)


def reported(evaluations: Table, targets: Table | None) -> tuple[Table, Table, int]:
    """Both tables without the runs that only served to choose settings; how many runs are left out as early.

    Evaluations are of runs that have one at their full length. targets None: an empty table.
    """
    evaluations = evaluations[evaluations["purpose"] == "report"]
    targets = evaluations.iloc[:0] if targets is None else targets[targets["purpose"] == "report"]
    full = evaluations["length"].eq(evaluations["seq_len"])
    begun = full.groupby([evaluations["run"], evaluations["model"]])
    return evaluations[begun.transform("any")], targets, int((~begun.any()).sum())


def figures(evaluations: Table, targets: Table) -> Iterator[Drawn]:
    """Everything that can be said from the two tables of the results store, for one task."""
    from analysis.comparisons import comparisons
    from analysis.plots import sweep
    from ssm_retrieval.training.outcomes import summarise
    from synthetic.results import cell_of

    yield "summary", summarise(evaluations, by=cell_of(evaluations)), None
    curves = sweep.accuracy_table(evaluations)
    yield "accuracy_curves", curves, lambda: sweep.accuracy_curves(curves)
    for unit in sweep.UNITS:
        thresholds = sweep.threshold_table(evaluations, unit)
        yield f"{unit}_vs_length", thresholds, partial(sweep.cost_vs_length, thresholds)
    yield "scaling", sweep.scaling_table(evaluations), None
    yield "comparisons", comparisons(thresholds), None
    states = sweep.state_table(evaluations)
    yield "state_size", states, (lambda: sweep.state_size(states)) if len(states) else None
    if len(targets):
        heat = sweep.heat_table(targets)
        yield "position_step", heat, (lambda: sweep.position_step(heat)) if len(heat) else None
        final = sweep.position_table(targets)
        yield "by_position", final, (lambda: sweep.by_position(final)) if len(final) else None


def _geometry(runs: Path, task: str) -> Iterator[Drawn]:
    from analysis import geometry

    summary, maps, points = geometry.measure(runs, task)
    if len(summary):
        yield "position_geometry", summary, lambda: geometry.geometry(summary, maps, points)
        yield "position_geometry_cosines", maps, None
        yield "position_geometry_pca", points, None


def _write(path: Path, table: Table, draw: Callable[[], Any] | None) -> str:
    from ssm_retrieval.style import save
    from ssm_retrieval.training.store import write_bytes

    if table.empty:
        return f"{path}: left out, no runs to show it"
    write_bytes(path.with_suffix(".csv"), csv(table))
    if draw is None:
        return f"{path}.csv"
    save(draw(), path)
    return f"{path}.png .pdf .csv"


def csv(table: Table) -> bytes:
    """A table as the CSV behind a figure."""
    return table.to_csv(index=False, float_format=f"%.{DIGITS}g").encode()


if __name__ == "__main__":
    sys.exit(main())
