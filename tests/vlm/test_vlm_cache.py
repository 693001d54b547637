"""Features on disk: filled once, also after a crash, and read by several processes."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from ssm_retrieval.errors import UserError
from vlm.data.cache import FeatureCache, Uncached

COUNT = 23


@dataclass
class Grey:
    """Picture i is of one grey level i, of sizes that differ."""

    name: str = "grey"
    fingerprint: str = "greys"
    count: int = COUNT

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        raise NotImplementedError("a cache reads no samples")

    def picture(self, image):
        return np.full((2 + int(image) % 3, 2, 3), int(image), np.uint8)

    def keys(self):
        return [str(i) for i in reversed(range(self.count))]


@dataclass
class Encoder:
    """(B, 4, 2): the grey level, and a third. Fails at call number `fails`; knows what it was asked for."""

    fails: int = -1
    asked: list = field(default_factory=list)
    calls: int = 0

    def __call__(self, pictures):
        self.calls += 1
        if self.calls == self.fails:
            raise RuntimeError("out of memory")
        levels = [float(picture.mean()) for picture in pictures]
        self.asked += [round(level) for level in levels]
        return torch.tensor([[[level, level / 3]] * 4 for level in levels])


def expected(images):
    return torch.tensor([[[float(i), float(i) / 3]] * 4 for i in images])


def filled(folder, **options):
    cache = FeatureCache(folder, "tiny-336", Encoder(), **options)
    source = Grey()
    cache.fill(source, progress=False, batch_size=4)
    return cache, source


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_features_are_those_of_the_encoder(tmp_path, dtype):
    cache, source = filled(tmp_path, dtype=dtype)
    found = cache.get(source, ["7", "0", "22", "7"])
    assert torch.equal(found, expected([7, 0, 22, 7]).to(found.dtype))
    assert found.dtype == (torch.float16 if dtype == np.float16 else torch.float32)
    assert sorted(cache.encode.asked) == list(range(COUNT))
    array = np.load(next(tmp_path.glob("*.npy")), mmap_mode="r")
    assert array.shape == (COUNT, 4, 2) and array[0, 0, 0] == COUNT - 1  # in the order of the keys


def test_what_is_read_can_be_changed_without_harm(tmp_path):
    cache, source = filled(tmp_path)
    cache.get(source, ["3"]).zero_()
    assert torch.equal(cache.get(source, ["3"]), expected([3]).half())


@pytest.mark.parametrize("fails", [1, 2, 5])
def test_an_interrupted_fill_goes_on_where_it_stopped(tmp_path, fails):
    source, first = Grey(), Encoder(fails=fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        FeatureCache(tmp_path, "tiny", first).fill(source, progress=False, batch_size=4)
    assert len(first.asked) == 4 * (fails - 1)
    second = Encoder()
    cache = FeatureCache(tmp_path, "tiny", second)
    if fails > 1:
        assert torch.equal(cache.get(source, ["22"]), expected([22]).half())
    with pytest.raises(ValueError, match=r"no features of '0' of grey yet .* fill the cache first"):
        cache.get(source, ["22", "0"])
    cache.fill(source, progress=False, batch_size=3)
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == COUNT
    assert torch.equal(cache.get(source, source.keys()), expected(reversed(range(COUNT))).half())
    cache.fill(source, progress=False)
    assert len(first.asked) + len(second.asked) == COUNT  # nothing is left to do


def test_a_reader_sees_what_another_process_has_filled_since(tmp_path):
    source = Grey()
    reader = FeatureCache(tmp_path, "tiny-336", Encoder())
    with pytest.raises(ValueError, match="0 of 23 are done"):
        reader.get(source, ["1"])
    filled(tmp_path)
    assert torch.equal(reader.get(source, ["1"]), expected([1]).half()) and not reader.encode.calls


def _fill_and_read(folder, both_ready, answers):
    def slow(pictures):
        time.sleep(0.05)  # so that the other process would come in between
        return encoder(pictures)

    encoder, source = Encoder(), Grey()
    cache = FeatureCache(folder, "tiny-336", slow)
    both_ready.wait()
    cache.fill(source, progress=False, batch_size=4)
    same = torch.equal(cache.get(source, source.keys()), expected(reversed(range(COUNT))).half())
    answers.put((same, len(encoder.asked)))


def test_two_processes_fill_once_and_both_read(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers, both_ready = context.Queue(), context.Barrier(2)
    both = [context.Process(target=_fill_and_read, args=(tmp_path, both_ready, answers)) for _ in range(2)]
    for process in both:
        process.start()
    found = [answers.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    assert all(same for same, _ in found) and sorted(count for _, count in found) == [0, COUNT]


def test_arrays_are_told_apart_by_what_features_depend_on(tmp_path):
    cache, _ = filled(tmp_path)
    same = Grey(name="another name")
    cache.fill(same, progress=False)
    assert len(cache.encode.asked) == COUNT  # the same pictures
    cache.fill(Grey(fingerprint="others"), progress=False)
    cache.fill(Grey(count=5), progress=False)
    FeatureCache(tmp_path, "tiny-480", Encoder()).fill(same, progress=False)
    FeatureCache(tmp_path, "tiny-336", Encoder(), dtype=np.float32).fill(same, progress=False)
    assert len(list(tmp_path.glob("*.npy"))) == 5


def damage(path, how):
    if how == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "not an array":
        path.write_text("hello")
    elif how == "missing":
        path.unlink()
    elif how == "another shape":
        np.save(path, np.zeros((3, 4, 2), np.float16))
    else:
        path.with_suffix(".json").write_text(how)


@pytest.mark.parametrize(
    "how",
    ["short", "not an array", "missing", "another shape", "{", "{}", "[]", "", "null", "[" * 50_000]
    + [f'{{"done": {done}}}' for done in ('"3"', "3.5", "-1", "24", "1e99", "NaN", "true", "[]")],
)
def test_damaged_files_are_one_line(tmp_path, how):
    filled(tmp_path)
    damage(next(tmp_path.glob("*.npy")), how)
    cache, source = FeatureCache(tmp_path, "tiny-336", Encoder()), Grey()
    for use in (lambda: cache.get(source, ["1"]), lambda: cache.fill(source, progress=False)):
        with pytest.raises(UserError, match=r"is damaged .*; delete .*\.\* to encode") as error:
            use()
        assert "\n" not in str(error.value)


def test_what_a_killed_fill_left_is_removed_and_nothing_else(tmp_path):
    filled(tmp_path)
    (array,) = tmp_path.glob("*.npy")
    mine = [tmp_path / f".{array.stem}{end}.0123456789ab.tmp" for end in (".npy", ".json")]
    other = tmp_path / ".another.npy.0123456789ab.tmp"  # another process may be writing it
    for path in (*mine, other):
        path.write_text("half")
    filled(tmp_path)
    assert not any(path.exists() for path in mine) and other.exists()


def test_encoders_that_give_something_else_are_named(tmp_path):
    source = Grey()
    with pytest.raises(ValueError, match=r"encode gave \(4, 2\) for 4 pictures"):
        FeatureCache(tmp_path, "x", lambda p: torch.zeros(4, 2)).fill(source, False, batch_size=4)
    with pytest.raises(RuntimeError):
        FeatureCache(tmp_path, "tiny-336", Encoder(fails=2)).fill(source, False, batch_size=4)
    with pytest.raises(ValueError, match="another encoder_key than 'tiny-336'"):
        FeatureCache(tmp_path, "tiny-336", lambda p: torch.zeros(len(p), 9, 2)).fill(source, False)


def test_unknown_pictures_are_named(tmp_path):
    cache, source = filled(tmp_path)
    with pytest.raises(ValueError, match="grey has no picture '99'"):
        cache.get(source, ["99"])


def test_progress_is_shown(tmp_path, capsys):
    FeatureCache(tmp_path, "tiny", Encoder()).fill(Grey(), batch_size=8)
    assert "features of grey" in capsys.readouterr().out


def test_uncached_encodes_a_picture_once_while_it_remembers_it():
    source, encoder = Grey(), Encoder()
    features = Uncached(encoder, size=3)
    features.fill(source)
    assert torch.equal(features.get(source, ["5", "1", "5"]), expected([5, 1, 5]))
    assert torch.equal(features.get(source, ["2", "1"]), expected([2, 1]))
    assert encoder.asked == [5, 1, 2]
    features.get(source, ["9"])  # 5 is the one not used for longest
    assert torch.equal(features.get(source, ["1", "2", "9"]), expected([1, 2, 9]))
    assert encoder.asked == [5, 1, 2, 9]
    features.get(source, ["5"])
    features.get(Grey(fingerprint="other"), ["9"])
    assert encoder.asked == [5, 1, 2, 9, 5, 9]
