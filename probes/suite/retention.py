"""What is left of each context token in an SSM's state when the answer is due, and the hidden attention map.

Parts of the table: "curve" (by role and distance), "contrast" (target over distractors at the same place),
"map" (mean |alpha| over channels, rows normalised) and "reconstruction" (relative error of map @ x + D x
against the layer's own scan).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.cache import recorded
from probes.retention import attention_output, mean_attention, normalise_rows, retention
from probes.scan import record_scans, scan_names, scan_of
from probes.suite.common import (
    Options,
    Probe,
    answer_at,
    batches,
    beside,
    coarse,
    interval_row,
    map_rows,
    require_roles,
    rows_within,
    scan_bytes,
    ssm_layers,
    usual_at,
)
from probes.token_roles import role, token_roles
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.tables import markdown
from synthetic.tasks import Task

QUANTITIES = ("kept", "share")  # of its own write, of the whole state
MAX_BINS = 12  # of distances


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: A task of position type.
        options: Sequences, seed and progress.

    Returns:
        Rows by layer: curve by role and distance, contrast, map by query and key, reconstruction.
    """
    layers = ssm_layers(model)
    require_roles(task, "retention")
    long = task.seq_len > 128
    examples = options.examples or (64 if long else 256)
    mapped = min(examples, 2 if task.seq_len > 512 else 8 if long else 32)
    found: dict[tuple[int, str], list[Tensor]] = {}
    maps: dict[int, Tensor] = {}
    errors: dict[int, float] = {}
    kinds: list[Tensor] = []
    at = 0
    for batch in batches(task, examples, rows_within(task, scan_bytes(model, layers)), options):
        done = sum(len(k) for k in kinds)
        kinds.append(token_roles(task, batch))
        at = answer_at(batch)
        ids = batch.input_ids[:, : at + 1]
        scans = record_scans(model, ids, layers)
        last = recorded(model, ids, [f"blocks.{i}.mixer.hook_ssm_state" for i in layers], positions=[at])
        for layer, scan in scans.items():
            norm = last[f"blocks.{layer}.mixer.hook_ssm_state"].flatten(1).norm(dim=1, keepdim=True)
            left = retention(scan, torch.arange(at + 1), at, state_norm=norm.expand(-1, at + 1))
            for name in QUANTITIES:
                found.setdefault((layer, name), []).append(getattr(left, name))
        if done < mapped:
            count = min(mapped - done, len(ids))
            for layer, total in _maps(model, ids[:count], layers, errors).items():
                maps[layer] = maps.get(layer, 0) + total / mapped
    where = torch.cat(kinds)[:, : at + 1]
    rows: list[dict[str, Any]] = []
    for (layer, name), parts in found.items():
        values = torch.cat(parts).double().numpy()
        rows += curve(values, where.numpy(), at, layer, name) + _contrast(values, where.numpy(), layer, name)
    for layer, weights in maps.items():
        small, size = coarse(weights)
        rows += map_rows(small, size, layer=layer, part="map", quantity="mean |alpha|", n=mapped)
        rows.append(
            dict(layer=layer, part="reconstruction", quantity="relative error", value=errors[layer], n=1)
        )
    return pd.DataFrame(rows)


def _maps(
    model: LanguageModel, ids: Tensor, layers: list[int], errors: dict[int, float]
) -> dict[int, Tensor]:
    """Sums over sequences of row-normalised maps (T, T) by layer; of the first sequence also the error."""
    totals = {}
    for layer, scan in record_scans(model, ids, layers).items():
        total = torch.zeros(1)
        for b in range(len(ids)):  # one at a time, because a batch of maps leaves the cache
            total = total + normalise_rows(mean_attention(scan.sequence(b)))[0]
        totals[layer] = total
    if not errors:
        # apart, because to hand out y the layer leaves its fused scan
        names = scan_names(layers, "mixer.hook_y")
        cache = recorded(model, ids[:1], names)
        for layer in layers:
            block: Any = model.blocks[layer]
            own = cache[f"blocks.{layer}.mixer.hook_y"]
            made = attention_output(scan_of(model, cache, layer), block.mixer.D.detach())
            errors[layer] = float((made.view_as(own) - own).norm() / own.norm())
    return totals


def _edges(at: int) -> np.ndarray:
    """Bins of the distances 1 .. at: single ones up to 32, then of equal ratio."""
    if at <= 32:
        return np.arange(1, at + 2)
    return np.unique(np.geomspace(1, at + 1, MAX_BINS + 1).round().astype(int))


def curve(values: np.ndarray, kinds: np.ndarray, at: int, layer: int, name: str) -> list[dict[str, Any]]:
    """Means over sequences by role and distance from the answer.

    Args:
        values: (B, at + 1).
        kinds: (B, at + 1) roles.
        at: Position of the answer.
        layer: The layer, for the rows.
        name: The quantity.

    Returns:
        Rows "curve", of targets and distractors.
    """
    rows, distance = [], at - np.arange(at + 1)
    edges = _edges(at)
    for kind in ("target", "distractor"):
        mine = kinds == role(kind)
        for low, high in pairwise(edges.tolist()):
            chosen = mine & (distance >= low) & (distance < high)
            count = chosen.sum(1)
            mean = (values * chosen).sum(1)[count > 0] / count[count > 0]
            if len(mean):
                rows.append(
                    interval_row(
                        mean, bounds=(0, np.inf), layer=layer, part="curve", quantity=name, role=kind,
                        distance=(low * (high - 1)) ** 0.5,
                    )
                )  # fmt: skip
    return rows


def _contrast(values: np.ndarray, kinds: np.ndarray, layer: int, name: str) -> list[dict[str, Any]]:
    """Of the target, over distractors at the same place in other sequences; geometric means.

    Not over its neighbours: what is left falls with distance along a convex curve, so that their mean would
    exceed it where nothing tells the target apart.
    """
    logs = np.log(values, out=np.full_like(values, np.nan), where=values > 0)  # without what has underflown
    target = (kinds == role("target")).argmax(1)
    own = (logs - usual_at(logs, kinds))[np.arange(len(target)), target]
    result = interval_row(own, layer=layer, part="contrast", quantity=name)
    return [result | {key: float(np.exp(result[key])) for key in ("value", "low", "high")}]


def summary(table: pd.DataFrame) -> str:
    """What is left of the target over distractors, and errors of the reconstruction, as Markdown."""
    contrast = table[table["part"] == "contrast"].sort_values(["family", "quantity", "layer"])
    errors = table[table["part"] == "reconstruction"].sort_values(["family", "layer"])
    words = (
        "What is left of a token at the answer's position, exactly, from the linear recurrence: of what it "
        "wrote (kept), and relative to the state (share). Exact of the write at the token's own place: the "
        "convolution writes a symbol at the next places too, and these are not counted. Target over "
        "distractors at the same place, "
        "geometric mean over sequences with 95 % interval; 1 says that the target is kept no better."
    )
    found = markdown(
        ["family", "weights", "layer", "relative error"],
        [[r["family"], r["weights"], r["layer"], f"{r['value']:.1e}"] for r in errors.to_dict("records")],
    )
    check = "The hidden attention map times the layer's input, against the layer's own scan:"
    return "\n\n".join([words, beside(contrast, ["family", "quantity", "layer"]), check, found])


PROBE = Probe(
    "What is left of the target when the answer is due?",
    measure,
    summary,
    version=2,
    columns=(
        "role",
        "distance",
        "query",
        "key",
    ),
)
