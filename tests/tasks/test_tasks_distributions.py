"""What the tasks draw, against closed forms and against counting small spaces in full."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from task_solvers import POSITION_TASKS, small

from synthetic import tasks
from synthetic.tasks import sampling
from synthetic.tasks.mqar import power_law

MIN_P = 1e-3  # seeds are fixed, so these are not flaky


def uniform(values, size):
    counts = np.bincount(np.asarray(values), minlength=size)
    assert len(counts) == size
    return stats.chisquare(counts).pvalue > MIN_P


@pytest.mark.parametrize("split", sampling.SPLITS)
def test_places_are_uniform(split):
    places = {"ngram": 12, "grid": 16, "induction": 15, "selective-copy": 16}
    for name, size in places.items():
        batch = small(name).batch(20_000, seed=1, index=0, split=split)
        assert uniform(batch.target_index.flatten(), size), name


@pytest.mark.parametrize("name, size", [("ngram", 30), ("induction", 16), ("selective-copy", 14)])
def test_answers_are_uniform_over_the_symbols(name, size):
    task = small(name)
    batch = task.batch(20_000, seed=2, index=0)
    for column in range(batch.labels.shape[1]):
        assert uniform(batch.labels[:, column] - task.vocabulary.first_symbol, size)


def test_ngram_length_is_uniform_between_its_bounds():
    """Facts 1.5: N uniform on min_seq_len .. seq_len, one draw a batch, and fixed where a length is given."""
    task = tasks.build("ngram", seq_len=12, min_seq_len=6)
    lengths = [task.batch(1, seed=0, index=i).length for i in range(700)]
    assert uniform(np.array(lengths) - 6, 7)
    assert task.batch(1, seed=0, index=0, length=12).length == 12


def test_ngram_contexts_are_all_those_with_a_unique_query():
    """Every (context, start) whose bigram stands there only, equally often: the rejection's closed form."""
    task = tasks.build("ngram", seq_len=5, num_symbols=3, query_size=2, answer_size=1)
    space = {
        (*context, start)
        for context in itertools.product(range(3), repeat=5)
        for start in range(3)
        if sum(context[i : i + 2] == context[start : start + 2] for i in range(4)) == 1
    }
    context, start = task.draw(np.random.default_rng(0), 60_000, 5, 1)
    seen, counts = np.unique(np.concatenate([context, start], axis=1), axis=0, return_counts=True)
    assert {tuple(row) for row in seen.tolist()} == space
    assert stats.chisquare(counts).pvalue > MIN_P


def test_context_counts_are_no_overestimates():
    """`log_contexts` decides whether a split is possible: compared with full enumeration."""
    for v, n in ((2, 6), (3, 5), (4, 5)):
        task = tasks.build("ngram", seq_len=12, num_symbols=v, query_size=2, answer_size=1)
        exact = sum(
            any(sum(c[i : i + 2] == c[s : s + 2] for i in range(n - 1)) == 1 for s in range(n - 2))
            for c in itertools.product(range(v), repeat=n)
        )
        assert math.exp(task.log_contexts(n)) <= exact
    task = tasks.build("induction", seq_len=9, num_symbols=3)
    assert round(math.exp(task.log_contexts(5))) == 4 * 3**4
    task = tasks.build("selective-copy", seq_len=9, num_tokens=2, num_symbols=5)
    assert round(math.exp(task.log_contexts(6))) == 15 * 25
    task = tasks.build("mqar", seq_len=20, num_symbols=20, num_pairs=2)
    assert round(math.exp(task.log_contexts(8))) == 90 * 90


