"""How many facts a state holds: the recall scaling law of Mamba (Koren et al. 2026, arXiv 2609.07681).

A state space model that recalls stores sum_i v_i k_i^T: the embedding of a value, v_i (D numbers), times a
hash of its key, k_i (N numbers). It reads with the hash of the query and decodes with the embeddings of all V
tokens. The other facts and tokens are noise of variance sigma^2 beside a signal of 1, and one of V must win:

    p       = Phi(1 / sigma - m_V)
    sigma^2 = a N_f / (layers N D) + 1 / D
    m_V     = sqrt(2 ln V) - (ln ln V + ln 4 pi) / (2 sqrt(2 ln V))

N_f is the number of facts, D the width of the embedding (`d_model`, not the 2 D channels of a Mamba block), N
is `d_state`, and m_V the typical largest of V standard normal numbers. The authors keep to layers N <= D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats
from scipy.special import log_ndtr, ndtr, ndtri, xlogy

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import require
from ssm_retrieval.statistics.inputs import check_confidence

# (model, task) -> a, as in `src/theory/approximate_scaling_laws.py` of the authors' code
# (github.com/yuvalko1/mamba-recall-scaling-laws). "ar" asks for one fact, "mqar" for all of them.
CONSTANTS: Mapping[tuple[str, str], float] = {
    ("linear", "ar"): 1.0,  # trained; derived
    ("linear", "mqar"): 5 / 4,  # trained; derived: more queries, more variance
    ("mamba", "ar"): 1 / 2,  # trained; an empirical half of the linear model's
    ("mamba", "mqar"): 5 / 8,  # the same
    ("designed", "ar"): 2.0,  # linear, with weights set by hand; derived
    ("designed", "mqar"): 3.0,  # the same
}
CELL = ["n_facts", "d_model", "d_state", "vocab_size", "n_layer"]
# where `fit_constant` looks before it refines
LOG_A = np.linspace(np.log(1e-4), np.log(1e4), 101)
LAPSES = np.append(0, np.geomspace(1e-3, 0.5, 10))


# --- the law ---------------------------------------------------------------------------------------------


def _positive(**values: Any) -> list[np.ndarray]:
    arrays = []
    for name, value in values.items():
        array = np.asarray(value, dtype=float)
        fine = np.isfinite(array) & (array > 0)
        if not fine.all():
            raise UserError(f"{name} must be positive and finite, but holds {array[~fine][0]:g}")
        arrays.append(array)
    return arrays


def _constant(a: Any) -> np.ndarray:
    array = np.asarray(a, dtype=float)
    if not (array >= 0).all():
        raise UserError(f"a {array.min():g} must be at least 0; CONSTANTS has the published ones")
    return array


def typical_maximum(vocab_size: Any) -> np.ndarray:
    """m_V: the typical largest of V standard normal numbers, such that V P(x > m_V) is about 1.

    Args:
        vocab_size: V, an array of any shape.

    Returns:
        m_V, in the shape of `vocab_size`.

    Raises:
        UserError: If V is below 2.
    """
    (V,) = _positive(vocab_size=vocab_size)
    if (V < 2).any():
        raise UserError(f"vocab_size {V.min():g} must be at least 2; one token is never mistaken")
    root = np.sqrt(2 * np.log(V))
    return root - (np.log(np.log(V)) + np.log(4 * np.pi)) / (2 * root)


def load(n_facts: Any, d_model: Any, d_state: Any, n_layer: Any = 1) -> np.ndarray:
    """Facts for each number that the law counts, N_f / (layers N D), on which the curves of models collapse.

    A Mamba block holds `expand` times as many: the law counts D, not the `d_inner` channels. Arguments
    broadcast.

    Args:
        n_facts: N_f, the facts in the context.
        d_model: D, the width of the embedding.
        d_state: N, the states per channel.
        n_layer: Number of layers.

    Returns:
        The load, in the common shape.

    Raises:
        UserError: If an argument is not positive and finite.
    """
    F, D, N, layers = _positive(n_facts=n_facts, d_model=d_model, d_state=d_state, n_layer=n_layer)
    return F / (layers * N * D)


def recall_at_load(load: Any, d_model: Any, vocab_size: Any, a: Any = 1.0) -> np.ndarray:
    """The law as a function of the load: p = Phi(1 / sqrt(a load + 1 / D) - m_V).

    Arguments broadcast.

    Args:
        load: N_f / (layers N D), see `load`.
        d_model: D, which bounds p however small the load is.
        vocab_size: V, the tokens among which the model answers.
        a: The constant, from 0 to inf; see `CONSTANTS`.

    Returns:
        Probability that the most likely token is the right one, in the common shape.

    Raises:
        UserError: If load or d_model is not positive and finite, V is below 2, or a is negative.
    """
    x, D = _positive(load=load, d_model=d_model)
    return ndtr(1 / np.sqrt(_constant(a) * x + 1 / D) - typical_maximum(vocab_size))


def recall_probability(
    n_facts: Any, d_model: Any, d_state: Any, vocab_size: Any, n_layer: Any = 1, a: Any = 1.0
) -> np.ndarray:
    """The law: how likely a fact is recalled (arXiv 2609.07681). Arguments broadcast.

    Args:
        n_facts: N_f, the facts in the context.
        d_model: D, the width of the embedding.
        d_state: N, the states per channel.
        vocab_size: V, the tokens among which the model answers.
        n_layer: Number of layers; the law takes their states for one large state.
        a: The constant; see `CONSTANTS`.

    Returns:
        Probability of a right answer, in the common shape.

    Raises:
        UserError: If a size is not positive and finite, V is below 2, or a is negative.
    """
    return recall_at_load(load(n_facts, d_model, d_state, n_layer), d_model, vocab_size, a)


def facts_at(
    d_model: Any, d_state: Any, vocab_size: Any, n_layer: Any = 1, a: Any = 1.0, p: Any = 0.95
) -> np.ndarray:
    """How many facts are recalled with probability p: the inverse of `recall_probability`, in closed form.

        N_f = ((Phi^-1(p) + m_V)^-2 - 1 / D) layers N D / a

    Arguments broadcast.

    Args:
        d_model: D, the width of the embedding.
        d_state: N, the states per channel.
        vocab_size: V, the tokens among which the model answers.
        n_layer: Number of layers.
        a: The constant; see `CONSTANTS`.
        p: Probability of a right answer, between 0 and 1.

    Returns:
        The number of facts, in the common shape: not rounded, 0 where a state of any size has D too small for
        p, inf where p is what a model without memory reaches.

    Raises:
        UserError: If a size is not positive and finite, V is below 2, a is negative, or p is not between 0
            and 1.
    """
    D, N, layers = _positive(d_model=d_model, d_state=d_state, n_layer=n_layer)
    share = np.asarray(p, dtype=float)
    if not ((share > 0) & (share < 1)).all():
        raise UserError(f"p {share.min():g} must lie between 0 and 1, say 0.95")
    need = ndtri(share) + typical_maximum(vocab_size)  # 1 / sigma
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.maximum(np.where(need > 0, need**-2.0, np.inf) - 1 / D, 0)
        return np.where(room > 0, room * layers * N * D / _constant(a), 0.0)


# --- its constant ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedConstant:
    """The constant a that fits a model's answers best, and how well the law fits them.

    Attributes:
        a: Maximum-likelihood estimate; 0 or inf where the answers only bound it.
        low: Lower end of its interval; nan for a single seed.
        high: Upper end.
        lapse: Share of answers that are wrong whatever the load.
        seeds: Number of seeds.
        observations: Number of rows.
        rmse: Root mean square over cells of accuracy - (1 - lapse) p, where a cell pools its seeds.
        worst: The largest such difference, with its sign.
        dispersion: Deviance / (rows - 1). It is about 1 if the law holds and seeds differ only by chance, and
            grows with the number of answers if not.
    """

    a: float
    low: float
    high: float
    lapse: float
    seeds: int
    observations: int
    rmse: float
    worst: float
    dispersion: float


@dataclass(frozen=True)
class _Answers:
    """Rows of observations as arrays (n,), and which seed each is of (n, seeds). A right answer has

    P(right) = (1 - lapse) Phi(z),    z = 1 / sqrt(a load + 1 / D) - m_V
    """

    load: np.ndarray
    d_model: np.ndarray
    m: np.ndarray
    correct: np.ndarray
    count: np.ndarray
    member: np.ndarray

    def signal(self, log_a: np.ndarray) -> np.ndarray:
        """1 / sigma; (values of log_a, n)."""
        return (np.exp(log_a)[:, None] * self.load + 1 / self.d_model) ** -0.5

    def logs(self, log_a: np.ndarray, lapse: float) -> tuple[np.ndarray, np.ndarray]:
        """log P(right) and log P(wrong), exact in both tails; (values of log_a, n)."""
        z = self.signal(log_a) - self.m
        with np.errstate(divide="ignore"):
            slip = np.log(lapse)
        return np.log1p(-lapse) + log_ndtr(z), np.logaddexp(log_ndtr(-z), slip + log_ndtr(z))

    def log_likelihood(self, log_a: np.ndarray, lapse: float) -> np.ndarray:
        """Binomial, without its constant; (values of log_a,)."""
        right, wrong = self.logs(log_a, lapse)
        return right @ self.correct + wrong @ (self.count - self.correct)

    def surprise(self, log_a: np.ndarray, lapse: float, confidence: float) -> np.ndarray:
        """|sum of the seeds' scores| / what it reaches by chance; (values of log_a,). Above 1: a is rejected.

        A score is d log-likelihood / d log a, up to a factor, less its regression on the score of the lapses.
        Its spread is Student's of the seeds, or the normal one of independent answers if that is larger.
        """
        signal, (log_right, log_wrong) = self.signal(log_a), self.logs(log_a, lapse)
        slope = self.load * signal**3  # -dz / d log a, without a factor that all rows share
        log_density = stats.norm.logpdf(signal - self.m) + np.log1p(-lapse)
        right, wrong = np.exp(log_density - log_right) * slope, np.exp(log_density - log_wrong) * slope
        score = self.correct * right - (self.count - self.correct) * wrong
        information = (right * wrong) @ self.count
        if lapse > 0:
            odds = np.exp(log_right - log_wrong)
            of_lapse = ((self.count - self.correct) * odds - self.correct) / (1 - lapse)
            common = -(wrong @ self.count) / (1 - lapse)
            part = common / (odds @ self.count) * (1 - lapse) ** 2
            score, information = score - part[:, None] * of_lapse, information - part * common
        scores, tail = score @ self.member, (1 + confidence) / 2
        seeds = scores.shape[1]
        spread = stats.t.ppf(tail, seeds - 1) * np.sqrt(seeds * scores.var(axis=1, ddof=1))
        return np.abs(scores.sum(axis=1)) / np.maximum(spread, ndtri(tail) * np.sqrt(information))


def _answers(observations: pd.DataFrame) -> _Answers:
    require(observations, [*CELL, "seed", "correct", "count"], "observations")
    correct, count = (observations[name].to_numpy(float) for name in ("correct", "count"))
    if not ((correct >= 0) & (correct <= count) & (count >= 1)).all():
        raise UserError("observations must have 0 <= correct <= count and count >= 1 in every row")
    F, D, N, V, layers = (observations[name].to_numpy(float) for name in CELL)
    member = pd.get_dummies(observations["seed"]).to_numpy(float)
    if not (member.sum(axis=1) == 1).all():
        raise UserError("observations lack entries in column seed; name the seed of every row")
    return _Answers(load(F, D, N, layers), D, typical_maximum(V), correct, count, member)


def fit_constant(observations: pd.DataFrame, confidence: float = 0.95) -> FittedConstant:
    """Fit the law's constant a to right answers, by binomial maximum likelihood.

    Trained models err now and then where the law says that they never do. A share of lapses, fitted with a,
    keeps those few answers from outweighing all others, as in psychophysics (Wichmann and Hill 2001).

    The unit of the interval is the seed, whose answers rise and fall together. The interval holds every a at
    which a t-test over seeds cannot tell their mean score (d log-likelihood / d log a) from 0, nor the score
    test of independent answers their sum. So it widens as seeds differ, and is one-sided where all answers
    are right. How well the law fits is another question, which `rmse` answers. A run that did not learn says
    nothing about the room of a state: leave it out, and report how many of the seeds learned.

    Args:
        observations: A row for each seed and cell, with the columns n_facts, d_model, d_state, vocab_size,
            n_layer, seed, correct and count. Every seed should have the same cells.
        confidence: Level of the interval, between 0 and 1.

    Returns:
        The constant, its interval and the quality of the fit.

    Raises:
        UserError: If there are no rows, a column is missing, or numbers are impossible.
    """
    check_confidence(confidence)
    answers = _answers(observations)
    log_a, lapse = _most_likely(answers)
    low = high = np.nan
    if (seeds := answers.member.shape[1]) > 1:
        low, high = (float(np.exp(_end(answers, log_a, lapse, confidence, step))) for step in (-1, 1))
    right, wrong = answers.correct, answers.count - answers.correct
    best_possible = (xlogy(right, right / answers.count) + xlogy(wrong, wrong / answers.count)).sum()
    deviance = 2 * (best_possible - answers.log_likelihood(np.array([log_a]), lapse)[0])
    expected = answers.count * np.exp(answers.logs(np.array([log_a]), lapse)[0][0])
    sums = observations[CELL].assign(right=right, expected=expected, count=answers.count)
    pooled = sums.groupby(CELL).sum()
    off = ((pooled["right"] - pooled["expected"]) / pooled["count"]).to_numpy()
    return FittedConstant(
        float(np.exp(log_a)), low, high, lapse, seeds, len(observations),
        rmse=float(np.sqrt(np.mean(off**2))),
        worst=float(off[np.abs(off).argmax()]),
        dispersion=float(deviance / max(1, len(observations) - 1)),
    )  # fmt: skip


def _most_likely(answers: _Answers) -> tuple[float, float]:
    """log a and the share of lapses: the best of a grid, refined; log a is ±inf at the grid's ends."""
    grid = np.array([answers.log_likelihood(LOG_A, lapse) for lapse in LAPSES])
    j, i = divmod(int(grid.argmax()), len(LOG_A))
    if i in (0, len(LOG_A) - 1):
        return (-np.inf if i == 0 else np.inf), float(LAPSES[j])
    near = (LAPSES[max(0, j - 1)] + LAPSES[min(len(LAPSES) - 1, j + 1)]) / 2
    found = optimize.minimize(
        lambda x: -answers.log_likelihood(x[:1], x[1])[0], (LOG_A[i], LAPSES[j]),
        method="Nelder-Mead", bounds=[(LOG_A[0], LOG_A[-1]), (0, LAPSES[-1])],
        options={"xatol": 1e-7, "fatol": 1e-7, "initial_simplex": [
            (LOG_A[i], LAPSES[j]), (LOG_A[i + 1], LAPSES[j]), (LOG_A[i], near)
        ]},
    ).x  # fmt: skip
    return float(found[0]), float(found[1])


