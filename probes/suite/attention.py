"""What heads attend to: retrieval, induction and previous-token scores, of attention and hidden attention.

An SSM layer's hidden attention is |alpha| with rows normalised: by head in Mamba-2, the mean over channels in
Mamba, which count as head 0. Parts of the table: "score" (by quantity, layer, head, with the baseline of
uniform attention) and "map" (one sequence, the head that retrieves best in each layer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.heads import HeadScores, induction_score, previous_token_score, retrieval_score
from probes.retention import hidden_attention, mean_attention, normalise_rows
from probes.suite.common import (
    BUDGET,
    WEIGHTS,
    NotApplicable,
    Options,
    Probe,
    answer_at,
    batches,
    coarse,
    error_bars,
    families,
    interval,
    layers_with,
    map_panels,
    map_rows,
    markdown,
    recorded,
    scan_names,
    scan_of,
)
from probes.token_roles import role, token_roles
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.style import NAMES, family_colors, legend, panels
from synthetic.tasks import Batch, Task
from synthetic.tasks.position import Position

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {
    "retrieval": "attention from the answer's\nposition to the target",
    "induction": "attention to the token after\nthe previous occurrence",
    "previous": "attention to the\nprevious token",
}
SHOWN = 12  # best rows of a family and score in the summary


def patterns(model: LanguageModel, ids: Tensor) -> dict[int, Tensor]:
    """Layer -> (B, H, T, T), rows of sum 1, of one batch; SSM layers as the module says."""
    attention, ssm = layers_with(model, "attn.hook_pattern"), layers_with(model, "mixer.hook_dt")
    names = [f"blocks.{i}.attn.hook_pattern" for i in attention] + scan_names(ssm)
    cache = recorded(model, ids, names)
    found = {i: cache[f"blocks.{i}.attn.hook_pattern"] for i in attention}
    for i in ssm:
        scan = scan_of(model, cache, i)
        if scan.A.shape[1] == 1:  # Mamba-2: few heads, a map each
            found[i] = normalise_rows(hidden_attention(scan).abs())
        else:
            found[i] = normalise_rows(mean_attention(scan)).unsqueeze(1)
    return dict(sorted(found.items()))


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Rows score by layer and head, with baseline; rows map by layer, `query` and `key`."""
    maps_bytes = 4 * model.config.n_layer * task.max_length(task.usual_queries(task.seq_len)) * 8
    usual = 4 if task.seq_len > 512 else 16 if task.seq_len > 128 else 64
    examples = options.examples or usual
    rows = max(1, min(examples, BUDGET // (maps_bytes * task.max_length(1))))
    scores: dict[tuple[int, str], list[HeadScores]] = {}
    first: dict[int, Tensor] = {}
    target: int | None = None
    for batch in batches(task, examples, rows, options):
        match = _target(task, batch)
        at = batch.input_ids.shape[1] - 1 if match is None else answer_at(batch)
        ids = batch.input_ids[:, : at + 1]
        for layer, pattern in patterns(model, ids).items():
            found = {"induction": induction_score(pattern, ids), "previous": previous_token_score(pattern)}
            if match is not None:
                found["retrieval"] = retrieval_score(pattern, at, match)
            for name, score in found.items():
                scores.setdefault((layer, name), []).append(score)
            if layer not in first:
                first[layer] = pattern[0].clone()
        if target is None and match is not None:
            target = int(match[0])
    if not scores:
        raise NotApplicable("it has neither attention nor SSM layers")
    table: list[dict[str, Any]] = []
    best: dict[int, int] = {}
    for (layer, name), parts in scores.items():
        joined = HeadScores(*(torch.cat([getattr(p, f) for p in parts]) for f in ("value", "baseline")))
        if bool(joined.baseline.isnan().all()):  # no token occurs twice
            continue
        for row in joined.table().to_dict("records"):
            table.append(
                dict(layer=layer, part="score", quantity=name, head=row["head"], value=row["score"],
                     low=row["low"], high=row["high"], baseline=row["baseline"], n=row["sequences"])
            )  # fmt: skip
        if name == "retrieval" or layer not in best:
            best[layer] = int(joined.value.nanmean(0).argmax())
    for layer, pattern in first.items():
        small, size = coarse(pattern[best.get(layer, 0)])
        shared = dict(
            layer=layer, part="map", quantity="pattern", head=best.get(layer, 0), n=1, target=target
        )
        table += map_rows(small, size, **shared)
    return pd.DataFrame(table).astype({"head": "Int64"})


def _target(task: Task, batch: Batch) -> Tensor | None:
    """(B,) positions of the target symbols; None where tokens have no roles."""
    if not isinstance(task, Position):
        return None
    return (token_roles(task, batch) == role("target")).int().argmax(1)


def _labels(part: pd.DataFrame) -> list[str]:
    """layer.head, or the layer where every layer has one."""
    single = part["head"].nunique() == 1
    return [f"{r.layer}" if single else f"{r.layer}.{r.head}" for r in part.itertuples()]


def draw_scores(table: pd.DataFrame) -> Figure:
    """Score of every layer.head, trained filled, untrained hollow, uniform attention as a dash."""
    table, names = table[table["part"] == "score"], families(table)
    rows = [q for q in QUANTITIES if q in set(table["quantity"])]
    figure, axes = panels(len(rows), len(names), size=(3.6, 2.2), sharey="row", sharex="col")
    for i, quantity in enumerate(rows):
        for j, family in enumerate(names):
            ax, color = axes[i, j], family_colors()[family]
            mine = table[(table["family"] == family) & (table["quantity"] == quantity)]
            mine = mine.sort_values(["layer", "head"])
            mine = mine.assign(label=_labels(mine))
            labels = list(dict.fromkeys(mine["label"]))
            for weights in WEIGHTS:
                part = mine[mine["weights"] == weights]
                x = np.array([labels.index(label) for label in part["label"]])
                if weights == "trained":
                    ax.errorbar(
                        x - 0.1, part["value"], yerr=error_bars(part), fmt="o", color=color, capsize=2, ms=5
                    )
                    ax.plot(x, part["baseline"], ls="", marker="_", ms=14, mew=1.5, color="0.3")
                else:
                    ax.plot(x + 0.15, part["value"], "o", color=color, mfc="none", ms=4, alpha=0.8)
            step = -(-len(labels) // 8)
            ax.set_xticks(range(0, len(labels), step), labels[::step])
            ax.set_xlim(-0.6, len(labels) - 0.4)
            shown = table.loc[table["quantity"] == quantity, ["value", "high"]]
            top = float(np.nanmax(shown.to_numpy(dtype=float)))
            ax.set_ylim(-0.03 * top, min(1.03, 1.15 * top))
            ax.grid(axis="x", visible=False)
            if i == 0:
                ax.set_title(NAMES[family])
            if j == 0:
                ax.set_ylabel(QUANTITIES[quantity], fontsize=8)
            if i == len(rows) - 1:
                ax.set_xlabel("layer.head" if "." in labels[0] else "layer (mean over channels)")
    looks: dict[str, dict[str, Any]] = {
        NAMES[name]: dict(color=family_colors()[name], marker="o", ls="") for name in names
    }
    looks |= {
        "untrained weights": dict(color="0.3", marker="o", mfc="none", ls=""),
        "uniform attention": dict(color="0.3", marker="_", ms=14, mew=1.5, ls=""),
    }
    legend(figure, looks)
    return figure


def draw_maps(table: pd.DataFrame) -> Figure:
    """One sequence: the pattern of each layer's best retrieving head; a triangle is below the target."""
    maps = table[(table["part"] == "map") & (table["weights"] == "trained")]

    def decorate(ax: Any, family: str, layer: int, part: pd.DataFrame) -> None:
        target = part["target"].iloc[0]
        if np.isfinite(target):
            starts = np.sort(part["key"].unique())
            column = int(np.searchsorted(starts, target, side="right")) - 1
            ax.plot(column, len(starts) - 0.5, marker=6, color="crimson", ms=8, clip_on=False, zorder=5)
            ax.set(xlim=(-0.5, len(starts) - 0.5), ylim=(len(starts) - 0.5, -0.5))
        single = table[(table["family"] == family) & (table["part"] == "score")]["head"].nunique() == 1
        which = "mean over channels" if single else f"head {part['head'].iloc[0]}"
        ax.set_title(f"{NAMES[family]}, layer {layer}\n{which}", fontsize=8)

    figure = map_panels(maps, ("key", "query"), "attention in a cell", decorate)
    legend(figure, {"the target's column": dict(color="crimson", marker=6, ls="", ms=8)})
    return figure


def summary(table: pd.DataFrame) -> str:
    words = (
        "Attention mass with Student's 95 % interval over sequences, beside uniform attention over the "
        f"visible tokens and untrained weights; the {SHOWN} best heads of each score. SSM layers: hidden "
        "attention |alpha|, rows normalised, by head (Mamba-2) or as the mean over channels (Mamba).\n\n"
    )
    keys = ["family", "quantity", "layer", "head"]
    score = table[table["part"] == "score"]
    untrained = score[score["weights"] == "untrained"].set_index(keys)["value"]
    rows = []
    groups: Any = score[score["weights"] == "trained"].groupby(keys[:2], sort=False)
    for _, group in groups:
        for row in group.sort_values("value", ascending=False).head(SHOWN).to_dict("records"):
            key = tuple(row[k] for k in keys)
            rows.append([*key, interval(row), f"{row['baseline']:.3g}", f"{untrained[key]:.3g}"])
    return words + markdown([*keys, "score", "uniform", "untrained"], rows)


PROBE = Probe(
    "Which heads retrieve?",
    measure,
    {"": draw_scores, "_maps": draw_maps},
    summary,
    columns=(
        "head",
        "baseline",
        "query",
        "key",
        "target",
    ),
)
