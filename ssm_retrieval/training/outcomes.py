"""What each run needed and how far it got: a row per run, and a row per cell, whose runs differ in seed.

Input is a tidy table `evaluations`, one row per evaluation: kind is 'during' training or 'final' (on more
held-out sequences, finished runs only), length the context evaluated, train_length the one in training at
that moment and seq_len the goal of the run. A run is a (run, model) pair: tables of older versions have
several models in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import median_bounds, median_interval, require, share_interval

RUN = ["run", "model"]
CELL = ("task", "layout", "seq_len", "model", "preset", "position", "d_state", "n_layer")
SPENT = ("examples", "tokens", "step", "seconds")
# Columns that describe one evaluation, even where a run happens to have a single one.
PER_EVALUATION = {
    *SPENT, "kind", "split", "train_length", "length", "loss", "train_loss", "train_accuracy", "accuracy",
    "correct", "count", "ci_low", "ci_high", "chance", "confirm_correct", "confirm_count", "heldout_reached",
}  # fmt: skip
OUTCOMES = {"value", "lower", "reached", "finished", "at_goal"}


# --- one row per run -------------------------------------------------------------------------------------


def _threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise UserError(f"threshold {threshold} must be an accuracy above 0 and at most 1, say 0.95")


def _per_run(
    evaluations: pd.DataFrame, columns: Sequence[str], outcome: Callable[[pd.DataFrame], dict[str, Any]]
) -> pd.DataFrame:
    """Columns that are constant within every run, and the outcome of each run's rows in order of steps."""
    needed = [*RUN, "seed", "seq_len", "kind", "step", "length", "accuracy", *columns]
    require(evaluations, dict.fromkeys(needed), "evaluations")
    groups = evaluations.groupby(RUN, sort=False, dropna=False)
    others = [c for c in evaluations.columns if c not in {*RUN, *PER_EVALUATION, *OUTCOMES}]
    varying = groups[others].nunique(dropna=False).gt(1).any()
    for column in ("seed", "seq_len"):
        if varying[column]:
            raise UserError(f"{column} differs within a run; give each training its own name in column run")
    kept = [c for c in evaluations.columns if c in RUN or (c in others and not varying[c])]
    config = evaluations.drop_duplicates(RUN)[kept].reset_index(drop=True)
    rows = [outcome(rows.sort_values("step", kind="stable")) for _, rows in groups]
    return pd.concat([config, pd.DataFrame(rows)], axis=1)


def examples_to_threshold(
    evaluations: pd.DataFrame, threshold: float = 0.95, by: str = "examples"
) -> pd.DataFrame:
    """What each run had spent when its held-out accuracy at its goal length first was >= threshold.

    Of many evaluations of few sequences one may pass by luck. So a run counts only if the evaluation that is
    its result, the final or else the last one at the goal, is >= threshold as well.

    Args:
        evaluations: The tidy table.
        threshold: Accuracy that counts as learned.
        by: What is counted, one of `SPENT`.

    Returns:
        One row per run: its configuration, value and reached (right-censored: a run that did not get there
        has reached False and value = all it spent), lower = what was spent at the evaluation before (the
        truth lies in (lower, value] where reached, above lower = value elsewhere), finished = has a final
        evaluation, accuracy and chance of the final or else last evaluation at the goal.

    Raises:
        UserError: For missing columns or entries, or a bad unit or threshold.
    """
    _threshold(threshold)
    if by not in SPENT:
        raise UserError(f"by {by} is no unit of what a run spends; choose from {', '.join(SPENT)}")

    def outcome(rows: pd.DataFrame) -> dict[str, Any]:
        goal = rows[(rows["length"] == rows["seq_len"]) & rows["kind"].isin(("during", "final"))]
        during, final = (goal[goal["kind"] == kind] for kind in ("during", "final"))
        if rows[by].isna().any() or goal.empty:
            what = f"has no evaluation at seq_len {rows['seq_len'].iloc[0]}" if goal.empty else f"lacks {by}"
            raise UserError(f"run {rows['run'].iloc[0]} {what}; drop the run or repair its rows")
        last = (during if final.empty else final).iloc[-1]
        passed, spent = (during["accuracy"] >= threshold).to_numpy(), during[by].to_numpy(float)
        first = int(passed.argmax()) if passed.any() and last["accuracy"] >= threshold else None
        value = float(rows[by].max()) if first is None else float(spent[first])
        lower = value if first is None else float(spent[first - 1]) if first else 0.0
        return dict(
            value=value,
            lower=lower,
            reached=first is not None,
            finished=not final.empty,
            accuracy=float(last["accuracy"]),
            chance=float(last["chance"]),
        )

    return _per_run(evaluations, [by, "chance"], outcome)


