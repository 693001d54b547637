"""Logit lens (nostalgebraist 2020): from which layer on can an answer be read with the model's own head?

It reads the residual stream after every layer as if it were the last:

    logits = head(norm(residual))
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


@dataclass(frozen=True)
class Lens:
    """How each answer is ranked, all of shape (B, A).

    Attributes:
        log_prob: Log-probability of the answer, nats.
        rank: int64, tokens with a larger logit; 0 is the likeliest token.
        correct: bool, whether the answer has the largest logit.
    """

    log_prob: Tensor
    rank: Tensor
    correct: Tensor


@torch.no_grad()
def logit_lens(
    residual: Tensor, norm: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], answers: Tensor
) -> Lens:
    """Read residuals with the model's own last norm and head.

    Args:
        residual: (B, A, D) at the positions where answers are due.
        norm: The last norm, (..., D) -> (..., D).
        head: The output layer, (..., D) -> (..., V).
        answers: (B, A) int64 token ids.

    Returns:
        Log-probability and rank of every answer.

    Raises:
        UserError: Shapes of residual and answers differ.
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
    """The logit lens of every layer as a table, one row each.

    Args:
        residuals: Layer to (B, A, D), such as the embedding and the output of every block.
        norm: The last norm, (..., D) -> (..., D).
        head: The output layer, (..., D) -> (..., V).
        answers: (B, A) int64 token ids.

    Returns:
        Columns layer; accuracy with Wilson's interval low, high, over answers; log_prob (nats) with Student's
        interval log_prob_low, log_prob_high, over sequences; median_rank; answers.
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
