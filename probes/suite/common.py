"""What the probes of a run have in common: options, held-out sequences, layers and tables.

Every probe makes one tidy table, a row per number. Columns that all have:

    layer      block, 0-based; in the residual stream n is what n blocks have made of the embedding
    part       which of the probe's measurements the row belongs to
    quantity   what was measured
    value      the number; low, high: its 95 % interval, nan where there is none
    n          sequences (or answers) behind it

`probes.run` adds family and weights ("trained", or "untrained": the same architecture as initialised).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.cache import Recording, record
from probes.updates import Scan
from ssm_retrieval import tables
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.statistics import mean_interval
from synthetic.tasks import Batch, Task
from synthetic.tasks.position import Position

BUDGET = 192 * 2**20  # bytes of recorded tensors of one batch
SHORT = 128  # up to this length maps show every token
BINS = 64  # of a map's axis at greater lengths
WEIGHTS = ("trained", "untrained")


class NotApplicable(ValueError):
    """A model or task that lacks what a probe measures; the message is one line that says what."""


@dataclass(frozen=True)
class Options:
    """examples: sequences; None: the probe's own number. seed: of the held-out stream they are drawn from.
    progress: is told the share that is done, 0 .. 1."""

    examples: int | None = None
    seed: int = 0
    progress: Callable[[float], None] = lambda share: None


@dataclass(frozen=True)
class Probe:
    """measure: (model, task, options) -> table; summary: table -> Markdown. `analysis.plots` draws.

    title: what is asked, for the summary. version: raised whenever the same options would give other numbers.
    untrained: whether the same measurement of untrained weights is its control. columns: of its table, beside
    those that all have.
    measure raises `NotApplicable`; summary takes the tables of all families in one.
    """

    title: str
    measure: Callable[[LanguageModel, Task, Options], pd.DataFrame]
    summary: Callable[[pd.DataFrame], str]
    version: int = 1
    untrained: bool = True
    columns: tuple[str, ...] = ()


# --- sequences ----------------------------------------------------------------------------------------------


def single_query(task: Task) -> Task:
    """The task without what is appended after its answer (supervise_bos)."""
    return replace(task, supervise_bos=False) if isinstance(task, Position) else task


def require_roles(task: Task, what: str) -> None:
    """Raises NotApplicable for tasks whose tokens have no roles (`probes.token_roles`)."""
    if not isinstance(task, Position):
        known = "position, position-varlen or grid"
        raise NotApplicable(f"{what} needs the roles of tokens, which task {task.name} lacks; use {known}")


def batches(task: Task, examples: int, rows: int, options: Options) -> Iterator[Batch]:
    """`examples` held-out sequences of the task's full length, `rows` at a time, one query if it can be."""
    task = single_query(task)
    queries = 1 if isinstance(task, Position) else task.usual_queries(task.seq_len)
    for index, start in enumerate(range(0, examples, rows)):
        yield task.batch(
            min(rows, examples - start), seed=options.seed, index=index, split="heldout",
            queries=queries, length=task.seq_len,
        )  # fmt: skip
        options.progress(min(start + rows, examples) / examples)


def answer_at(batch: Batch) -> int:
    """Sequence index of the first answer. Raises NotApplicable if it differs from row to row."""
    if batch.answer_at.dim() > 1:
        raise NotApplicable("answers stand at other places in every sequence of this task")
    return int(batch.answer_at[0])


