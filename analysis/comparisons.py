"""Paired tests of a sweep: architectures against each other, and settings against each other."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pandas as pd

from ssm_retrieval.statistics import holm, paired_sign_test


def comparisons(thresholds: pd.DataFrame) -> pd.DataFrame:
    """Test who gets to the threshold with less, pairing runs of the same length and seed.

    Args:
        thresholds: Table of `analysis.plots.sweep.threshold_table`, best in tokens: equal budgets are equal
            numbers of tokens.

    Returns:
        A row per pair. Column kind is "variant" for architectures in the same setting, "layout" for layouts
        of the same architecture that differ in nothing else. Further columns are the fields of
        `ssm_retrieval.statistics.SignTest`; comparisons is the number of rows of one kind, over which p_holm
        corrects p, and by_chance in how many of those all known pairs would agree if coins decided. Pairs
        without common runs are left out.
    """
    table = thresholds.copy()
    parts = table["setting"].str.partition(", ")
    table["layout"], table["supervision"] = parts[0], parts[2]
    table["where"] = table["variant"] + ", " + table["supervision"]
    rows: list[dict[str, Any]] = []
    for kind, factor, within in (("variant", "variant", "setting"), ("layout", "layout", "where")):
        found = []
        for level, part in table.groupby(within):
            for a, b in combinations(sorted(part[factor].unique()), 2):
                keys = part[part[factor] == a][["seq_len", "seed"]]
                if keys.merge(part[part[factor] == b], on=["seq_len", "seed"]).empty:
                    continue
                test = paired_sign_test(part, a, b, on=("seq_len", "seed"), factor=factor)
                found.append({"kind": kind, "within": level, **dataclasses.asdict(test)})
        known = [count for row in found if (count := row["a_first"] + row["b_first"])]
        many = dict(comparisons=len(found), by_chance=sum(2.0 ** (1 - count) for count in known))
        for row, corrected in zip(found, holm([row["p"] for row in found]) if found else [], strict=True):
            rows.append({**row, "p_holm": float(corrected), **many})
    return pd.DataFrame(rows)
