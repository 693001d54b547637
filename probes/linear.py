"""Linear probes: what can be read off a hidden state by a linear map, and how much of that means anything.

Ridge regression on one-hot labels or multinomial logistic regression (`probes.linear_maps`).
Penalties are chosen on a validation part. Accuracies are those of a test part on which nothing was chosen,
with Wilson intervals. A high accuracy may be the probe's own doing, so each comes with two controls:

* `majority`: the accuracy of always giving the commonest label of the training part;
* `shuffled`: the accuracy on the same labels dealt to sequences at random, about chance.

There is no control task of random labels by token type (Hewitt & Liang 2019, arXiv 1909.03368): a label here
is the type of a token itself, so such a task renames the classes, and a linear map that reads one reads the
other. The control that tells is the same model with untrained weights.

With more features F than sequences n, an accuracy says more about n than about the features. `project` makes
F the same for states of every size; report n and F beside every number. All is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F_

from probes.linear_maps import LinearMap, basis, logistic, ridge_in_basis
from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import wilson

# in units of the mean eigenvalue of the features' Gram matrix
PENALTIES = tuple(10.0**k for k in range(-6, 3))
METHODS = ("ridge", "logistic")


# --- held-out accuracy and its controls ---------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Row numbers, int64, of the three parts of n sequences; a sequence is in one part only."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(n: int, seed: int, validation: float = 0.2, test: float = 0.2) -> Split:
    """Deal n sequences out to three parts at random.

    Args:
        n: Sequences.
        seed: Of the order.
        validation: Share of the validation part.
        test: Share of the test part.

    Returns:
        The parts.

    Raises:
        UserError: A part would be empty.
    """
    held, tested = round(n * validation), round(n * test)
    if min(held, tested, n - held - tested) < 1:
        raise UserError(f"{n} sequences leave a part empty; give more of them")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Split(order[held + tested :], order[:held], order[held : held + tested])


def project(features: int, width: int, seed: int) -> Tensor | None:
    """A random projection to `width` features, which keeps distances about (Johnson & Lindenstrauss 1984).

    With it a probe sees states of every size alike, with as many sequences for each feature.

    Args:
        features: F.
        width: Features to keep.
        seed: Of the entries.

    Returns:
        (F, width) float32, Gaussian with variance 1 / width, to multiply features with; None if F is at most
        width.
    """
    if features <= width:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(features, width, generator=generator) / width**0.5


def probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    parts: Split,
    method: str = "ridge",
    penalties: Sequence[float] = PENALTIES,
) -> pd.DataFrame:
    """How well J labelings of n sequences can be read off one state of each.

    Args:
        features: (n, F).
        labels: (n, J) int64 in 0 .. classes - 1, or -1 for a sequence without a label. It counts in no
            accuracy; ridge is trained to give it no class, logistic regression leaves it out.
        classes: C.
        parts: Which sequences train, validate and test.
        method: "ridge" or "logistic".
        penalties: In units of the mean eigenvalue of the Gram matrix, so that they mean the same at any
            scale.

    Returns:
        A row per labeling: accuracy (nan without a label in the test part) with Wilson's low, high; count,
        the test sequences; majority; penalty, the chosen one, the largest of equally good ones.

    Raises:
        UserError: The method is unknown, or labels have another shape or lie outside the classes.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; use one of {', '.join(METHODS)}")
    if labels.dim() != 2 or len(labels) != len(features):
        raise UserError(f"labels must be (n, J) for features (n, F), not {tuple(labels.shape)}")
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels must lie in 0 .. {classes - 1}, or be -1")
    b = basis(features[parts.train])
    scale = float(b.values.mean()) if len(b.values) else 1.0
    where = (parts.train, parts.validation, parts.test)
    train, validation, test = (b.coordinates(features[r]) for r in where)
    ordered = sorted((p * scale for p in penalties), reverse=True)  # ties: the first, so the largest
    rows = []
    for column in labels.T:
        gold, gold_validation, gold_test = (column[r] for r in where)
        if method == "ridge":
            targets = F_.one_hot(gold.clamp(min=0), classes) * (gold >= 0)[:, None]
            maps = ridge_in_basis(b, train, targets, ordered)
        else:
            maps = _logistic_path(train, gold, classes, [p / len(train) for p in ordered])
        scores = [_right(m(validation), gold_validation).double().mean().nan_to_num(0) for m in maps]
        best = int(torch.stack(scores).argmax())
        right = _right(maps[best](test), gold_test)
        hits, count = int(right.sum()), len(right)
        low, high = wilson(hits, count)
        common = gold[gold >= 0].mode().values if (gold >= 0).any() else torch.tensor(-2)
        majority = float((gold_test[gold_test >= 0] == common).double().mean())
        rows.append((hits / count if count else np.nan, low, high, count, majority, ordered[best] / scale))
    return pd.DataFrame(rows, columns=["accuracy", "low", "high", "count", "majority", "penalty"])


def _logistic_path(train: Tensor, gold: Tensor, classes: int, penalties: Sequence[float]) -> list[LinearMap]:
    """From the largest penalty on, each solution the start of the next."""
    there = gold >= 0
    maps = [LinearMap(train.new_zeros(train.shape[1], classes), train.new_zeros(classes))]
    for penalty in penalties if there.any() else ():
        maps.append(logistic(train[there], gold[there], classes, penalty, start=maps[-1]))
    return maps[1:] or maps * len(penalties)


