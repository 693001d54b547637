"""The tables of docs/claims.md, from committed results: `python -m studies.claims`.

Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->`. Sources: the paper's own results in
analysis/published, and the tables of the studies.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import analysis
from analysis import published, settings
from analysis.comparisons import comparisons
from analysis.plots import sweep
from analysis.tables import agreed, between, by_seed, fill, share
from ssm_retrieval.statistics import bootstrap_median_time
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown, read
from ssm_retrieval.training import store
from ssm_retrieval.training.outcomes import reachable_length
from studies.capacity import report as capacity
from studies.retrieval_cpu import default_run
from studies.vlm_pretrained import summary as quick_start
from studies.vlm_retrieval import summary as retrieval
from studies.what_mamba_lacks import report as lacks
from studies.what_mamba_lacks.config import LENGTH
from studies.why_mamba_lags import contrasts

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "claims.md"
RETRIEVAL = ROOT / "studies" / "retrieval_cpu"
PAIRS = {"1 B / 790 M": "1B and 790M", "1.4 B": "1.4B", "2.8 B": "2.8B"}  # as the page calls them
# Claims, the study that tests them, its results.
STUDIES = (
    ("1, 2, 9, 11, 12", "retrieval_cpu", "results.parquet"),
    ("3, 6, 8", "vlm_retrieval", "results.parquet"),
    ("4, 13, 15", "capacity", "measured.csv"),
    ("5", "vlm_pretrained", "results.parquet"),
    ("13, 14", "what_mamba_lacks", "results.parquet"),
)
CLAIM = re.compile(r"^## (?P<title>\d+\. [^\n]+)$(?P<body>.*?)(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)
VERDICT = re.compile(r"\*\*Verdict: (?P<word>[^.*]+)\.\*\*")
VERDICTS = (
    "supported at this size",
    "partly supported",
    "not supported at this size",
    "contradicted at this size",
    "not resolved at this size",
    "not tested",
)


# --- the published table -----------------------------------------------------------------------------------


def differences() -> pd.DataFrame:
    """Mamba-VL minus Pythia-VL: a row per pair, a column per benchmark, in points."""
    gaps = published.gaps(published.results())
    return (
        -gaps.pivot(index="pair", columns="benchmark", values="gap").rename(PAIRS).loc[list(PAIRS.values())]
    )


def published_groups() -> str:
    """By group and pair: mean difference Mamba - Pythia, and in how many benchmarks Mamba is ahead."""
    table = differences()
    rows = []
    for group, columns in published.GROUPS.items():
        part = table[list(columns)]
        cells = [
            f"{part.loc[pair].mean():+.2f} ({(part.loc[pair] > 0).sum()} of {len(columns)})"
            for pair in table.index
        ]
        rows.append([group, *cells])
    return markdown(["group", *table.index], rows)


def published_scale() -> str:
    """Grounding gap Pythia - Mamba by pair, with and without the suspect column."""
    gaps = -differences()[list(published.GROUPS["grounding"])]
    rows = []
    for pair, before in zip(gaps.index, [None, *gaps.index], strict=False):
        rest = gaps.loc[pair].drop(published.SUSPECT[1])
        grown = "–" if before is None else f"{(gaps.loc[pair] > gaps.loc[before]).sum()} of {gaps.shape[1]}"
        rows.append([pair, f"{gaps.loc[pair].mean():.2f}", f"{rest.mean():.2f}", grown])
    return markdown(
        ["pair", "mean gap of 6", f"without {published.SUSPECT[1]}", "wider than one size below"], rows
    )


# --- studies/retrieval_cpu ---------------------------------------------------------------------------------


def evaluations() -> pd.DataFrame:
    """Every evaluation of the runs that are reported, of the usual state sizes, labelled."""
    table = analysis.load(RETRIEVAL / "results.parquet")
    return settings.label(table[table["purpose"] == "report"])


def lengths(table: pd.DataFrame) -> str:
    """A line per architecture: how far it gets, and what it needs for length 64, query last, many queries."""
    table = table[(table["queries"] > 1) & table["usual_state"]]
    outcomes = sweep.threshold_table(table, "tokens")
    laws = sweep.scaling_table(table)
    laws = laws[laws["unit"] == "tokens"].set_index("variant")
    rows = []
    for variant in settings.variants(table):
        mine = outcomes[outcomes["variant"] == variant]
        seeds = mine.groupby("seq_len")["reached"].agg(["sum", "size"])
        learned = seeds.index[seeds["sum"] == seeds["size"]]
        every: Any = learned.max() if len(learned) else 0
        longer = [f"{n}: {share(row['sum'], row['size'])}" for n, row in seeds.iterrows() if n > every]
        short = mine[mine["seq_len"] == 64]
        law = laws.loc[variant]
        below = law["lower_exponent"]
        exponent = "–"
        if not np.isnan(law["exponent"]):
            exponent = between(law["exponent"], law["exponent_low"], law["exponent_high"], 2)
            exponent += "" if np.isnan(below) else f"; {below:.2f}"
        rows.append([variant, every or "–", ", ".join(longer), cost(short), accuracy(table, short), exponent])
    head = ["model", "longest length that every seed learned", "seeds at longer ones"]
    return markdown([*head, "tokens for length 64", "accuracy at 64", "exponent of the length"], rows)


def layouts(table: pd.DataFrame) -> str:
    """Query last, first, and behind two readings of 64 symbols: one query each; seeds that are faster."""
    table = single_queries(table)
    outcomes = sweep.threshold_table(table, "tokens")
    tests = layout_tests(outcomes)
    rows = []
    for variant in settings.variants(table):
        mine = outcomes[outcomes["variant"] == variant]
        cells = [
            mine[mine["setting"] == f"{name}, single query"] for name in ("suffix", "prefix", "two-pass")
        ]
        test = tests.loc[f"{variant}, single query"]
        faster = {test["a"]: test["a_first"], test["b"]: test["b_first"]}
        found = [text for cell in cells for text in (cost(cell), accuracy(table, cell))]
        rows.append([variant, *found, f"{faster['prefix']} and {faster['suffix']} of {test['n']}"])
    ways = ("query last", "query first", "context twice")
    head = [f"{what}, {way}" for way in ways for what in ("tokens", "accuracy")]
    return markdown(["model", *head, "seeds faster with the query first and last"], rows)


def single_queries(table: pd.DataFrame) -> pd.DataFrame:
    """Evaluations of runs with one query per sequence of length 64."""
    return table[(table["queries"] == 1) & table["usual_state"] & (table["seq_len"] == 64)]


def layout_tests(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Paired tests of query first against query last, by architecture."""
    tests = comparisons(outcomes[~outcomes["setting"].str.startswith("two-pass")])
    return tests[tests["kind"] == "layout"].set_index("within")


