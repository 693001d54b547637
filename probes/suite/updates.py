"""What every token does to an SSM's state, by its role: is the queried symbol written differently?

Parts of the table, of which 1 means "as any token does there":

* "contrast": the target divided by the mean of distractors at the same position, because the first symbols
  change an empty state more than later ones;
* "aligned": the same ratio of relative updates, at tokens around the target.

Without division:

* "role": quantity by layer and role; * "position": quantity by layer and position, in long sequences the mean
over the tokens up to the next one listed; * "sequence": relative updates of one held-out sequence, token by
token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.scan import Scan, record_scans
from probes.suite.common import (
    BINS,
    SHORT,
    WEIGHTS,
    Options,
    Probe,
    batches,
    beside,
    interval,
    interval_row,
    require_roles,
    rows_within,
    scan_bytes,
    ssm_layers,
    usual_at,
)
from probes.token_roles import ROLES, is_context, target_at, token_roles
from probes.updates import decay, horizon, split_by_role, state_changes, write_norm
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.statistics import bootstrap_median_time
from ssm_retrieval.tables import markdown
from synthetic.tasks import Task

WINDOW = 12  # tokens on either side of the target
NAMED = dict(enumerate(ROLES))


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: A task of position type.
        options: Sequences, seed and progress.

    Returns:
        Rows by layer: part role by role, contrast, aligned by offset from the target, position by position,
        and sequence by position with role and token.
    """
    layers = ssm_layers(model)
    require_roles(task, "updates")
    examples = options.examples or (32 if task.seq_len > 256 else 128)
    values: dict[tuple[int, str], list[Tensor]] = {}
    lasting: dict[tuple[int, str], list[tuple[float, bool]]] = {}
    kinds: list[Tensor] = []
    tokens: list[str] = []
    for batch in batches(task, examples, rows_within(task, scan_bytes(model, layers)), options):
        kinds.append(token_roles(task, batch))
        tokens = tokens or task.vocabulary.decode(batch.input_ids[0])
        for layer, scan in record_scans(model, batch.input_ids, layers).items():
            found = dict(
                write=write_norm(scan), decay=decay(scan).mean, relative=state_changes(scan).relative
            )
            for name, numbers in found.items():
                values.setdefault((layer, name), []).append(numbers)
            for name, outcome in _horizons(scan, kinds[-1], options.seed + 1000 * len(kinds)):
                lasting.setdefault((layer, name), []).append(outcome)
    where = torch.cat(kinds)
    rows = []
    for (layer, name), parts in values.items():
        numbers = torch.cat(parts)
        for row in split_by_role(numbers, where, NAMED).to_dict("records"):
            rows.append(
                dict(layer=layer, part="role", quantity=name, role=row["role"], value=row["mean"],
                     low=row["low"], high=row["high"], n=row["sequences"])
            )  # fmt: skip
        rows += contrast(numbers, where, layer, name) + positions(numbers, layer, name)
        if name == "relative":
            rows += _sequence(numbers[0], where[0], tokens, layer)
    for (layer, name), outcomes in lasting.items():
        steps, reached = zip(*outcomes, strict=True)
        value, low, high = bootstrap_median_time(steps, reached, resamples=500)
        bound = dict(zip(("value", "low", "high"), (value, low, high), strict=True))
        rows.append(dict(layer=layer, part="role", quantity="horizon", role=name, n=len(steps), **bound))
    return pd.DataFrame(rows)


