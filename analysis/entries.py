"""What `python -m analysis.figures` can draw: an `Entry` for each figure and table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import diagrams, published, vlm_plots
from analysis.comparisons import comparisons
from analysis.plots import sweep
from analysis.settings import DENSE
from ssm_retrieval.errors import UserError
from ssm_retrieval.training.outcomes import summarise
from ssm_retrieval.training.store import WEIGHTS
from ssm_retrieval.training.tables import concatenated, files, load
from synthetic.results import cell_of

STUDIES = Path(__file__).resolve().parent.parent / "studies"
SYNTHETIC, VLM = "retrieval_cpu", "vlm_retrieval"  # the studies whose committed tables are drawn by default
ABSENT = "the studies' tables come with the repository, not with the package; give your own RUNS"
DRAWN = "a drawing, no measurement"
VLM_FIGURES = "fig3_resolution, fig4_layouts"


@dataclass(frozen=True)
class Entry:
    """One figure or table.

    Attributes:
        name: Name of its files, without an ending.
        title: What it shows, in a few words.
        source: Whose numbers it shows; `DRAWN` for a drawing.
        table: The table behind it, written as CSV.
        draw: Makes the figure; None if there is only a table.
        texts: Contents of text files to write beside it, by ending.
    """

    name: str
    title: str
    source: str
    table: pd.DataFrame
    draw: Callable[[], Any] | None = None
    texts: dict[str, str] | None = None


def of_paper(width: float, studies: bool = True) -> Iterator[Entry | str]:
    """Yield the paper's figures in their order, or one line for each that is left out.

    Args:
        width: Width of the figures of VLMs, in inches.
        studies: Draw the tables of this repository's studies, too; False for published numbers only.

    Yields:
        Entries, and lines that say what is left out and why.
    """
    asked, tokens = diagrams.task_table(), diagrams.synthetic_table()
    yield Entry("fig1_architecture", "Mamba-VL and Pythia-VL", DRAWN, _lengths(), diagrams.architecture)
    yield Entry(
        "fig2_tasks", "What each task asks and answers", DRAWN, asked, lambda: diagrams.task_overview(asked)
    )
    if studies:
        yield from of_vlm(STUDIES / VLM / "results.parquet", f"measured: studies/{VLM}", width)
    else:
        yield f"{VLM_FIGURES}: left out, the paper gives their numbers only as figures; draw your own RUNS"
    yield Entry("fig5_synthetic_task", "The synthetic retrieval task", DRAWN, tokens,
                lambda: diagrams.synthetic_task(tokens))  # fmt: skip
    if studies:
        yield from of_synthetic(STUDIES / SYNTHETIC, f"measured: studies/{SYNTHETIC}")
    else:
        yield "synthetic curves: left out, the paper gives their numbers only as a figure"
    yield from _published(width)


def of_runs(runs: Path, width: float) -> Iterator[Entry | str]:
    """Yield what the user's own runs have measured, or one line for each figure that is left out.

    Args:
        runs: Folder of runs, or a Parquet file of their results.
        width: Width of the figures of VLMs, in inches.

    Yields:
        Entries, and lines that say what is left out and why.

    Raises:
        UserError: `runs` has no results that can be read.
    """
    if not runs.exists():
        raise UserError(f"RUNS {runs} does not exist; give a folder of runs or a results.parquet")
    if not files(runs):
        load(runs)  # says what is missing
    yield from of_vlm(runs, "measured: your runs", width)
    yield from of_synthetic(runs, "measured: your runs")


def _lengths() -> pd.DataFrame:
    """Lengths of the sequence that Fig. 1 draws."""
    from vlm.layout import grid_side, image_ids

    rows = [
        dict(pixels=pixels, grid=grid_side(pixels), patches=grid_side(pixels) ** 2,
             image_tokens=len(image_ids(grid_side(pixels))))
        for pixels in (224, 336, 480)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _published(width: float) -> Iterator[Entry]:
    table = published.results()
    gaps, means = published.gaps(table), published.mean_gaps(table)
    yield Entry("gap_vs_scale", "Grounding gap against scale", published.SOURCE, gaps,
                lambda: vlm_plots.gap_vs_scale(table, width))  # fmt: skip
    yield Entry("mean_gaps", "Mean gaps, with and without the suspect cell", published.SOURCE, means)
    texts = {"md": vlm_plots.markdown(table), "tex": vlm_plots.latex(table)}
    yield Entry("results", "Published results", published.SOURCE, table, texts=texts)


# --- VLMs -------------------------------------------------------------------------------------------------


def of_vlm(place: Path, source: str, width: float) -> Iterator[Entry | str]:
    """Yield Figs. 3 and 4 from results of `vlm.evaluate`.

    Args:
        place: Folder of runs, or a Parquet file of their results.
        source: What the figures say of whose numbers they show.
        width: Their width in inches.

    Yields:
        Entries, and lines that say what is left out and why.
    """
    if not place.exists():
        yield f"{VLM_FIGURES}: left out, {ABSENT}"
        return
    found = concatenated(files(place))
    if found is None or "metric" not in found:
        yield f"{VLM_FIGURES}: left out, {place} has no results of vlm.evaluate"
        return
    for name, title, what, make, draw in (
        ("fig3_resolution", "Resolution", "resolution", vlm_plots.resolution_table, vlm_plots.resolution),
        ("fig4_layouts", "Layouts against agnostic", "layout", vlm_plots.layout_table, vlm_plots.layouts),
    ):
        table = make(found)
        if table.empty:
            yield f"{name}: left out, the runs have only one {what}"
        else:
            yield Entry(name, title, source, table, partial(draw, table, width))


# --- the synthetic tasks ----------------------------------------------------------------------------------


def of_synthetic(place: Path, source: str) -> Iterator[Entry | str]:
    """Yield the figures and tables of a sweep of `synthetic.run`, task by task.

    Names begin with the task where there are several.

    Args:
        place: Folder of runs, or the results.parquet of a study. Only a folder of runs has the trained models
            that the geometry of position tokens needs.
        source: What the figures say of whose numbers they show.

    Yields:
        Entries, and lines that say what is left out and why.

    Raises:
        UserError: A table at `place` is damaged.
    """
    if not place.exists():
        yield f"synthetic curves: left out, {ABSENT}"
        return
    found = concatenated(files(place))
    if found is None or ("metric" in found and "accuracy" not in found):
        yield f"synthetic curves: left out, {place} has no results of synthetic.run"
        return
    if "metric" not in found:  # all of it is synthetic.run's: check that every column is there
        found = load(place)
    beside = load(place, "targets") if files(place, "targets") else None
    if beside is None:
        yield f"figures by position: left out, {place} has no table of targets beside the results"
    evaluations, targets, early = reported(found, beside)
    if early:
        yield f"synthetic curves: {early} runs have no evaluation at their full length yet and are left out"
    elif evaluations.empty:
        yield f"synthetic curves: left out, {place} has no reported runs yet, only validation; let it go on"
    tasks = sorted(evaluations["task"].unique())
    for task in tasks:
        prefix = f"{task}-" if len(tasks) > 1 else ""
        mine = evaluations[evaluations["task"] == task], targets[targets["task"] == task]
        for name, table, draw in (*_sweep(*mine), *_geometry(place, task)):
            if len(table):
                yield Entry(f"{prefix}{name}", f"{task}: {name.replace('_', ' ')}", source, table, draw)


def reported(
    evaluations: pd.DataFrame, targets: pd.DataFrame | None
) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Keep the runs that are reported, without those that only served to choose settings.

    Args:
        evaluations: The results table.
        targets: The table of right answers by position; None if there is none.

    Returns:
        Evaluations of the runs that have one at their full length; targets, empty if there are none; and how
        many runs are left out because they have not come that far.
    """
    evaluations = evaluations[evaluations["purpose"] == "report"]
    targets = evaluations.iloc[:0] if targets is None else targets[targets["purpose"] == "report"]
    full = evaluations["length"].eq(evaluations["seq_len"])
    begun = full.groupby([evaluations["run"], evaluations["model"]])
    return evaluations[begun.transform("any")], targets, int((~begun.any()).sum())


