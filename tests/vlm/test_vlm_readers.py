"""Official files as they are found: older releases, files of two releases, odd entries, a byte order mark."""

from __future__ import annotations

import pytest
from vlm_files import CASES, CHAT, GENOME, INSTANCES, PAGE, REFS, TURNS, v7w, write

from ssm_retrieval.errors import UserError
from vlm.data.files import WrongFile
from vlm.data.registry import read

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", CASES)
def test_a_byte_order_mark_changes_nothing(name, tmp_path):
    split, files, _ = CASES[name]
    for folder in ("plain", "marked"):
        write(tmp_path / folder, files)
    for file in files:
        path = tmp_path / "marked" / file
        if path.suffix not in (".p", ".jpg"):
            path.write_bytes(BOM + path.read_bytes())
    plain, marked = (list(read(name, tmp_path / folder, split)) for folder in ("plain", "marked"))
    assert plain == marked != []


@pytest.mark.parametrize("content", [b"\xff\xfe1\n", b"12\n\x80"])
def test_a_list_that_is_no_text_is_named(tmp_path, content):
    write(tmp_path, CASES["ai2d"][1])
    (tmp_path / "ai2d_test_ids.csv").write_bytes(content)
    with pytest.raises(WrongFile, match=r"ai2d_test_ids\.csv is not UTF-8 text .*; download it again"):
        list(read("ai2d", tmp_path, "test"))


# --- files that do not belong together ----------------------------------------------------------------------

QUESTIONS, ANSWERS = CASES["vqav2"][1]
ANSWER = CASES["vqav2"][1][ANSWERS]["annotations"][0]
BOX_FREE = {"images": INSTANCES["images"], "annotations": []}
STRAYS = {  # (data set, files that change, the file that lacks something, what it lacks)
    "answer_type": ("vqav2", {ANSWERS: {"annotations": [{"question_id": 9, "answers": []}]}}, ANSWERS,
                    "an entry has no 'answer_type'"),
    "other answers": ("vqav2", {ANSWERS: {"annotations": [ANSWER | {"question_id": 8}]}}, ANSWERS,
                      "has no answers to question 9"),
    "no answers": ("vqav2", {ANSWERS: {"annotations": []}}, ANSWERS, "has no answers to question 9"),
    "no captions": ("nocaps", {"nocaps_val_4500_captions.json": {
        "images": INSTANCES["images"], "annotations": []}}, "nocaps_val_4500_captions.json",
        "has no captions of image 7"),
    "no image": ("refcoco", {"instances.json": INSTANCES | {"images": []}}, "instances.json",
                 "has no image 7"),
    "no box": ("refcoco", {"instances.json": BOX_FREE}, "instances.json", "has no annotation 3"),
    "an empty box": ("refcoco", {"instances.json": BOX_FREE | {
        "annotations": [{"id": 3, "image_id": 7, "bbox": [1, 2, 3, 0]}]}}, "instances.json",
        "width=3 height=0 is empty"),
    "a choice": ("visual7w-pointing", {"v7w_pointing_answers.json": {"boxes": []}},
                 "v7w_pointing_answers.json", "has no box"),
}  # fmt: skip


@pytest.mark.parametrize("how", STRAYS)
def test_the_file_that_lacks_something_is_named(tmp_path, how):
    name, changed, file, lacks = STRAYS[how]
    split, files, _ = CASES[name]
    write(tmp_path, files | changed)
    with pytest.raises(UserError) as raised:
        list(read(name, tmp_path, split))
    said = str(raised.value)
    assert said.startswith(f"{tmp_path / file}") and lacks in said and "\n" not in said
    assert not any(other in said for other in files if other != file)


# --- what only some releases have ---------------------------------------------------------------------------


def test_captions_without_domains_are_read(tmp_path):
    content = {"images": INSTANCES["images"], "annotations": [{"image_id": 7, "caption": "A."}]}
    write(tmp_path, {"nocaps_val_4500_captions.json": content})
    (record,) = read("nocaps", tmp_path, "val")
    assert (record.domain, record.captions) == (None, ("A.",))


def test_boxes_of_pointing_questions_are_in_their_file_or_in_another_archive(tmp_path):
    boxes = [{"box_id": i, "name": f"n{i}", "x": i, "y": 0, "width": 5, "height": 5} for i in range(1, 5)]
    write(tmp_path, {"dataset_v7w_pointing.json": v7w(1, [2, 3, 4])})
    with pytest.raises(FileNotFoundError, match=r"Visual7W's dataset_v7w_grounding_annotations\.zip"):
        list(read("visual7w-pointing", tmp_path, "val"))
    write(tmp_path, {"v7w_pointing_answers.json": {"boxes": boxes}})
    (elsewhere,) = read("visual7w-pointing", tmp_path, "val")
    (tmp_path / "v7w_pointing_answers.json").unlink()
    write(tmp_path, {"dataset_v7w_pointing.json": v7w(1, [2, 3, 4]) | {"boxes": boxes}})
    (inside,) = read("visual7w-pointing", tmp_path, "val")
    assert inside == elsewhere and inside.boxes[inside.answer] == (1, 0, 6, 5)
    assert sorted(inside.choices) == ["n1", "n2", "n3", "n4"]
    assert inside.choices[inside.answer] == "n1"