def test_duplicates_ask_for_every_block_equally_and_stand_anywhere_in_it():
    task = tasks.build("ngram-duplicate", seq_len=40, blocks=4)  # blocks of 10: places 0 .. 4
    batch = task.batch(20_000, seed=3, index=0)
    assert uniform(batch.target_index[:, 0] // 10, 4)
    assert uniform(batch.target_index[:, 0] % 10, 5)
    labelled = (batch.alternatives == batch.labels[:, None]).all(-1)
    assert (labelled.sum(1) == 1).all() and (labelled.int().argmax(1) == batch.target_index[:, 0] // 10).all()
    query = batch.input_ids[:, -5:-3]  # <query> q1 q2 <query> t1 t2
    assert (query[:, 0] != query[:, 1]).all()


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_power_law_is_the_successive_draw(power):
    """First two places against P(i, j) = w_i w_j / (1 - w_i), w_i ~ (i + 1)^(power - 1)."""
    draws = power_law(np.random.default_rng(0), 40_000, 2, 5, power)
    w = np.arange(1, 6) ** (power - 1.0)
    w /= w.sum()
    pairs = list(itertools.permutations(range(5), 2))
    expected = np.array([w[i] * w[j] / (1 - w[i]) for i, j in pairs]) * 40_000
    counts = np.array([((draws == pair).all(1)).sum() for pair in pairs])
    assert counts.sum() == 40_000
    assert stats.chisquare(counts, expected).pvalue > MIN_P


def test_mqar_gaps_follow_the_power_law_and_fillers_avoid_the_keys():
    task = tasks.build("mqar", seq_len=16, num_symbols=24, num_pairs=2)
    batch = task.batch(20_000, seed=0, index=0)
    gaps = (batch.answer_at.numpy() - 4) // 2
    assert (batch.answer_at.numpy() % 2 == 0).all() and gaps.min() == 0 and gaps.max() == 5
    w = np.arange(1, 7) ** -0.99
    assert stats.chisquare(np.bincount(gaps[:, 0]), w / w.sum() * 20_000).pvalue > MIN_P
    assert (batch.target_index.numpy() == [0, 2]).all()  # every pair is asked for, in order
    ids = batch.input_ids.numpy() - task.vocabulary.first_symbol
    keys, values, tail = ids[:, 0:4:2], ids[:, 1:4:2], ids[:, 4:]
    assert uniform(keys[:, 0], 12) and uniform(values[:, 1] - 12, 12)
    assert ((tail[:, :, None] == keys[:, None]).sum(1) == 1).all()
    filler = tail[:, -1][(tail[:, -1:] != keys).all(1)]  # an odd place is no query's
    relative = (filler - keys[(tail[:, -1:] != keys).all(1), 0]) % 24
    assert len(filler) == 20_000 and np.bincount(relative, minlength=24)[0] == 0
    assert uniform(filler[filler >= 12] - 12, 12)


def test_mqar_asks_for_a_random_part_of_the_pairs_if_told():
    task = tasks.build("mqar", seq_len=24, num_symbols=64, num_pairs=4)
    batch = task.batch(10_000, seed=0, index=0, queries=2)
    assert batch.labels.shape == (10_000, 2)
    assert uniform(batch.target_index.flatten() // 2, 4)
    assert (
        task.pairs(9) == task.max_queries(9) == 2 and task.batch(1, seed=0, index=0, length=9).chance == 1 / 2
    )


def test_selective_copy_spaces_symbols_at_random():
    """All C(6, 2) choices of places, and of symbols, equally often."""
    task = tasks.build("selective-copy", seq_len=6, num_tokens=2, num_symbols=5)
    batch = task.batch(20_000, seed=0, index=0)
    _, counts = np.unique(batch.target_index.numpy(), axis=0, return_counts=True)
    # the split removes some contexts of each choice, so compare with what it leaves
    left = [
        sum(
            sampling.split_of(np.array([[a if k == i else b if k == j else 5 for k in range(6)]]))[0] == 0
            for a in range(5)
            for b in range(5)
        )
        for i, j in itertools.combinations(range(6), 2)
    ]
    assert stats.chisquare(counts, np.array(left) / sum(left) * 20_000).pvalue > MIN_P


# --- position tasks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size, num", [(1, 5), (2, 6), (3, 9), (3, 8), (3, 4), (4, 4), (1, 1)])
def test_distinct_draws_are_uniform_over_all_ordered_draws(size, num):
    """Both methods: redrawing duplicates (3 size <= num) and permuting."""
    rng = np.random.default_rng(2)
    draws = sampling.sample_distinct(rng, 60_000, size, num)
    assert draws.dtype == np.int64 and draws.shape == (60_000, size)
    _, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(counts) == math.perm(num, size)
    assert len(counts) == 1 or stats.chisquare(counts).pvalue > MIN_P


@pytest.mark.parametrize("name", POSITION_TASKS)
@pytest.mark.parametrize("split", sampling.SPLITS)
def test_targets_and_symbols_are_uniform(name, split):
    task = tasks.build(name, seq_len=10, num_symbols=40)
    batch = task.batch(30_000, seed=11, index=4, split=split)
    assert stats.chisquare(np.bincount(batch.target_index[:, 0].numpy(), minlength=10)).pvalue > MIN_P
    context = batch.input_ids[:, 1:11].numpy() - task.vocabulary.first_symbol
    for place in (0, 9):
        assert stats.chisquare(np.bincount(context[:, place], minlength=40)).pvalue > MIN_P
    queried = context[np.arange(30_000), batch.target_index[:, 0]]
    assert stats.chisquare(np.bincount(queried, minlength=40)).pvalue > MIN_P


def test_varlen_distractors_are_uniform_over_the_other_symbols():
    task = tasks.build("position-varlen", seq_len=6, num_symbols=20)
    for queries in (1, 3):
        batch = task.batch(20_000, seed=1, index=1, queries=queries)
        context = batch.input_ids[:, 1:7].numpy() - task.vocabulary.first_symbol
        target = batch.target_index.numpy()
        queried = np.take_along_axis(context, target, axis=1)
        occurrences = (context[:, :, None] == queried[:, None, :]).sum(axis=1)
        assert (occurrences == 1).all()
        is_target = np.zeros_like(context, dtype=bool)
        np.put_along_axis(is_target, target, True, axis=1)
        # distances from the first query, without those that other queries occupy
        distance = ((context - queried[:, :1]) % 20)[~is_target]
        counts = np.bincount(distance, minlength=20)
        assert counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > MIN_P


def test_varlen_random_length_counts_distractors():
    """Distractors uniform on min_seq_len .. seq_len - 1, so contexts of one more; one length a batch."""
    task = tasks.build("position-varlen", seq_len=9, num_symbols=30, min_seq_len=5)
    lengths = []
    for index in range(400):
        batch = task.batch(2, seed=0, index=index)
        assert batch.input_ids.shape[1] == batch.length + 3 and batch.chance == 1 / batch.length
        lengths.append(batch.length)
    assert sorted(set(lengths)) == [6, 7, 8, 9]
    assert stats.chisquare(np.bincount(lengths)[6:]).pvalue > MIN_P
    assert task.batch(2, seed=0, index=0, length=3).length == 3
    assert task.max_queries() == 6 and task.max_queries(9) == 9
    with pytest.raises(ValueError, match="queries 7"):
        task.batch(2, seed=0, index=0, queries=7)
