"""Samples of official files, against the published prompts written out by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_files import CASES, CHAT, INSTANCES, REF, TURNS, V7W, write
from vlm_sources import ASKED, questions, source

from vlm.data.sources import FileSource
from vlm.data.turns import Rules
from vlm.metrics.vqa import exact_match

END = "<|endoftext|>"
CAPTION = "Provide a one-sentence caption for the provided image.\n"
VQA = "Answer the question using a single word or phrase."
CHOICE = "Answer with the option's letter from the given choices directly."
LOCATE = "Locate the region that is described by:"
MATCH = "Determine if the image matches the description:\n"
MENTION = "Provide a one-sentence caption for the image and mention each entity.\n"
DESCRIBE = "Provide a short description of the region:\n"

ABCD = "A: A\nB: B\nC: C\nD: D\nAnswer: "

# name: (prompt, answer, target of evaluation) of the first sample of the files of `test_vlm_data`
EXPECTED = {
    "coco": (CAPTION, "A dog.", {"captions": ["A dog."], "domain": None}),
    "nocaps": (CAPTION, "A.", {"captions": ["A.", "B."], "domain": "near-domain"}),
    "textcaps": (CAPTION, "A.", {"captions": ["A.", "B."], "domain": None}),
    "vqav2": (f"{VQA}\nQuestion: Q?\nAnswer: ", "Red.", {"answers": ["red"] * 10, "kind": "other"}),
    "gqa": (f"{VQA}\nQuestion: Q?\nAnswer: ", "Yes.", {"answers": ["yes"], "kind": None}),
    "vsr": (f"{MATCH}C.\n", "False.", {"label": False, "relation": "under"}),
    "pope": (
        f"{VQA}\nQuestion: Q?\nAnswer: ",
        "No.",
        {"answers": ["no"], "kind": "random", "label": False},
    ),
    **{
        name: (
            f"{LOCATE}\nLeft dog.\n",
            "[0.10,0.25,0.40,0.75].",
            {"box": [10, 20, 40, 60], "width": 100, "height": 80},
        )
        for name in ("refcoco", "refcoco+", "refcocog")
    },
    "visual-genome-regions": (
        f"{LOCATE}\nP.\n",
        "[0.00,0.04,0.08,0.16].",
        {"box": [0, 2, 4, 8], "width": 50, "height": 50},
    ),
    "visual-genome-qa": (f"{VQA}\nQuestion: Q?\nAnswer: ", "A.", {"answers": ["A."], "kind": None}),
    "grit": (
        MENTION,
        "||a dog [0.50,0.00,1.00,1.00]|| and ||a cat [0.00,0.00,0.50,0.50]||",
        {
            "caption": "a dog and a cat",
            "spans": [[0, 5, [[50, 0, 100, 50]]], [10, 15, [[0, 0, 50, 25]]]],
        },
    ),
    "textvqa": (
        f"{VQA}\nOCR text:\nSTOP\nQuestion: Q?\nAnswer: ",
        "Stop.",
        {"answers": ["stop"] * 10, "kind": None},
    ),
    "docvqa": (f"{VQA}\nQuestion: Q?\nAnswer: ", "12.", {"answers": ["12"], "kind": None}),
    "infographicvqa": (f"{VQA}\nQuestion: Q?\nAnswer: ", "12.", {"answers": ["12"], "kind": None}),
    "ocr-vqa": (f"{VQA}\nQuestion: Q?\nAnswer: ", "A.", {"answers": ["A"], "kind": None}),
    "easy-vqa": (
        f"{VQA}\nQuestion: Is there a red shape?\nAnswer: ",
        "Yes.",
        {"answers": ["yes"], "kind": "yes/no"},
    ),
    "aokvqa": (f"{CHOICE}\nQuestion: Q?\n{ABCD}", "C.", {"choices": list("abcd"), "answer": 2}),
    "ai2d": (
        f"{CHOICE}\nOCR text:\nB: leaf\nQuestion: Q?\n{ABCD}",
        "D.",
        {"choices": list("abcd"), "answer": 3},
    ),
    "llava-pretrain": ("Say.\n", "A dog.", {"text": "A dog."}),
    "llava-instruct": ("Say.\n", "A dog.\n", {"text": "A dog."}),
}
ONE_ORDER = Rules(every_slot=False)


def picture(folder, name, size=(100, 50)):
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 10, 30)).save(path)


def texts(sample):
    """Prompt and answers: (what is not supervised, what is)."""
    return tuple(
        "".join(chunk.text for chunk in sample.chunks if chunk.supervised == told) for told in (False, True)
    )


def test_every_data_set_is_written_out():
    assert EXPECTED.keys() | {"visual7w-telling", "visual7w-pointing"} == CASES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_training_and_evaluation_have_the_published_words(name, tmp_path):
    prompt, answer, target = EXPECTED[name]
    told = source(name, tmp_path, ONE_ORDER)[0]
    first = "".join(chunk.text for chunk in told.chunks[: [c.supervised for c in told.chunks].index(True)])
    assert (first, texts(told)[1].split(END)[0], told.target) == (prompt, answer, {})
    assert told.chunks[-1].text.endswith(END) and told.source == name
    asked = source(name, tmp_path, ASKED)[0]
    assert texts(asked) == (prompt, "") and asked.target == target
    assert (asked.image, asked.task) == (told.image, told.task)


def test_choices_are_read_from_the_record(tmp_path):
    asked = source("visual7w-telling", tmp_path, ASKED)[0]
    choices = asked.target["choices"]
    assert choices[asked.target["answer"]] == "a" and sorted(choices) == list("abcd")
    printed = "".join(f"{letter}: {c.upper()}\n" for letter, c in zip("ABCD", choices, strict=True))
    assert texts(asked) == (f"{CHOICE}\nQuestion: Q?\n{printed}Answer: ", "")


def test_pointing_reads_the_size_from_the_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"v7w_1\.jpg is missing: visual7w-pointing needs it"):
        source("visual7w-pointing", tmp_path, ASKED)
    picture(tmp_path, "v7w_1.jpg", (10, 20))
    asked = source("visual7w-pointing", tmp_path, ASKED)[0]
    target = asked.target
    assert (target["width"], target["height"]) == (10, 20)
    assert target["boxes"][target["answer"]] == [0, 1, 3, 6]  # box 1 of the file is the right one
    assert f"{'ABCD'[target['answer']]}: [0.00,0.05,0.30,0.30].\n" in texts(asked)[0]


@pytest.mark.parametrize("name", ["vqav2", "gqa"])
def test_questions_of_an_image_are_packed_twenty_a_sample(name, tmp_path):
    images = [(i, 1 if name == "vqav2" or i % 2 else 2) for i in range(46)]
    write(tmp_path, questions(name, images))
    found = FileSource(name, tmp_path, tmp_path, "train")
    assert [len(s.chunks) for s in found] == ([41, 41, 13] if name == "vqav2" else [41, 7, 41, 7])
    for i, sample in enumerate(found):  # GQA's file scatters an image's questions
        asked = [c.text for c in sample.chunks[1::2]]
        first = 20 * i if name == "vqav2" else (0 if i < 2 else 1) + 40 * (i % 2)
        step = 1 if name == "vqav2" else 2
        numbers = [first + step * k for k in range(len(asked))]
        assert asked == [f"\nQuestion: N{n}?\nAnswer: " for n in numbers]
        assert [c.text for c in sample.chunks[2::2]] == [f"{n}.{END}" for n in numbers]  # most frequent
    assert len({sample.id for sample in found}) == len(found)
    assert len(FileSource(name, tmp_path, tmp_path, "train", rules=ASKED)) == 46


def test_captions_are_samples_of_their_own(tmp_path):
    found = source("nocaps", tmp_path)
    assert [texts(sample)[1] for sample in found] == [f"A.{END}", f"B.{END}"]
    assert [sample.id for sample in found] == ["7#0", "7#1"] and found.keys() == ["COCO_7.jpg"]


@pytest.mark.parametrize("name", ["aokvqa", "ai2d"])
def test_each_slot_has_the_right_choice_once(name, tmp_path):
    if name == "ai2d":
        write(tmp_path, CASES["ai2d"][1])
        found = FileSource(name, tmp_path, tmp_path, "test")
    else:
        found = source(name, tmp_path)
    right = "abcd"[EXPECTED[name][2]["answer"]]
    slots = []
    for sample in found:
        letter = texts(sample)[1][0]
        offered = dict(
            line.split(": ") for line in texts(sample)[0].split("Question: Q?\n")[1].splitlines()[:-1]
        )
        assert offered[letter] == right.upper() and sorted(offered.values()) == list("ABCD")
        moved = [place for place, choice in offered.items() if choice != place]
        assert len(moved) in (0, 2)  # the right choice has changed places with the one in the slot
        slots.append(letter)
    assert sorted(slots) == list("ABCD") and len({sample.id for sample in found}) == 4


def test_visual7w_packs_different_questions(tmp_path):
    qas = [
        V7W | {"qa_id": i, "question": f"q{i}?", "answer": "a", "multiple_choices": ["b", "c", "d"]}
        for i in range(5)
    ]
    content = {"images": [{"split": "train", "filename": "a.jpg", "image_id": 1, "qa_pairs": qas}]}
    write(tmp_path, {"dataset_v7w_telling.json": content})
    found = FileSource("visual7w-telling", tmp_path, tmp_path, "train")
    seen = []
    for sample in found:
        turns = texts(sample)[0].split("Question: ")[1:]
        answers = texts(sample)[1].split(END)[:-1]
        assert len(turns) == len(answers) <= 3
        assert len({turn.split("?")[0] for turn in turns}) == len(turns)
        for turn, answer in zip(turns, answers, strict=True):
            assert f"{answer[0]}: A\n" in turn
            seen.append((turn.split("?")[0], answer[0]))
    assert sorted(seen) == [(f"Q{i}", letter) for i in range(5) for letter in "ABCD"]


def test_expressions_of_one_box_are_in_different_samples(tmp_path):
    refs = [
        REF | {"ann_id": ann, "split": "train"}
        | {"sentences": [{"sent_id": 10 * ann + i, "raw": f"thing {ann} {i}"} for i in range(count)]}
        for ann, count in ((3, 2), (4, 1), (5, 3))
    ]  # fmt: skip
    boxes = [{"id": i, "image_id": 7, "bbox": [i, i, 9, 9]} for i in (3, 4, 5)]
    write(tmp_path, {"refs(unc).p": refs, "instances.json": INSTANCES | {"annotations": boxes}})
    found = FileSource("refcoco", tmp_path, tmp_path, "train")
    phrases = [[c.text.strip() for c in sample.chunks[1::2]] for sample in found]
    assert phrases == [
        ["Thing 3 0.", "Thing 4 0.", "Thing 5 0."],
        ["Thing 3 1.", "Thing 5 1."],
        ["Thing 5 2."],
    ]
    last = FileSource("refcoco", tmp_path, tmp_path, "train", expressions="last")
    assert [[c.text.strip() for c in s.chunks[1::2]] for s in last] == [
        ["Thing 3 1.", "Thing 4 0.", "Thing 5 2."]
    ]


def test_regions_may_be_described(tmp_path):
    told = source("visual-genome-regions", tmp_path, Rules(regions="dense captioning"))[0]
    assert texts(told) == (f"{DESCRIBE}[0.00,0.04,0.08,0.16].\n", f"P.\n{END}")
    asked = source("visual-genome-regions", tmp_path, replace(ASKED, regions="dense captioning"))[0]
    assert texts(asked)[1] == "" and asked.target == {"box": [0, 2, 4, 8], "captions": ["p"]}


def test_grit_keeps_the_spans_that_can_be_printed(tmp_path):
    chunks = [
        [0, 5, 0, 0, 0.5, 0.5, 0.9],
        [2, 5, 0, 0, 0.5, 0.5, 0.9],  # inside the one before
        [10, 15, 0.5, 0.5, 0.5, 1, 0.9],  # no width
        [10, 99, 0, 0, 1, 1, 0.9],  # ends behind the caption
    ]
    row = {"caption": "a dog and a cat", "width": 100, "height": 50, "noun_chunks": chunks}
    write(tmp_path, {"0/1.json": row, "0/1.jpg": "", "1/0.json": row | {"noun_chunks": []}, "1/0.jpg": ""})
    found = FileSource("grit", tmp_path, tmp_path, "train")
    assert texts(found[0])[1] == f"||a dog [0.00,0.00,0.50,0.50]|| and a cat{END}"
    assert texts(found[1])[1] == f"a dog and a cat{END}" and found.keys() == ["0/1.jpg", "1/0.jpg"]


def test_conversations_supervise_the_model_only(tmp_path):
    write(tmp_path, {"llava_instruct_150k.json": [CHAT[0] | {"conversations": TURNS + TURNS}]})
    (told,) = FileSource("llava-instruct", tmp_path, tmp_path, "train")
    assert [(c.text, c.supervised) for c in told.chunks] == [
        ("Say.\n", False), ("A dog.\n", True), ("Say.\n", False), (f"A dog.\n{END}", True),
    ]  # fmt: skip


def test_pictures_are_rgb_and_missing_ones_are_named(tmp_path):
    picture(tmp_path, "val2014/a.jpg", (6, 4))
    found = source("coco", tmp_path)
    (key,) = found.keys()
    assert found.picture(key).shape == (4, 6, 3) and found.picture(key).dtype == np.uint8
    Image.new("L", (6, 4), 77).save(tmp_path / "images" / "grey.png")
    assert (found.picture("grey.png") == 77).all()
    with pytest.raises(FileNotFoundError, match=r"no\.jpg is missing: coco needs it"):
        found.picture("no.jpg")
    (tmp_path / "images" / "bad.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be read") as error:
        found.picture("bad.jpg")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["vqav2", "aokvqa"])
def test_hidden_answers_cannot_be_trained_on(name, tmp_path):
    if name == "vqav2":
        asked = {"questions": [{"question_id": 9, "image_id": 7, "question": "Q?"}]}
        write(tmp_path, {"v2_OpenEnded_mscoco_test2015_questions.json": asked})
    else:
        row = {"question_id": "q", "image_id": 7, "question": "Q?", "choices": list("abcd")}
        write(tmp_path, {"aokvqa_v1p0_test.json": [row]})
    with pytest.raises(ValueError, match=r"split 'test' has no answers"):
        FileSource(name, tmp_path, tmp_path, "test")
    assert len(FileSource(name, tmp_path, tmp_path, "test", rules=ASKED)) == 1


def test_a_split_without_samples_is_named(tmp_path):
    write(tmp_path, CASES["coco"][1])
    with pytest.raises(ValueError, match=r"coco has nothing to train on in split 'test'"):
        FileSource("coco", tmp_path, tmp_path, "test")
    with pytest.raises(ValueError, match="unknown"):
        FileSource("cocoo", tmp_path, tmp_path, "test", index_folder=tmp_path / "index")


def test_targets_are_json(tmp_path):
    asked = source("refcoco", tmp_path, ASKED)[0]
    assert json.loads(json.dumps(asked.target)) == asked.target


def test_the_documents_snippet_trains_on_official_files(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(from vlm.data.cache .*?)```", page, flags=re.DOTALL)
    karpathy = CASES["coco"][1]["dataset_coco.json"]["images"][0] | {"split": "train"}
    write(tmp_path / "annotations" / "coco", {"dataset_coco.json": {"images": [karpathy]}})
    refs = [
        REF | {"split": split, "sentences": [{"sent_id": 1, "raw": "dog"}]} for split in ("train", "testA")
    ]
    write(tmp_path / "annotations" / "refcoco", {"refs(unc).p": refs, "instances.json": INSTANCES})
    for name in ("val2014/a.jpg", "train2014/COCO_7.jpg"):
        path = tmp_path / "images" / "coco" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (100, 80)).save(path)
    monkeypatch.chdir(tmp_path)
    names = {
        "tokenize": lambda text: list(text.encode()),
        "encode_pictures": lambda pictures: torch.zeros(len(pictures), 24 * 24, 2),
    }
    exec(snippet, names)
    batch = next(names["found"])
    assert batch.features.shape == (32, 576, 2) and batch.input_ids.shape[0] == 32
    assert {sample.task for sample in batch.samples} == {"captioning", "grounding"}
    assert names["test"][0].target == {"box": [10, 20, 40, 60], "width": 100, "height": 80}


# --- GQA's metric -------------------------------------------------------------------------------------------


def test_exact_match():
    assert exact_match("Red.", "red") == exact_match(" to the left. ", "to the left") == 1.0
    assert exact_match("Reddish.", "red") == exact_match("", "red") == exact_match("the red", "red") == 0.0
    assert exact_match("Mr. x", "mr. x") == 1.0
