"""What the rows of the results store have in common: which lines and panels of a figure they belong to."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.style import FAMILIES, NAMES, family_colors

POSITION_NAMES = {"rope": "RoPE", "none": "no positions"}  # learned positions, the default, go without saying
TELLING = ("preset", "n_layer", "lr")  # named in a label only where runs of one label differ in them
DASHES = {"learned": "-", "rope": "--", "none": ":"}
MARKERS = {"learned": "o", "rope": "s", "none": "D"}


def label(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with the columns variant (architecture and position scheme), setting (layout and number of
    queries per training sequence) and usual_state (False for state sizes other than the family's usual one).

    The usual state size of a family is the one that most of its rows have. Raises ValueError if a config
    column of the results store is missing or there are no rows.
    """
    needed = ["model", "position", "rotary_pct", "d_state", "layout", "queries", "seq_len", *TELLING]
    missing = [name for name in needed if name not in table]
    if missing or table.empty:
        raise ValueError(f"table lacks {', '.join(missing) or 'rows'}; it must be one of the results store's")
    table = table.copy()
    table["variant"] = [_variant(row) for row in table[needed].to_dict("records")]
    for name in TELLING:
        differs = table.groupby("variant")[name].transform("nunique") > 1
        if differs.any():
            table.loc[differs, "variant"] += f", {name} " + table.loc[differs, name].map(str)
    dense = table["queries"].gt(1).map({True: "dense queries", False: "single query"})
    table["setting"] = table["layout"].fillna("").map(lambda x: f"{x}, " if x else "") + dense
    # by number of different lengths first: a sweep over states has many sizes at a single length
    usual = {}
    for family, rows in table.groupby("model"):
        lengths = rows.groupby("d_state")["seq_len"].nunique()
        usual[family] = lengths.idxmax() if len(lengths) else None
    state = table["model"].map(usual)
    table["usual_state"] = table["d_state"].isna() | (table["d_state"] == state)
    return table


def _variant(row: dict[Any, Any]) -> str:
    name = NAMES[row["model"]]
    scheme = POSITION_NAMES.get(row["position"])
    if scheme == "RoPE" and row["rotary_pct"] < 1:
        scheme = f"RoPE {row['rotary_pct']:.0%}".replace("%", " %")
    return f"{name}, {scheme}" if scheme else name


def variants(table: pd.DataFrame) -> list[str]:
    """The labels in the order in which every figure lists them."""
    first = table.drop_duplicates("variant")
    order = {family: i for i, family in enumerate(FAMILIES)}
    rows = zip(
        first["model"].map(order), first["position"].fillna("").map(str), first["variant"], strict=True
    )
    return [name for *_, name in sorted(rows)]


def looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """color, linestyle and marker of every variant: colour tells the family, the rest its position scheme."""
    first = table.drop_duplicates("variant").set_index("variant")
    found = {}
    for name in variants(table):
        scheme = first.loc[name, "position"]
        scheme = scheme if isinstance(scheme, str) else "learned"
        found[name] = dict(
            color=family_colors()[str(first.loc[name, "model"])],
            linestyle=DASHES[scheme],
            marker=MARKERS[scheme],
        )
    return found