def _right(scores: Tensor, gold: Tensor) -> Tensor:
    """(m,) bool of the m rows that have a label."""
    return (scores.argmax(-1) == gold)[gold >= 0]


def controlled(features: Tensor, labels: Tensor, classes: int, seed: int = 0, **options: Any) -> pd.DataFrame:
    """`probe` with shuffled labels as its control.

    Args:
        features: (n, F).
        labels: (n, J) int64, as in `probe`.
        classes: C.
        seed: Of the split and of the shuffle.
        **options: Method and penalties of `probe`.

    Returns:
        The table of `probe` with a further column, shuffled: the accuracy on the labels dealt out anew among
        the sequences that have one.
    """
    parts = split(len(features), seed)
    mixed = labels.clone()
    generator = torch.Generator().manual_seed(seed + 1)
    for j in range(labels.shape[1]):
        rows = (labels[:, j] >= 0).nonzero().squeeze(1)
        mixed[rows, j] = labels[rows[torch.randperm(len(rows), generator=generator)], j]
    table = probe(features, torch.cat([labels, mixed], 1), classes, parts, **options)
    J = labels.shape[1]
    return table.iloc[:J].assign(shuffled=table["accuracy"].to_numpy()[J:])


# --- curves -------------------------------------------------------------------------------------------------


def decode_curve(
    states: Tensor,
    times: Sequence[int] | Tensor,
    tokens: Tensor,
    lags: Sequence[int] | Tensor,
    **options: Any,
) -> pd.DataFrame:
    """Is the identity of token i linearly decodable from h_t after t - i steps?

    One probe for each (t, lag). Its classes are the tokens that occur at those places of a time.

    Args:
        states: (n, T, F), of n sequences after the tokens at T times.
        times: (T,) positions t.
        tokens: (n, L) token ids.
        lags: The t - i, not negative; those that reach before the sequence are left out.
        **options: Of `controlled`.

    Returns:
        Columns time, lag, those of `controlled`, and chance, 1 / classes.

    Raises:
        UserError: Shapes do not fit, a time lies outside the sequences, or all lags reach before them.
    """
    if states.dim() != 3 or len(times) != states.shape[1] or len(tokens) != len(states):
        raise UserError(f"states must be (n, T, F) for T times and n token rows, not {tuple(states.shape)}")
    tables = []
    for k, t in enumerate(int(t) for t in times):
        if not 0 <= t < tokens.shape[1]:
            raise UserError(f"times must lie in 0 .. {tokens.shape[1] - 1}, but one is {t}")
        inside = [int(lag) for lag in lags if 0 <= lag <= t]
        if not inside:
            continue
        known, labels = tokens[:, [t - lag for lag in inside]].unique(return_inverse=True)
        table = controlled(states[:, k], labels, len(known), **options)
        table.insert(0, "time", t)
        table.insert(1, "lag", inside)
        tables.append(table.assign(chance=1 / len(known)))
    if not tables:
        raise UserError("no lag reaches a token of the sequences; give lags between 0 and the times")
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Capacity:
    """How many tokens can be read off a state.

    Attributes:
        recoverable: Largest n whose n tokens have a mean accuracy of at least the threshold; 0 if there is
            none.
        expected: Largest expected number of tokens recovered.
        table: Columns tokens (n), accuracy, expected, per_number of the state.
    """

    recoverable: int
    expected: float
    table: pd.DataFrame


def capacity(
    accuracies: Mapping[int, Sequence[float]], chance: float, state_size: int, threshold: float = 0.5
) -> Capacity:
    """How many tokens can be read off a state.

    The expected number of tokens recovered is the sum of (accuracy - chance) / (1 - chance): on average a
    guess adds nothing (terms may be negative).

    Args:
        accuracies: n to the test accuracies of its n tokens. `{n: curve[:n] for n in ...}` takes the n latest
            of a decode curve.
        chance: Accuracy of a guess, in [0, 1).
        state_size: Numbers of the state, d_inner d_state.
        threshold: Mean accuracy from which n tokens count as recoverable.

    Returns:
        The capacity for every n and the largest.

    Raises:
        UserError: Accuracies, chance or state size are out of range.
    """
    if not 0 <= chance < 1 or state_size < 1 or not accuracies:
        raise UserError("capacity needs accuracies, a chance in [0, 1) and a state of at least one number")
    rows = []
    for n, values in sorted(accuracies.items()):
        array = np.asarray(values, dtype=float)
        if array.shape != (n,) or n < 1 or not ((array >= 0) & (array <= 1)).all():
            raise UserError(f"accuracies[{n}] must be {n} numbers in [0, 1], not of shape {array.shape}")
        expected = float(((array - chance) / (1 - chance)).sum())
        rows.append((n, array.mean(), expected, expected / state_size))
    table = pd.DataFrame(rows, columns=["tokens", "accuracy", "expected", "per_number"])
    passed = table.loc[table["accuracy"] >= threshold, "tokens"]
    return Capacity(int(passed.max()) if len(passed) else 0, float(table["expected"].max()), table)