def rows_within(task: Task, bytes_per_token: int, budget: int = BUDGET) -> int:
    """Sequences of a batch whose recordings take about `budget` bytes."""
    tokens = task.max_length(task.usual_queries(task.seq_len))
    return max(1, budget // max(1, tokens * bytes_per_token))


# --- layers -------------------------------------------------------------------------------------------------


def layers_with(model: LanguageModel, local: str) -> list[int]:
    """Blocks that have a hook of this name."""
    names = set(model.hook_names())
    return [i for i in range(model.config.n_layer) if f"blocks.{i}.{local}" in names]


def ssm_layers(model: LanguageModel) -> list[int]:
    """Raises NotApplicable for a model without any."""
    found = layers_with(model, "mixer.hook_dt")
    if not found:
        raise NotApplicable("it has no SSM layers")
    return found


SCAN_NAMES = ("mixer.hook_conv", "mixer.hook_dt", "mixer.hook_B", "mixer.hook_C")


def scan_names(layers: Sequence[int], *more: str) -> list[str]:
    return [f"blocks.{i}.{name}" for i in layers for name in (*SCAN_NAMES, *more)]


def scan_bytes(model: LanguageModel, layers: Sequence[int]) -> int:
    """Bytes per token of what `scan_names` records: x and dt of every channel, with copies."""
    mixers: list[Any] = [model.blocks[i] for i in layers]
    return sum(4 * 3 * block.mixer.config.d_inner for block in mixers)


def scan_of(model: LanguageModel, cache: Recording, layer: int) -> Scan:
    """The recurrence of one layer from a recording of `scan_names`."""
    x, dt, Bt, Ct = (cache[f"blocks.{layer}.{name}"] for name in SCAN_NAMES)
    block: Any = model.blocks[layer]
    A = -torch.exp(block.mixer.A_log.detach().float())
    return Scan.mamba2(A, dt, Bt, Ct, x) if Bt.dim() == 4 else Scan.mamba(A, dt, Bt, Ct, x)


def one_sequence(scan: Scan, b: int) -> Scan:
    """The recurrence of sequence b, as a batch of one."""
    at = slice(b, b + 1)
    return Scan(scan.A, scan.dt[at], scan.Bt[at], scan.Ct[at], scan.x[at])


def run_silently(model: LanguageModel, ids: Tensor) -> None:
    """A forward pass for what is recorded in it; no logits."""
    with torch.no_grad():
        model.hidden(ids, at=torch.zeros(0, dtype=torch.int64))


def recorded(model: LanguageModel, ids: Tensor, names: Sequence[str], **options: Any) -> Recording:
    with record(model, list(names), **options) as cache:
        run_silently(model, ids)
    return cache


# --- tables -------------------------------------------------------------------------------------------------


def interval_row(values: Any, bounds: tuple[float, float] | None = None, **columns: Any) -> dict[str, Any]:
    """A row with mean, interval and number of the finite ones of `values`, one a sequence."""
    data = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=float).ravel()
    data = data[np.isfinite(data)]
    mean, low, high = mean_interval(data, bounds=bounds) if len(data) else (np.nan,) * 3
    return columns | dict(value=mean, low=low, high=high, n=len(data))


def coarse(weights: Tensor, bins: int = BINS) -> tuple[Tensor, int]:
    """A map (T, S) with the sums of `size` columns and means of `size` rows in one cell, and that size.

    Rows that sum to 1 still do. The last cells may cover fewer tokens. size is 1 up to SHORT tokens.
    """
    T = weights.shape[0]
    size = 1 if T <= SHORT else -(-T // bins)
    if size == 1:
        return weights, 1
    index = torch.arange(T) // size
    cells = int(index[-1]) + 1
    columns = weights.new_zeros(T, cells).index_add_(1, index, weights)
    rows = weights.new_zeros(cells, cells).index_add_(0, index, columns)
    return rows / index.bincount()[:, None], size


def map_rows(weights: Tensor, size: int, **columns: Any) -> list[dict[str, Any]]:
    """Rows of a map's cells at and below the diagonal: query and key, the first tokens of each cell."""
    return [
        columns | dict(query=t * size, key=i * size, value=float(weights[t, i]))
        for t in range(len(weights))
        for i in range(t + 1)
    ]


def interval(row: Any, digits: int = 3) -> str:
    """`0.42 [0.40, 0.44]`."""
    value = f"{row['value']:.{digits}g}"
    if not np.isfinite(row["low"]):
        return value
    return f"{value} [{row['low']:.{digits}g}, {row['high']:.{digits}g}]"


def markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table that ends a line."""
    return tables.markdown(headers, rows) + "\n"


def beside(table: pd.DataFrame, by: Sequence[str], headers: Sequence[str] = (), digits: int = 3) -> str:
    """Markdown: a row per combination of `by`, trained numbers with intervals beside those untrained."""
    rows = []
    groups: Any = table.groupby(list(by), sort=False, dropna=False)
    for key, group in groups:
        cells = []
        for weights in WEIGHTS:
            part = group[group["weights"] == weights]
            cells.append(interval(part.iloc[0], digits) if len(part) else "")
        rows.append([*key, *cells])
    return markdown([*(headers or by), *WEIGHTS], rows)
