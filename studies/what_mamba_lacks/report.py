"""Tables, sentences and figures of README.md, from the runs of this study:

    python -m studies.what_mamba_lacks.report [RUNS]    # RUNS has the folders of the sweeps

Writes results.parquet and learning_rates.json beside this file if RUNS is given, draws the figures, and
replaces what stands between the markers `<!-- NAME -->` and `<!-- /NAME -->` in README.md. Sweeps that were
not run, or not to the end, leave out their rows.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import analysis
from analysis.tables import between, by_seed, fill, share
from ssm_retrieval.cli import guarded
from ssm_retrieval.errors import UserError
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown, read
from ssm_retrieval.training import store
from ssm_retrieval.training.parquet import rows_of, to_parquet
from studies.what_mamba_lacks import built, figures
from studies.what_mamba_lacks.config import (
    ALL,
    LENGTH,
    LEVELS,
    NOTHING,
    ONE_REMOVED,
    POSITIONS_ALONE,
    SWEEPS,
    WITHOUT_CONVOLUTION,
    WITHOUT_TAPS,
    Cell,
)
from studies.what_mamba_lacks.effects import (
    FACTORIALS,
    OUTCOMES,
    SSMS,
    bounds,
    each,
    effects,
    factorial,
    outcomes,
)
from synthetic import results

HERE = Path(__file__).parent
RESULTS, RATES = HERE / "results.parquet", HERE / "learning_rates.json"
MISSING = "These runs have not been made yet."
PICTURES = (
    "![Steps to 0.95 of every cell: the median lies on the bar, an arrow is the limit of steps](steps.png)",
    "![Main effects of the ingredients, with 95 % intervals](effects.png)",
    "![Ingredients that training builds from the published first weights, a line per seed](built.png)",
)
NAMED: dict[str, Cell] = {
    "with all four ingredients": ALL,
    "without positions": ONE_REMOVED[0],
    "with the published convolution": ONE_REMOVED[1],
    "with the published memory": ONE_REMOVED[2],
    "with C apart from B": ONE_REMOVED[3],
    "without a convolution": WITHOUT_CONVOLUTION,
    "with positions alone": POSITIONS_ALONE,
    "with none": NOTHING,
}
BARE = {  # of models that have no convolution
    "with all that it can have" if cell == ALL else name: dataclasses.replace(cell, convolution="none")
    for name, cell in NAMED.items()
    if cell not in (ONE_REMOVED[1], WITHOUT_CONVOLUTION)
}
# Ingredient: its column of `growth`, and the size from which it counts as there. C = B gives a gap of about
# 0.46 at first, because the vectors of positions differ between context and query. C = -B would do as well:
# the output projection can turn the sign.
THERE = {
    "identity (last tap's share of the squared weights)": ("identity", 0.5),
    f"long memory (share of states that keep half for {LENGTH} tokens)": ("long", 0.5),
    "tie (cosine of C with its symbol's B, minus that of others; either sign)": ("gap", 0.25),
}


def main(runs: str | None = None) -> int:
    """Make tables and figures anew, from folders of runs, if given; returns the exit status.

    Raises:
        UserError: If there is no sweep's folder in `runs`.
    """
    if runs is not None:
        collect(Path(runs))
    figures.write(finished(), growth())
    text = (HERE / "README.md").read_text(encoding="utf-8")
    store.write_bytes(HERE / "README.md", filled(text, finished(), rates(), growth()).encode())
    return 0


def collect(runs: Path) -> None:
    """Keep the evaluations of all sweeps, and how their rates were chosen."""
    there = [name for name in SWEEPS if (runs / name / results.RESULTS).is_dir()]
    if not there:
        raise UserError(f"RUNS {runs} has none of the folders {', '.join(SWEEPS)}; run a sweep of this study")
    table = analysis.load([runs / name for name in there])
    store.write_bytes(RESULTS, to_parquet(rows_of(table), results.EVALUATION))
    chosen = {name: runs / name / RATES.name for name in there}
    found = [
        {"sweep": name} | row
        for name, path in chosen.items()
        if path.exists()
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    store.write_json(RATES, found)


def finished() -> pd.DataFrame:
    """`outcomes` of the committed results; no rows if there are none."""
    if not RESULTS.exists():
        return pd.DataFrame(columns=["model", "seq_len", *LEVELS])
    return outcomes(read(RESULTS))


def rates() -> list[dict[str, Any]]:
    """How the sweeps chose their learning rates; empty if none did."""
    return json.loads(RATES.read_text(encoding="utf-8")) if RATES.exists() else []


def growth() -> pd.DataFrame:
    """The committed measurements of `built`, and the gap of its two cosines; no rows if there are none."""
    if not built.TABLE.exists():
        return pd.DataFrame(columns=["model"])
    table = pd.read_csv(built.TABLE)
    return table.assign(gap=table["same"] - table["others"])


def filled(text: str, runs: pd.DataFrame, chosen: list[dict[str, Any]], grown: pd.DataFrame) -> str:
    """README with its tables and sentences made anew.

    Args:
        text: README.md.
        runs: Rows of `outcomes`.
        chosen: As `rates`.
        grown: As `growth`.

    Returns:
        The new README.md.
    """
    made = dict(
        findings=findings(runs, grown),
        removed=_with(PICTURES[0], removed(runs)),
        effects=_with(PICTURES[1], effects_table(runs)),
        families=families(runs),
        built=_with(PICTURES[2], built_table(grown)),
        cells=cells_table(runs),
        rates=rates_table(chosen),
        cost=cost(runs),
    )
    return fill(text, {name: content or MISSING for name, content in made.items()})


def _with(picture: str, table: str) -> str:
    """A table and the figure of the same numbers; nothing if there are none."""
    return f"{table}\n\n{picture}" if table else ""


# --- cells --------------------------------------------------------------------------------------------------


def results_of(cell: pd.DataFrame) -> list[str]:
    """Seeds at 0.95, median steps, longest context and accuracy of a cell's runs, and their rate."""
    low, high = bounds(cell)
    steps = f"({low:,.0f}, {high:,.0f}]" if high < float("inf") else f"more than {low:,.0f}"
    longest = ", ".join(str(n) for n in cell["longest"])
    lr = ", ".join(f"{rate:g}" for rate in sorted(cell["lr"].unique()))
    return [share(cell["reached"].sum(), len(cell)), steps, longest, by_seed(cell["accuracy"], 2), lr]


