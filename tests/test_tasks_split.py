"""The train / held-out split of the position tasks: its hash, its sides, the count of contexts it needs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from task_solvers import POSITION_TASKS

from synthetic import tasks
from synthetic.tasks import sampling

ALL = [(name, layout) for name in POSITION_TASKS for layout in tasks.LAYOUTS]
MIN_P = 1e-3  # seeds are fixed, so these are not flaky
unhurried = settings(deadline=None)  # a busy machine is no failure


def contexts_of(task, batch):
    start = batch.input_ids[0].tolist().index(task.vocabulary.bos) + 1
    rows = batch.input_ids[:, start : start + batch.length] - task.vocabulary.first_symbol
    return {tuple(row) for row in rows.tolist()}


def heldout_reference(context):
    """The hash by Python integers: splitmix64 constants, linear form, splitmix64 finaliser, top bits."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    constants = [mix(i * 0x9E3779B97F4A7C15 & mask) for i in range(1, len(context) + 2)]
    total = sum(c * x for c, x in zip(constants, context, strict=False)) + constants[-1]
    return mix(total & mask) < 2**61


@unhurried
@given(st.lists(st.lists(st.integers(0, 5000), min_size=6, max_size=6), min_size=1, max_size=20))
def test_split_equals_reference_hash(contexts):
    expected = [heldout_reference(context) for context in contexts]
    assert sampling.is_heldout(np.array(contexts)).tolist() == expected


def test_split_is_exhaustive_and_disjoint_in_a_small_space():
    """All 120 contexts of 4 out of 5 symbols, from different seeds, queries and layouts."""
    seen = {"train": set(), "heldout": set()}
    for layout, (split, found) in itertools.product(("suffix", "instruction"), seen.items()):
        task = tasks.build("position", seq_len=4, num_symbols=5, layout=layout)
        for seed in range(3):
            found |= contexts_of(task, task.batch(2000, seed=seed, index=0, split=split, queries=2))
    space = set(itertools.permutations(range(5), 4))
    assert seen["train"] & seen["heldout"] == set()
    assert seen["train"] | seen["heldout"] == space
    assert seen["heldout"] == {context for context in space if heldout_reference(context)}


def test_rows_are_uniform_within_their_side_of_the_split():
    task = tasks.build("position", seq_len=4, num_symbols=5)
    for split, share in (("heldout", 1 / 8), ("train", 7 / 8)):
        batch = task.batch(20_000, seed=0, index=0, split=split)
        _, counts = np.unique(batch.input_ids[:, 1:5].numpy(), axis=0, return_counts=True)
        assert abs(len(counts) / 120 - share) < 0.1
        assert stats.chisquare(counts).pvalue > MIN_P


@pytest.mark.parametrize("name, layout", ALL)
@pytest.mark.parametrize("length", [3, 64])
def test_split_is_disjoint_in_a_large_space(name, layout, length):
    task = tasks.build(name, seq_len=64, num_symbols=100, layout=layout)
    sides = [
        set().union(*(contexts_of(task, task.batch(2000, seed=0, index=i, split=s, length=length))
                      for i in range(3)))
        for s in sampling.SPLITS
    ]  # fmt: skip
    assert not sides[0] & sides[1] and all(len(side) > 4000 for side in sides)


def test_one_eighth_is_held_out():
    contexts = np.random.default_rng(0).integers(0, 1024, (100_000, 20))
    share = sampling.is_heldout(contexts).mean()
    assert stats.binomtest(round(share * 100_000), 100_000, 1 / 8).pvalue > MIN_P


def test_both_sides_of_every_small_space_have_contexts():
    """Spaces of at least MIN_CONTEXTS contexts pass `check`; their split, counted exhaustively."""
    for num_symbols, length in itertools.product(range(1, 120), range(1, 6)):
        if sampling.MIN_CONTEXTS <= math.perm(num_symbols, length) <= 5000:
            tasks.build("position", seq_len=length, num_symbols=num_symbols)
            space = np.array(list(itertools.permutations(range(num_symbols), length)))
            assert 0.02 < sampling.is_heldout(space).mean() < 0.3
        elif length <= num_symbols and math.perm(num_symbols, length) < sampling.MIN_CONTEXTS:
            with pytest.raises(ValueError, match="too few"):
                tasks.build("position", seq_len=length, num_symbols=num_symbols)


@unhurried
@given(st.integers(1, 6), st.integers(2, 4))
def test_varlen_context_count_is_a_lower_bound(length, num_symbols):
    space = itertools.product(range(num_symbols), repeat=length)
    exact = sum(any(context.count(x) == 1 for x in context) for context in space)
    task = tasks.build("position-varlen", seq_len=200, num_symbols=num_symbols)
    assert math.exp(task._log_contexts(length)) <= exact * (1 + 1e-9)


def test_many_rows_are_drawn_in_rounds():
    """Memory is bounded by drawing in rounds; the rows are as many and as different as asked for."""
    task = tasks.build("position", seq_len=16, num_symbols=70_000)
    batch = task.batch(300, seed=0, index=0, split="heldout")
    assert batch.input_ids.shape == (300, 19) and len(contexts_of(task, batch)) == 300
