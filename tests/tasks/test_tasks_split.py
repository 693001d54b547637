"""The three splits: their hash, their sides, the count of contexts they need, and rows by their number."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from task_solvers import POSITION_TASKS

from ssm_retrieval.errors import UserError
from synthetic import tasks
from synthetic.tasks import sampling

ALL = [(name, layout) for name in POSITION_TASKS for layout in tasks.LAYOUTS]
MIN_P = 1e-3  # seeds are fixed, so these are not flaky
unhurried = settings(deadline=None)  # a busy machine is no failure


def contexts_of(task, batch):
    start = batch.input_ids[0].tolist().index(task.vocabulary.bos) + 1
    rows = batch.input_ids[:, start : start + batch.length] - task.vocabulary.first_symbol
    return {tuple(row) for row in rows.tolist()}


def split_reference(context):
    """The hash by Python integers: splitmix64 constants, linear form, splitmix64 finaliser, four bits."""
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    constants = [mix(i * 0x9E3779B97F4A7C15 & mask) for i in range(1, len(context) + 2)]
    total = sum(c * x for c, x in zip(constants, context, strict=False)) + constants[-1]
    hashed = mix(total & mask)
    if hashed >= 2**61:
        return "train"
    return "validation" if hashed & 2**53 else "heldout"


@unhurried
@given(st.lists(st.lists(st.integers(0, 5000), min_size=6, max_size=6), min_size=1, max_size=20))
def test_split_equals_reference_hash(contexts):
    expected = [split_reference(context) for context in contexts]
    found = sampling.split_of(np.array(contexts))
    assert [sampling.SPLITS[i] for i in found] == expected
    assert sampling.is_heldout(np.array(contexts)).tolist() == [name == "heldout" for name in expected]


def test_split_is_exhaustive_and_disjoint_in_a_small_space():
    """All 120 contexts of 4 out of 5 symbols, from different seeds, queries and layouts."""
    seen = {split: set() for split in sampling.SPLITS}
    for layout, (split, found) in itertools.product(("suffix", "instruction"), seen.items()):
        task = tasks.build("position", seq_len=4, num_symbols=5, layout=layout)
        for seed in range(3):
            found |= contexts_of(task, task.batch(2000, seed=seed, index=0, split=split, queries=2))
    space = set(itertools.permutations(range(5), 4))
    assert seen == {s: {context for context in space if split_reference(context) == s} for s in seen}
    assert set().union(*seen.values()) == space and sum(map(len, seen.values())) == len(space)


def test_rows_are_uniform_within_their_side_of_the_split():
    task = tasks.build("position", seq_len=4, num_symbols=5)
    for split, share in sampling.SHARES.items():
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
    assert len(set().union(*sides)) == sum(map(len, sides)) and all(len(side) > 4000 for side in sides)


def test_shares_of_the_splits():
    """7/8 trains, 1/16 decides when to stop, 1/16 is reported."""
    contexts = np.random.default_rng(0).integers(0, 1024, (100_000, 20))
    counts = np.bincount(sampling.split_of(contexts), minlength=3)
    assert stats.chisquare(counts, [87_500, 6250, 6250]).pvalue > MIN_P
    assert list(sampling.SHARES.values()) == [7 / 8, 1 / 16, 1 / 16]


def test_all_splits_of_every_small_space_have_contexts():
    """Spaces of at least MIN_CONTEXTS contexts pass `check`; their splits, counted exhaustively."""
    for num_symbols, length in itertools.product(range(1, 120), range(1, 6)):
        if sampling.MIN_CONTEXTS <= math.perm(num_symbols, length) <= 5000:
            tasks.build("position", seq_len=length, num_symbols=num_symbols)
            space = np.array(list(itertools.permutations(range(num_symbols), length)))
            counts = np.bincount(sampling.split_of(space), minlength=3)
            assert counts[1:].min() >= 4 and counts[0] > 0.7 * len(space)
        elif length <= num_symbols and math.perm(num_symbols, length) < sampling.MIN_CONTEXTS:
            with pytest.raises(ValueError, match="too few"):
                tasks.build("position", seq_len=length, num_symbols=num_symbols)


@unhurried
@given(st.integers(1, 6), st.integers(2, 4))
def test_varlen_context_count_is_a_lower_bound(length, num_symbols):
    space = itertools.product(range(num_symbols), repeat=length)
    exact = sum(any(context.count(x) == 1 for x in context) for context in space)
    task = tasks.build("position-varlen", seq_len=200, num_symbols=num_symbols)
    assert math.exp(task.log_contexts(length)) <= exact * (1 + 1e-9)


def test_many_rows_are_drawn_in_rounds():
    """Memory is bounded by drawing in rounds; the rows are as many and as different as asked for."""
    task = tasks.build("position", seq_len=16, num_symbols=70_000)
    batch = task.batch(300, seed=0, index=0, split="heldout")
    assert batch.input_ids.shape == (300, 19) and len(contexts_of(task, batch)) == 300


def test_an_empty_split_is_one_line_not_a_loop_without_end():
    contexts = np.array([[0, 1]])
    assert split_reference([0, 1]) == "train"

    def draw(rows):
        return contexts.repeat(rows, 0), np.zeros((rows, 1), dtype=np.int64)

    assert sampling.draw_split(draw, 3, "train", row_cells=2)[0].tolist() == [[0, 1]] * 3
    with pytest.raises(UserError, match="no context of length 2 seems to belong to the split validation"):
        sampling.draw_split(draw, 3, "validation", row_cells=2)


# --- rows by their number ------------------------------------------------------------------------------

EVERY = {
    "position": dict(seq_len=12, num_symbols=20),
    "position-varlen": dict(seq_len=12, num_symbols=20),
    "grid": dict(seq_len=9, num_symbols=12, layout="prefix"),
    "ngram": dict(seq_len=16, min_seq_len=8),
    "ngram-duplicate": dict(seq_len=24, blocks=2),
    "mqar": dict(seq_len=16, num_symbols=40, num_pairs=3),
    "selective-copy": dict(seq_len=12, num_tokens=4),
    "induction": dict(seq_len=12),
}


def sequences(task, batches):
    """All token sequences in order, each with its labels: the rows of a set."""
    return [
        (tuple(ids), tuple(labels))
        for batch in batches
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)
    ]


def rows_of(name, split, count, **more):
    task = tasks.build(name, **EVERY[name])
    return sequences(task, task.examples(count, seed=5, split=split, length=task.seq_len, **more))


def test_every_task_is_among_these():
    assert set(EVERY) == set(tasks.names())


@pytest.mark.parametrize("name", EVERY)
def test_splits_never_share_a_sequence(name):
    """Training batches of several seeds, the sequences that stop training, and those that are reported."""
    task = tasks.build(name, **EVERY[name])
    length = task.seq_len
    train = {
        row
        for seed in range(3)
        for row in sequences(task, [task.batch(2000, seed=seed, index=0, length=length)])
    }
    validation, heldout = (set(rows_of(name, split, 1024)) for split in ("validation", "heldout"))
    assert not train & validation and not train & heldout and not validation & heldout
    assert len(validation) > 500 and len(heldout) > 500


@pytest.mark.parametrize("split", ["validation", "heldout"])
@pytest.mark.parametrize("name", EVERY)
def test_row_i_is_the_same_in_every_set(name, split):
    """Sets of 16 and of 1,024, in batches of any size, from any row on: one sequence of rows."""
    whole = rows_of(name, split, 1024, batch_size=100)
    assert len(whole) == 1024
    assert rows_of(name, split, 16) == whole[:16]
    assert rows_of(name, split, 130, batch_size=7) == whole[:130]
    assert rows_of(name, split, 50, start=77, batch_size=1000) == whole[77:127]
    assert rows_of(name, split, 1, start=1023, batch_size=1) == whole[1023:]


def test_batches_of_a_set_are_as_large_as_asked_for():
    task = tasks.build("position", **EVERY["position"])
    sizes = [len(b.labels) for b in task.examples(50, seed=0, split="heldout", length=12, batch_size=20)]
    assert sizes == [20, 20, 10]
    for wrong in (dict(count=0), dict(batch_size=0), dict(start=-1), dict(split="test"), dict(length=13)):
        with pytest.raises(UserError):
            next(task.examples(**(dict(count=4, seed=0, split="heldout", length=12) | wrong)))
