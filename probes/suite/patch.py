"""Causal tracing: which activations, at which layer and token, carry the answer from run to run?

Part of the table is the kind of corruption: "query" (another symbol is asked for) or "target" (the queried
symbol has changed places). quantity is "effect", the share of the logit difference that a patch restores; the
other columns are those of `probes.patching.patch`, with its controls: self (0), everything (1) and unrelated.
The role target+partner is one patch of both symbols: effects of two patches do not add up.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probes.contrast_pairs import KINDS, contrast_pairs
from probes.patch_cells import patch_cells, target_and_partner
from probes.patching import trace
from probes.suite.common import Options, Probe, families, interval, markdown, require_roles
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.style import NAMES, panels
from synthetic.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT = 40  # tokens up to which every position has a cell of its own
CELLS = 20  # otherwise
SITES = ("residual", "state", "head")
ANSWERS = 0.5  # accuracy of clean runs below which a share of the logit difference says nothing


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Rows by part (kind of pair), site, layer, head, role and tokens start .. stop - 1, and control."""
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


def _column(row: Any) -> tuple[int, int, str]:
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


def _row(row: Any) -> tuple[int, int, str]:
    head = -1 if pd.isna(row["head"]) else int(row["head"])
    layer = int(row["layer"])
    return layer, head, str(layer) if head < 0 else f"{layer}.{head}"


def tracing_grid(part: pd.DataFrame) -> tuple[np.ndarray, list[Any], list[Any]]:
    """Rows of one family, site and control as a map: values (rows, columns), nan where there is none, and
    the sort keys and labels of both, the label last."""
    records = part.to_dict("records")
    rows, columns = sorted({_row(r) for r in records}), sorted({_column(r) for r in records})
    grid = np.full((len(rows), len(columns)), np.nan)
    for r in records:
        grid[rows.index(_row(r)), columns.index(_column(r))] = r["value"]
    return grid, rows, columns


def draw(table: pd.DataFrame, kind: str) -> Figure:
    """Layer x tokens, families side by side: for each site the patches, and below them their control."""
    table = table[(table["part"] == kind) & (table["role"] != "everything")]
    names = families(table)
    sites = [site for site in SITES if (table["site"] == site).any()]
    controls = (("", "patch"), ("unrelated", "control: unrelated run"))
    shown = [(site, *control) for site in sites for control in controls]
    most = max(
        len(tracing_grid(part)[1]) for _, part in table[table["control"] == ""].groupby(["family", "site"])
    )
    size = (4.3, max(1.9, 0.14 * most + 1.2))
    figure, axes = panels(len(shown), len(names), size=size)
    for i, (site, control, title) in enumerate(shown):
        for j, family in enumerate(names):
            ax = axes[i, j]
            mine = table[(table["family"] == family) & (table["site"] == site)]
            part = mine[mine["control"] == control]
            if part.empty:
                ax.set_axis_off()
                continue
            grid, rows, columns = tracing_grid(part)
            image = ax.imshow(grid, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="nearest")
            ax.set_xticks(range(len(columns)), [c[2] for c in columns], rotation=90, fontsize=7)
            step = max(1, len(rows) // 16)
            ax.set_yticks(range(0, len(rows), step), [r[2] for r in rows[::step]], fontsize=8)
            named = sum(c[0] == 0 for c in columns)
            ax.axvline(named - 0.5, color="0.3", lw=1)
            ax.grid(False)
            if part["accuracy_clean"].iloc[0] < ANSWERS:
                image.set_alpha(0.15)
                said = "shares mean nothing: the model does\nnot answer the clean run"
                ax.text(0.5, 0.5, said, transform=ax.transAxes, ha="center", va="center", fontsize=9)
            ax.set_title(f"{NAMES[family]}, {site}: {title}", fontsize=9)
            ax.set_ylabel("layer.head" if site == "head" else "layer", fontsize=8)
    figure.suptitle(f"clean and corrupted run differ in the {kind}", fontsize=10)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(-1, 1), "RdBu_r")
    bar = figure.colorbar(scale, ax=axes, shrink=0.6, aspect=30)
    bar.set_label("effect: share of the logit difference restored", fontsize=9)
    return figure


def summary(table: pd.DataFrame) -> str:
    first = table.drop_duplicates(["family", "part"])
    words = [
        "Share of the logit difference between clean and corrupted run that a patch restores (ratio of means "
        "over pairs, 95 % interval by the delta method). Layer n of the residual stream is what n blocks "
        "have made. Controls: the run's own activation (self), another clean run's of its norm (unrelated), "
        "all positions at once (everything). Of a model that does not answer the clean run right, or whose "
        "gap is near 0, these shares say nothing.\n\n"
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
        markdown(["family", "other", "gap of logits", "accuracy clean", "corrupted, clean's answer"], gaps)
    )
    words.append("\nThe strongest patches of each site, and controls over all its patches:\n\n")
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
            rows.append([*key, _row(row)[2], _column(row)[2], interval(row), *beside])
    head = [
        "family",
        "other",
        "site",
        "layer",
        "tokens",
        "effect",
        "self (largest)",
        "unrelated (largest)",
        "everything",
    ]
    return "".join(words) + markdown(head, rows)


PROBE = Probe(
    "Which activations carry the answer?",
    measure,
    {f"_{kind}": partial(draw, kind=kind) for kind in KINDS},
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
