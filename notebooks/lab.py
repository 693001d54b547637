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
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator
from torch import Tensor

import synthetic
from ssm_retrieval import style
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
    seq_len=N, queries=1, batch_tokens=1024, schedule="linear", seed=0, eval_every=25
)
OWN: dict[str, dict[str, Any]] = {"transformer": dict(steps=300), "mamba": dict(steps=600, lr=4e-3)}

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
    """What tokens near a special one do, over ordinary tokens at the same position elsewhere.

    values: (B, L), positive; centre: (B,) position of the special token; ordinary: (B, L) bool, the tokens
    whose geometric mean at each position counts as 1; shown: (B, L) bool, the tokens that may enter.
    Returns (offsets, 3): geometric mean over sequences with its 95 % interval, by tokens after the special.
    """
    logs = values.double().clamp(min=1e-12).log()
    logs = logs - (logs * ordinary).sum(0) / ordinary.sum(0)
    after = torch.arange(values.shape[1]) - centre[:, None]
    known = shown & ordinary.any(0)
    return np.exp([mean_interval(logs[known & (after == offset)].numpy()) for offset in offsets])


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
