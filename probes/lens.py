"""Logit lens, and what a patch did: effect sizes that are 0 for the corrupted run and 1 for the clean one.

The logit lens (nostalgebraist 2020) reads the residual stream after every layer as if it were the last:
logits = head(norm(residual)). The normalised logit difference is that of Wang et al. 2022 (arXiv 2211.00593)
and Zhang & Nanda 2023 (arXiv 2309.16042).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import mean_interval, wilson

LEAST = 1e-6  # difference of logits up to which there is nothing for a patch to restore


@dataclass(frozen=True)
class Lens:
    """Of each answer, (B, A): log-probability (nats), rank (0: the likeliest token), is it the arg-max?"""

    log_prob: Tensor
    rank: Tensor
    correct: Tensor


@torch.no_grad()
def logit_lens(
    residual: Tensor, norm: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], answers: Tensor
) -> Lens:
    """Reads residuals (B, A, D) at the positions where the answers, (B, A) token ids, are due.

    norm, head: the model's last norm and output layer, (..., D) -> (..., D) -> (..., V). The rank counts
    tokens with a larger logit. Raises UserError for shapes that differ.
    """
    if residual.dim() != 3 or residual.shape[:2] != answers.shape:
        raise UserError(
            f"residual must be (B, A, D) for answers (B, A), not {tuple(residual.shape)} "
            f"and {tuple(answers.shape)}"
        )
    logits = head(norm(residual)).to(torch.promote_types(residual.dtype, torch.float32))
    own = logits.gather(-1, answers.unsqueeze(-1))
    return Lens(
        (own - logits.logsumexp(-1, keepdim=True)).squeeze(-1),
        (logits > own).sum(-1),
        logits.argmax(-1) == answers,
    )


def lens_table(
    residuals: Mapping[Any, Tensor],
    norm: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    answers: Tensor,
) -> pd.DataFrame:
    """One row per layer: layer, accuracy with Wilson interval, log_prob with Student's, median rank, answers.

    residuals: layer -> (B, A, D), e.g. the embedding and the output of every block. The interval of log_prob
    takes sequences as independent, that of the accuracy answers.
    """
    rows = []
    for layer, residual in residuals.items():
        lens = logit_lens(residual, norm, head, answers)
        hits, count = int(lens.correct.sum()), lens.correct.numel()
        low, high = wilson(hits, count)
        mean, mean_low, mean_high = mean_interval(lens.log_prob.mean(1).double().cpu().numpy())
        rows.append(
            dict(
                layer=layer,
                accuracy=hits / count,
                low=low,
                high=high,
                log_prob=mean,
                log_prob_low=mean_low,
                log_prob_high=mean_high,
                median_rank=float(lens.rank.double().median()),
                answers=count,
            )
        )
    return pd.DataFrame(rows)


# --- effects of patches -------------------------------------------------------------------------------------


def logit_difference(logits: Tensor, clean_answer: Tensor, corrupted_answer: Tensor) -> Tensor:
    """(...,): logit of the clean run's answer minus that of the corrupted run's. logits: (..., V)."""
    return (
        logits.gather(-1, clean_answer.unsqueeze(-1)) - logits.gather(-1, corrupted_answer.unsqueeze(-1))
    ).squeeze(-1)


def normalised_difference(patched: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
    """(patched - corrupted) / (clean - corrupted), elementwise over broadcast logit differences.

    1: the patch restored the clean run, 0: it changed nothing, below 0 or above 1: it went further. nan where
    |clean - corrupted| <= LEAST: there is nothing to restore. Means of this ratio are led by its smallest
    denominators; `probes.patching.effect` divides means instead.
    """
    gap = clean - corrupted
    return torch.where(gap.abs() > LEAST, (patched - corrupted) / gap, torch.nan)
