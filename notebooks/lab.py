"""What the notebooks share: trained models, in a temporary folder; one look; prose with computed numbers."""

from __future__ import annotations

import getpass
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib.colors import LogNorm
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from torch import Tensor

import synthetic
from probes.heads import HeadScores
from ssm_retrieval import models, style
from ssm_retrieval.models import LanguageModel
from ssm_retrieval.ops.memory import keep_freed_memory
from ssm_retrieval.statistics import mean_interval
from synthetic import RunConfig, tasks
from synthetic.config import Plan

# Never the repository; one folder per user, because a lab's machine has many of them.
OUT = Path(tempfile.gettempdir()) / f"ssm-retrieval-notebooks-{getattr(os, 'getuid', getpass.getuser)()}"
# The small runs that notebooks 01, 03 and 04 share: what trains in half a minute and is worth looking into.
N = 12  # context symbols
SHARED: dict[str, Any] = dict(
    seq_len=N, queries=1, batch_tokens=1024, schedule="linear", seed=0, eval_every=25, growth="prefix"
)
# Mamba as its authors publish it: no positions, four layers, their first weights. docs/learnability.md says
# what the defaults of the toolkit change, and why.
OWN: dict[str, dict[str, Any]] = {
    "transformer": dict(steps=300, position="learned"),
    "mamba": dict(steps=600, lr=4e-3, position="none", ssm_init="default"),
}

_LOOK = ExitStack()  # keeps the theme for as long as the kernel lives


@dataclass(frozen=True)
class Trained:
    """A trained model, its task, what was settled for its training, and what came of it.

    result, metrics: of `synthetic.Run`; positions: its by_position.
    """

    model: LanguageModel
    task: tasks.Task
    plan: Plan
    result: dict[str, Any]
    metrics: pd.DataFrame
    positions: pd.DataFrame

    def untrained(self) -> LanguageModel:
        """The same architecture with the weights it had before training."""
        return models.build(self.plan.model, seed=self.plan.seed, **self.plan.model_overrides).eval()


def begin() -> None:
    """One thread, so that the numbers do not depend on how many cores there are; the project's figures."""
    torch.set_num_threads(1)
    keep_freed_memory()
    _LOOK.enter_context(style.theme())


def say(text: str) -> None:
    """Prose whose numbers are computed."""
    display(Markdown(text))


def counts(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten, written as 20k or 1M."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_locator(NullLocator())


def around(values: Tensor, centre: Tensor, ordinary: Tensor, shown: Tensor, offsets: range) -> np.ndarray:
    """What tokens near a special one do, over ordinary tokens at the same position in other sequences.

    Args:
        values: (B, L), positive.
        centre: (B,) position of the special token.
        ordinary: (B, L) bool, the tokens whose geometric mean at each position counts as 1.
        shown: (B, L) bool, the tokens that may enter.
        offsets: Tokens after the special one.

    Returns:
        (offsets, 3): geometric mean over sequences with its 95 % interval.
    """
    logs = values.double().clamp(min=1e-12).log()
    logs = logs - (logs * ordinary).sum(0) / ordinary.sum(0)
    after = torch.arange(values.shape[1]) - centre[:, None]
    known = shown & ordinary.any(0)
    return np.exp([mean_interval(logs[known & (after == offset)].numpy()) for offset in offsets])


def interval(values: Any) -> str:
    """`1.20 [1.10, 1.30]` of a number and the bounds of its interval."""
    value, low, high = values
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def band(ax: Any, x: Any, values: np.ndarray, **look: Any) -> None:
    """A line with its interval.

    Args:
        ax: Where to draw.
        x: (points,).
        values: (points, 3): number, low, high.
        **look: Of the line.
    """
    ax.plot(x, values[:, 0], **look)
    ax.fill_between(x, values[:, 1], values[:, 2], color=look["color"], alpha=0.2, lw=0)


def errorbars(ax: Any, x: Any, values: Any, **look: Any) -> None:
    """Points with error bars.

    Args:
        ax: Where to draw.
        x: (points,).
        values: (points, 3): number, low, high.
        **look: Of the points.
    """
    value, low, high = np.asarray(values, dtype=float).T
    ax.errorbar(x, value, yerr=[value - low, high - value], **dict(capsize=2, ms=5) | look)


def attention_map(ax: Any, pattern: Tensor, mark: int, title: str, color: str) -> Any:
    """Draw a pattern with a logarithmic scale.

    Args:
        ax: Where to draw.
        pattern: (T, T), rows of sum 1.
        mark: Column that a red triangle marks.
        title: Of the map.
        color: Of the title.

    Returns:
        The image, for a colour bar.
    """
    last = len(pattern) - 1
    weights = pattern.clamp(min=1e-4)
    weights = weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), torch.nan)
    image = ax.imshow(weights, norm=LogNorm(1e-4, 1), cmap="viridis")
    ax.plot(mark, last + 0.6, marker=6, color="crimson", ms=8, clip_on=False, zorder=5)
    ax.set(xlim=(-0.5, last + 0.5), ylim=(last + 0.5, -0.5))
    ax.set(xticks=range(0, last + 1, 4), yticks=range(0, last + 1, 4))
    ax.set_title(title, fontsize=9, color=color)
    ax.grid(False)
    return image


def head_scores(
    ax: Any, scores: dict[int, HeadScores], untrained: dict[int, HeadScores], color: str
) -> tuple[int, int, float, float]:
    """Draw every head's score; hollow: untrained, dash: even attention. Returns the best head.

    Args:
        ax: Where to draw.
        scores: Layer to the scores of its heads.
        untrained: The same of untrained weights.
        color: Of the points.

    Returns:
        Layer, head, score and baseline of the highest.
    """
    labels, best = [], (0, 0, 0.0, 0.0)
    for layer, score in scores.items():
        table, plain = score.table(), untrained[layer].table()
        for row, other in zip(table.itertuples(), plain.itertuples(), strict=True):
            x = len(labels)
            labels.append(f"{layer}.{row.head}" if len(table) > 1 else f"{layer}")
            errorbars(ax, [x - 0.1], [(row.score, row.low, row.high)], fmt="o", color=color)
            ax.plot(x + 0.15, other.score, "o", color=color, mfc="none")
            ax.plot(x, row.baseline, "_", color="0.3", ms=14, mew=1.5)
            if row.score > best[2]:
                best = (layer, int(row.head), row.score, row.baseline)
    step = -(-len(labels) // 12)
    ax.set_xticks(range(0, len(labels), step), labels[::step])
    ax.set(ylim=(-0.03, 1.03), xlim=(-0.6, len(labels) - 0.4))
    ax.grid(axis="x", visible=False)
    return best


def wish(family: str, **options: Any) -> RunConfig:
    """What to train: a small model with SHARED and OWN options, unless told otherwise.

    options: fields of `RunConfig`. In float32 on the CPU, whose numbers differ least between machines.
    """
    options = SHARED | OWN[family] | options
    return RunConfig(model=(family,), device="cpu", precision="float32", out=str(OUT), **options)  # type: ignore[arg-type]


def trained(family: str, **options: Any) -> Trained:
    """`wish` trained now, or found if it was trained before, by another notebook perhaps."""
    run = synthetic.train(wish(family, **options), progress=False)
    return Trained(run.model(), run.task, run.plan, run.result, run.metrics, run.by_position)