RESULTS_HEAD = ["seeds at 0.95 [95 %]", "median steps to it", "longest context learned", "accuracy", "rate"]


def named(model: str) -> dict[str, Cell]:
    """The cells of a state space model that have names, that with all ingredients first."""
    return BARE if model in WITHOUT_TAPS else NAMED


def removed(runs: pd.DataFrame) -> str:
    """A line per model, length and named cell: all ingredients, each one removed, none."""
    rows = [
        [NAMES[model], length, name, *results_of(found[cell])]
        for model, length, found in each(runs)
        for name, cell in named(model).items()
        if cell in found
    ]
    return markdown(["model", "length", "ingredients", *RESULTS_HEAD], rows) if rows else ""


def cells_table(runs: pd.DataFrame) -> str:
    """A line per model, length and cell."""
    rows = [
        [NAMES[model], length, *(getattr(cell, factor) for factor in LEVELS), *results_of(part)]
        for model, length, found in each(runs)
        for cell, part in found.items()
    ]
    return markdown(["model", "length", *LEVELS, *RESULTS_HEAD], rows) if rows else ""


def families(runs: pd.DataFrame) -> str:
    """A line per family and position scheme at the shorter length."""
    short = runs[runs["seq_len"] == LENGTH]
    rows = []
    if not short.empty:
        attention = short[~short["model"].isin(SSMS)]
        turned = attention["rotary_pct"].map(lambda pct: f"RoPE {pct:.0%}".replace("%", " %"))
        schemes = attention["positions"].where(attention["rotary_pct"].isna(), turned)
        for (model, scheme), cell in attention.groupby(["model", schemes]):
            rows.append([NAMES[str(model)], scheme, "–", *results_of(cell.sort_values("seed"))])
    for model, length, found in each(short):
        with_names = named(model)
        everything = next(iter(with_names))
        pairs = dict(
            published=("with none", "with positions alone"), recall=("without positions", everything)
        )
        rows += [
            [NAMES[model], cell.positions, first, *results_of(found[cell])]
            for first, pair in pairs.items()
            for cell in (with_names[name] for name in pair)
            if cell in found and length == LENGTH
        ]
    return markdown(["model", "positions", "first weights", *RESULTS_HEAD], rows) if rows else ""


def pace(runs: pd.DataFrame) -> str:
    """A line per state space model: how soon it learns the shorter length, as published and with all."""
    rows = []
    for model, length, found in each(runs):
        everything, *_ = named(model).values()
        wanted = [named(model)["with positions alone"], everything]
        pair = [found[cell] for cell in wanted if cell in found]
        if length == LENGTH and len(pair) == len(wanted):
            rows.append([NAMES[model], *(text for cell in pair for text in results_of(cell)[:2])])
    head = ["model", "positions alone: seeds at 0.95", "median steps"]
    return markdown([*head, "all that it can have: seeds at 0.95", "median steps"], rows) if rows else ""


# --- effects ------------------------------------------------------------------------------------------------


def effects_table(runs: pd.DataFrame) -> str:
    """A line per effect of each complete factorial, a column per outcome."""
    parts = []
    for model in FACTORIALS:
        chosen = factorial(runs[runs["seq_len"] == LENGTH], model)
        if chosen.empty:
            continue
        found = effects(chosen, model)
        rows = [
            [f"{term}: {contrast}", *(_effect(row) for row in part.to_dict("records"))]
            for (term, contrast), part in found.groupby(["term", "contrast"], sort=False)
        ]
        count = int(found["comparisons"].iloc[0])
        parts.append(f"{NAMES[model]}, {len(chosen)} runs, {count} effects on each outcome:\n")
        parts.append(markdown(["effect", *OUTCOMES], rows) + "\n")
    return "\n".join(parts).rstrip("\n")


