"""What the rows of the results store have in common: which lines and panels of a figure they belong to."""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
from pandas.api.types import is_number

from ssm_retrieval.errors import UserError
from ssm_retrieval.style import FAMILIES, NAMES, family_colors
from synthetic.results import CONFIG, SIZES, apart

POSITION_NAMES = {"rope": "RoPE", "none": "no positions"}  # learned positions, the default, go without saying
DENSE = ("position", "position-varlen", "grid")  # tasks whose number of queries is a choice
DASHES = {"learned": "-", "rope": "--", "none": ":"}
MARKERS = {"learned": "o", "rope": "s", "none": "D"}


def label(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that say to which line and panel of a figure a row belongs.

    Args:
        table: Rows of the results store.

    Returns:
        A copy with the columns variant (architecture, position scheme, and whatever else it takes to tell
        runs apart), setting (layout and number of queries per training sequence) and usual_state (False for
        state sizes other than the preset's or, if no run of a variant has that, the commonest).

    Raises:
        UserError: A column of the results store is missing, or there are no rows.
    """
    missing = [name for name in CONFIG if name not in table]
    if missing or table.empty:
        raise UserError(f"table lacks {', '.join(missing) or 'rows'}; it must be one of the results store's")
    table = table.copy()
    # a state space model without positions needs no words, unless others of its architecture have some
    given = table["position"].eq("learned").groupby(table["model"]).transform("any")
    scheme = table["position"].astype(object).where(table["position"].notna() | ~given, "none")
    needed = table[["model", "rotary_pct"]].assign(position=scheme)
    table["variant"] = [_variant(row) for row in needed.to_dict("records")]
    dense = table["queries"].gt(1).map({True: "dense queries", False: "single query"})
    dense = dense.where(table["task"].isin(DENSE), "")
    layout = table["layout"].fillna("")
    table["setting"] = (layout + ", " + dense).str.strip(", ").replace("", "its own layout")
    for name in (*SIZES, *apart(table, ["task", "variant", "setting", "seq_len", "d_state", "seed"])):
        differs = table.groupby("variant")[name].transform(lambda column: column.nunique(dropna=False)) > 1
        if differs.any():
            words = f", {name} " + table.loc[differs, name].map(
                lambda v: f"{v:g}" if is_number(v) else str(v)
            )
            table.loc[differs, "variant"] += words
    groups = table.groupby(["model", "preset", "variant"], dropna=False)["d_state"]
    table["usual_state"] = table["d_state"].isna() | (table["d_state"] == groups.transform(_usual_state))
    return table


def _usual_state(states: pd.Series[float]) -> float:
    """The preset's state size where runs have it, else the commonest; nan for models without a state.

    State space models that retrieve positions have a state of their own (`synthetic.shape`).
    """
    from ssm_retrieval import models

    model, preset, _ = cast(tuple[str, str, str], states.name)
    try:
        own = getattr(models.config(f"{model}-{preset}"), "d_state", None)
    except ValueError:  # a preset of another version
        own = None
    known = states.dropna()
    if own is not None and own in set(known):
        return float(own)
    return float(known.mode().max()) if len(known) else float("nan")


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
        first["model"].map(order),
        first["position"].astype(object).fillna("").map(str),
        first["variant"],
        strict=True,
    )
    return [name for *_, name in sorted(rows)]


def looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """color, linestyle and marker of every variant: colour tells the family, the rest its position scheme."""
    first = table.drop_duplicates("variant").set_index("variant")
    found = {}
    for name in variants(table):
        scheme = first.loc[name, "position"]
        if not isinstance(scheme, str):
            scheme = "none" if POSITION_NAMES["none"] in name else "learned"
        found[name] = dict(
            color=family_colors()[str(first.loc[name, "model"])],
            linestyle=DASHES[scheme],
            marker=MARKERS[scheme],
        )
    return found
