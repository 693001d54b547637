"""Tables and figures of this study, from probed runs of studies/retrieval_cpu:

    python -m studies.why_mamba_lags.contrasts [RUNS PROBES]

RUNS is the folder of that sweep, PROBES one with the output of
`python -m probes.run RUNS/<id> --out PROBES/<id>` for each probed run. Writes measured.parquet beside this
file (one row per run, weights, site, layer, quantity, role and lag), the figures (figures.py) and what stands
between `<!-- NAME -->` and `<!-- /NAME -->` in README.md. Without arguments it starts from measured.parquet.

Runs are the units: tables show every seed; intervals of ratios and differences are Student's 95 % over three.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.tables import by_seed, fill
from ssm_retrieval.statistics import geometric_mean_interval
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from synthetic import records

HERE = Path(__file__).parent
MEASURED = HERE / "measured.parquet"
LAYOUTS = {"suffix": "query last", "prefix": "query first"}
WORDS = {"write": "written", "kept": "kept", "share": "part of the state"}
RUN = ["run", "model", "position", "layout", "queries", "seq_len", "d_state", "seed", "accuracy"]
USUAL_STATE = {"mamba": 16, "mamba2": 64}
TOGETHER = "target+partner"  # role of a patch of both
SITES = {"residual": "residual stream", "state": "state"}


# --- from probed runs to one tidy table ---------------------------------------------------------------------


def collect(runs: Path, probes: Path) -> pd.DataFrame:
    """One row per run, weights, site, layer, quantity, role and lag."""
    tables = []
    for folder in sorted(path.parent for path in probes.glob("*/summary.md")):
        plan = records.config(runs / folder.name)["plan"]
        result = records.result(runs / folder.name)
        overrides = plan["model_overrides"]
        values = [
            folder.name,
            plan["family"],
            overrides.get("position", ""),
            plan["task_options"]["layout"],
            "single" if plan["queries"] == 1 else "dense",
            plan["seq_len"],
            overrides.get("d_state", USUAL_STATE.get(plan["family"], 0)),
            plan["seed"],
            result["accuracy"],
        ]
        tables.append(measured(folder).assign(**dict(zip(RUN, values, strict=True))))
    table = pd.concat(tables, ignore_index=True)
    texts = ("run", "model", "position", "layout", "queries", "weights", "site", "quantity", "role")
    return table.astype({"value": "float32", **{name: "category" for name in texts}})


def measured(folder: Path) -> pd.DataFrame:
    """weights, site, layer, quantity, role, lag, value of one probed run, from the tables of its probes."""
    parts = [
        _part(folder, "updates", "contrast", "write"),
        _part(folder, "retention", "contrast", "share"),
        _part(folder, "retention", "contrast", "kept"),
        _part(folder, "retention", "curve", "kept", name="kept curve", lag="distance"),
        _part(folder, "linear", "token", "accuracy", name="decoded", lag="lag"),
        _part(folder, "linear", "answer", "accuracy", name="answer decoded"),
        _part(folder, "linear", "capacity", "expected tokens", name="tokens"),
        _part(folder, "lens", "accuracy", "accuracy", name="lens"),
        _part(folder, "patch", "target", "effect", name="moved"),
        _part(folder, "patch", "target", "effect", name="moved, unrelated", control="unrelated"),
        _part(folder, "attention", "score", "retrieval", name="retrieval"),
    ]
    columns = ["weights", "site", "layer", "quantity", "role", "lag", "value"]
    table = pd.concat([part.reindex(columns=columns) for part in parts], ignore_index=True)
    return table.fillna({"site": "", "role": "", "lag": -1}).astype({"layer": int, "lag": int})


def _part(
    folder: Path, probe: str, part: str, quantity: str, *, name: str = "", lag: str = "", control: str = ""
) -> pd.DataFrame:
    path = folder / f"{probe}.csv"
    if not path.exists():
        return pd.DataFrame()
    table = pd.read_csv(path)
    table = table[(table["part"] == part) & (table["quantity"] == quantity)]
    if probe == "patch":  # residual stream and state; a mean over the distractors, whose number differs
        table = table[table["control"].fillna("").eq(control) & table["site"].isin(list(SITES))]
        table = table.groupby(["weights", "site", "layer", "role"])["value"].mean().reset_index()
    if probe == "attention":  # the best head of each layer
        table = table.groupby(["weights", "layer"])["value"].max().reset_index()
    table = table.assign(quantity=name or quantity)
    return table.rename(columns={lag: "lag"}) if lag else table


# --- selections ---------------------------------------------------------------------------------------------


def cells(table: pd.DataFrame, *, any_state: bool = False, **fixed: Any) -> pd.DataFrame:
    """Choose rows by their values.

    Args:
        table: The study's table.
        any_state: Keep state sizes other than the usual one, too.
        **fixed: Column = the value, or a tuple of values.

    Returns:
        The rows.
    """
    usual = table["d_state"] == table["model"].map(USUAL_STATE).astype(float).fillna(0)
    table = table if any_state else table[usual]
    for name, value in fixed.items():
        table = table[table[name].isin(value) if isinstance(value, tuple) else table[name] == value]
    return table


def best_layer(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The largest value over layers of every run and `by`."""
    return table.groupby([*RUN, *by], observed=True)["value"].max().reset_index()