# --- odd entries --------------------------------------------------------------------------------------------


def test_boxes_that_nothing_refers_to_may_be_empty(tmp_path):
    """COCO train2014 has boxes of no height, such as annotation 918."""
    empty = [{"id": i, "image_id": 7, "bbox": box} for i, box in ((918, [1, 2, 30, 0]), (919, [1, 2, 0, 3]))]
    others = INSTANCES | {"annotations": [*empty, *INSTANCES["annotations"]]}
    for file in ("refs(unc).p", "refs(umd).p"):
        write(tmp_path, {file: REFS, "instances.json": others})
    for name in ("refcoco", "refcoco+", "refcocog"):
        assert [r.box for r in read(name, tmp_path, "val")] == [(10, 20, 40, 60)] * 2


def test_regions_outside_their_image_are_left_out(tmp_path):
    """The image has 50 x 50 pixels."""
    inside = [(0, 0, 5, 5), (-3, -3, 5, 5), (49, 49, 9, 9)]
    outside = [(50, 0, 5, 5), (0, 50, 5, 5), (56, 1, 3, 2), (-5, 0, 5, 5), (0, -5, 5, 5), (1, 1, 0, 5),
               (1, 1, 5, -1)]  # fmt: skip
    regions = [
        {"region_id": i, "phrase": "p", "x": x, "y": y, "width": width, "height": height}
        for i, (x, y, width, height) in enumerate([*inside, *outside])
    ]
    write(tmp_path, GENOME | {"region_descriptions.json": [{"id": 2, "regions": regions}]})
    found = list(read("visual-genome-regions", tmp_path, "train"))
    assert [r.id for r in found] == ["0", "1", "2"]
    assert [r.box for r in found] == [(0, 0, 5, 5), (0, 0, 2, 2), (49, 49, 58, 58)]


GPT_FIRST = [TURNS[1], *TURNS]
SYSTEM = [{"from": "system", "value": "s"}, *TURNS]
MIXED = [
    {"id": "odd", "conversations": [*TURNS, TURNS[0]]},
    {"id": "gpt first", "conversations": GPT_FIRST},
    {"id": "system", "conversations": SYSTEM},
    {"id": "null", "image": None, "conversations": TURNS},
    {"id": "nothing", "image": "", "conversations": TURNS},
]


@pytest.mark.parametrize("name", ["llava-pretrain", "llava-instruct"])
def test_conversations_without_an_image_are_left_out_whatever_their_turns(tmp_path, name):
    (file,) = CASES[name][1]
    write(tmp_path, {file: [*MIXED, *CHAT]})
    (record,) = read(name, tmp_path, "train")
    assert record.id == "1" and [t.role for t in record.turns] == ["human", "assistant"]
    for turns in (GPT_FIRST, SYSTEM, TURNS[:1], []):
        write(tmp_path, {file: [CHAT[0] | {"id": "b", "conversations": turns}]})
        with pytest.raises(UserError, match=rf"{file}: .*the turns of b do not alternate from human to gpt"):
            list(read(name, tmp_path, "train"))


def test_words_of_a_diagram_are_in_the_order_of_their_labels(tmp_path):
    """The letters are what the answers name; the boxes' keys T0, T1, T10, T2 say nothing."""
    rows = {"T0": ("E", "leaf"), "T1": ("B", "root"), "T10": ("A", "stem"), "T2": ("C", "bud")}
    text = {key: {"replacementText": label, "value": value} for key, (label, value) in rows.items()}
    write(tmp_path, CASES["ai2d"][1] | {"ai2d/annotations/12.png.json": {"text": text}})
    (record,) = read("ai2d", tmp_path, "test")
    assert record.ocr == ("A: stem", "B: root", "C: bud", "E: leaf")


@pytest.mark.parametrize(("name", "file", "image", "first"), [
    ("docvqa", "val_v1.0_withQT.json", "image", "What"),
    ("infographicvqa", "infographicsVQA_val_v1.0_withQT.json", "image_local_name", "what"),
])  # fmt: skip
def test_questions_on_documents_begin_as_in_the_released_readers(tmp_path, name, file, image, first):
    write(tmp_path, {file: {"data": [PAGE | {image: "a.png", "question": "what is on p. A3?"}]}})
    (record,) = read(name, tmp_path, "val")
    assert record.question == f"{first} is on p. A3?"
