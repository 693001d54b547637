"""Scores of hand-built heads, whose patterns are known; logit lens and effects against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from circuits import copying_head, induction_head, previous_token_head
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from probes.heads import (
    HeadScores,
    induction_score,
    previous_occurrence,
    previous_token_score,
    retrieval_score,
)
from probes.lens import (
    lens_table,
    logit_lens,
)
from probes.patch_effects import logit_difference, normalised_difference
from ssm_retrieval.statistics import wilson

V, B, N = 9, 6, 7  # vocabulary, sequences, tokens before the query


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def permutations(n, rows=B, seed=0):
    return torch.stack([torch.randperm(n, generator=g) for g in [generator(seed)] for _ in range(rows)])


def queries():
    """(tokens (B, N + 1) with the query last, target position (B,), symbol (B,))."""
    context = permutations(V)[:, :N]
    target = torch.arange(B) % N
    symbol = context.gather(1, target[:, None])[:, 0]
    return torch.cat([context, V + symbol[:, None]], dim=1), target, symbol


def uniform(rows, L, heads=2):
    """Causal attention that does not look."""
    weights = torch.ones(L, L, dtype=torch.float64).tril()
    return (weights / weights.sum(1, keepdim=True)).expand(rows, heads, L, L)


# --- heads ---


def test_the_copying_head_is_a_retrieval_head():
    tokens, target, symbol = queries()
    pattern, output = copying_head(tokens, V)
    score = retrieval_score(pattern, N, target)
    assert (score.value == 1).all() and score.baseline.tolist() == pytest.approx([1 / (N + 1)] * B)
    lens = logit_lens(output[:, N:], nn.Identity(), nn.Identity(), symbol[:, None])
    assert lens.correct.all() and (lens.rank == 0).all()
    row = score.table().iloc[0]
    assert (row["score"], row["low"], row["high"], row["sequences"]) == (1, 1, 1, B)


def test_the_previous_token_head():
    tokens, target, _ = queries()
    pattern = previous_token_head(tokens)
    score = previous_token_score(pattern)
    assert (score.value == 1).all()
    assert score.baseline.tolist() == pytest.approx([np.mean([1 / (t + 1) for t in range(1, N + 1)])] * B)
    found = retrieval_score(pattern, N, target).value[:, 0]
    assert found.tolist() == (target == N - 1).double().tolist()


def test_the_induction_head():
    once = permutations(V)
    tokens = torch.cat([once, once], dim=1)
    pattern = induction_head(tokens, V)
    score = induction_score(pattern, tokens)
    assert (score.value == 1).all()
    assert (previous_token_score(pattern).value < 0.5).all()
    expected = np.mean([1 / (t + 1) for t in range(V, 2 * V)])
    assert score.baseline.tolist() == pytest.approx([expected] * B)


@settings(deadline=None, max_examples=40)
@given(L=st.integers(2, 12), vocab=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_uniform_attention_scores_its_baseline(L, vocab, seed):
    tokens = torch.randint(vocab, (3, L), generator=generator(seed))
    pattern = uniform(3, L)
    target = torch.randint(L, (3,), generator=generator(seed))
    for score in (
        previous_token_score(pattern),
        induction_score(pattern, tokens),
        retrieval_score(pattern, L - 1, target),
    ):
        torch.testing.assert_close(
            score.value, score.baseline[:, None].expand(-1, 2), equal_nan=True, atol=1e-12, rtol=0
        )


@settings(deadline=None, max_examples=40)
@given(L=st.integers(1, 12), vocab=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_scores_are_those_of_loops(L, vocab, seed):
    tokens = torch.randint(vocab, (2, L), generator=generator(seed))
    pattern = torch.rand(2, 3, L, L, generator=generator(seed), dtype=torch.float64).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    before = previous_occurrence(tokens)
    induction = torch.full((2, 3), torch.nan, dtype=torch.float64)
    for b in range(2):
        ids = tokens[b].tolist()
        last = [max((s for s in range(t) if ids[s] == ids[t]), default=-1) for t in range(L)]
        assert before[b].tolist() == last
        for h in range(3):
            after = [pattern[b, h, t, s + 1] for t, s in enumerate(last) if 0 <= s < t - 1]
            if after:
                induction[b, h] = torch.stack(after).mean()
    torch.testing.assert_close(induction_score(pattern, tokens).value, induction, equal_nan=True)


def test_rows_of_a_part_of_the_pattern():
    tokens = torch.randint(4, (2, 10), generator=generator())
    pattern = uniform(2, 10)
    last = pattern[:, :, -3:]
    some = [9, 2, 7]
    picked = pattern[:, :, some]
    assert (retrieval_score(last, 8, [3, 4]).value == pattern[:, :, 8, 3]).all()
    assert (retrieval_score(picked, torch.tensor([2, 9]), [0, 1], rows=some).value[0] == 1 / 3).all()
    torch.testing.assert_close(
        previous_token_score(picked, some).value[0, 0].item(), (1 / 10 + 1 / 3 + 1 / 8) / 3
    )
    torch.testing.assert_close(
        induction_score(last, tokens).value, induction_score(last, tokens, [7, 8, 9]).value
    )


def test_one_row_of_a_pattern():
    pattern, tokens = uniform(2, 10), torch.tensor([[0, 1, 2, 0, 3, 4, 5, 6, 7, 8]] * 2)
    one = pattern[:, :, [3]]
    assert (retrieval_score(one, 3, [0, 1], rows=[3]).value == 1 / 4).all()
    for score in (previous_token_score(one, [3]), induction_score(one, tokens, [3])):
        assert (score.value == 1 / 4).all() and (score.baseline == 1 / 4).all()
    for wrong in ([-1], [10]):
        with pytest.raises(ValueError, match=r"in 0 \.\. 9"):
            previous_token_score(one, wrong)


def test_scores_are_made_where_the_pattern_is():
    """What a function makes without naming a device would be on another one here, and not fit."""
    tokens, pattern = torch.randint(4, (2, 10), generator=generator()), uniform(2, 10)
    query = torch.tensor([2, 9])

    def results():
        return (
            retrieval_score(pattern, 8, [3, 4]),
            retrieval_score(pattern[:, :, [2, 9]], query, [0, 1], rows=[2, 9]),
            previous_token_score(pattern),
            induction_score(pattern, tokens),
        )

    wanted = results()
    with torch.device("meta"):
        found = results()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close((ours.value, ours.baseline), (theirs.value, theirs.baseline))


def test_the_interval_of_a_score_is_students_and_stays_in_0_1():
    value = torch.tensor([[0.5, 0.1], [0.7, 0.9], [0.6, 1.0]])
    scores = HeadScores(value, torch.tensor([0.1, 0.2, 0.3])).table(confidence=0.8)
    each = value[:, 0].double().numpy()
    low, high = stats.t.interval(0.8, 2, each.mean(), stats.sem(each))
    assert scores.loc[0, ["score", "low", "high"]].tolist() == pytest.approx([0.6, low, high])
    assert scores.loc[1, "high"] == 1 and 0 < scores.loc[1, "low"] < 2 / 3
    assert scores["baseline"].tolist() == pytest.approx([0.2, 0.2]) and scores["head"].tolist() == [0, 1]


def test_several_matches_and_none():
    pattern = uniform(2, 5)
    score = retrieval_score(pattern, 4, torch.tensor([[0, 2], [1, -1]]))
    assert score.value[:, 0].tolist() == pytest.approx([0.4, 0.2])
    assert score.baseline.tolist() == pytest.approx([0.4, 0.2])
    none = retrieval_score(pattern, 4, torch.tensor([-1, 3]))
    assert none.value[0].isnan().all() and none.table()["sequences"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no sequence"):
        induction_score(pattern, torch.arange(5).expand(2, 5)).table()


def test_a_token_that_follows_itself_is_no_induction():
    tokens = torch.tensor([[1, 1, 1]])
    assert induction_score(uniform(1, 3), tokens).value.isnan().all()


def test_patterns_that_do_not_fit_are_refused():
    pattern = uniform(2, 5)
    with pytest.raises(ValueError, match="no row"):
        retrieval_score(pattern[:, :, :2], 1, [0, 0])
    with pytest.raises(ValueError, match="after its query"):
        retrieval_score(pattern, 1, [0, 2])
    with pytest.raises(ValueError, match="give rows"):
        previous_token_score(pattern[..., :3])
    with pytest.raises(ValueError, match="5 positions"):
        previous_token_score(pattern, [1, 2])
    with pytest.raises(ValueError, match=r"\(B, S\)"):
        induction_score(pattern, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, H, L, S\)"):
        previous_token_score(pattern[0])


# --- logit lens ---


def test_lens_is_the_softmax_of_the_head():
    norm, head = nn.LayerNorm(8).double(), nn.Linear(8, 20, bias=False).double()
    residual = torch.randn(5, 3, 8, generator=generator(), dtype=torch.float64)
    answers = torch.randint(20, (5, 3), generator=generator())
    lens = logit_lens(residual, norm, head, answers)
    for b, a in np.ndindex(5, 3):
        logits = (head.weight @ norm(residual[b, a])).detach().numpy()
        own = logits[answers[b, a]]
        assert lens.log_prob[b, a].item() == pytest.approx(own - np.log(np.exp(logits).sum()), rel=1e-10)
        assert lens.rank[b, a].item() == (logits > own).sum()
        assert lens.correct[b, a].item() == (logits.argmax() == answers[b, a].item())


def test_lens_table_by_layer():
    """Layer 0 knows nothing, layer 1 knows half of the answers: one-hot residuals of size s on V tokens."""
    size, answers = 3.0, torch.arange(4)[:, None]
    residual = torch.zeros(4, 1, V)
    residual[:2, 0, :2] = size * torch.eye(2)
    residual[2:, 0, 8] = size
    table = lens_table(
        {"embed": torch.zeros(4, 1, V), 0: residual}, nn.Identity(), nn.Identity(), answers
    ).set_index("layer")
    assert table.loc["embed", "log_prob"] == pytest.approx(-math.log(V))
    normaliser = math.log(math.exp(size) + V - 1)
    assert table.loc[0, "log_prob"] == pytest.approx(size / 2 - normaliser, rel=1e-6)
    assert table.loc[0, "accuracy"] == 0.5 and table.loc[0, "low"] < 0.5 < table.loc[0, "high"]
    each = np.array([size, size, 0, 0]) - normaliser
    low, high = stats.t.interval(0.95, 3, each.mean(), stats.sem(each))
    assert table.loc[0, ["log_prob_low", "log_prob_high"]].tolist() == pytest.approx([low, high], rel=1e-5)
    assert table.loc[0, ["low", "high"]].tolist() == pytest.approx(list(wilson(2, 4)))
    assert table.loc[0, "median_rank"] == 0 and table["answers"].tolist() == [4, 4]
    assert table.loc["embed", "accuracy"] == 0.25  # of equal logits the first is the arg-max, as elsewhere
    with pytest.raises(ValueError, match=r"\(B, A, D\)"):
        logit_lens(residual[:, 0], nn.Identity(), nn.Identity(), answers)


# --- effects ---


def test_logit_difference_of_loops():
    logits = torch.randn(3, 4, V, generator=generator())
    clean, corrupted = (torch.randint(V, (3, 4), generator=generator(seed)) for seed in (1, 2))
    found = logit_difference(logits, clean, corrupted)
    assert found.shape == (3, 4)
    for i, j in np.ndindex(3, 4):
        assert found[i, j] == logits[i, j, clean[i, j]] - logits[i, j, corrupted[i, j]]


def test_normalised_difference_is_0_for_corrupted_and_1_for_clean():
    clean = torch.randn(40, generator=generator(1)) + 5
    corrupted = torch.randn(40, generator=generator(2)) - 5
    for share in (0.0, 0.5, 1.0, 1.5):
        patched = corrupted + share * (clean - corrupted)
        torch.testing.assert_close(normalised_difference(patched, clean, corrupted), torch.full((40,), share))
    ratio = normalised_difference(
        torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([2.0, 1.0])
    )
    assert ratio[0].isnan() and ratio[1] == 0  # no gap, nothing to restore
