"""What the probes of a run have in common: options, held-out sequences, layers and tables.

Every probe makes one tidy table, a row per number. Columns that all have:

    layer      block, 0-based; lens, patch and capacity count the residual stream: n is after n blocks, 0 the
               embedding
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

from probes.scan import layers_with
from probes.token_roles import role
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.statistics import mean_interval
from ssm_retrieval.tables import markdown
from synthetic.tasks import Batch, Task
from synthetic.tasks.base import Place
from synthetic.tasks.position import Position

BUDGET = 192 * 2**20  # bytes of recorded tensors of one batch
SHORT = 128  # up to this length maps show every token
BINS = 64  # of a map's axis at greater lengths
WEIGHTS = ("trained", "untrained")


class NotApplicable(UserError):
    """The model or task lacks what a probe measures; the message is one line that says what."""


@dataclass(frozen=True)
class Options:
    """What a probe is told.

    Attributes:
        examples: Sequences to measure. None: the probe's own number.
        seed: Of the held-out stream they are drawn from.
        progress: Is told the share that is done, 0 .. 1.
        place: Where contexts shorter than seq_len lay in training; "gap" parts queries from them.
    """

    examples: int | None = None
    seed: int = 0
    progress: Callable[[float], None] = lambda share: None
    place: Place = "first"


@dataclass(frozen=True)
class Probe:
    """One probe of the command line. `analysis.plots` draws its table.

    Attributes:
        title: The question it answers, for the summary.
        measure: (model, task, options) -> table; raises `NotApplicable`.
        summary: Table of all families -> Markdown.
        version: Raised whenever the same options would give other numbers.
        untrained: Whether the same measurement of untrained weights is its control.
        columns: Of its table, beside those that all have.
    """

    title: str
    measure: Callable[[LanguageModel, Task, Options], pd.DataFrame]
    summary: Callable[[pd.DataFrame], str]
    version: int = 1
    untrained: bool = True
    columns: tuple[str, ...] = ()


# --- sequences ----------------------------------------------------------------------------------------------


def single_query(task: Task) -> Task:
    """The task without what is appended after its answer (`supervise_bos`)."""
    return replace(task, supervise_bos=False) if isinstance(task, Position) else task


def require_roles(task: Task, what: str) -> None:
    """Refuse tasks whose tokens have no roles (`probes.token_roles`).

    Args:
        task: The task.
        what: Name of the probe, for the message.

    Raises:
        NotApplicable: The task is not of position type.
    """
    if not isinstance(task, Position):
        known = "position, position-varlen or grid"
        raise NotApplicable(f"{what} needs the roles of tokens, which task {task.name} lacks; use {known}")


def batches(task: Task, examples: int, rows: int, options: Options) -> Iterator[Batch]:
    """Held-out sequences of the task's full length, with one query each if the task allows it.

    Args:
        task: The task.
        examples: Sequences in all.
        rows: Sequences of a batch.
        options: Seed, and progress, which is told after each batch.

    Yields:
        Batches; the last may be smaller.
    """
    task = single_query(task)
    queries = 1 if isinstance(task, Position) else task.usual_queries(task.seq_len)
    for index, start in enumerate(range(0, examples, rows)):
        yield task.batch(
            min(rows, examples - start), seed=options.seed, index=index, split="heldout",
            queries=queries, length=task.seq_len,
        )  # fmt: skip
        options.progress(min(start + rows, examples) / examples)


def answer_at(batch: Batch) -> int:
    """Position of the first answer.

    Args:
        batch: Sequences of a task.

    Returns:
        The position, the same in all sequences.

    Raises:
        NotApplicable: It differs from sequence to sequence.
    """
    if batch.answer_at.dim() > 1:
        raise NotApplicable("answers stand at other places in every sequence of this task")
    return int(batch.answer_at[0])


def rows_within(task: Task, bytes_per_token: int, budget: int = BUDGET) -> int:
    """How many sequences a batch may have.

    Args:
        task: The task.
        bytes_per_token: Of what is recorded.
        budget: Bytes that the recordings of a batch may take, about.

    Returns:
        Sequences, at least 1.
    """
    tokens = task.max_length(task.usual_queries(task.seq_len))
    return max(1, budget // max(1, tokens * bytes_per_token))


# --- layers -------------------------------------------------------------------------------------------------


def ssm_layers(model: LanguageModel) -> list[int]:
    """Indices of the SSM blocks.

    Args:
        model: The model.

    Returns:
        At least one index.

    Raises:
        NotApplicable: There are none.
    """
    found = layers_with(model, "mixer.hook_dt")
    if not found:
        raise NotApplicable("it has no layers with the recurrence of Mamba or Mamba-2")
    return found


def scan_bytes(model: LanguageModel, layers: Sequence[int]) -> int:
    """Bytes per token of what `probes.scan.record_scans` records: x and dt of every channel, with copies."""
    mixers: list[Any] = [model.blocks[i] for i in layers]
    return sum(4 * 3 * block.mixer.config.d_inner for block in mixers)


# --- tables -------------------------------------------------------------------------------------------------


def interval_row(values: Any, bounds: tuple[float, float] | None = None, **columns: Any) -> dict[str, Any]:
    """A row with the mean of some values and its interval.

    Args:
        values: One number a sequence; those that are not finite are left out.
        bounds: Limits of the interval, such as (0, 1).
        **columns: Further columns.

    Returns:
        The columns with value, low, high (Student's) and n.
    """
    data = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=float).ravel()
    data = data[np.isfinite(data)]
    mean, low, high = mean_interval(data, bounds=bounds) if len(data) else (np.nan,) * 3
    return columns | dict(value=mean, low=low, high=high, n=len(data))


def usual_at(values: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """The mean at every position over the sequences with a distractor there.

    Args:
        values: (B, L); what is not finite is left out.
        kinds: (B, L) roles, as `probes.token_roles` numbers them.

    Returns:
        (L,), nan where no sequence has a distractor.
    """
    ordinary = (kinds == role("distractor")) & np.isfinite(values)
    count = np.where(ordinary.any(0), ordinary.sum(0), np.nan)
    return np.where(ordinary, values, 0).sum(0) / count


def coarse(weights: Tensor, bins: int = BINS) -> tuple[Tensor, int]:
    """A map with tokens put together in cells, small enough to draw; unchanged up to `SHORT` tokens.

    Weights of columns add up and rows are averaged, so rows that sum to 1 still do. The last cells may cover
    fewer tokens.

    Args:
        weights: (T, T).
        bins: Cells of an axis, at most.

    Returns:
        The smaller map, and the tokens of a cell.
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
    """A map's cells at and below the diagonal as rows.

    Args:
        weights: (T, T).
        size: Tokens of a cell.
        **columns: Further columns.

    Returns:
        The columns with query and key, the first tokens of each cell, and value.
    """
    return [
        columns | dict(query=t * size, key=i * size, value=float(weights[t, i]))
        for t in range(len(weights))
        for i in range(t + 1)
    ]


def interval(row: Any, digits: int = 3) -> str:
    """A row's value and interval as text, `0.42 [0.40, 0.44]`."""
    value = f"{row['value']:.{digits}g}"
    if not np.isfinite(row["low"]):
        return value
    return f"{value} [{row['low']:.{digits}g}, {row['high']:.{digits}g}]"


def beside(table: pd.DataFrame, by: Sequence[str], digits: int = 3) -> str:
    """A Markdown table with a row per combination of `by`: trained numbers beside those of untrained weights.

    Args:
        table: Rows of a probe.
        by: Columns that tell the rows apart.
        digits: Significant digits.

    Returns:
        The table, without a newline at its end.
    """
    rows = []
    groups: Any = table.groupby(list(by), sort=False, dropna=False)
    for key, group in groups:
        cells = []
        for weights in WEIGHTS:
            part = group[group["weights"] == weights]
            cells.append(interval(part.iloc[0], digits) if len(part) else "")
        rows.append([*key, *cells])
    return markdown([*by, *WEIGHTS], rows)
