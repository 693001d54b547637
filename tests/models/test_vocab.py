"""Token strings and ids, against the table of the original code written out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthetic.vocab import Vocabulary


def test_small_table_in_full():
    vocabulary = Vocabulary(num_symbols=3, num_positions=2)
    assert vocabulary.tokens == (
        "<pad>", "<bos>", "<query>", "<s0>", "<s1>", "<s2>", "<p0>", "<p1>", "<task>",
    )  # fmt: skip
    assert len(vocabulary) == 9
    assert (vocabulary.pad, vocabulary.bos, vocabulary.query, vocabulary.task) == (0, 1, 2, 8)
    assert (vocabulary.first_symbol, vocabulary.first_position) == (3, 6)


def test_original_sizes():
    """Retrievit: 403 tokens for positions at length 200, 33 for n-grams; <task> comes after them."""
    assert len(Vocabulary(200, 200)) == 403 + 1
    assert len(Vocabulary(30, 0)) == 33 + 1
    original = Vocabulary(200, 200)
    assert original.ids["<s199>"] == 202 and original.ids["<p0>"] == 203 and original.ids["<p199>"] == 402


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 50), st.data())
def test_round_trip(num_symbols, num_positions, data):
    vocabulary = Vocabulary(num_symbols, num_positions)
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == len(vocabulary)
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) - 1)))
    tokens = vocabulary.decode(ids)
    assert vocabulary.encode(tokens) == ids
    assert vocabulary.encode(" ".join(tokens)) == ids


def test_decode_takes_arrays_and_tensors_and_marks_unknown_ids():
    vocabulary = Vocabulary(2, 2)
    assert vocabulary.decode(np.array([3, 5])) == ["<s0>", "<p0>"]
    assert vocabulary.decode(torch.tensor([7, 8, -100])) == ["<task>", "<UNK>", "<UNK>"]


@pytest.mark.parametrize("sizes", [(0, 1), (-1, 1), (1, -1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="must"):
        Vocabulary(*sizes)


def test_unknown_token_is_refused_by_name():
    with pytest.raises(ValueError, match=r"<s2>.* 2 symbols"):
        Vocabulary(2, 2).encode("<bos> <s2>")