def _horizons(scan: Scan, kinds: Tensor, seed: int) -> list[tuple[str, tuple[float, bool]]]:
    """(role, (median tokens over channels and states, was it reached?)) of every sequence.

    Of each role one token drawn at random, so that roles with one and with many tokens are censored alike.
    The last eighth of a sequence is left out: it says of nothing that it lasts longer than that.
    """
    found = []
    generator = torch.Generator().manual_seed(seed)
    L = kinds.shape[1]
    for b in range(len(kinds)):
        one = scan.sequence(b)
        for number in kinds[b].unique().tolist():
            places = (kinds[b, : L - max(1, L // 8)] == number).nonzero().flatten()
            if len(places):
                drawn = int(torch.randint(len(places), (1,), generator=generator))
                lasting = horizon(one, places[drawn : drawn + 1])
                steps, reached = lasting.steps.flatten(), lasting.reached.flatten()
                middle = int(steps.where(reached, torch.inf).argsort()[len(steps) // 2])
                done = bool(reached[middle])
                found.append((ROLES[number], (float(steps[middle] if done else steps.max()), done)))
    return found


def contrast(values: Tensor, kinds: Tensor, layer: int, name: str) -> list[dict[str, Any]]:
    """The target over the mean of the sequences with a distractor at its place, and tokens around it.

    Args:
        values: (B, L).
        kinds: (B, L) roles.
        layer: The layer, for the rows.
        name: The quantity.

    Returns:
        A row "contrast", and of "relative" rows "aligned" by offset from the target.
    """
    numbers = values.double().numpy()
    target = target_at(kinds).numpy()
    context = is_context(kinds).numpy()
    ratio = np.where(context, numbers / usual_at(numbers, kinds.numpy()), np.nan)
    own = ratio[np.arange(len(target)), target]
    rows = [interval_row(own, layer=layer, part="contrast", quantity=name)]
    L = numbers.shape[1]
    for offset in range(-min(WINDOW, L), min(WINDOW, L) + 1) if name == "relative" else ():
        at = target + offset
        inside = (at >= 0) & (at < L)
        row = interval_row(
            ratio[inside, at[inside]], layer=layer, part="aligned", quantity="relative", offset=offset
        )
        if row["n"] > 1:
            rows.append(row)
    return rows


def positions(values: Tensor, layer: int, name: str) -> list[dict[str, Any]]:
    """Means over sequences at every position, above SHORT tokens at BINS equal parts of the sequence.

    Args:
        values: (B, L); what is not finite is left out.
        layer: The layer, for the rows.
        name: The quantity.

    Returns:
        Rows "position".
    """
    L = values.shape[1]
    size = 1 if L <= SHORT else -(-L // BINS)
    return [
        interval_row(
            values[:, start : start + size].nanmean(1), layer=layer, part="position", quantity=name,
            position=start,
        )
        for start in range(0, L, size)
    ]  # fmt: skip


def _sequence(values: Tensor, kinds: Tensor, tokens: list[str], layer: int) -> list[dict[str, Any]]:
    """Relative updates (L,) of one sequence, with what stands at each position."""
    numbers, names = values.tolist(), [ROLES[kind] for kind in kinds.tolist()]
    return [
        dict(layer=layer, part="sequence", quantity="relative", position=at, role=name, token=token,
             value=value, n=1)
        for at, (value, name, token) in enumerate(zip(numbers, names, tokens, strict=True))
    ]  # fmt: skip


def summary(table: pd.DataFrame) -> str:
    """The target over distractors at the same position, and horizons, as Markdown."""
    words = (
        "What the target token does, divided by what distractors at the same position do (mean over "
        "sequences with Student's 95 % interval; mean decay: the share of the state that a token keeps). "
        "Hypothesis 1 says that this is 1 unless the query is known before. All roles are in updates.csv."
    )
    part = table[table["part"] == "contrast"].sort_values(["family", "quantity", "layer"])
    rows = []
    lasting = table[(table["part"] == "role") & (table["quantity"] == "horizon")]
    groups: Any = lasting.sort_values(["family", "layer"]).groupby(["family", "layer"], sort=False)
    columns = [(w, r) for w in WEIGHTS for r in ("target", "distractor")]
    for key, group in groups:
        cells = group.set_index(["weights", "role"])
        rows.append([*key, *(interval(cells.loc[c]) if c in cells.index else "" for c in columns)])
    named = [r if w == "trained" else f"{r}, {w}" for w, r in columns]
    horizons = (
        "Horizon, the tokens until half of the state's entries have decayed to 1/e (median over "
        "sequences with bootstrap interval; inf: it outlasts the sequence):"
    )
    found = markdown(["family", "layer", *named], rows)
    return "\n\n".join([words, beside(part, ["family", "quantity", "layer"]), horizons, found])


PROBE = Probe(
    "What does every token do to the state?",
    measure,
    summary,
    version=3,
    columns=(
        "role",
        "offset",
        "position",
        "token",
    ),
)