def layouts_by_chance(table: pd.DataFrame) -> str:
    """How many architectures have all seeds on one side of `layouts`, and how many would by chance."""
    tests = layout_tests(sweep.threshold_table(single_queries(table), "tokens")).to_dict("records")
    signs = [
        [1] * t["a_first"] + [-1] * t["b_first"] + [0] * (t["n"] - t["a_first"] - t["b_first"]) for t in tests
    ]
    return agreed(signs, "differences between query first and last are compared in this table")


def geometry() -> str:
    """Locality of position tokens by architecture: range over seeds, and how many lie above shuffled ones."""
    table = locality()
    names = {"readout": "output rows of position tokens", "learned": "learned position table"}
    rows = []
    for (variant, length, kind), part in table.groupby(["variant", "seq_len", "table"], sort=False):
        above = (part["locality"] > part["shuffled_high"]).sum()
        values = f"{part['locality'].min():.2f} to {part['locality'].max():.2f}"
        rows.append([variant, length, names[str(kind)], values, f"{above} of {len(part)}"])
    return markdown(["model", "length", "table", "locality, by seed", "seeds above shuffled positions"], rows)


def locality() -> pd.DataFrame:
    """Locality of position tokens, a row per model and table."""
    return pd.read_csv(RETRIEVAL / "figures" / "position_geometry.csv")


def geometry_by_chance() -> str:
    """How many models of `geometry` lie above shuffled positions, and how many would by chance."""
    table = locality()
    above, n = int((table["locality"] > table["shuffled_high"]).sum()), len(table)
    return (
        f"{n} tables of position tokens are compared with the range of shuffled ones. {above} of them lie "
        f"above it; chance would put one in forty there, {n / 40:.0f} of them."
    )


# --- studies/why_mamba_lags --------------------------------------------------------------------------------


def updates() -> str:
    """What each layer does with the target, over what it does with a distractor: length 64, one query."""
    rows, measured = [], probes()
    for model in contrasts.SSM:
        mine = contrasts.cells(measured, model=model, queries="single", weights="trained")
        for quantity, words in contrasts.WORDS.items():
            part = mine[mine["quantity"] == quantity]
            for layer in sorted(part["layer"].unique()):
                here = part[part["layer"] == layer]
                ratios = [
                    contrasts.ratio(here.loc[here["layout"] == name, "value"])
                    for name in ("suffix", "prefix")
                ]
                rows.append([NAMES[model], layer + 1, words, *ratios])
    return markdown(["model", "layer", "target over distractor", "query last", "query first"], rows)


def positions(table: pd.DataFrame) -> str:
    """Position schemes of the Transformer: accuracy and the longest length learned, at 16 and 64 symbols."""
    table = table[
        (table["model"] == "transformer") & (table["queries"] > 1) & table["seq_len"].isin((16, 64))
    ]
    longest = reachable_length(table).set_index("run")["value"]
    final = table[table["kind"] == "final"]
    rows = []
    for variant in settings.variants(table):
        cells = [variant]
        for length in (16, 64):
            mine = final[(final["variant"] == variant) & (final["seq_len"] == length)].sort_values("seed")
            cells += [by_seed(mine["accuracy"]), ", ".join(f"{n:g}" for n in longest[mine["run"]])]
        rows.append(cells)
    head = [f"{what} at {length}" for length in (16, 64) for what in ("accuracy", "longest length learned")]
    return markdown(["model", *head], rows)


