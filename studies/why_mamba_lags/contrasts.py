"""Tables and figures of this study, from probed runs of studies/retrieval_cpu:

    python -m studies.why_mamba_lags.contrasts [RUNS PROBES]

RUNS is the folder of that sweep, PROBES one with the output of
`python -m probes.run RUNS/<id> --out PROBES/<id>` for each probed run. Writes measured.parquet beside this
file (one row per run, weights, site, layer, quantity, role and lag), the figures (figures.py) and what stands
between `<!-- NAME -->` and `<!-- /NAME -->` in README.md. Without arguments it starts from measured.parquet.

Runs are the units: tables show every seed. So few seeds have no interval of their mean; ranges stand beside
means, which of ratios are geometric.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.tables import by_seed, fill
from ssm_retrieval import models
from ssm_retrieval.style import NAMES
from ssm_retrieval.tables import markdown
from ssm_retrieval.training import store
from synthetic import records

HERE = Path(__file__).parent
MEASURED = HERE / "measured.parquet"
LAYOUTS = {"suffix": "query last", "prefix": "query first", "two-pass": "context twice"}
WORDS = {"write": "written", "kept": "kept", "share": "part of the state"}
RUN = ["run", "model", "position", "layout", "queries", "seq_len", "d_state", "seed", "accuracy"]
LENGTH = 64  # of the study's models
FAMILIES = ("mamba", "mamba2", "transformer")
SSM = FAMILIES[:2]
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
            getattr(models.config(plan["model"], **overrides), "d_state", 0),
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
        _part(folder, "capacity", "facts", "facts", name="facts", lag="shown"),
        _part(folder, "capacity", "place", "accuracy", name="read out", lag="place"),
        _part(folder, "patch", "target", "effect", name="moved"),
        _part(folder, "patch", "target", "effect", name="moved, unrelated", control="unrelated"),
        _part(folder, "knockout", "part", "drop", name="without one part", lag="number"),
        _part(folder, "knockout", "set", "drop", name="without the needed parts", lag="size"),
        _part(folder, "knockout", "control", "drop", name="without random parts", lag="size"),
    ]
    columns = ["weights", "site", "layer", "quantity", "role", "lag", "value"]
    table = pd.concat([part.reindex(columns=columns) for part in parts], ignore_index=True)
    table = table.astype({"site": object, "role": object})
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
    if probe == "capacity" and part == "place":  # behind the whole context
        table = table[table["shown"] == table["shown"].max()]
    table = table.assign(quantity=name or quantity)
    return table.rename(columns={lag: "lag"}) if lag else table


# --- selections ---------------------------------------------------------------------------------------------


def cells(table: pd.DataFrame, **fixed: Any) -> pd.DataFrame:
    """Choose rows by their values.

    Args:
        table: The study's table.
        **fixed: Column = the value, or a tuple of values.

    Returns:
        The rows.
    """
    for name, value in fixed.items():
        table = table[table[name].isin(value) if isinstance(value, tuple) else table[name] == value]
    return table


def best_layer(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The largest value over layers of every run and `by`."""
    return table.groupby([*RUN, *by], observed=True)["value"].max().reset_index()


def ratio(values: Any) -> str:
    """Geometric mean of ratios over seeds, and their range."""
    values = np.asarray(values, float)
    if not len(values):
        return "–"
    low, mean, high = values.min(), np.exp(np.log(values).mean()), values.max()
    return f"{_short(mean)} ({_short(low)} to {_short(high)})"


def each(cell: pd.DataFrame, digits: int = 2) -> str:
    """The value of every seed."""
    return by_seed(cell.sort_values("seed")["value"], digits)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


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
    """Target over distractor by layer: query last, query first, untrained; one query per sequence."""
    rows = []
    for model in SSM:
        mine = cells(table, model=model, queries="single")
        for quantity in WORDS:
            part = mine[mine["quantity"] == quantity]
            for layer in sorted(part["layer"].unique()):
                here = part[part["layer"] == layer]
                found = [
                    ratio(cells(here, layout=layout, weights=weights)["value"])
                    for layout, weights in (
                        ("suffix", "trained"), ("prefix", "trained"), ("prefix", "untrained")
                    )
                ]  # fmt: skip
                rows.append([NAMES[model], WORDS[quantity], layer + 1, *found])
    head = ["model", "quantity", "layer", "query last", "query first", "untrained"]
    return markdown(head, rows)


def tokens(table: pd.DataFrame) -> str:
    """Symbols that the model answers, that it can still be asked for, and that linear probes find."""
    rows = []
    keys = ["model", "layout", "queries", "seq_len"]
    for key, cell in table.groupby(keys, observed=True):
        model, layout, queries, length = (*map(str, key[:3]), int(str(key[3])))
        if layout == "prefix":
            continue
        trained = cell[cell["weights"] == "trained"]
        once = trained.drop_duplicates("run").sort_values("seed")
        asked = trained[(trained["quantity"] == "facts") & (trained["lag"] == length)]
        state = best_layer(cells(cell, quantity="tokens", site="state"), ["weights"])
        fresh = state[state["weights"] == "untrained"]["value"]
        rows.append(
            [
                NAMES[model],
                f"{LAYOUTS[layout]}, {queries}",
                by_seed(once["accuracy"] * length, 1),
                each(asked, 1) or "–",
                each(state[state["weights"] == "trained"], 1) or "–",
                f"{fresh.mean():.1f}" if len(fresh) else "–",
            ]
        )
    head = ["model", "query", "accuracy x N", "asked for one by one", "linear probe of the state"]
    return markdown([*head, "of an untrained one"], rows)


def where(table: pd.DataFrame) -> str:
    """By layer: share of the logit difference restored from the context symbols and from the last token.

    Both context symbols are patched at once, because effects of two patches do not add up.
    """
    rows = []
    for name, part in settings(table):
        moved = part[(part["quantity"] == "moved") & (part["site"] == "residual")]
        for layer in sorted(moved["layer"].unique()):
            here = moved[moved["layer"] == layer]
            found = []
            for roles in ((TOGETHER,), ("last", "query")):
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
    head = ["setting", "after block", "context symbols, one patch", "last token", "place decodable there"]
    return markdown(head, rows)


def needed(table: pd.DataFrame) -> str:
    """The parts that seem responsible, taken away at once, beside random sets of as many others, by seed."""
    rows = []
    for name, part in settings(table):
        once = part.drop_duplicates("run").sort_values("seed")
        count, gone, others = [], [], []
        for run in once["run"]:
            mine = part[part["run"] == run]
            single = mine[mine["quantity"] == "without one part"]
            together = mine[mine["quantity"] == "without the needed parts"]
            if single.empty:
                continue
            count.append(f"{int(together['lag'].sum())} of {len(single)}")
            gone.append(f"{together['value'].iloc[0]:.2f}" if len(together) else "–")
            random = mine.loc[mine["quantity"] == "without random parts", "value"]
            others.append(f"{random.mean():.2f}" if len(random) else "–")
        rows.append([name, *(", ".join(cell) or "–" for cell in (count, gone, others))])
    head = ["setting", "parts that seem needed", "accuracy lost without them", "without random ones"]
    return markdown(head, rows)


def settings(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What is compared where: models that have learned the task (accuracy above 0.5), by name."""
    found = []
    for layout, queries in (("suffix", "dense"), ("prefix", "single")):
        for model in FAMILIES:
            part = cells(table, model=model, layout=layout, queries=queries)
            part = part[part["accuracy"] > 0.5]
            if len(part):
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
        needed=needed(table),
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
