"""What patches did: effect sizes that are 0 for the corrupted run and 1 for the clean one.

The normalised logit difference is that of Wang et al. 2022 (arXiv 2211.00593) and Zhang & Nanda 2023
(arXiv 2309.16042).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.patch_cells import Cell
from ssm_retrieval.statistics import mean_interval, ratio_of_means, wilson

LEAST = 1e-6  # difference of logits up to which there is nothing for a patch to restore


def logit_difference(logits: Tensor, clean_answer: Tensor, corrupted_answer: Tensor) -> Tensor:
    """Logit of the clean run's answer minus that of the corrupted run's.

    Args:
        logits: (..., V).
        clean_answer: (...) int64 token ids.
        corrupted_answer: (...) int64 token ids.

    Returns:
        (...) differences.
    """
    return (
        logits.gather(-1, clean_answer.unsqueeze(-1)) - logits.gather(-1, corrupted_answer.unsqueeze(-1))
    ).squeeze(-1)


def normalised_difference(patched: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
    """The share of a logit difference that a patch restores, (patched - corrupted) / (clean - corrupted).

    1: the patch restores the clean run; 0: it changes nothing; below 0 or above 1: it overshoots. The
    smallest denominators dominate a mean of such ratios, so `effect` divides means instead.

    Args:
        patched: Logit differences of patched runs.
        clean: Those of clean runs; all three broadcast.
        corrupted: Those of corrupted runs.

    Returns:
        The ratio, elementwise; nan where |clean - corrupted| is at most `LEAST`: there is nothing to restore.
    """
    gap = clean - corrupted
    return torch.where(gap.abs() > LEAST, (patched - corrupted) / gap, torch.nan)


def effect(patched: Tensor, clean: Tensor, corrupted: Tensor) -> tuple[float, float, float]:
    """mean(patched - corrupted) / mean(clean - corrupted), with its 95 % interval by the delta method.

    Args:
        patched: (B,) logit differences; nan leaves an example out.
        clean: (B,) logit differences of clean runs.
        corrupted: (B,) logit differences of corrupted runs.

    Returns:
        Effect, low, high; nan where the mean gap is below `LEAST`, because there is nothing to restore.
    """
    known = ~patched.isnan()
    moved, gap = ((t - corrupted)[known].double().cpu().numpy() for t in (patched, clean))
    if not len(gap) or abs(gap.mean()) < LEAST:
        return np.nan, np.nan, np.nan
    return ratio_of_means(moved, gap)


@dataclass(frozen=True)
class Key:
    """What one patch is.

    Attributes:
        site: "residual", "state" or "head".
        layer: Index of the block; n_layer for the last norm's input.
        head: Number of the head; None for other sites.
        cell: Number of the cell of tokens.
        control: The control it is, see `probes.patching.patch`; "" for a patch itself.
    """

    site: str
    layer: int
    head: int | None
    cell: int
    control: str


@dataclass(frozen=True, eq=False)
class Traced:
    """Patches of B pairs: the results of K keys.

    Attributes:
        keys: K patches.
        cells: The cells that their numbers mean.
        difference: (K, B) float64 logit differences; nan where a pair has no token in the key's cell.
        right: (K, B) bool, whether the patched run gives the clean answer.
        clean: (B,) float64 logit differences of the unpatched clean runs.
        corrupted: (B,) float64 logit differences of the unpatched corrupted runs.
        clean_right: (B,) bool, whether the clean run gives the clean answer.
        corrupted_right: (B,) bool, whether the corrupted run gives the clean answer.
    """

    keys: list[Key]
    cells: list[Cell]
    difference: Tensor
    right: Tensor
    clean: Tensor
    corrupted: Tensor
    clean_right: Tensor
    corrupted_right: Tensor

    def effects(self) -> Tensor:
        """(K, B) normalised logit differences; nan also where clean and corrupted runs do not differ."""
        return normalised_difference(self.difference, self.clean, self.corrupted)

    def table(self) -> pd.DataFrame:
        """One row per key, with the columns of `probes.patching.patch`."""
        each = self.effects()
        rows = []
        for i, key in enumerate(self.keys):
            cell = self.cells[key.cell]
            known = ~self.difference[i].isnan()
            hits, n = int(self.right[i][known].sum()), int(known.sum())
            accuracy_low, accuracy_high = wilson(hits, n)
            row: dict[str, Any] = dict(
                site=key.site, layer=key.layer, head=key.head, role=cell.role, low=cell.low, high=cell.high,
                control=key.control, n=n,
            )  # fmt: skip
            row |= _named("effect", effect(self.difference[i], self.clean, self.corrupted))
            row |= _named("effect_each", _mean(each[i]))
            row |= _named("accuracy", (hits / n if n else np.nan, accuracy_low, accuracy_high))
            rows.append(row)
        table = pd.DataFrame(rows).astype(dict(head="Int64", low="Int64", high="Int64"))
        return table.assign(
            gap=float((self.clean - self.corrupted).double().mean()),
            accuracy_clean=float(self.clean_right.double().mean()),
            accuracy_corrupted=float(self.corrupted_right.double().mean()),
        )


def _named(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _mean(values: Tensor) -> tuple[float, float, float]:
    data = values[~values.isnan()].double().cpu().numpy()
    return mean_interval(data) if len(data) else (np.nan, np.nan, np.nan)