def ratio(values: Any) -> str:
    """Geometric mean of ratios over seeds and its 95 % interval."""
    mean, low, high = geometric_mean_interval(values)
    return f"{_short(mean)} [{_short(low)}, {_short(high)}]"


def each(cell: pd.DataFrame, digits: int = 2) -> str:
    """The value of every seed."""
    return by_seed(cell.sort_values("seed")["value"], digits)


def _short(value: float) -> str:
    return f"{value:.2g}" if value >= 10 or value < 0.1 else f"{value:.2f}"


def difference(a: Any, b: Any, digits: int = 2) -> str:
    """Write the difference of two means, a minus b.

    Args:
        a: Values.
        b: Values.
        digits: Decimal places.

    Returns:
        The difference with Welch's 95 % interval, and Hedges' g, its standardised size.
    """
    from scipy import stats

    a, b = np.asarray(a, float), np.asarray(b, float)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2))
    g = (a.mean() - b.mean()) / pooled * (1 - 3 / (4 * (len(a) + len(b)) - 9))
    return f"{a.mean() - b.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], g = {g:.1f}"


def variant(model: Any, position: Any) -> str:
    """How a row of a table calls a model."""
    return NAMES[str(model)] + (" (RoPE)" if position == "rope" else "")


# --- tables -------------------------------------------------------------------------------------------------


def runs_table(table: pd.DataFrame) -> str:
    """Which runs are behind this page, and what they came to."""
    once = table.drop_duplicates("run").sort_values(["seq_len", "layout", "model", "d_state"])
    rows = []
    keys = ["seq_len", "layout", "queries", "model", "position", "d_state"]
    for key, cell in once.groupby(keys, observed=True, sort=True):
        length, layout, queries, model, position, d_state = key
        accuracy = ", ".join(f"{a:.2f}" for a in cell.sort_values("seed")["accuracy"])
        rows.append(
            [variant(model, position), length, f"{LAYOUTS[str(layout)]}, {queries}", d_state or "–", accuracy]
        )
    return markdown(["model", "length", "query", "d_state", "final accuracy, by seed"], rows)


def contrasts(table: pd.DataFrame) -> str:
    """Target over distractor in the last layer, query last against first, by length; and untrained."""
    rows = []
    for model in USUAL_STATE:
        for quantity in WORDS:
            for length in (16, 32):
                part = cells(table, model=model, quantity=quantity, seq_len=length)
                part = part[part["layer"] == part["layer"].max()]
                first = part[(part["layout"] == "prefix") & (part["weights"] == "trained")]
                last = part[(part["layout"] == "suffix") & (part["weights"] == "trained")]
                last = last[last["queries"] == ("single" if length == 16 else "dense")]
                plain = part[(part["layout"] == "prefix") & (part["weights"] == "untrained")]
                found = [ratio(rows_["value"]) for rows_ in (last, first)]
                seeds = ", ".join(_short(v) for v in first.sort_values("seed")["value"])
                fresh = f"{np.exp(np.log(plain['value']).mean()):.2f}"
                rows.append([NAMES[model], WORDS[quantity], length, *found, seeds, fresh])
    head = ["model", "quantity", "length", "query last", "query first", "its seeds", "untrained"]
    return markdown(head, rows)


def tokens(table: pd.DataFrame) -> str:
    """Context symbols that a linear probe finds in the state, beside those that the model itself finds."""
    part = best_layer(cells(table, quantity="tokens", site="state"), ["weights"])
    rows = []
    for key, cell in part.groupby(["model", "layout", "queries", "seq_len"], observed=True):
        model, layout, queries, length = (*key[:3], int(str(key[3])))
        trained = cell[cell["weights"] == "trained"].sort_values("seed")
        fresh = cell[cell["weights"] == "untrained"].sort_values("seed")
        rows.append(
            [
                NAMES[str(model)],
                f"{LAYOUTS[str(layout)]}, {queries}",
                length,
                by_seed(trained["accuracy"] * length, 1) if layout == "suffix" else "–",
                each(trained, 1),
                f"{fresh['value'].mean():.1f}",
            ]
        )
    head = ["model", "query", "length N", "accuracy x N", "decodable", "decodable, untrained"]
    return markdown(head, rows)


