"""The order of training examples and the batches made of it."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vlm import layout, prompts
from vlm.data.loader import batches
from vlm.data.mixture import Mixture, permuted
from vlm.data.samples import Sample

SIDE = 2
SEEDS = st.integers(-5, 2**40)


@dataclass
class Words:
    """Sample i asks for a word i times (mod 13): lengths differ, and each sample has a text of its own."""

    name: str
    length: int
    fingerprint: str = "words"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        question = f"{self.name} {index} " + "word " * (index % 13)
        return Sample(str(index), self.name, f"{index % 4}", "vqa", tuple(prompts.vqa([(question, "yes")])))

    def picture(self, image):
        return np.full((2, 2, 3), int(image), np.uint8)

    def keys(self):
        return [str(i) for i in range(4)]


class Numbered:
    """Features that name source and picture, in float16."""

    def get(self, source, images):
        values = [[len(source.name) * 10 + int(image)] * SIDE**2 for image in images]
        return torch.tensor(values, dtype=torch.float16)[:, :, None]


def encode(text):
    return [ord(letter) for letter in text]


def mixture(weights=None):
    return Mixture({"a": Words("a", 37), "bb": Words("bb", 5), "ccc": Words("ccc", 64)}, weights)


def made(mix, start=0, stop=6, **options):
    options = {"batch_size": 4, "seed": 3, "layout": "query-first"} | options
    return list(batches(mix, Numbered(), start=start, stop=stop, encode=encode, side=SIDE, **options))


def same(left, right):
    return (
        torch.equal(left.input_ids, right.input_ids)
        and torch.equal(left.labels, right.labels)
        and torch.equal(left.features, right.features)
        and left.samples == right.samples
    )


# --- order --------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permutations_have_every_place_once(length, key):
    places = np.arange(length)
    found = permuted(places, length, np.full(length, key, np.uint64))
    assert sorted(found.tolist()) == places.tolist()


@pytest.mark.parametrize("length", [2, 5, 16, 61])
def test_permutations_take_each_place_everywhere_equally_often(length):
    keys = np.arange(200 * length, dtype=np.uint64)
    for place in (0, length // 2, length - 1):
        found = permuted(np.full(len(keys), place), length, keys)
        assert stats.chisquare(np.bincount(found, minlength=length)).pvalue > 1e-4


@given(SEEDS, st.integers(0, 3))
@settings(max_examples=30)
def test_concatenation_has_every_example_once_an_epoch(seed, epoch):
    mix = mixture()
    everything = [(name, i) for name, source in mix.sources.items() for i in range(len(source))]
    found = mix.order(seed, epoch * len(mix), (epoch + 1) * len(mix))
    assert sorted(found) == sorted(everything) and len(mix) == 106
    assert found != mix.order(seed, (epoch + 1) * len(mix), (epoch + 2) * len(mix))
    assert found != mix.order(seed + 1, epoch * len(mix), (epoch + 1) * len(mix))


@given(SEEDS, st.integers(0, 500), st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_order_does_not_depend_on_where_it_starts(seed, start, first, more, weighted):
    mix = mixture({"a": 3, "bb": 0.5, "ccc": 1} if weighted else None)
    whole = mix.order(seed, start, start + first + more)
    assert whole[first:] == mix.order(seed, start + first, start + first + more)
    assert len(whole) == first + more


@given(
    st.lists(st.floats(0, 100), min_size=3, max_size=3).filter(lambda w: sum(w) > 1e-3),
    st.integers(0, 10**6),
    st.integers(1, 400),
)
def test_weights_are_realised_in_every_stretch(weights, start, count):
    shares = dict(zip(("a", "bb", "ccc"), weights, strict=True))
    found = Counter(name for name, _ in mixture(shares).order(0, start, start + count))
    for name, weight in shares.items():
        assert abs(found[name] - count * weight / sum(weights)) < 4
        assert weight > 0 or not found[name]


def test_a_weighted_source_is_used_up_before_it_starts_again():
    found = mixture({"a": 1, "bb": 6, "ccc": 1}).order(5, 0, 400)
    for name, length in (("a", 37), ("bb", 5), ("ccc", 64)):
        mine = [i for source, i in found if source == name]
        rounds = [mine[i : i + length] for i in range(0, len(mine) - length + 1, length)]
        assert all(sorted(r) == list(range(length)) for r in rounds)
    bb = [i for source, i in found if source == "bb"]
    assert bb[:5] != bb[5:10] or bb[:5] != bb[10:15]


def test_another_source_leaves_the_order_inside_a_weighted_one():
    two = Mixture({"a": Words("a", 37), "bb": Words("bb", 5)}, {"a": 1, "bb": 1}).order(9, 0, 60)
    three = mixture({"a": 1, "bb": 1, "ccc": 2}).order(9, 0, 120)
    assert [i for s, i in two if s == "a"][:25] == [i for s, i in three if s == "a"][:25]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": 1, "bb": 1}, "only one of them has ccc"),
        ({"a": 1, "bb": -1, "ccc": 1}, "-1 of 'bb'"),
        ({"a": 1, "bb": float("nan"), "ccc": 1}, "nan of 'bb'"),
        ({"a": 0, "bb": 0, "ccc": 0}, "all 0"),
    ],
)
def test_wrong_weights_are_named(weights, said):
    with pytest.raises(ValueError, match=said):
        mixture(weights)


def test_empty_mixtures_are_refused():
    with pytest.raises(ValueError, match="'a' has no examples"):
        Mixture({"a": Words("a", 0)})
    with pytest.raises(ValueError, match="at least one source"):
        Mixture({})
    with pytest.raises(ValueError, match="start=-1"):
        mixture().order(0, -1, 3)


# --- batches ------------------------------------------------------------------------------------------------


def test_batches_are_sequences_padded_on_the_right():
    mix = mixture()
    (batch,) = made(mix, 2, 3)
    order = mix.order(3, 8, 12)
    assert [(s.source, int(s.id)) for s in batch.samples] == order
    longest = 0
    for row, (name, index) in enumerate(order):
        sample = mix.sources[name][index]
        ids, labels = layout.sequence(sample.chunks, encode, SIDE, "query-first")
        rest = batch.input_ids.shape[1] - len(ids)
        assert batch.input_ids[row].tolist() == ids + [0] * rest
        assert batch.labels[row].tolist() == labels + [-100] * rest
        assert (batch.features[row] == 10 * len(name) + index % 4).all()
        longest = max(longest, len(ids))
    assert batch.input_ids.shape == batch.labels.shape == (4, longest)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.features.shape == (4, SIDE**2, 1) and batch.features.dtype == torch.float16


@given(st.integers(0, 9), st.integers(0, 5), st.integers(1, 4), st.integers(1, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_resumed_batches_are_the_rest_of_all_batches(start, count, group, size, weighted):
    mix = mixture({"a": 3, "bb": 0.5, "ccc": 1} if weighted else None)
    whole = made(mix, 0, start + count, group=group, batch_size=size)
    resumed = made(mix, start, start + count, group=group, batch_size=size)
    assert len(whole) == start + count and len(resumed) == count
    assert all(map(same, whole[start:], resumed))


def test_workers_change_nothing_and_leave_the_global_random_state():
    for group in (1, 3):
        alone = made(mixture(), 1, 9, group=group)
        state = torch.get_rng_state()
        helped = made(mixture(), 1, 9, group=group, workers=2)
        assert len(alone) == len(helped) == 8 and all(map(same, alone, helped))
        assert torch.equal(state, torch.get_rng_state())


@given(SEEDS, st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_grouping_keeps_a_windows_examples_and_pads_less(seed, window):
    span = {"start": 8 * window, "stop": 8 * window + 8, "seed": seed}
    plain, grouped = made(mixture(), **span), made(mixture(), **span, group=8)

    def examples(found):
        return Counter((s.source, s.id) for batch in found for s in batch.samples)

    def places(found):
        return sum(batch.input_ids.numel() for batch in found)

    assert examples(plain) == examples(grouped) and len(grouped) == 8
    assert places(grouped) < places(plain)
    lengths = [(batch.labels != -100).int().argmax(1) for batch in grouped]
    ranges = sorted((int(x.min()), int(x.max())) for x in lengths)
    assert all(low[1] <= high[0] for low, high in pairwise(ranges))


def test_grouped_batches_do_not_come_by_length():
    longest = [batch.input_ids.shape[1] for batch in made(mixture(), 0, 40, group=8)]
    windows = [longest[i : i + 8] for i in range(0, 40, 8)]
    ranks = {tuple(np.argsort(window, kind="stable")) for window in windows}
    assert tuple(range(8)) not in ranks and len(ranks) == 5  # another order in every window
    other = [batch.input_ids.shape[1] for batch in made(mixture(), 0, 8, group=8, seed=4)]
    assert tuple(np.argsort(other, kind="stable")) != tuple(np.argsort(windows[0], kind="stable"))


def test_prompts_without_room_for_an_answer_are_replaced_and_named(caplog):
    mix = Mixture({"a": Words("a", 13)})
    fits = [len(layout.sequence(mix.sources["a"][i].chunks, encode, SIDE)[0]) for i in range(13)]
    with caplog.at_level(logging.WARNING):
        found = made(mix, 0, 13, batch_size=1, max_length=fits[5])
    answer = len("Yes.<|endoftext|>")
    room = [i for i in range(13) if fits[i] - answer < fits[5]]  # an answer may be cut short
    used = Counter(int(batch.samples[0].id) for batch in found)
    assert room == list(range(9)) and used == {i: 1 for i in room} | {0: 5}
    assert "a 9 is left out: max_length" in caplog.text and "a 8 is" not in caplog.text
    assert all(batch.input_ids.shape[1] <= fits[5] for batch in found)
    for order in prompts.LAYOUTS:
        with pytest.raises(
            ValueError, match=r"13 examples in a row from number .* no room for the image or an"
        ):
            made(mix, 0, 1, max_length=60, layout=order)
    with pytest.raises(ValueError, match="cuts the image"):
        made(mix, 0, 1, max_length=5)


class Broken(Words):
    def __getitem__(self, index):
        raise ValueError(f"line {index} is damaged")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_a_worker_is_one_line(workers):
    with pytest.raises(ValueError, match=r"^line \d+ is damaged$"):
        made(Mixture({"a": Broken("a", 3)}), workers=workers)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"group": 0}, {"start": -1}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        made(mixture(), **wrong)


def test_mixtures_can_be_sent_to_other_processes():
    mix = pickle.loads(pickle.dumps(mixture({"a": 1, "bb": 2, "ccc": 3})))
    assert mix.order(1, 0, 50) == mixture({"a": 1, "bb": 2, "ccc": 3}).order(1, 0, 50)