Made = tuple[str, pd.DataFrame, Callable[[], Any] | None]  # name, table, drawing


def _sweep(evaluations: pd.DataFrame, targets: pd.DataFrame) -> Iterator[Made]:
    """Everything that the two tables of the results store can say of one task; a table may be empty."""
    yield "summary", summarise(evaluations, by=cell_of(evaluations)), None
    curves = sweep.accuracy_table(evaluations)
    yield "accuracy_curves", curves, lambda: sweep.accuracy_curves(curves)
    for unit in sweep.UNITS:
        thresholds = sweep.threshold_table(evaluations, unit)
        yield f"{unit}_vs_length", thresholds, partial(sweep.cost_vs_length, thresholds)
    yield "scaling", sweep.scaling_table(evaluations), None
    yield "comparisons", comparisons(thresholds), None  # in tokens, the last unit
    states = sweep.state_table(evaluations)
    yield "state_size", states, lambda: sweep.state_size(states)
    if len(targets):
        heat = sweep.heat_table(targets)
        yield "position_step", heat, lambda: sweep.position_step(heat)
        final = sweep.position_table(targets)
        yield "by_position", final, lambda: sweep.by_position(final)


def _geometry(place: Path, task: str) -> Iterator[Made]:
    """The geometry of position tokens, for tasks whose answers are positions; needs the trained models."""
    from analysis import geometry

    if not any(place.glob(f"*/{WEIGHTS}")) or task not in DENSE:
        return
    summary, maps, points = geometry.measure(place, task)
    yield "position_geometry", summary, lambda: geometry.geometry(summary, maps, points)
    yield "position_geometry_cosines", maps, None
    yield "position_geometry_pca", points, None
