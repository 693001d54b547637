"""What every token writes, erases and keeps in a state with keys, and what is read of it in the end.

Of layers with a delta rule, and of gated linear attention and Mamba-3, which erase nothing: the rows about
erasures are left out there. In Mamba-3 a token also writes the second part of the write before it.

Parts of the table (`probes.delta` has the equations):

* "role": norms of the write and of what is erased, the share of the state that is kept, and the relative
  change, by layer and role; "position": the same by position, above `SHORT` tokens at equal parts;
* "contrast": the target divided by the mean of distractors at the same position;
* "curve": what is left of a write when the answer is due ("kept", a share of the write, mean over heads), by
  role and distance;
* "map": hidden attention |M|, mean over heads, rows normalised; "reconstruction": the relative error of M v
  against the layer's own output (without its skip), with erasures and as if nothing were erased.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probes.cache import recorded
from probes.delta import DeltaScan, changes, delta_layers, hidden_attention, record_deltas, survival
from probes.retention import normalise_rows
from probes.suite.common import (
    NotApplicable,
    Options,
    Probe,
    answer_at,
    batches,
    beside,
    coarse,
    map_rows,
    require_roles,
    rows_within,
)
from probes.suite.retention import curve
from probes.suite.updates import contrast, positions
from probes.token_roles import ROLES, token_roles
from probes.updates import split_by_role
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.tables import markdown
from synthetic.tasks import Task

QUANTITIES = ("write", "erase", "keep", "relative")
ADDING = ("write", "keep", "relative")  # of layers that erase nothing
NAMED = dict(enumerate(ROLES))


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: A task of position type.
        options: Sequences, seed and progress.

    Returns:
        Rows by layer: role, position, contrast, curve, map and reconstruction.

    Raises:
        NotApplicable: The model has no such layer.
    """
    layers = delta_layers(model)
    if not layers:
        raise NotApplicable("it has no layers with keys and a state")
    require_roles(task, "erasure")
    examples = options.examples or (32 if task.seq_len > 256 else 128)
    mixers: list[Any] = [model.blocks[i] for i in layers]
    shapes = [(block.config, 2 * block.config.n_head * block.config.d_state) for block in mixers]
    width = sum(4 * 2 * (keys + 2 * config.d_inner) for config, keys in shapes)
    values: dict[tuple[int, str], list[Tensor]] = {}
    left: dict[int, list[Tensor]] = {}
    kinds: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    at = 0
    for batch in batches(task, examples, rows_within(task, width), options):
        kinds.append(token_roles(task, batch))
        at = answer_at(batch)
        ids = batch.input_ids[:, : at + 1]
        scans = record_deltas(model, ids, layers)
        for layer, scan in scans.items():
            found = changes(scan)
            for name in QUANTITIES if scan.erase else ADDING:
                values.setdefault((layer, name), []).append(getattr(found, name))
            left.setdefault(layer, []).append(survival(scan, at).mean(-1))
        if not rows:  # of the first sequence
            names = [f"blocks.{i}.mixer.hook_y" for i in layers]
            own = recorded(model, ids[:1], names)
            for layer, name in zip(layers, names, strict=True):
                skip = getattr(model.blocks[layer].mixer, "D", None)  # Mamba-3's
                scan, y = scans[layer].sequence(0), own[name]
                rows += _maps(scan, y if skip is None else y - skip.detach()[:, None] * scan.v, layer)
    where = torch.cat(kinds)[:, : at + 1]
    for (layer, name), parts in values.items():
        numbers = torch.cat(parts)
        for row in split_by_role(numbers, where, NAMED).to_dict("records"):
            rows.append(
                dict(layer=layer, part="role", quantity=name, role=row["role"], value=row["mean"],
                     low=row["low"], high=row["high"], n=row["sequences"])
            )  # fmt: skip
        rows += contrast(numbers, where, layer, name) + positions(numbers, layer, name)
    for layer, parts in left.items():
        rows += curve(torch.cat(parts).double().numpy(), where.numpy(), at, layer, "kept")
    return pd.DataFrame(rows)


def _maps(scan: DeltaScan, own: Tensor, layer: int) -> list[dict[str, Any]]:
    """The map of one sequence, and its errors. own: (1, L, H, P)."""
    rows = []
    maps = ((True, "relative error"), (False, "relative error without erasures"))
    for erase, name in maps if scan.erase else maps[:1]:
        weights = hidden_attention(scan, erase)
        made = torch.einsum("bhti,bihp->bthp", weights, scan.v)
        error = float((made - own).norm() / own.norm())
        rows.append(dict(layer=layer, part="reconstruction", quantity=name, value=error, n=1))
        if erase:
            small, size = coarse(normalise_rows(weights[0].abs().mean(0)))
            rows += map_rows(small, size, layer=layer, part="map", quantity="mean |M|", n=1)
    return rows


def summary(table: pd.DataFrame) -> str:
    """The target over distractors, what an ordinary token erases, and errors of the maps, as Markdown."""
    words = (
        "What the target token writes, erases and keeps, divided by what distractors at the same position do "
        "(mean over sequences with Student's 95 % interval). 1 says that the target is treated as any token."
    )
    part = table[table["part"] == "contrast"].sort_values(["family", "quantity", "layer"])
    usual = table[(table["part"] == "role") & (table["role"] == "distractor")]
    usual = usual.sort_values(["family", "quantity", "layer"])
    plain = "The same quantities of distractors: norms of write and erasure, shares of the state before:"
    errors = table[table["part"] == "reconstruction"].sort_values(["family", "layer"])
    columns = ["family", "weights", "layer", "quantity"]
    found = [[*(r[c] for c in columns), f"{r['value']:.1e}"] for r in errors.to_dict("records")]
    check = (
        "The hidden attention map times the values, against the layer's own output. Of layers that erase, a "
        "map without erasures, as if they were gated linear attention, misses it by the second number:"
    )
    by = ["family", "quantity", "layer"]
    return "\n\n".join([words, beside(part, by), plain, beside(usual, by), check,
                        markdown([*columns, "error"], found)])  # fmt: skip


PROBE = Probe(
    "What does every token write, erase and keep?",
    measure,
    summary,
    columns=("role", "offset", "position", "distance", "query", "key"),
)
