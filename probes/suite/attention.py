"""What heads attend to: retrieval, induction and previous-token scores, of attention and of hidden attention.

SSM layers count by their hidden attention, `probes.retention.attention_pattern`: head by head in Mamba-2, the
mean over channels as head 0 in Mamba. So do layers with a delta rule, head by head (`probes.delta`). Parts of
the table: "score" (by quantity, layer and head, with the baseline of uniform attention) and "map" (one
sequence, the head of each layer that retrieves best).
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probes.cache import recorded
from probes.delta import delta_layers, delta_names, delta_of, hidden_attention
from probes.heads import HeadScores, induction_score, previous_token_score, retrieval_score
from probes.retention import attention_pattern, normalise_rows
from probes.scan import layers_with, scan_names, scan_of
from probes.suite.common import (
    BUDGET,
    NotApplicable,
    Options,
    Probe,
    answer_at,
    batches,
    coarse,
    interval,
    map_rows,
)
from probes.token_roles import targets_at, token_roles
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.tables import markdown
from synthetic.tasks import Batch, Task
from synthetic.tasks.position import Position

SHOWN = 12  # best rows of a family and score in the summary


def patterns(model: LanguageModel, ids: Tensor) -> dict[int, Tensor]:
    """Attention and hidden attention of every layer, for one batch.

    Args:
        model: The model.
        ids: (B, T) int64.

    Returns:
        Layer to (B, H, T, T), rows of sum 1.

    Raises:
        NotApplicable: The model has neither attention nor layers with a state that is known.
    """
    attention, ssm = layers_with(model, "attn.hook_pattern"), layers_with(model, "mixer.hook_dt")
    delta = delta_layers(model)
    if not attention and not ssm and not delta:
        raise NotApplicable("it has neither attention nor SSM layers, nor a delta rule")
    names = [f"blocks.{i}.attn.hook_pattern" for i in attention]
    cache = recorded(model, ids, names + scan_names(ssm) + delta_names(model, delta))
    found = {i: cache[f"blocks.{i}.attn.hook_pattern"] for i in attention}
    for i in ssm:
        found[i] = attention_pattern(scan_of(model, cache, i))
    for i in delta:
        found[i] = normalise_rows(hidden_attention(delta_of(model, cache, i)).abs())
    return dict(sorted(found.items()))


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: Its task; retrieval is scored only where tokens have roles.
        options: Sequences, seed and progress.

    Returns:
        Rows "score" by layer and head, with baseline, and rows "map" by layer, query and key.
    """
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
            target = int(match[0, 0])
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
    """(B, 1) positions of the targets, (B, 2) if they are read twice; None where tokens have no roles."""
    if not isinstance(task, Position):
        return None
    return targets_at(token_roles(task, batch))


def summary(table: pd.DataFrame) -> str:
    """The best heads of each score, beside uniform attention and untrained weights, as Markdown."""
    words = (
        "Attention mass with Student's 95 % interval over sequences, beside uniform attention over the "
        f"visible tokens and untrained weights; the {SHOWN} best heads of each score. SSM layers: hidden "
        "attention |alpha|, rows normalised, by head (Mamba-2, delta rule) or as the mean over channels "
        "(Mamba)."
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
    return words + "\n\n" + markdown([*keys, "score", "uniform", "untrained"], rows)


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