def state_sizes(table: pd.DataFrame) -> str:
    """The same at length 16 for states of different size."""
    part = best_layer(
        cells(table, any_state=True, quantity="tokens", site="state", seq_len=16, queries="dense"),
        ["weights"],
    )
    rows = []
    for (model, d_state), cell in part.groupby(["model", "d_state"], observed=True):
        trained, fresh = (cell[cell["weights"] == w] for w in ("trained", "untrained"))
        accuracy = ", ".join(f"{a:.2f}" for a in trained.sort_values("seed")["accuracy"])
        numbers = f"{256 * int(str(d_state)):,}"
        found = [each(trained, 1), f"{fresh['value'].mean():.1f}"]
        rows.append([NAMES[str(model)], d_state, numbers, accuracy, *found])
    head = ["model", "d_state", "numbers per layer", "accuracy, by seed", "decodable", "decodable, untrained"]
    return markdown(head, rows)


def effects(table: pd.DataFrame) -> str:
    """Differences of the number of decodable symbols, with Welch's interval and Hedges' g."""
    part = cells(table, any_state=True, quantity="tokens", site="state", weights="trained")
    part = best_layer(part, [])
    rows = []
    for model, usual in USUAL_STATE.items():
        mine = part[part["model"] == model]
        plain = dict(layout="suffix", queries="dense", seq_len=16, d_state=usual)
        for name, a, b in (
            (
                "query first - last, single, N = 16",
                dict(queries="single", layout="prefix"),
                dict(queries="single"),
            ),
            ("N = 32 - N = 16, query last, dense", dict(seq_len=32), {}),
            ("d_state 64 - 4, query last, dense, N = 16", dict(d_state=64), dict(d_state=4)),
        ):
            x, y = (cells(mine, any_state=True, **{**plain, **some})["value"] for some in (a, b))
            rows.append([NAMES[model], name, difference(x, y, digits=1)])
    return markdown(["model", "comparison", "difference in decodable symbols"], rows)


def where(table: pd.DataFrame) -> str:
    """By layer: share of the logit difference restored from the context symbols and from the last token.

    Of the two context symbols in one patch where the runs were probed so, else the sum of two patches, which
    is another thing: effects of two patches do not add up.
    """
    rows = []
    joint = bool((table["role"] == TOGETHER).any())
    for name, part in settings(table):
        moved = part[(part["quantity"] == "moved") & (part["site"] == "residual")]
        for layer in sorted(moved["layer"].unique()):
            here = moved[moved["layer"] == layer]
            found = []
            for roles in ((TOGETHER,) if joint else ("target", "partner"), ("last", "query")):
                some = here[here["role"].isin(roles)]
                found.append(each(some.groupby("seed")["value"].sum().reset_index()))
            decoded = part[
                (part["quantity"] == "answer decoded")
                & (part["site"] == "residual")
                & (part["weights"] == "trained")
                & (part["layer"] == layer - 1)
            ]
            found.append(each(decoded) if len(decoded) else "–")
            rows.append([name, layer, *found])
    both = "context symbols, one patch" if joint else "context symbols, sum of two patches"
    head = ["setting", "after block", both, "last token", "place decodable there"]
    return markdown(head, rows)


def settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What is compared where: models that have learned the task (accuracy above 0.5), by name."""
    found = []
    wanted = (
        ("transformer", "suffix", "dense", 16, "learned"),
        ("mamba", "suffix", "dense", 16, ""),
        ("mamba2", "suffix", "dense", 16, ""),
        ("mamba", "prefix", "single", 16, ""),
        ("mamba2", "prefix", "single", 16, ""),
    )
    for model, layout, queries, length, position in wanted:
        part = cells(table, model=model, layout=layout, queries=queries, seq_len=length, position=position)
        part = part[part["accuracy"] > 0.5]
        found.append((f"{NAMES[model]}, {LAYOUTS[layout]}", part))
    return found


def filled(text: str) -> str:
    """README with its tables made anew from measured.parquet."""
    table = pd.read_parquet(MEASURED)
    made = dict(
        runs=runs_table(table),
        contrasts=contrasts(table),
        where=where(table),
        tokens=tokens(table),
        sizes=state_sizes(table),
        effects=effects(table),
    )
    return fill(text, made)


def main(arguments: list[str]) -> None:
    """Make the figures and the tables of README.md anew; first from folders of runs, if given."""
    from studies.why_mamba_lags import figures

    if arguments:
        table = collect(Path(arguments[0]), Path(arguments[1]))
        store.write_bytes(MEASURED, table.to_parquet(index=False, compression="zstd"))
    figures.write(pd.read_parquet(MEASURED))
    text = (HERE / "README.md").read_text(encoding="utf-8")
    store.write_bytes(HERE / "README.md", filled(text).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
