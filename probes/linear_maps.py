"""Ridge regression in closed form (Hoerl & Kennard 1970) and multinomial logistic regression, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from ssm_retrieval.errors import UserError


@dataclass(frozen=True)
class LinearMap:
    """x (..., F) -> x weight + bias (..., C).

    Attributes:
        weight: (F, C) float64.
        bias: (C,) float64.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The map of x, (..., F) of any float dtype, in float64."""
        return x.double() @ self.weight + self.bias


@dataclass(frozen=True)
class Basis:
    """Centred features in their principal directions.

    All ridge solutions lie in the span of these directions and are diagonal in them, so one decomposition
    serves every penalty and every target. Directions without variance are left out: r is at most min(n, F).

    Attributes:
        mean: (F,) float64.
        directions: (F, r) float64, orthonormal columns.
        values: (r,) float64, eigenvalues of the Gram matrix, largest first.
    """

    mean: Tensor
    directions: Tensor
    values: Tensor

    def coordinates(self, x: Tensor) -> Tensor:
        """Features (n, F) as coordinates (n, r)."""
        return (x.double() - self.mean) @ self.directions

    def map(self, weight: Tensor, bias: Tensor) -> LinearMap:
        """The map of features that equals a map of coordinates.

        Args:
            weight: (r, C).
            bias: (C,).

        Returns:
            A map from features (..., F) to (..., C).
        """
        full = self.directions @ weight
        return LinearMap(full, bias - self.mean @ full)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding, largest first, and their eigenvectors in columns."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values[-1:].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    keep = (values > floor).nonzero().squeeze(1).flip(0)
    return values[keep], vectors[:, keep]


def basis(x: Tensor) -> Basis:
    """The principal directions of features x (n, F).

    With X the centred features: from X X^T (dual) if n < F, else from X^T X (primal).
    """
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    if len(x) < x.shape[1]:
        values, vectors = _eigen(centred @ centred.T)
        return Basis(mean, centred.T @ (vectors / values.sqrt()), values)
    values, vectors = _eigen(centred.T @ centred)
    return Basis(mean, vectors, values)


def ridge_in_basis(b: Basis, coordinates: Tensor, y: Tensor, penalties: Sequence[float]) -> list[LinearMap]:
    """`ridge`, with maps of coordinates instead of features.

    Args:
        b: The basis of the features.
        coordinates: (n, r), the features in it.
        y: (n, C).
        penalties: Of the squared weights, not negative.

    Returns:
        A map from coordinates (..., r) for each penalty.

    Raises:
        UserError: A penalty is negative.
    """
    if any(p < 0 for p in penalties):
        raise UserError(f"penalties must not be negative, but the smallest is {min(penalties)}")
    y_mean = y.double().mean(0)
    cross = coordinates.T @ (y.double() - y_mean)
    return [LinearMap(cross / (b.values + p)[:, None], y_mean) for p in penalties]


def ridge(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[LinearMap]:
    """argmin ||X W + b - Y||^2 + p ||W||^2 for every penalty p, from one eigendecomposition.

    The bias b is not penalised. A penalty of 0 gives the least-squares solution of least norm. Costs n F
    min(n, F) and the cube of min(n, F).

    Args:
        x: (n, F).
        y: (n, C).
        penalties: The p, not negative.

    Returns:
        A map for each penalty.

    Raises:
        UserError: A penalty is negative.
    """
    b = basis(x)
    return [b.map(m.weight, m.bias) for m in ridge_in_basis(b, b.coordinates(x), y, penalties)]


def logistic(
    x: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    start: LinearMap | None = None,
    iterations: int = 500,
) -> LinearMap:
    """argmin mean cross-entropy(X W + b, labels) + p / 2 ||W||^2, by L-BFGS; b is not penalised.

    Args:
        x: (n, F).
        labels: (n,) int64 in 0 .. classes - 1.
        classes: C; each class is a column of W.
        penalty: p. Without one, separable data have no solution, and `iterations` stops the search.
        start: Where to begin, such as the solution for another penalty. None: at zero.
        iterations: Most steps of L-BFGS.

    Returns:
        The map from features to logits.

    Raises:
        UserError: There are no labels, or some lie outside the classes.
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
