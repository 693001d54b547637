"""Which parts does the model need? Each is taken away, then all that seem needed at once, beside random sets.

Parts are heads of attention and of Mamba-2, and equal groups of channels of Mamba (`probes.ablation`). Taken
away means: replaced by their mean over sequences. On one half of the sequences every part is taken away by
itself; those whose drop of accuracy has an interval above 0 are called responsible, the largest first, at
most half of all parts of one width. On the other half they are taken away together, beside random sets of as
many other parts: what is responsible must cost more than these (arXiv 2606.00930). Parts of the table:

    part     the drop without one part; `chosen` says whether it is called responsible
    set      the drop without all of these, `size` many. p of the randomisation test: how often a random set
             costs as much
    control  the drop without each random set
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from probes.ablation import Part, knock_out, knock_out_together, parts
from probes.suite.common import NotApplicable, Options, Probe, batches, interval
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.tables import markdown
from synthetic.tasks import Batch, Task

EXAMPLES = 256  # sequences, half for each question
SETS = 20  # random sets, so that the smallest p is 1/21


def measure(model: LanguageModel, task: Task, options: Options) -> pd.DataFrame:
    """Measure a model.

    Args:
        model: The model.
        task: Its task.
        options: Sequences, seed and progress.

    Returns:
        Rows by part, all with the accuracy of the whole model as `intact`.

    Raises:
        NotApplicable: Some block has branches side by side, whose parts are not known.
    """
    half = max(2, (options.examples or EXAMPLES) // 2)
    first, second = batches(task, 2 * half, half, options)
    try:
        every = [part for layer in range(model.config.n_layer) for part in parts(model, layer)]
    except UserError as error:
        raise NotApplicable(str(error)) from error
    alone = knock_out(model, first, every, control=False)
    chosen = responsible(every, alone)
    rows: list[dict[str, Any]] = [
        dict(
            part="part", layer=part.layer, number=part.number, kind=part.kind, chosen=part in chosen,
            n=row["n"], value=row["drop"], low=row["drop_low"], high=row["drop_high"],
            intact=row["accuracy_intact"],
        )
        for part, row in zip(every, alone.to_dict("records"), strict=True)
    ]  # fmt: skip
    table = pd.DataFrame(rows + _together(model, second, chosen, every)).assign(quantity="drop")
    return table.reindex(columns=[*table.columns, *(name for name in ("size", "p") if name not in table)])


def responsible(every: list[Part], alone: pd.DataFrame) -> list[Part]:
    """The parts whose drops lie above 0, the largest first, at most half of those of one width.

    Args:
        every: All parts.
        alone: Rows of `probes.ablation.knock_out`, in the same order.

    Returns:
        Some of the parts; as many others of their width are left to compare with.
    """
    found: list[Part] = []
    drops = alone["drop"].to_numpy()
    for i in np.argsort(-drops, kind="stable"):
        width = every[i].high - every[i].low
        most = sum(part.high - part.low == width for part in every) // 2
        taken = sum(part.high - part.low == width for part in found)
        if alone["drop_low"].iloc[i] > 0 and taken < most:
            found.append(every[i])
    return found


def _together(
    model: LanguageModel, batch: Batch, chosen: list[Part], every: list[Part]
) -> list[dict[str, Any]]:
    if not chosen:
        return []
    found = knock_out_together(model, batch, chosen, every, sets=SETS)
    answers = len(batch.input_ids) * batch.target_index.shape[1]
    shared: Any = dict(layer=model.config.n_layer, n=answers, size=len(chosen), intact=found.accuracy_intact)
    drop = dict(part="set", value=found.drop, low=found.drop_low, high=found.drop_high, p=found.p)
    return [shared | drop, *(shared | dict(part="control", value=value) for value in found.controls)]


def summary(table: pd.DataFrame) -> str:
    """The set that is called responsible beside random sets, as Markdown."""
    words = (
        "Parts (heads, or groups of channels) are replaced by their mean over sequences. Responsible are "
        "those whose loss costs accuracy on one half of the sequences, at most half of all. They are taken "
        f"away together on the other half, beside {SETS} random sets of as many other parts. p: the "
        "randomisation test."
    )
    rows = []
    for family, mine in table.groupby("family", sort=False):
        single, sets = mine[mine["part"] == "part"], mine[mine["part"] == "set"]
        count = f"{int(single['chosen'].astype(bool).sum())} of {len(single)}"
        intact = f"{mine['intact'].iloc[0]:.3f}"
        if sets.empty:
            rows.append([family, intact, count, "–", "–", "–"])
            continue
        control = mine.loc[mine["part"] == "control", "value"]
        others = f"{control.mean():.3f} ({control.min():.3f} to {control.max():.3f})"
        (row,) = sets.to_dict("records")
        rows.append([family, intact, count, interval(row), others, f"{row['p']:.2g}"])
    head = ["family", "accuracy", "responsible parts", "drop without them", "without random ones", "p"]
    return f"{words}\n\n" + markdown(head, rows)


PROBE = Probe(
    "Which parts does the model need, more than random ones?",
    measure,
    summary,
    untrained=False,
    columns=("number", "kind", "chosen", "size", "p", "intact"),
)
