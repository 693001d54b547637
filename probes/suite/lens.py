"""Logit lens: after which layer can the answer be read off the residual stream with the model's own head?

Parts of the table: "accuracy" and "log_prob" of the answers by layer; layer 0 is the embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.lens import lens_table
from probes.suite.common import (
    WEIGHTS,
    Options,
    Probe,
    batches,
    beside,
    families,
    recorded,
    rows_within,
)
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.style import NAMES, family_colors, legend, panels
from synthetic.tasks import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Rows by layer, with chance: of a guess among the answers, and log(1 / vocabulary) for log_prob."""
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


def draw(table: pd.DataFrame) -> Figure:
    """Accuracy and log-probability of the answer by layer, families together, untrained weights dashed."""
    figure, axes = panels(1, 2, size=(3.8, 3.2))
    labels = {"accuracy": "accuracy of the lens", "log_prob": "log-probability of the answer (nats)"}
    for ax, (part, label) in zip(axes[0], labels.items(), strict=True):
        mine = table[table["part"] == part]
        for family in families(mine):
            for weights in WEIGHTS:
                line = mine[(mine["family"] == family) & (mine["weights"] == weights)].sort_values("layer")
                look: dict[str, Any] = dict(color=family_colors()[family])
                look |= dict(marker="o", ms=4) if weights == "trained" else dict(ls="--", lw=1, alpha=0.7)
                ax.plot(line["layer"], line["value"], **look)
                ax.fill_between(
                    line["layer"], line["low"], line["high"], color=look["color"], alpha=0.15, lw=0
                )
        ax.axhline(mine["chance"].iloc[0], color="0.4", ls=":", lw=1)
        ax.set(xlabel="blocks passed (0 = embedding)", ylabel=label)
        ax.set_xticks(range(int(mine["layer"].max()) + 1))
    axes[0, 0].set_ylim(-0.03, 1.03)
    looks: dict[str, dict[str, Any]] = {
        NAMES[name]: dict(color=family_colors()[name], marker="o") for name in families(table)
    }
    looks |= {"untrained weights": dict(color="0.3", ls="--"), "chance": dict(color="0.4", ls=":")}
    legend(figure, looks)
    return figure


def summary(table: pd.DataFrame) -> str:
    chance = table.groupby("part")["chance"].first()
    words = (
        "The residual stream where the answer is due, after every block, read with the model's last norm and "
        f"head. Chance: accuracy {chance['accuracy']:.3g}, log-probability {chance['log_prob']:.3g} nats. "
        "Wilson's and Student's 95 % intervals.\n\n"
    )
    return words + beside(table, ["family", "quantity", "layer"])


PROBE = Probe("After which layer can the answer be read?", measure, {"": draw}, summary, columns=("chance",))
