"""Causal tracing: which activations, at which layer and token, carry the answer from run to run?

The part of the table is the kind of corruption: "query" (another symbol is asked for) or "target" (the
queried symbol has changed places). The quantity is "effect", the share of the logit difference that a patch
restores; the other columns are those of `probes.patching.patch`, with its controls: self (0), everything (1)
and unrelated. The role target+partner is one patch of both symbols, because effects of two patches do not add
up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from probes.contrast_pairs import KINDS, contrast_pairs
from probes.patch_cells import patch_cells, target_and_partner
from probes.patch_sites import SITES
from probes.patching import trace
from probes.suite.common import Options, Probe, interval, require_roles
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.tables import markdown
from synthetic.tasks import Task

SHORT = 40  # tokens up to which every position has a cell of its own
CELLS = 20  # otherwise


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: A task of position type.
        options: Pairs, seed and progress.

    Returns:
        Rows by part (kind of pair), site, layer, head, role with tokens start .. stop - 1, and control.
    """
    require_roles(task, "patch")
    long = task.seq_len > 256
    examples = options.examples or (16 if long else 64)
    tables = []
    for k, kind in enumerate(KINDS):

        def share(done: int, count: int, k: int = k) -> None:
            options.progress((k + done / count) / len(KINDS))

        made = contrast_pairs(task, examples, task.seq_len, kind, options.seed)
        what = [*patch_cells(made, SHORT if made.answer_at < SHORT else CELLS), target_and_partner(made)]
        tables.append(trace(model, made, what, SITES, progress=share).table().assign(part=kind))
    joined = pd.concat(tables, ignore_index=True)
    joined = joined.rename(columns=dict(low="start", high="stop"))
    joined = joined.rename(columns=dict(effect="value", effect_low="low", effect_high="high"))
    return joined.assign(quantity="effect", kind=joined["part"])


def column_key(row: Any) -> tuple[int, int, str]:
    """Sort key and label of a cell: named roles in the order of a sequence, then windows of distractors."""
    if row["role"] != "distractor":
        order = (
            "bos", "task", "target", "partner", "target+partner", "separator", "query_marker", "query",
            "last", "answer",
        )  # fmt: skip
        place = order.index(row["role"]) if row["role"] in order else len(order)
        return 0, place, "marker" if row["role"] == "query_marker" else str(row["role"])
    start, stop = int(row["start"]), int(row["stop"])
    return 1, start, str(start) if stop == start + 1 else f"{start}-{stop - 1}"


def row_key(row: Any) -> tuple[int, int, str]:
    """Sort key and label of a layer, or of a head in it."""
    head = -1 if pd.isna(row["head"]) else int(row["head"])
    layer = int(row["layer"])
    return layer, head, str(layer) if head < 0 else f"{layer}.{head}"


def summary(table: pd.DataFrame) -> str:
    """The strongest patches of each site beside their controls, as Markdown."""
    first = table.drop_duplicates(["family", "part"])
    words = [
        "Share of the logit difference between clean and corrupted run that a patch restores (ratio of means "
        "over pairs, 95 % interval by the delta method). Layer n of the residual stream is what n blocks "
        "have made. Controls: the run's own activation (self), another clean run's of its norm (unrelated), "
        "all positions at once (everything). Of a model that does not answer the clean run right, or whose "
        "gap is near 0, these shares say nothing."
    ]
    gaps = [
        [
            r["family"],
            r["part"],
            f"{r['gap']:.3g}",
            f"{r['accuracy_clean']:.3g}",
            f"{r['accuracy_corrupted']:.3g}",
        ]
        for r in first.to_dict("records")
    ]
    words.append(
        markdown(["family", "pairs", "gap of logits", "clean answer in clean run", "in corrupted run"], gaps)
    )
    words.append("The strongest patches of each site, and controls over all its patches:")
    rows = []
    groups: Any = table.groupby(["family", "part", "site"], sort=False)
    for key, group in groups:
        patches = group[(group["control"] == "") & group["value"].notna()]
        limits = {
            name: group.loc[group["control"] == name, "value"].abs().max()
            for name in ("self", "unrelated", "everything")
        }
        beside = [f"{v:.3g}" if np.isfinite(v) else "" for v in limits.values()]
        for row in patches.sort_values("value", ascending=False).head(3).to_dict("records"):
            rows.append([*key, row_key(row)[2], column_key(row)[2], interval(row), *beside])
    head = [
        "family",
        "pairs",
        "site",
        "layer",
        "tokens",
        "effect",
        "self (largest)",
        "unrelated (largest)",
        "everything",
    ]
    return "\n\n".join([*words, markdown(head, rows)])


PROBE = Probe(
    "Which activations carry the answer?",
    measure,
    summary,
    version=2,
    untrained=False,
    columns=(
        "site",
        "head",
        "role",
        "start",
        "stop",
        "control",
        "gap",
    ),
)