def _end(answers: _Answers, log_a: float, lapse: float, confidence: float, step: int) -> float:
    """Where log a begins to be rejected, down (step -1) or up (1) from the estimate; ±inf if nowhere."""

    def excess(x: Any) -> Any:
        return answers.surprise(np.atleast_1d(x), lapse, confidence) - 1

    way = LOG_A[step * (LOG_A - log_a) > 0][::step]
    rejected = excess(way) > 0
    if not rejected.any():
        return step * np.inf
    first = int(rejected.argmax())
    inside = way[first - 1] if first else log_a
    if not np.isfinite(inside):  # not even a = 0, or inf, explains the answers
        return log_a
    return float(optimize.brentq(lambda x: excess(x)[0], inside, way[first], xtol=1e-9))


def fit_constants(
    observations: pd.DataFrame, by: Sequence[str] = ("model",), confidence: float = 0.95
) -> pd.DataFrame:
    """Fit a constant in each group of observations, by `fit_constant` with its errors.

    Args:
        observations: As for `fit_constant`, with the columns `by`.
        by: Columns that make the groups.
        confidence: Of the intervals.

    Returns:
        One row per group with the fields of `FittedConstant`.
    """
    require(observations, by, "observations")
    rows = []
    for cell, group in observations.groupby(list(by), dropna=False, sort=True):
        found = dataclasses.asdict(fit_constant(group, confidence))
        rows.append(dict(zip(by, cell, strict=True)) | found)
    return pd.DataFrame(rows)
