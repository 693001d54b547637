"""What sections on probes share: which runs have a probe's table, and what to say of those that lack it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.report.parts import Missing
from analysis.report.runs import Run
from analysis.report.traces import control, curve


def tables(
    runs: Sequence[Run], probe: str, part: str
) -> tuple[list[tuple[Run, pd.DataFrame]], list[Missing]]:
    """Find the tables of a probe.

    Args:
        runs: The runs of the page.
        probe: Name of the probe.
        part: Part that a table must have; older versions lack some.

    Returns:
        The runs that have such a table, with it, and what to say of the others.
    """
    found, missing = [], []
    for run in runs:
        table = run.probe(probe)
        missing += _lacking(run, probe, set() if table is None else set(table["family"]))
        if table is not None and part in set(table["part"]):
            found.append((run, table))
        elif table is not None:
            text = f"{run.name} was probed by an older version that did not keep this; probe it again."
            missing.append(Missing(text, run.probe_command(probe)))
    return found, missing


def _lacking(run: Run, probe: str, there: set[str]) -> list[Missing]:
    """What to say of the families that have no table of a probe."""
    reasons, missing = run.left_out(probe), []
    others = [family for family in run.plans if family not in there]
    for family in (family for family in others if family in reasons):
        missing.append(Missing(f"{run.title(family)}: left out by the probe, {reasons[family]}."))
    finished = [family for family in others if family in run.results and family not in reasons]
    if finished:
        text = f"Not probed yet: {'; '.join(map(run.title, finished))}."
        missing.append(Missing(text, run.probe_command(probe)))
    training = [family for family in others if family not in run.results and family not in reasons]
    if training:
        text = (
            f"Not trained to the end yet, so that it cannot be probed: {'; '.join(map(run.title, training))}."
        )
        missing.append(Missing(text, run.train_command()))
    return missing


def label(run: Run, words: str) -> str:
    """Of a view: with the run where there are several."""
    return f"run {run.letter}: {words}" if run.letter else words


def beside_untrained(
    name: str,
    rows: pd.DataFrame,
    axes: tuple[str, str],
    color: str,
    more: Callable[[pd.DataFrame], Mapping[str, Any]],
    *,
    dash: str = "solid",
    symbol: str = "circle",
) -> tuple[list[Any], pd.DataFrame]:
    """Draw values by layer: trained weights with their intervals, untrained ones dotted and hollow.

    Args:
        name: Of the series.
        rows: One family's rows of a figure's table, in their order.
        axes: What x and y are.
        color: #rrggbb.
        more: What hovering shows of the trained rows, by name.
        dash: Plotly's, of trained weights.
        symbol: Plotly's.

    Returns:
        The traces, and the trained rows.
    """
    traces, trained = [], rows[rows["weights"] == "trained"]
    look: Any = dict(dash=dash, symbol=symbol, more=more(trained))
    hollow: Any = control("untrained weights") | dict(symbol=f"{symbol}-open")
    looks = {"trained": (name, look), "untrained": (f"{name}, untrained", hollow)}
    for weights, part in rows.groupby("weights", sort=False):
        title, own = looks[str(weights)]
        bounds: Any = dict(low=part["low"], high=part["high"])
        traces += curve(title, part["layer"], part["value"], axes, **(own | bounds | dict(color=color)))
    return traces, trained
