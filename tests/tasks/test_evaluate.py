"""The interval that every accuracy is reported with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from ssm_retrieval.statistics import wilson
from synthetic import evaluate, tasks
from synthetic.evaluate import Evaluation, heldout

counts = st.one_of(st.integers(1, 300), st.integers(1, 10**12)).flatmap(
    lambda n: st.tuples(st.one_of(st.sampled_from([0, 1, n - 1, n]), st.integers(0, n)), st.just(n))
)


@settings(deadline=None, max_examples=500)
@given(counts)
@example((0, 3))
@example((1024, 1024))
def test_wilson_interval_contains_the_rate_and_mirrors(observed):
    """Whatever the rounding; and a bound is 0 or 1 exactly where the rate is."""
    correct, count = observed
    low, high = wilson(correct, count)
    assert 0.0 <= low <= correct / count <= high <= 1.0
    assert (low == 0.0) == (correct == 0) and (high == 1.0) == (correct == count)
    mirrored = wilson(count - correct, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_that_of_scipy(observed):
    want = stats.binomtest(*observed).proportion_ci(0.95, method="wilson")
    assert wilson(*observed) == pytest.approx((want.low, want.high), rel=1e-9, abs=1e-12)


def test_nothing_is_known_without_observations():
    assert wilson(0, 0) == (0.0, 1.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 18), st.booleans()), min_size=1, max_size=40), st.integers(1, 30))
def test_answers_by_equal_parts_of_the_context(answers, bins):
    """Every answer in the one part that holds its target; parts that differ by one symbol at most."""
    target, right = (np.array(x) for x in zip(*answers, strict=True))
    parts = Evaluation(19, right, target, 0.0, 1 / 19).by_target(bins)
    assert len(parts) == min(bins, 19) and [p[0] for p in parts[1:]] == [p[1] for p in parts[:-1]]
    assert parts[0][0] == 0 and parts[-1][1] == 19
    sizes = {high - low for low, high, _, _ in parts}
    assert max(sizes) - min(sizes) <= 1
    for low, high, correct, count in parts:
        inside = [ok for at, ok in answers if low <= at < high]
        assert (correct, count) == (sum(inside), len(inside))


def test_answers_by_position_have_counts_rates_and_intervals():
    right = np.array([True, False, True, True, False])
    rows = Evaluation(6, right, np.array([4, 1, 4, 1, 4]), 0.0, 1 / 6).by_position()
    (a, b), (c, d) = wilson(1, 2), wilson(2, 3)
    assert rows == [
        dict(position=1, correct=1, count=2, rate=1 / 2, ci_low=a, ci_high=b),
        dict(position=4, correct=2, count=3, rate=2 / 3, ci_low=c, ci_high=d),
    ]


def test_held_out_sequences_begin_with_the_first_and_come_in_batches_of_limited_size(monkeypatch):
    monkeypatch.setattr(evaluate, "EVAL_TOKENS", 100)
    task = tasks.build("selective-copy", seq_len=12, num_tokens=3)  # 15 tokens a sequence
    batches = list(heldout(task, 20, 12))
    assert [len(batch.labels) for batch in batches] == [6, 6, 6, 2]
    same = dict(seed=evaluate.EVAL_SEED, split="heldout", length=12, start=0)
    (want,) = task.examples(20, **same)
    assert torch.equal(torch.cat([batch.input_ids for batch in batches]), want.input_ids)
    assert len(next(heldout(task, 4, 12)).labels) == 4
    monkeypatch.setattr(evaluate, "EVAL_TOKENS", 3)  # less than one sequence
    assert [len(batch.labels) for batch in heldout(task, 2, 12)] == [1, 1]
