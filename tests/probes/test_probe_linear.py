"""Ridge against lstsq with augmented rows, logistic against closed forms and Newton, controls, curves."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from circuits import constant_decay
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.linear import (
    capacity,
    controlled,
    decode_curve,
    probe,
    project,
    split,
)
from probes.linear_maps import LinearMap, logistic, ridge
from probes.scan import iterate_states
from ssm_retrieval.statistics import wilson


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def augmented(x, y, penalty):
    """Ridge as least squares with rows sqrt(penalty) I added: (weight, bias)."""
    x, y = x.numpy(), y.numpy()
    rows = np.vstack([x - x.mean(0), penalty**0.5 * np.eye(x.shape[1])])
    goal = np.vstack([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(rows, goal, rcond=None)[0]
    return weight, y.mean(0) - x.mean(0) @ weight


# --- ridge ---


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 30), F=st.integers(1, 30), seed=st.integers(0, 1000))
def test_ridge_is_least_squares_with_more_rows(n, F, seed):
    """Primal (n >= F) and dual (n < F)."""
    x, y = normal(n, F, seed=seed) + 3, normal(n, 4, seed=seed + 1)
    penalties = (1e-3, 1.0, 100.0)
    for ours, penalty in zip(ridge(x, y, penalties), penalties, strict=True):
        weight, bias = augmented(x, y, penalty)
        np.testing.assert_allclose(ours.weight, weight, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(ours.bias, bias, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(ours(x), x.numpy() @ weight + bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n, F", [(40, 7), (7, 40)])
def test_without_penalty_it_is_the_least_squares_solution_of_least_norm(n, F):
    x, y = normal(n, F), normal(n, 2, seed=1)
    (found,) = ridge(x, y, [0.0])
    expected = np.linalg.lstsq((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weight, expected, atol=1e-9)


def test_features_without_variance_carry_nothing():
    x = torch.cat([torch.ones(20, 3), normal(20, 1).float()], dim=1)
    y = 2 * x[:, 3:].double() + 1
    (found,) = ridge(x, y, [0.0])
    np.testing.assert_allclose(found.weight.flatten(), [0, 0, 0, 2], atol=1e-6)
    (flat,) = ridge(torch.ones(5, 2), normal(5, 1), [1.0])
    assert (flat.weight == 0).all() and flat.bias.item() == pytest.approx(normal(5, 1).mean().item())


@pytest.mark.parametrize("n", [4, 40])
def test_the_unit_of_the_features_does_not_matter(n):
    x, y = normal(n, 6), normal(n, 2, seed=1)
    (one,), (other,) = ridge(x, y, [0.5]), ridge(1e-9 * x, y, [0.5e-18])
    torch.testing.assert_close(other(1e-9 * x), one(x))


def test_ridge_refusals():
    with pytest.raises(ValueError, match="negative"):
        ridge(normal(3, 2), normal(3, 1), [-1.0])


# --- logistic ---


def test_logistic_of_one_binary_feature_is_the_log_odds():
    """Counts n_xk: the logits are log n_xk up to a constant of each x, where no penalty pulls at them."""
    counts = np.array([[30, 10, 5], [4, 20, 11]])  # feature x class
    x = torch.tensor([[float(i)] for i in range(2) for k in range(3) for _ in range(counts[i, k])])
    labels = torch.tensor([k for i in range(2) for k in range(3) for _ in range(counts[i, k])])
    found = logistic(x, labels, 3, 0.0)
    for i in range(2):
        p = found(torch.tensor([[float(i)]])).softmax(-1)[0]
        np.testing.assert_allclose(p, counts[i] / counts[i].sum(), atol=1e-5)
    strong = logistic(x, labels, 3, 1e6)  # only the bias is left: the classes' shares
    np.testing.assert_allclose(strong(x[:1]).softmax(-1)[0], counts.sum(0) / counts.sum(), atol=1e-4)


def test_logistic_finds_its_way_from_logits_of_any_size():
    """Rows whose largest logits lie 1,000 apart; scipy must know every option, or it warns."""
    x, labels = normal(60, 3), integers(3, 60)
    far = LinearMap(1000 * normal(3, 3, seed=1), torch.zeros(3, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logistic(x, labels, 3, 0.1, start=far)
    torch.testing.assert_close(found.weight, logistic(x, labels, 3, 0.1).weight, rtol=1e-4, atol=1e-5)


def test_logistic_is_newtons_binary_solution():
    """Two classes with penalty p on both columns are one logit w = w_1 - w_0 with penalty p / 2."""
    x, penalty = normal(80, 3), 0.05
    labels = (x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + normal(80, seed=5) > 0.3).long()
    X, y = np.hstack([x.numpy(), np.ones((80, 1))]), labels.numpy()
    lam = np.diag([penalty / 2] * 3 + [0.0])
    w = np.zeros(4)
    for _ in range(50):
        p = 1 / (1 + np.exp(-X @ w))
        w -= np.linalg.solve(X.T @ (X * (p * (1 - p))[:, None]) / 80 + lam, X.T @ (p - y) / 80 + lam @ w)
    found = logistic(x, labels, 2, penalty)
    np.testing.assert_allclose(found.weight[:, 1] - found.weight[:, 0], w[:3], atol=1e-5)
    assert (found.bias[1] - found.bias[0]).item() == pytest.approx(w[3], abs=1e-5)
    again = logistic(x, labels, 2, penalty, start=found)
    torch.testing.assert_close(again.weight, found.weight, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        logistic(x, labels + 1, 2, penalty)


# --- probes and controls ---


@pytest.mark.parametrize("method", ["ridge", "logistic"])
@pytest.mark.parametrize("F", [12, 300])
def test_what_is_separable_is_read(method, F):
    """Noisy one-hot features in a random rotation, more features than samples or fewer."""
    n, classes = 200, 5
    labels = integers(classes, n, 2)
    clean = torch.cat([torch.nn.functional.one_hot(c, classes) for c in labels.T], 1).double()
    features = clean @ normal(10, F, seed=2) + 0.05 * normal(n, F, seed=3)
    table = controlled(features, labels, classes, method=method)
    assert (table["accuracy"] == 1).all() and (table["count"] == 40).all()
    assert (table["low"] == wilson(40, 40)[0]).all() and (table["high"] == 1).all()
    assert (table["shuffled"] < 0.5).all()


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_random_features_have_no_accuracy(method):
    n, classes = 1000, 4
    table = controlled(
        normal(n, 20), integers(classes, n, 3, seed=1), classes, method=method, penalties=(1e-2, 1.0)
    )
    for column in ("accuracy", "shuffled"):  # 200 test sequences: a standard error of 0.03
        assert (abs(table[column] - 1 / classes) < 0.12).all()


def test_a_projection_keeps_distances():
    """Squared distances of 100 points have ratios of mean 1 and variance 2 / width (chi-square)."""
    points = normal(100, 4000).float()
    small = points @ project(4000, 512, seed=3)
    ratios = (torch.pdist(small) / torch.pdist(points)).square()
    assert ratios.mean().item() == pytest.approx(1, abs=0.02)
    assert ratios.var().item() == pytest.approx(2 / 512, rel=0.2)
    assert project(512, 512, seed=0) is None
    assert (project(600, 512, seed=0) != project(600, 512, seed=1)).any()


def test_the_penalty_is_chosen_on_the_validation_part_only():
    """Test labels are what a strong penalty gets wrong; choosing must not see them."""
    parts = split(100, seed=0)
    features, labels = normal(100, 30), integers(3, 100, 1, seed=1)
    base = probe(features, labels, 3, parts)
    changed = labels.clone()
    changed[parts.test] = (labels[parts.test] + 1) % 3
    assert probe(features, changed, 3, parts)["penalty"].item() == base["penalty"].item()
    assert sorted(torch.cat([parts.train, parts.validation, parts.test]).tolist()) == list(range(100))
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (60, 20, 20)


@pytest.mark.parametrize("method", ["ridge", "logistic"])
def test_sequences_without_a_label_do_not_count(method):
    labels = integers(3, 120)
    features = torch.nn.functional.one_hot(labels, 3).double() + 0.01 * normal(120, 3)
    some = torch.where(torch.arange(120) % 4 == 0, -1, labels)
    none = torch.full_like(labels, -1)
    parts = split(120, seed=0)
    table = probe(features, torch.stack([some, none], 1), 3, parts, method)
    assert table["accuracy"][0] == 1 and table["count"][0] == (some[parts.test] >= 0).sum()
    assert np.isnan(table["accuracy"][1]) and table["count"][1] == 0 and table["low"][1] == 0


def test_probe_refusals():
    parts = split(10, 0)
    with pytest.raises(ValueError, match="ridge, logistic"):
        probe(normal(10, 2), integers(2, 10, 1), 2, parts, method="svm")
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        probe(normal(10, 2), integers(2, 10, 1) + 5, 2, parts)
    with pytest.raises(ValueError, match=r"\(n, J\)"):
        probe(normal(10, 2), integers(2, 10), 2, parts)
    with pytest.raises(ValueError, match="a part empty"):
        split(2, 0)


# --- curves ---


def shift_register(tokens, vocab, memory):
    """States (n, L, memory * vocab) that hold exactly the last `memory` tokens, one-hot."""
    hot = torch.nn.functional.one_hot(tokens, vocab).double()
    return torch.cat([torch.roll(hot, k, dims=1) * (torch.arange(tokens.shape[1]) >= k)[:, None]
                      for k in range(memory)], dim=-1)  # fmt: skip


def test_decode_curve_of_a_shift_register():
    """Accuracy 1 for tokens it holds, chance for older ones; so many tokens are recoverable."""
    tokens = integers(4, 500, 10)
    states = shift_register(tokens, 4, memory=3)[:, [1, 9]]
    table = decode_curve(states, [1, 9], tokens, range(8), penalties=(1e-3, 1.0))
    assert table.loc[table["time"] == 1, "lag"].tolist() == [0, 1]
    late = table[table["time"] == 9]
    assert late["accuracy"].tolist()[:3] == [1, 1, 1]
    assert (abs(late["accuracy"][late["lag"] >= 3] - 0.25) < 0.15).all()
    assert (late["chance"] == 0.25).all()
    curve = late["accuracy"].tolist()
    found = capacity({n: curve[:n] for n in (1, 2, 3, 4, 8)}, chance=0.25, state_size=12, threshold=0.9)
    assert found.recoverable == 3
    assert found.table["expected"][2] == 3 and found.table["per_number"][2] == 0.25


def test_decode_curve_of_a_fading_state():
    """h_t = sum a^(t-i) e_{token i} of distinct tokens: decodable as long as a^lag is above the noise."""
    order = torch.stack([torch.randperm(8, generator=g) for g in [torch.Generator().manual_seed(0)]
                         for _ in range(800)])  # fmt: skip
    scan = constant_decay(0.5, torch.nn.functional.one_hot(order, 8).double())
    states = torch.cat([h for _, h in iterate_states(scan)], dim=1)[:, 7].flatten(1)
    noisy = (states + 0.02 * normal(800, 8))[:, None]
    curve = decode_curve(noisy, [7], order, [0, 7], penalties=(1e-4, 1e-2))["accuracy"].tolist()
    assert curve[0] > 0.99 and curve[1] < 0.8


def test_capacity_in_closed_form():
    found = capacity({2: [1.0, 0.5], 1: [1.0], 4: [0.5, 0.5, 0.25, 0.25]}, chance=0.25, state_size=32)
    expected = pd.DataFrame(
        dict(
            tokens=[1, 2, 4],
            accuracy=[1.0, 0.75, 0.375],
            expected=[1.0, 4 / 3, 2 / 3],
            per_number=[1 / 32, 1 / 24, 1 / 48],
        )
    )
    pd.testing.assert_frame_equal(found.table, expected)
    assert found.recoverable == 2 and found.expected == pytest.approx(4 / 3)
    assert capacity({1: [0.3]}, 0.25, 32).recoverable == 0
    for wrong in (dict(accuracies={}), dict(chance=1.0), dict(state_size=0), dict(accuracies={2: [0.5]})):
        with pytest.raises(ValueError, match="accuracies"):
            capacity(**(dict(accuracies={1: [0.5]}, chance=0.5, state_size=4) | wrong))


def test_curve_refusals():
    with pytest.raises(ValueError, match="T times"):
        decode_curve(normal(10, 3), [1], integers(3, 10, 3), [0])
    with pytest.raises(ValueError, match=r"0 \.\. 2"):
        decode_curve(normal(10, 1, 3), [3], integers(3, 10, 3), [0])
    with pytest.raises(ValueError, match="no lag"):
        decode_curve(normal(10, 1, 3), [1], integers(3, 10, 3), [2])
