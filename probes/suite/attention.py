"""What heads attend to: retrieval, induction and previous-token scores, of attention and hidden attention.

An SSM layer's hidden attention is |alpha| with rows normalised: by head in Mamba-2, the mean over channels in
Mamba, which count as head 0. Parts of the table: "score" (by quantity, layer, head, with the baseline of
uniform attention) and "map" (one sequence, the head that retrieves best in each layer).
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probes.heads import HeadScores, induction_score, previous_token_score, retrieval_score
from probes.retention import hidden_attention, mean_attention, normalise_rows
from probes.suite.common import (
    BUDGET,
    NotApplicable,
    Options,
    Probe,
    answer_at,
    batches,
    coarse,
    interval,
    layers_with,
    map_rows,
    markdown,
    recorded,
    scan_names,
    scan_of,
)
from probes.token_roles import role, token_roles
from ssm_retrieval.models.common import LanguageModel
from synthetic.tasks import Batch, Task
from synthetic.tasks.position import Position

SHOWN = 12  # best rows of a family and score in the summary


def patterns(model: LanguageModel, ids: Tensor) -> dict[int, Tensor]:
    """Layer -> (B, H, T, T), rows of sum 1, of one batch; SSM layers as the module says."""
    attention, ssm = layers_with(model, "attn.hook_pattern"), layers_with(model, "mixer.hook_dt")
    if not attention and not ssm:
        raise NotApplicable("it has neither attention nor SSM layers")
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
    summary,
    columns=(
        "head",
        "baseline",
        "query",
        "key",
        "target",
    ),
)
