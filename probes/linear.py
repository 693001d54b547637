"""Linear probes: what can be read off a hidden state by a linear map, and how much of that means anything.

Ridge regression on one-hot labels in closed form (Hoerl & Kennard 1970) and multinomial logistic regression.
Penalties are chosen on a validation part; accuracies are those of a test part that nothing was chosen on,
with Wilson intervals. A high accuracy may be the probe's doing, so every one comes with

  - majority: the accuracy of always giving the commonest label of the training part;
  - shuffled: the accuracy on the same labels dealt to sequences at random, about chance.

There is no control task of random labels by token type (Hewitt & Liang 2019, arXiv 1909.03368): here a label
is the type of a token itself, so such a task renames the classes, and a linear map that reads one reads the
other. The control that tells is the same model with untrained weights.

With more features F than sequences n an accuracy says more of n than of the features. `project` makes F the
same for states of every size; n and F belong beside every number. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import optimize
from torch import Tensor
from torch.nn import functional as F_

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import wilson

PENALTIES = tuple(
    10.0**k for k in range(-6, 3)
)  # in units of the mean eigenvalue of the features' Gram matrix
METHODS = ("ridge", "logistic")


@dataclass(frozen=True)
class LinearMap:
    """x (..., F) -> x weight + bias (..., C); weight: (F, C), bias: (C,), float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x.double() @ self.weight + self.bias


@dataclass(frozen=True)
class Basis:
    """Centred features in their principal directions: mean (F,), directions (F, r), values (r,) eigenvalues.

    r is at most min(n, F): directions without variance are left out. All ridge solutions lie in their span
    and are diagonal in it, so one decomposition serves every penalty and every target.
    """

    mean: Tensor
    directions: Tensor
    values: Tensor

    def coordinates(self, x: Tensor) -> Tensor:
        """(n, F) -> (n, r)."""
        return (x.double() - self.mean) @ self.directions

    def map(self, weight: Tensor, bias: Tensor) -> LinearMap:
        """The map of features that does to them what weight (r, C), bias (C,) do to coordinates."""
        full = self.directions @ weight
        return LinearMap(full, bias - self.mean @ full)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding, largest first, and their eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values[-1:].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    keep = (values > floor).nonzero().squeeze(1).flip(0)
    return values[keep], vectors[:, keep]


def basis(x: Tensor) -> Basis:
    """Of features x (n, F): from X X^T (dual) if n < F, from X^T X (primal) else, X the centred features."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    if len(x) < x.shape[1]:
        values, vectors = _eigen(centred @ centred.T)
        return Basis(mean, centred.T @ (vectors / values.sqrt()), values)
    values, vectors = _eigen(centred.T @ centred)
    return Basis(mean, vectors, values)


class Moments:
    """Sums over samples that arrive in batches, enough for ridge regression without keeping the samples.

    n; x: (F,) and y: (C,) sums; xx: (F, F) = X^T X; xy: (F, C) = X^T Y. Float64, 8 F (F + C) bytes: for few
    features and many samples. With more features than samples keep those instead, and use `ridge`.
    """

    def __init__(self, features: int, targets: int):
        self.n = 0
        self.x, self.y = (torch.zeros(k, dtype=torch.float64) for k in (features, targets))
        self.xx = torch.zeros(features, features, dtype=torch.float64)
        self.xy = torch.zeros(features, targets, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (n, F), y: (n, C), any float dtype and device. Raises UserError for other shapes."""
        if x.shape != (len(y), len(self.x)) or y.shape != (len(x), len(self.y)):
            wanted = f"(n, {len(self.x)}) and (n, {len(self.y)})"
            raise UserError(f"x and y must be {wanted}, not {tuple(x.shape)} and {tuple(y.shape)}")
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)

    def ridge(self, penalties: Sequence[float]) -> list[LinearMap]:
        """What `ridge` gives for all samples added. Raises UserError before any were."""
        if not self.n:
            raise UserError("no samples were added")
        mean, y_mean = self.x / self.n, self.y / self.n
        values, vectors = _eigen(self.xx - torch.outer(mean, self.x))
        cross = vectors.T @ (self.xy - torch.outer(mean, self.y))
        return _ridge_maps(Basis(mean, vectors, values), cross, y_mean, penalties)


def _ridge_maps(b: Basis, cross: Tensor, y_mean: Tensor, penalties: Sequence[float]) -> list[LinearMap]:
    if any(p < 0 for p in penalties):
        raise UserError(f"penalties must not be negative, but the smallest is {min(penalties)}")
    return [b.map(cross / (b.values + p)[:, None], y_mean) for p in penalties]