def probes() -> pd.DataFrame:
    """What the probes of the study "why_mamba_lags" measured."""
    return pd.read_parquet(contrasts.MEASURED)


# --- studies/what_mamba_lacks ------------------------------------------------------------------------------


def ingredients() -> str:
    """Mamba and Mamba-2 with everything, and with one ingredient removed, at the shorter length."""
    runs = lacks.finished()
    return lacks.removed(runs[runs["model"].isin(("mamba", "mamba2")) & runs["seq_len"].eq(LENGTH)])


# --- what it costs -----------------------------------------------------------------------------------------


def costs() -> str:
    """Runs of every study, those that choose rates included, and how long they took."""
    rows = [
        [
            "1",
            "[the default run](../README.md)",
            *_spent(pd.read_csv(default_run.MEASURED), ["model", "seed"], 2),
        ]
    ]
    for claims, name, path in STUDIES:
        file = ROOT / "studies" / name / path
        table = pd.read_csv(file) if file.suffix == ".csv" else read(file)
        rows.append([claims, f"[{name}](../studies/{name}/README.md)", *_spent(table, ["run"], 1)])
    return markdown(["claims", "study", "runs", "minutes", "threads of a run"], rows)


def _spent(table: pd.DataFrame, by: list[str], threads: int) -> list[str]:
    """Number of runs, their minutes in all, and threads; a run's last row has its whole time."""
    seconds = table.groupby(by)["seconds"].max()
    return [f"{len(seconds):,}", f"{seconds.sum() / 60:,.0f}", str(threads)]


# --- pieces ------------------------------------------------------------------------------------------------


def cost(cell: pd.DataFrame) -> str:
    """Tokens to 0.95: median and range over seeds; ∞ for more than a run had."""
    if cell.empty:
        return "–"
    values = bootstrap_median_time(cell["value"], cell["reached"])
    median, low, high = ("∞" if value == float("inf") else f"{value:,.0f}" for value in values)
    return f"{median} [{low}, {high}]"


def accuracy(table: pd.DataFrame, cell: pd.DataFrame) -> str:
    """Final held-out accuracy of every seed."""
    final = table[table["kind"] == "final"].set_index("run")["accuracy"]
    return by_seed(final[cell.sort_values("seed")["run"]]) or "–"


def verdicts(text: str) -> str:
    """The table of contents: every claim of the page with its verdict.

    Raises:
        ValueError: A claim has no verdict, several, or an unknown one.
    """
    rows = []
    for claim in CLAIM.finditer(text):
        found = VERDICT.findall(claim["body"])
        if len(found) != 1 or found[0].partition(":")[0] not in VERDICTS:
            raise ValueError(f"claim {claim['title']!r} needs one verdict out of: {', '.join(VERDICTS)}")
        anchor = re.sub(r"[^\w\- ]", "", claim["title"].lower()).replace(" ", "-")
        rows.append([f"[{claim['title']}](#{anchor})", found[0]])
    return markdown(["claim", "verdict"], rows)


def rewritten(text: str) -> str:
    """The page with its tables made anew."""
    table = evaluations()
    found = retrieval.scores(pd.read_parquet(retrieval.RESULTS))
    law = pd.read_csv(capacity.MEASURED)
    law = law[law["model"].isin(capacity.LAW)]
    held = law[law["task"].eq("position")]
    made = {
        "verdicts": verdicts(text),
        "costs": costs(),
        "ingredients": ingredients(),
        "recall-law": capacity.fits_table(capacity.learned(law[law["task"].eq("mqar")])),
        "published-groups": published_groups(),
        "published-scale": published_scale(),
        "lengths": lengths(table),
        "default-run": default_run.table(pd.read_csv(default_run.MEASURED)),
        "layouts": layouts(table),
        "layouts-by-chance": layouts_by_chance(table),
        "capacity-facts": capacity.runs_table(held),
        "capacity-fits": capacity.fits_table(capacity.learned(held)),
        "updates": updates(),
        "geometry": geometry(),
        "geometry-by-chance": geometry_by_chance(),
        "positions": positions(table),
        "delta-facts": capacity.keyed_facts(pd.read_csv(capacity.MEASURED)),
        "delta-pace": lacks.pace(lacks.finished()),
        "vlm-found": retrieval.base(found),
        "vlm-shapes": retrieval.shapes(found),
        "vlm-edges": retrieval.edges(pd.read_csv(retrieval.HERE / "changed.csv")),
        "vlm-layouts": retrieval.layouts(found),
        "vlm-families": retrieval.families(found),
        "vlm-resolution": retrieval.resolution(found),
        "vlm-scores": quick_start.scores(pd.read_parquet(quick_start.RESULTS)),
    }
    return fill(text, made)


def main() -> None:
    """Make the tables of docs/claims.md anew from committed results."""
    store.write_bytes(DOCUMENT, rewritten(DOCUMENT.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    main()
