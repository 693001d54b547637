"""What is left out of official files, and what is read by number from an index on disk."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image
from vlm_files import CASES, write
from vlm_sources import ASKED, questions, source

from vlm.data.sources import FileSource

# --- what the published data leave out ----------------------------------------------------------------------


def test_large_regions_are_left_out(tmp_path):
    regions = [
        {"region_id": i, "phrase": f"p{i}", "x": 0, "y": 0, "width": width, "height": 128}
        for i, width in enumerate((128, 129))
    ]
    files = CASES["visual-genome-regions"][1] | {"region_descriptions.json": [{"id": 2, "regions": regions}]}
    write(tmp_path, files)
    (told,) = FileSource("visual-genome-regions", tmp_path, tmp_path, "train", filtered=True)
    assert told.id == "0"
    (both,) = FileSource("visual-genome-regions", tmp_path, tmp_path, "train")
    assert len(both.chunks) == 5


def test_grit_is_balanced_by_phrase(tmp_path):
    def image(caption, width=100):
        spans = [[0, len(caption), 0, 0, 1, 1, 0.9]]
        return {"caption": caption, "width": width, "height": 100, "noun_chunks": spans}

    captions = ["The Dog"] * 10 + ["a dog"] * 10 + ["cat"] * 2 + ["some fish"] * 3
    rows = {f"0/{i:02d}.json": image(caption) for i, caption in enumerate(captions)}
    rows |= {f"0/small{i}.json": image("bird", width=99) for i in range(4)}
    write(tmp_path, rows | {name.replace("json", "jpg"): "" for name in rows})
    found = FileSource("grit", tmp_path, tmp_path, "train", filtered=True)
    kept = [captions[int(sample.id)].lower().split()[-1] for sample in found]
    assert (kept.count("dog"), kept.count("fish"), len(kept)) == (8, 3, 11)
    assert [s.id for s in found] == [s.id for s in FileSource("grit", tmp_path, "", "train", filtered=True)]
    assert len(FileSource("grit", tmp_path, tmp_path, "train")) == 29


def test_grit_leaves_out_pictures_that_were_small_originally(tmp_path):
    """img2dataset may have enlarged them; the released script looks at both sizes. Others do not say."""
    sizes = {"a": (99, 200), "b": (200, 99), "c": (100, 100), "d": (50, 50), "e": None, "f": (640, 480)}
    rows = {}
    for key, size in sizes.items():
        said = {} if size is None else {"original_width": size[0], "original_height": size[1]}
        span = [0, 3, 0, 0, 1, 1, 0.9]
        rows[f"0/{key}.json"] = {"caption": "cat", "width": 256, "height": 256, "noun_chunks": [span]} | said
        rows[f"0/{key}.jpg"] = ""
    write(tmp_path, rows)
    assert [s.id for s in FileSource("grit", tmp_path, "", "train", filtered=True)] == ["c", "e", "f"]
    assert len(FileSource("grit", tmp_path, "", "train")) == 6


def test_covers_that_show_nothing_are_left_out(tmp_path):
    book = {"questions": ["Q?", "R?"], "answers": ["A", "B"], "split": 2}
    names = ("good", "plain", "small", "missing", "broken", "twice", "again")
    rows = {name: book | {"imageURL": f"h/{name}.png"} for name in names}
    rows["again"]["imageURL"] = "h/twice.png"
    write(tmp_path, {"dataset.json": rows})
    for name, size, colours in (
        ("good", (351, 400), 0.8), ("twice", (400, 400), 0.5), ("again", (400, 400), 0.5),
        ("plain", (400, 400), 0.86), ("small", (350, 400), 0.5),
    ):  # fmt: skip
        pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        pixels[: round(colours * size[1])] = 7
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "images" / "broken.png").write_text("not a picture")
    (told,) = FileSource("ocr-vqa", tmp_path, tmp_path, "val", filtered=True)
    assert told.image == "images/good.png" and len(told.chunks) == 5
    assert len(FileSource("ocr-vqa", tmp_path, tmp_path, "val")) == len(names)


def cover(path, size=(360, 360)):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_an_address_may_come_again_in_another_split(tmp_path):
    """The released reader counts addresses among the books of the split."""
    book = {"questions": ["Q?"], "answers": ["A"], "imageURL": "h/one.png"}
    write(tmp_path, {"dataset.json": {"a": book | {"split": 2}, "b": book | {"split": 1}}})
    for key in "abc":
        cover(tmp_path / "images" / f"{key}.png")
    (told,) = FileSource("ocr-vqa", tmp_path, tmp_path, "val", filtered=True)
    assert told.image == "images/a.png"
    write(tmp_path, {"dataset.json": {"a": book | {"split": 2}, "c": book | {"split": 2}}})
    with pytest.raises(ValueError, match="nothing to train on"):
        FileSource("ocr-vqa", tmp_path, tmp_path, "val", filtered=True)


def test_articles_are_found_at_the_ends_of_words(tmp_path):
    """The released code takes them out wherever \\b stands around them: "a-frame" is "-frame"."""
    captions = ["an-arch", "The -ARCH", "-arch", "some  a -arch"]
    rows = {
        f"0/{i}.json": {
            "caption": caption, "width": 100, "height": 100,
            "noun_chunks": [[0, len(caption), 0, 0, 1, 1, 0.9]],
        }
        for i, caption in enumerate(captions)
    }  # fmt: skip
    write(tmp_path, rows | {name.replace("json", "jpg"): "" for name in rows})
    assert len(FileSource("grit", tmp_path, tmp_path, "train", filtered=True)) == len(captions)


def test_other_data_sets_lose_nothing(tmp_path):
    assert list(source("gqa", tmp_path, filtered=True)) == list(source("gqa", tmp_path))


# --- the index on disk --------------------------------------------------------------------------------------


def test_an_index_on_disk_is_used_again_and_notices_other_files(tmp_path, monkeypatch):
    index = tmp_path / "index"
    write(tmp_path, questions("vqav2", [(i, i) for i in range(30)]))
    in_memory = FileSource("vqav2", tmp_path, tmp_path, "train")
    first = FileSource("vqav2", tmp_path, tmp_path, "train", index_folder=index)
    assert list(first) == list(in_memory) and len(first) == 30
    with monkeypatch.context() as patched:
        patched.setattr("vlm.data.registry.read", None)  # nothing may be read again
        again = FileSource("vqav2", tmp_path, tmp_path, "train", index_folder=index)
        assert list(again) == list(in_memory)
        copy = pickle.loads(pickle.dumps(again))
        assert copy[17] == in_memory[17] and pickle.loads(pickle.dumps(in_memory))[17] == in_memory[17]
    assert len(FileSource("vqav2", tmp_path, tmp_path, "train", rules=ASKED, index_folder=index)) == 30
    write(tmp_path, questions("vqav2", [(i, i) for i in range(31)]))
    assert len(FileSource("vqav2", tmp_path, tmp_path, "train", index_folder=index)) == 31
    with pytest.raises(IndexError):
        first[30]


def test_an_index_notices_pictures_that_come_or_change_later(tmp_path):
    book = {"questions": ["Q?"], "answers": ["A"], "split": 2}
    rows = {key: book | {"imageURL": f"h/{key}.png"} for key in ("first", "cut", "late")}
    write(tmp_path, {"dataset.json": rows})
    for key in ("first", "cut"):
        cover(tmp_path / "images" / f"{key}.png")
    whole = (tmp_path / "images" / "cut.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[:1000])

    def kept():
        more = dict(filtered=True, index_folder=tmp_path / "index")  # beside the pictures
        return [s.image.split("/")[1] for s in FileSource("ocr-vqa", tmp_path, tmp_path, "val", **more)]

    assert kept() == kept() == ["first.png"]
    assert len(list((tmp_path / "index").glob("*.npy"))) == 1  # which the index itself does not change
    cover(tmp_path / "images" / "late.png")
    assert kept() == ["first.png", "late.png"]
    (tmp_path / "images" / "cut.png").write_bytes(whole)
    assert kept() == ["first.png", "cut.png", "late.png"]


def test_an_index_notices_pictures_of_another_size(tmp_path):
    write(tmp_path, CASES["visual7w-pointing"][1])

    def width():
        made = FileSource(
            "visual7w-pointing", tmp_path, tmp_path / "images", "val", rules=ASKED,
            index_folder=tmp_path / "index",
        )  # fmt: skip
        return made[0].target["width"]

    cover(tmp_path / "images" / "v7w_1.jpg", (10, 20))
    assert width() == 10
    cover(tmp_path / "images" / "v7w_1.jpg", (30, 20))
    assert width() == 30


def test_an_index_notices_diagrams_that_come_later(tmp_path):
    files = CASES["ai2d"][1]
    write(tmp_path, files)

    def found():
        return len(FileSource("ai2d", tmp_path, "", "test", rules=ASKED, index_folder=tmp_path / "index"))

    assert found() == 1
    row = {"questionId": "12-1", "answerTexts": ["a", "b"], "correctAnswer": 0}
    write(tmp_path, {
        "ai2d/annotations/12.jpg.json": files["ai2d/annotations/12.png.json"],
        "ai2d/questions/12.jpg.json": {"questions": {"R?": row}},
    })  # fmt: skip
    assert found() == 2


def test_a_damaged_index_is_one_line(tmp_path):
    index = tmp_path / "index"
    source("coco", tmp_path, index_folder=index)
    (path,) = index.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"damaged .* delete .*coco-val.*\.\*") as error:
        FileSource("coco", tmp_path, tmp_path / "images", "val", index_folder=index)
    assert "\n" not in str(error.value)


def test_an_interrupted_index_is_made_anew(tmp_path):
    rows = CASES["coco"][1]["dataset_coco.json"]["images"]
    write(tmp_path, {"dataset_coco.json": {"images": [*rows, {"split": "val"}]}})
    with pytest.raises(ValueError, match="cocoid"):
        FileSource("coco", tmp_path, tmp_path, "val", index_folder=tmp_path / "index")
    assert not list((tmp_path / "index").glob("*.npy")) and not list((tmp_path / "index").glob("*.jsonl"))
    assert len(source("coco", tmp_path, index_folder=tmp_path / "index")) == 1
