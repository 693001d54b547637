"""Results tables and the tables of README.md, from the runs of this study:

    python -m studies.retrieval_cpu.report [RUNS [KEYED]]

RUNS is the folder of the sweep config.py, KEYED that of keyed.py. What they found is kept beside this file,
in results.parquet and targets.parquet, and in keyed.parquet. What stands between the markers `<!-- NAME -->`
and `<!-- /NAME -->` in README.md is replaced. The figures come from `python -m analysis.figures`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd

import analysis
from analysis import settings
from analysis.comparisons import comparisons
from analysis.plots import sweep
from analysis.tables import between, by_seed, fill, share
from ssm_retrieval.statistics import bootstrap_median_time
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from ssm_retrieval.training.outcomes import reachable_length
from ssm_retrieval.training.parquet import rows_of, to_parquet
from synthetic import results

HERE = Path(__file__).parent
RATES = HERE / "learning_rates.json"
KEYED, KEYED_RATES = HERE / "keyed.parquet", HERE / "keyed_rates.json"


def main(runs: str | None = None, keyed: str | None = None) -> None:
    """Make the tables of README.md anew; from folders of runs, if given, else from the committed results."""
    if runs is not None:
        for name, columns in (("results", results.EVALUATION), ("targets", results.TARGET)):
            found = rows_of(analysis.load(runs, name))
            store.write_bytes(HERE / f"{name}.parquet", to_parquet(found, columns))
        store.write_bytes(RATES, (Path(runs) / RATES.name).read_bytes())
    if keyed is not None:
        store.write_bytes(KEYED, to_parquet(rows_of(analysis.load(keyed)), results.EVALUATION))
        store.write_bytes(KEYED_RATES, (Path(keyed) / RATES.name).read_bytes())
    text = (HERE / "README.md").read_text(encoding="utf-8")
    store.write_bytes(HERE / "README.md", filled(text).encode())


def filled(text: str) -> str:
    """README with its tables made anew."""
    everything = analysis.load(HERE / "results.parquet")
    table = everything[everything["purpose"] == "report"]
    tables = {
        "rates": rates(json.loads(RATES.read_text())),
        "lengths": cells(table[table["queries"] > 1], usual=True),
        "layouts": cells(table[table["queries"] == 1], usual=True),
        "exponents": exponents(table),
        "layout-tests": layout_tests(table),
        "cost": cost(everything),
        **keyed_tables(),
    }
    return fill(text, tables)


def keyed_tables() -> dict[str, str]:
    """The tables of layers with keys and Mamba-3."""
    if not KEYED.exists():
        return dict.fromkeys(("keyed-layouts", "keyed-tests", "keyed-rates"), "Not run yet.")
    everything = analysis.load(KEYED)
    table = everything[everything["purpose"] == "report"]
    return {
        "keyed-layouts": cells(table, usual=False),
        "keyed-tests": layout_tests(table),
        "keyed-rates": f"{rates(json.loads(KEYED_RATES.read_text()))}\n\n{cost(everything)}",
    }


def number(value: float) -> str:
    """A number without decimals; a dash for nan."""
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:,.0f}"


def cells(table: pd.DataFrame, usual: bool) -> str:
    """A line per architecture, setting and length: seeds that got there, cost, accuracy."""
    table = settings.label(table)
    table = table[table["usual_state"]] if usual else table
    outcomes = sweep.threshold_table(table, "tokens")
    final = table[table["kind"] == "final"].set_index("run")["accuracy"]
    longest = reachable_length(table).set_index("run")["value"]
    rows = []
    order = settings.variants(table)
    groups: Any = outcomes.groupby(["variant", "setting", "seq_len"])
    for (variant, setting, length), cell in sorted(groups, key=lambda g: (order.index(g[0][0]), *g[0][1:])):
        median = bootstrap_median_time(cell["value"], cell["reached"])
        cell = cell.sort_values("seed")
        rows.append(
            [
                variant,
                setting,
                str(length),
                share(cell["reached"].sum(), len(cell)),
                f"{number(median[0])} [{number(median[1])}, {number(median[2])}]",
                by_seed(final[cell["run"]]),
                ", ".join(str(n) for n in longest[cell["run"]]),
            ]
        )
    header = ["model", "setting", "length", "seeds at 0.95 [95 %]", "tokens to 0.95, median [range]"]
    return markdown([*header, "final accuracy, by seed", "longest length learned, by seed"], rows)


def exponents(table: pd.DataFrame) -> str:
    """A line per fitted power law."""
    laws = sweep.scaling_table(table)
    rows: list[list[Any]] = []
    for law in laws.to_dict("records"):
        known = not math.isnan(law["exponent"])
        value = between(law["exponent"], law["exponent_low"], law["exponent_high"], 2) if known else "–"
        if not known and not math.isnan(law["exponent_low"]):
            value = f"[{law['exponent_low']:.2f}, {law['exponent_high']:.2f}]"
        below, low, high = (law[f"lower_exponent{end}"] for end in ("", "_low", "_high"))
        lower = "–" if math.isnan(below) else between(below, low, high, 2)
        runs = f"{law['n_reached']} of {law['n']}"
        rows.append([law["variant"], law["setting"], law["unit"], value, lower, runs, str(law["note"])])
    head = ["model", "setting", "unit", "exponent [95 %]", "with the lower ends", "runs at 0.95", "note"]
    return markdown(head, rows)


def layout_tests(table: pd.DataFrame) -> str:
    """A line per paired test of query first against query last."""
    table = table[table["layout"].isin(("suffix", "prefix"))]
    found = comparisons(sweep.threshold_table(table, "tokens"))
    found = found[found["kind"] == "layout"]
    rows: list[list[Any]] = [
        [
            *(str(r[name]) for name in ("within", "n", "a_first", "b_first")),
            str(r["unknown"] + r["ties"]),
            f"{r['p']:.3g}",
            f"{r['p_holm']:.3g}",
            f"{r['p_smallest']:.3g}",
        ]
        for r in found.to_dict("records")
    ]
    header = ["model", "pairs", "query first was faster", "query last was faster", "undecided"]
    return markdown([*header, "p", "p, Holm", "smallest p possible"], rows)


def cost(table: pd.DataFrame) -> str:
    """How many runs there are, and how long they took, by purpose."""
    final = table[table["kind"] == "final"]
    rows = [
        [str(purpose), str(len(part)), f"{part['seconds'].sum() / 60:.0f}"]
        for purpose, part in final.groupby("purpose")
    ]
    return markdown(["runs", "number", "minutes on one thread"], rows)


def rates(rows: list[dict]) -> str:
    """The scores of all learning rates, and which one was chosen."""
    names = {"rope": ", RoPE 25 %", "none": ", no positions"}
    lines = []
    for key in dict.fromkeys((row["model"], row["position"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["position"]) == key]
        scores = [", ".join(f"{score:.3f}" for score in r["scores"]) for r in mine]
        lines.append([NAMES[key[0]] + names.get(key[1], ""), *scores, f"{mine[0]['lr']:g}"])
    candidates = list(dict.fromkeys(f"{row['candidate']:g}" for row in rows))
    return markdown(["model", *(f"scores at {c}" for c in candidates), "chosen"], lines)


if __name__ == "__main__":
    main(*sys.argv[1:3])