def _effect(row: Mapping[Hashable, Any]) -> str:
    """The effect, its interval, and a star if the interval that holds for all effects excludes 0."""
    sure = row["low_all"] > 0 or row["high_all"] < 0
    return between(row["effect"], row["low"], row["high"], 2) + ("*" if sure else "")


# --- what models build --------------------------------------------------------------------------------------


def onset(run: pd.DataFrame, column: str, least: float) -> float:
    """The first step at which a run's measure has the size `least` or more; inf if it never has."""
    there = run[run[column].abs() >= least]
    return float(there["step"].min()) if len(there) else float("inf")


def built_table(grown: pd.DataFrame) -> str:
    """A line per family and ingredient: before and after training, and when it first was there."""
    rows = []
    for model, part in grown.groupby("model", sort=False):
        seeds = [run.sort_values("step") for _, run in part.groupby("seed")]
        longest = ", ".join(str(run["train_length"].iloc[-1]) for run in seeds)
        for words, (column, least) in THERE.items():
            ends = [by_seed((run[column].iloc[i] for run in seeds), 2) for i in (0, -1)]
            steps = [onset(run, column, least) for run in seeds]
            when = ", ".join("never" if step == float("inf") else f"{step:.0f}" for step in steps)
            rows.append([NAMES[str(model)], words, *ends, f"{least:g}", when, longest])
    head = ["model", "ingredient", "before training", "after", "there from", "first step there"]
    return markdown([*head, "length in training at the end"], rows) if rows else ""


# --- sentences ----------------------------------------------------------------------------------------------


def findings(runs: pd.DataFrame, grown: pd.DataFrame) -> str:
    """What the tables come to, a line each."""
    lines = [
        f"* **{NAMES[model]}, {length} symbols.** {_needed(found, named(model))}"
        for model, length, found in each(runs)
        if next(iter(named(model).values())) in found
    ]
    for model, part in grown.groupby("model", sort=False):
        last = part.sort_values("step").groupby("seed").tail(1)
        counts = [
            f"{words.split(' (')[0]} in {int((last[column].abs() >= least).sum())} of {len(last)} seeds"
            for words, (column, least) in THERE.items()
        ]
        lines.append(
            f"* **{NAMES[str(model)]}, what training builds.** From the published first weights with learned "
            f"positions, after at most {int(part['step'].max()):,} steps: {', '.join(counts)}."
        )
    return "\n".join(lines)


def _needed(found: dict[Cell, pd.DataFrame], with_names: dict[str, Cell]) -> str:
    """What became of the cell with everything, of those without one ingredient, and of that with none."""
    alike: dict[str, list[str]] = {}
    for name, cell in with_names.items():
        if cell in found:
            alike.setdefault(_reached(found[cell]), []).append(name)
    sentences = (f"{', '.join(names)}: {said}." for said, names in alike.items())
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _reached(cell: pd.DataFrame) -> str:
    low, high = bounds(cell)
    k, n = int(cell["reached"].sum()), len(cell)
    if high < float("inf"):
        return f"{k} of {n} seeds reach 0.95, the median after {low:,.0f} to {high:,.0f} steps"
    return f"{k} of {n} seeds reach 0.95 in {cell['steps'].max():,.0f} steps"


# --- how it was done ----------------------------------------------------------------------------------------


def rates_table(chosen: list[dict[str, Any]]) -> str:
    """A line per cell: validation scores of all candidates, and the one that was taken."""
    keys = ("sweep", "model", "position", "d_conv", "ssm_init")
    lines: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in chosen:
        lines.setdefault((*(row[key] for key in keys), row["lr"]), []).append(row)
    rows = []
    for (sweep, model, position, d_conv, ssm_init, lr), candidates in lines.items():
        scores = ", ".join(f"{row['candidate']:g}: {by_seed(row['scores'])}" for row in candidates)
        setting = [sweep, NAMES[model], position, d_conv or "–", ssm_init or "–"]
        rows.append([*setting, scores, "–" if lr is None else f"{lr:g}"])
    head = ["sweep", "model", "positions", "taps", "first weights", "score at each rate", "chosen"]
    return markdown(head, rows) if rows else ""


def cost(runs: pd.DataFrame) -> str:
    """How many runs there are at each length, and how long they took."""
    rows = [
        [NAMES[str(model)], length, len(part), f"{part['spent'].sum() / 60:.0f}"]
        for (model, length), part in (runs.groupby(["model", "seq_len"]) if len(runs) else ())
    ]
    return markdown(["model", "length", "reported runs", "minutes on one thread"], rows) if rows else ""


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(*sys.argv[1:2])))
