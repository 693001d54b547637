"""Outcomes of the runs by cell, and what the ingredients change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ssm_retrieval.statistics import median_bounds
from ssm_retrieval.statistics.factorial import factorial_effects, factorial_shares
from ssm_retrieval.training.outcomes import examples_to_threshold, reachable_length
from studies.what_mamba_lacks.config import KEYED, LEVELS, WITHOUT_TAPS, Cell

SSMS = ("mamba", "mamba2", *KEYED)
FACTORIALS: dict[str, Mapping[str, Sequence[str]]] = {  # factors of each complete factorial, and their levels
    "mamba": LEVELS,
    "mamba2": dict(convolution=("default", "identity"), memory=LEVELS["memory"], tie=LEVELS["tie"]),
}
OUTCOMES = ("share at 0.95", "log2 of steps to 0.95", "log2 of longest context")


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """One row per finished run that is reported: what it was, and what it came to.

    Args:
        table: Rows of the results store.

    Returns:
        The configuration; positions, convolution, memory and tie, the latter three missing for models of
        other families; lower and value, the steps between which 0.95 was passed, reached, accuracy; longest,
        the longest context learned; spent, in seconds.
    """
    table = table[table["purpose"] == "report"]
    found = examples_to_threshold(table, by="step")
    found = found[found["finished"]].reset_index(drop=True)
    longest = reachable_length(table).set_index("run")["value"]
    seconds = table[table["kind"] == "final"].set_index("run")["seconds"]
    found["longest"] = found["run"].map(longest).astype(int)
    found["spent"] = found["run"].map(seconds)
    parts = found["ssm_init"].fillna("").replace("recall", "identity+long+tied").str.split("+")
    found["positions"] = found["position"].astype(object).fillna("none")
    bare = (found["d_conv"] == 1) | found["model"].isin(WITHOUT_TAPS)
    convolution = _level(parts, "identity", "default").mask(bare, "none")
    levels = dict(
        convolution=convolution,
        memory=_level(parts, "long", "default"),
        tie=_level(parts, "tied", "random"),
    )
    pure = found["model"].isin(SSMS)
    return found.assign(**{factor: level.where(pure) for factor, level in levels.items()})


def _level(parts: pd.Series, named: str, usual: str) -> pd.Series:
    """Per run, the level `named` if `ssm_init` has that part, else the usual one."""
    return parts.map(lambda found: named if named in found else usual)


def cells(runs: pd.DataFrame) -> dict[Cell, pd.DataFrame]:
    """The cells of state space models, those with the most ingredients first.

    Args:
        runs: Rows of `outcomes`, of one model and length.

    Returns:
        The runs of each cell by seed.
    """
    found = {Cell(*map(str, key)): cell.sort_values("seed") for key, cell in runs.groupby(list(LEVELS))}
    return {cell: found[cell] for cell in ordered(found)}


def each(runs: pd.DataFrame) -> list[tuple[str, int, dict[Cell, pd.DataFrame]]]:
    """Model, length and cells of all runs of state space models, in the order of tables."""
    found = []
    for model in SSMS:
        mine = runs[runs["model"] == model]
        for length in sorted(mine["seq_len"].unique()):
            found.append((model, int(length), cells(mine[mine["seq_len"] == length])))
    return found


def ordered(found: Iterable[Cell]) -> list[Cell]:
    """Cells in the order of tables and figures: the published default of each factor last."""
    return sorted(found, key=lambda cell: [-levels.index(getattr(cell, f)) for f, levels in LEVELS.items()])


def bounds(cell: pd.DataFrame) -> tuple[float, float]:
    """Between which steps the median run of a cell passes 0.95; the upper end is inf if most do not."""
    return median_bounds(cell["lower"], cell["value"], cell["reached"])


def factorial(runs: pd.DataFrame, model: str) -> pd.DataFrame:
    """The runs of a family's factorial at one length.

    Args:
        runs: Rows of `outcomes`, of one length.
        model: A key of `FACTORIALS`.

    Returns:
        Its runs; none if a combination of levels has no run.
    """
    factors = FACTORIALS[model]
    runs = runs[runs["model"] == model]
    if "positions" not in factors:
        runs = runs[runs["positions"] == "learned"]
    for factor, levels in factors.items():
        runs = runs[runs[factor].isin(levels)]
    wanted = int(np.prod([len(levels) for levels in factors.values()]))
    complete = len(runs.drop_duplicates(list(factors))) == wanted
    return runs if complete else runs.iloc[:0]


def effects(runs: pd.DataFrame, model: str) -> pd.DataFrame:
    """Main effects and two-way interactions on three outcomes.

    A run that never passed 0.95 counts with the steps of its limit; `most` and `least` say what that leaves
    open (`ssm_retrieval.statistics.factorial`).

    Args:
        runs: Rows of `factorial`, at least one.
        model: A key of `FACTORIALS`.

    Returns:
        The columns of `factorial_effects` and outcome, one of `OUTCOMES`.
    """
    with np.errstate(divide="ignore"):  # -inf: there was no evaluation before
        logs: dict[str, Any] = dict(value=np.log2(runs["value"]), lower=np.log2(runs["lower"]))
    steps = runs.assign(**logs)
    doublings = runs.assign(value=np.log2(runs["longest"].clip(lower=1)), reached=True)
    factors = FACTORIALS[model]
    found = [
        factorial_shares(runs, factors),
        factorial_effects(steps, factors, lower="lower"),
        factorial_effects(doublings, factors),
    ]
    return pd.concat([each.assign(outcome=name) for name, each in zip(OUTCOMES, found, strict=True)])