def reachable_length(evaluations: pd.DataFrame, threshold: float = 0.95) -> pd.DataFrame:
    """value = the longest context that each run learned; 0 if none.

    Learned is what the curriculum passed (column longest_length of a finished run: running training accuracy
    above 0.95), or what had held-out accuracy >= threshold while it, or the goal, was in training; the
    curriculum may pass short contexts between two evaluations. The goal itself counts only if the run's final
    evaluation agrees, as in `examples_to_threshold`. at_goal: value is seq_len, so the run might have gone
    further. Raises UserError as `examples_to_threshold`.
    """
    _threshold(threshold)

    def outcome(rows: pd.DataFrame) -> dict[str, Any]:
        fair = (rows["length"] == rows["train_length"]) | (rows["length"] == rows["seq_len"])
        passed = rows[fair & (rows["kind"] == "during") & (rows["accuracy"] >= threshold)]
        goal, trained = int(rows["seq_len"].iloc[0]), rows["train_length"].dropna()
        learned = {0, *passed["length"].astype(int)}
        learned |= set(trained[trained < trained.max()].astype(int))  # what the curriculum has left behind
        if "longest_length" in rows:
            learned |= set(rows["longest_length"].dropna().astype(int))
        final = rows[(rows["kind"] == "final") & (rows["length"] == goal)]
        if len(final) and final["accuracy"].iloc[-1] < threshold:
            learned -= {goal}
        return dict(value=max(learned), at_goal=max(learned) == goal)

    return _per_run(evaluations, ["train_length"], outcome)


# --- one row per cell ------------------------------------------------------------------------------------


def summarise(
    evaluations: pd.DataFrame, by: Sequence[str] | None = None, threshold: float = 0.95
) -> pd.DataFrame:
    """One row per cell, by default `CELL`; a missing value (d_state of a Transformer) is a group of its own.

    Args:
        evaluations: The tidy table.
        by: Columns that make a cell; with it the caller decides what is pooled.
        threshold: Accuracy that counts as learned.

    Returns:
        Seeds, runs, finished, reached: counts. reached_low, reached_high: Clopper and Pearson's 95 % interval
        of the share of runs that get there. accuracy: mean; accuracy_min, accuracy_max: over runs.
        examples_after, examples: between which evaluations the median of what runs need lies
        (`ssm_retrieval.statistics.median_bounds`); examples_low, examples_high, examples_confidence: interval
        of the median and the level that so few runs allow (`median_interval`). inf where runs never got
        there. reachable_length: mean.

    Raises:
        UserError: As `examples_to_threshold`, or if a default cell holds a seed twice, which means that it
            mixes configurations (learning rates, say).
    """
    keys = list(CELL if by is None else by)
    require(evaluations, keys, "evaluations")
    runs = examples_to_threshold(evaluations, threshold)
    lost = [key for key in keys if key not in runs or key in OUTCOMES]
    if lost or not keys:
        raise UserError(f"by must name columns that are constant within a run, unlike {lost}")
    runs["longest"] = reachable_length(evaluations, threshold)["value"]
    rows = []
    for cell, group in runs.groupby(keys, dropna=False, sort=True):
        named = dict(zip(keys, cell, strict=True))
        if by is None and group["seed"].duplicated().any():
            differ = [str(c) for c in group if c not in {"run", "seed", *OUTCOMES, "accuracy", "longest"}]
            differ = [c for c in differ if group[c].nunique(dropna=False) > 1]
            where = ", ".join(f"{k} {named[k]}" for k in keys if group[k].notna().all())
            raise UserError(
                f"the cell {where} has a seed twice (what differs: {', '.join(differ) or 'run'}); "
                "filter the table or name that column in by"
            )
        low, high = share_interval(int(group["reached"].sum()), len(group))
        spent = group["lower"], group["value"], group["reached"]
        examples_after, examples = median_bounds(*spent)
        examples_low, examples_high, level = median_interval(*spent)
        rows.append(
            named
            | dict(
                seeds=group["seed"].nunique(),
                runs=len(group),
                finished=int(group["finished"].sum()),
                reached=int(group["reached"].sum()),
                reached_low=low,
                reached_high=high,
                accuracy=float(group["accuracy"].mean()),
                accuracy_min=float(group["accuracy"].min()),
                accuracy_max=float(group["accuracy"].max()),
                chance=float(group["chance"].mean()),
                examples_after=examples_after,
                examples=examples,
                examples_low=examples_low,
                examples_high=examples_high,
                examples_confidence=level,
                reachable_length=float(group["longest"].mean()),
            )
        )
    return pd.DataFrame(rows)
