"""Logit lens: after which layer can the answer be read off the residual stream with the model's own head?

Parts of the table: "accuracy" and "log_prob" (nats) of the answers by layer; layer 0 is the embedding.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.cache import recorded
from probes.lens import lens_table
from probes.suite.common import (
    Options,
    Probe,
    batches,
    beside,
    rows_within,
)
from ssm_retrieval.models.common import LanguageModel
from synthetic.tasks import Task


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: Any task.
        options: Sequences, seed and progress.

    Returns:
        Rows by layer, with chance: that of a guess among the answers, for log_prob log(1 / vocabulary).
    """
    names = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(model.config.n_layer))]
    examples = options.examples or (128 if task.seq_len > 256 else 512)
    kept: dict[int, list[Tensor]] = {i: [] for i in range(len(names))}
    answers, chance = [], 0.0
    # all positions are recorded where answers stand at other places in every sequence
    rows = rows_within(task, 4 * model.config.d_model * (len(names) + 8))
    for batch in batches(task, examples, rows, options):
        at = batch.answer_at[..., : batch.retrieved]
        positions = at.tolist() if at.dim() == 1 else None
        cache = recorded(model, batch.input_ids, names, positions=positions)
        for i, name in enumerate(names):
            x = cache[name]
            kept[i].append(x if positions else x.take_along_dim(at[..., None], dim=1))
        answers.append(batch.labels[:, : batch.retrieved])
        chance = batch.chance
    norm, head = model.norm, model.head
    with torch.no_grad():
        table = lens_table({i: torch.cat(x) for i, x in kept.items()}, norm, head, torch.cat(answers))
    shared = dict(layer=table["layer"], n=table["answers"])
    accuracy = pd.DataFrame(
        shared | dict(part="accuracy", quantity="accuracy", value=table["accuracy"], low=table["low"],
                      high=table["high"], chance=chance)
    )  # fmt: skip
    log_prob = pd.DataFrame(
        shared | dict(part="log_prob", quantity="log_prob", value=table["log_prob"],
                      low=table["log_prob_low"], high=table["log_prob_high"],
                      chance=-np.log(model.config.vocab_size))
    )  # fmt: skip
    return pd.concat([accuracy, log_prob], ignore_index=True)


def summary(table: pd.DataFrame) -> str:
    """Accuracy and log-probability by layer, beside chance and untrained weights, as Markdown."""
    chance = table.groupby("part")["chance"].first()
    words = (
        "The residual stream where the answer is due, after every block, read with the model's last norm and "
        f"head. Chance: accuracy {chance['accuracy']:.3g}, log-probability {chance['log_prob']:.3g} nats. "
        "Wilson's and Student's 95 % intervals."
    )
    return words + "\n\n" + beside(table, ["family", "quantity", "layer"])


PROBE = Probe("After which layer can the answer be read?", measure, summary, columns=("chance",))
