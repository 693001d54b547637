"""Paired tests of a sweep: architectures against each other, and settings against each other."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pandas as pd

from analysis.statistics import holm, paired_sign_test


def comparisons(thresholds: pd.DataFrame) -> pd.DataFrame:
    """Who needs fewer sequences to the threshold, pairing runs of the same length and seed.

    thresholds: `analysis.plots.threshold_table`. kind "variant" pairs architectures in the same setting,
    "setting" pairs layouts (and numbers of queries) of the same architecture. The fields are those of
    `SignTest`; p_holm corrects over all rows of one kind. Pairs with nothing in common are left out.
    """
    rows: list[dict[str, Any]] = []
    for factor, within in (("variant", "setting"), ("setting", "variant")):
        found = []
        for level, part in thresholds.groupby(within):
            for a, b in combinations(sorted(part[factor].unique()), 2):
                keys = part[part[factor] == a][["seq_len", "seed"]]
                if keys.merge(part[part[factor] == b], on=["seq_len", "seed"]).empty:
                    continue
                test = paired_sign_test(part, a, b, on=("seq_len", "seed"), factor=factor)
                found.append({"kind": factor, "within": level, **dataclasses.asdict(test)})
        for row, corrected in zip(found, holm([row["p"] for row in found]) if found else [], strict=True):
            rows.append({**row, "p_holm": float(corrected)})
    return pd.DataFrame(rows)
