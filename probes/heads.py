"""What attention heads do, from their patterns: retrieval, induction and previous-token scores.

A pattern is (B, H, L, S), as after the softmax: its row l is the distribution over keys of the query at
position `rows[l]` of the sequence. A score is attention mass, 0 to 1. Beside it stands what uniform attention
over the visible tokens (those up to the query itself) would give. Scores are per sequence, for intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import mean_interval


@dataclass(frozen=True)
class HeadScores:
    """A score of every head in every sequence; nan for sequences without a position that it is about.

    Attributes:
        value: (B, H) attention mass.
        baseline: (B,) the same of uniform attention.
    """

    value: Tensor
    baseline: Tensor

    def table(self, confidence: float = 0.95) -> pd.DataFrame:
        """Means over sequences with Student's interval, one row per head.

        Args:
            confidence: Of the intervals.

        Returns:
            Columns head, score, low, high, baseline, sequences.

        Raises:
            UserError: No sequence has a score.
        """
        there = ~self.baseline.isnan()
        if not there.any():
            raise UserError("no sequence has a position that this score is about")
        baseline = float(self.baseline[there].mean())
        rows = []
        for head, values in enumerate(self.value[there].double().T.cpu().numpy()):
            mean, low, high = mean_interval(values, confidence, bounds=(0, 1))
            rows.append(
                dict(head=head, score=mean, low=low, high=high, baseline=baseline, sequences=len(values))
            )
        return pd.DataFrame(rows)


def _rows(pattern: Tensor, rows: Any) -> Tensor:
    """(L,) positions of the pattern's query rows; by default the last L of the S keys."""
    if pattern.dim() != 4:
        raise UserError(f"pattern must be (B, H, L, S), not of shape {tuple(pattern.shape)}")
    L, S = pattern.shape[2:]
    if rows is None:
        if L > S:
            raise UserError(f"pattern has {L} rows for {S} keys; give rows, their positions")
        return torch.arange(S - L, S, device=pattern.device)
    chosen = torch.as_tensor(rows, device=pattern.device).long()
    if chosen.shape != (L,) or (L and not 0 <= int(chosen.min()) <= int(chosen.max()) < S):
        raise UserError(f"rows must be {L} positions, one for each row of pattern, in 0 .. {S - 1}")
    return chosen


def _mean_mass(pattern: Tensor, rows: Tensor, key: Tensor) -> HeadScores:
    """Mean over rows of the attention to key (B, L); rows whose key is -1 are left out."""
    there = key >= 0  # (B, L)
    index = key.clamp(min=0)[:, None, :, None].expand(-1, pattern.shape[1], -1, -1)
    mass = pattern.gather(3, index).squeeze(3)  # (B, H, L)
    count = there.sum(1)  # 0 / 0 = nan where there is no such row
    value = (mass * there[:, None]).sum(2) / count[:, None]
    uniform = 1 / (rows + 1).to(pattern.dtype)
    return HeadScores(value, (uniform * there).sum(1) / count)


def retrieval_score(pattern: Tensor, query: Any, match: Any, rows: Any = None) -> HeadScores:
    """Attention from the position where the answer is due to the position, or positions, that hold it.

    Args:
        pattern: (B, H, L, S).
        query: Position in the sequence that asks, an int or (B,).
        match: (B,) or (B, K) positions of the target, whose masses are added; -1 leaves one out.
        rows: (L,) positions of the pattern's rows. None: the last L.

    Returns:
        Scores, nan for sequences without a match. The baseline is the number of matches over that of visible
        tokens.

    Raises:
        UserError: A query has no row, or a match lies after it, where causal attention cannot reach.
    """
    at = _rows(pattern, rows)
    B, H = pattern.shape[:2]
    where = torch.as_tensor(query, device=pattern.device).expand(B)
    found = where[:, None] == at  # (B, L)
    if not found.any(1).all():
        raise UserError("pattern has no row for some of the query positions; see rows")
    keys = torch.as_tensor(match, device=pattern.device).reshape(B, -1)
    if (keys > where[:, None]).any():
        raise UserError("a match lies after its query, where attention does not reach")
    asked = pattern[torch.arange(B, device=pattern.device), :, found.int().argmax(1)]  # (B, H, S)
    there = keys >= 0
    mass = asked.gather(2, keys.clamp(min=0)[:, None].expand(-1, H, -1)) * there[:, None]
    value, baseline = mass.sum(2), there.sum(1) / (where + 1).to(pattern.dtype)
    none = ~there.any(1)
    return HeadScores(value.masked_fill(none[:, None], torch.nan), baseline.masked_fill(none, torch.nan))


def previous_occurrence(tokens: Tensor) -> Tensor:
    """The last position before t that holds the same token.

    Args:
        tokens: (B, S) ints.

    Returns:
        (B, S) int64, -1 where there is none.
    """
    S = tokens.shape[1]
    order = torch.argsort(tokens, dim=1, stable=True)  # equal tokens side by side, in order of position
    ordered = tokens.gather(1, order)
    before = torch.full_like(order, -1)
    before[:, 1:] = torch.where(ordered[:, 1:] == ordered[:, :-1], order[:, : S - 1], -1)
    return torch.empty_like(order).scatter_(1, order, before)


def induction_score(pattern: Tensor, tokens: Tensor, rows: Any = None) -> HeadScores:
    """Attention from a token to the one after its previous occurrence (Olsson et al. 2022, arXiv 2209.11895).

    A token that follows itself is left out: the one after its previous occurrence is itself.

    Args:
        pattern: (B, H, L, S).
        tokens: (B, S) ints.
        rows: (L,) positions of the pattern's rows. None: the last L.

    Returns:
        Means over the rows whose token occurred before; nan for sequences without repetition.
    """
    at = _rows(pattern, rows)
    _check_tokens(pattern, tokens)
    before = previous_occurrence(tokens)[:, at]
    after = torch.where((before >= 0) & (before + 1 < at), before + 1, -1)
    return _mean_mass(pattern, at, after)


def previous_token_score(pattern: Tensor, rows: Any = None) -> HeadScores:
    """Attention from a position to the one before it, averaged over rows other than position 0.

    Args:
        pattern: (B, H, L, S).
        rows: (L,) positions of the pattern's rows. None: the last L.

    Returns:
        Scores of every sequence.
    """
    at = _rows(pattern, rows)
    return _mean_mass(pattern, at, (at - 1).expand(pattern.shape[0], -1))


def _check_tokens(pattern: Tensor, tokens: Tensor) -> None:
    expected = (pattern.shape[0], pattern.shape[3])
    if tuple(tokens.shape) != expected:
        raise UserError(f"tokens must be (B, S) = {expected}, not {tuple(tokens.shape)}")