def ridge(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[LinearMap]:
    """argmin ||X W + b - Y||^2 + p ||W||^2 for every penalty p, from one eigendecomposition.

    x: (n, F), y: (n, C). Costs n F min(n, F) and the cube of min(n, F). b is not penalised. A penalty of 0
    gives the least-squares solution of least norm. Raises UserError for negative penalties.
    """
    b, y_mean = basis(x), y.double().mean(0)
    return _ridge_maps(b, b.coordinates(x).T @ (y.double() - y_mean), y_mean, penalties)


def logistic(
    x: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    start: LinearMap | None = None,
    iterations: int = 500,
) -> LinearMap:
    """argmin mean cross-entropy(X W + b, labels) + penalty / 2 ||W||^2, by L-BFGS; b is not penalised.

    x: (n, F); labels: (n,) int64 in [0, classes), each class a column of W. start: where to begin, say at the
    solution for another penalty. Separable data without a penalty have no solution; `iterations` stops it.
    Raises UserError for labels outside the classes.
    """
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(f"labels must be at least one number in 0 .. {classes - 1}")
    features, gold = x.double().cpu().numpy(), labels.cpu().numpy()
    n, width = features.shape
    rows = np.arange(n)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        logits = features @ weight + bias
        logits -= logits.max(1, keepdims=True)
        normaliser = np.log(np.exp(logits).sum(1, keepdims=True))
        loss = float((normaliser[:, 0] - logits[rows, gold]).mean() + penalty / 2 * (weight**2).sum())
        error = np.exp(logits - normaliser)  # probabilities - one-hot labels
        error[rows, gold] -= 1
        error /= n
        return loss, np.concatenate([(features.T @ error + penalty * weight).ravel(), error.sum(0)])

    first = torch.cat([start.weight.flatten(), start.bias]) if start else torch.zeros((width + 1) * classes)
    options = dict(maxiter=iterations, maxfun=2 * iterations, ftol=1e-12, gtol=1e-8)
    found = optimize.minimize(objective, first.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    best = torch.from_numpy(found.x)
    return LinearMap(best[: width * classes].view(width, classes), best[width * classes :])


# --- held-out accuracy and its controls ---------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Row numbers of the three parts of n sequences; a sequence is in one part only."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(n: int, seed: int, validation: float = 0.2, test: float = 0.2) -> Parts:
    """Deals n sequences out at random, by shares. Raises UserError if a part would be empty."""
    held, tested = round(n * validation), round(n * test)
    if min(held, tested, n - held - tested) < 1:
        raise UserError(f"{n} sequences leave a part empty; give more of them")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Parts(order[held + tested :], order[:held], order[held : held + tested])


def project(features: int, width: int, seed: int) -> Tensor | None:
    """(features, width) float32, Gaussian with variance 1 / width; None where there are no more than width.

    x @ project(F, width, seed) keeps distances about (Johnson & Lindenstrauss 1984), so a probe of `width`
    features sees states of every size alike, with as many sequences for each feature.
    """
    if features <= width:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(features, width, generator=generator) / width**0.5


def probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    parts: Parts,
    method: str = "ridge",
    penalties: Sequence[float] = PENALTIES,
) -> pd.DataFrame:
    """How well J labelings of n sequences can be read off one state of each, a row per labeling.

    features: (n, F); labels: (n, J) int64 in [0, classes), or -1 for sequences that have none, which count in
    no accuracy (ridge is trained to give them no class; logistic leaves them out). penalties: in units of the
    mean eigenvalue of the Gram matrix, so that they mean the same at any scale of the features.
    Rows: accuracy (nan without a label in the test part), low, high, count (test sequences), majority,
    penalty (chosen; the largest of equally good ones). Raises UserError for unknown methods and labels.
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
            maps = _coordinate_ridge(b.values, train, gold, classes, ordered)
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


def _coordinate_ridge(
    values: Tensor, train: Tensor, gold: Tensor, classes: int, penalties: Sequence[float]
) -> list[LinearMap]:
    targets = F_.one_hot(gold.clamp(min=0), classes).double() * (gold >= 0)[:, None]
    mean = targets.mean(0)
    cross = train.T @ (targets - mean)
    return [LinearMap(cross / (values + p)[:, None], mean) for p in penalties]


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
    """`probe` with its control; arguments and options as there.

    A further column, shuffled: the accuracy on the labels dealt out anew among the sequences that have one.
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

    states: (n, T, F), of n sequences after the tokens at T `times`; tokens: (n, L) ids; lags: t - i >= 0,
    left out where they reach before the sequence. One probe for each (t, lag); the classes are the tokens
    that occur at those places of a time.
    Rows: time, lag, chance (1 / classes) and the columns of `controlled`, which takes the options.
    Raises UserError for times outside the sequences, or lags that all reach before them.
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
    """recoverable: largest n whose n tokens have mean accuracy >= threshold, 0 if none; expected: largest
    expected number of tokens recovered; table: tokens (n), accuracy, expected, per_number of the state."""

    recoverable: int
    expected: float
    table: pd.DataFrame


def capacity(
    accuracies: Mapping[int, Sequence[float]], chance: float, state_size: int, threshold: float = 0.5
) -> Capacity:
    """How many tokens can be read off a state of `state_size` = d_inner * d_state numbers.

    accuracies: n -> the test accuracies of its n tokens; `{n: curve[:n] for n in ...}` takes the n latest of
    a decode curve. The expected number of tokens recovered is sum (accuracy - chance) / (1 - chance), in
    which a guess counts nothing on average (terms may be negative). Raises UserError for other numbers.
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
