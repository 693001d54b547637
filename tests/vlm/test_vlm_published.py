"""`published=True`: exactly what the released code prints, beside the better text of the default."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vlm_files import CASES, CHAT, INSTANCES, V7W, write
from vlm_sources import ASKED, source

from vlm import prompts
from vlm.data import tasks
from vlm.data.records import Choice, Grounded, GroundedCaption, Span
from vlm.data.sources import FileSource
from vlm.data.turns import Rules
from vlm.prompts import END, INSTRUCTIONS, image_place

VQA, CHOICE, LOCATE = (INSTRUCTIONS[name] for name in ("vqa", "multiple choice", "grounding"))
MENTION = INSTRUCTIONS["grounded captioning"] + "\n"


def text_of(chunks):
    return "".join(f"<<{chunk.text}>>" if chunk.supervised else chunk.text for chunk in chunks)


def picture(folder):
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (100, 50)).save(folder / "images" / "v7w_1.jpg")


# --- prompts ------------------------------------------------------------------------------------------------

ASCII = st.text(st.characters(min_codepoint=10, max_codepoint=126, exclude_characters="|<"), min_size=1)


def released(text):
    """The released code's sentence, by Python's own capitalize()."""
    text = text.strip().capitalize()
    return text if text.endswith((".", "?", "!")) else text + "."


@given(st.lists(ASCII, min_size=2, max_size=4))
def test_published_conversations_are_sentences(texts):
    turns = [("human" if i % 2 == 0 else "gpt", text) for i, text in enumerate(texts)]
    found = prompts.chat(turns, published=True)
    ends = ["\n"] * (len(texts) - 1) + ["\n" + END]
    assert [chunk.text for chunk in found] == [released(t) + e for t, e in zip(texts, ends, strict=True)]
    assert [chunk.supervised for chunk in found] == [role == "gpt" for role, _ in turns]
    assert [c.text for c in prompts.chat(turns)] == [t.strip() + e for t, e in zip(texts, ends, strict=True)]


def test_published_conversations_lose_the_marker_after_they_are_made_sentences():
    last = prompts.chat([("human", "Who made it?\n<image>"), ("gpt", "It is by NASA")], published=True)
    assert text_of(last) == f"Who made it?.\n<<It is by nasa.\n{END}>>"
    first = prompts.chat([("human", "<image>\nWho made it?"), ("gpt", "Me")], published=True)
    assert text_of(first) == f"who made it?\n<<Me.\n{END}>>"  # the marker was its first character


@given(ASCII, ASCII, ASCII)
def test_published_captions_with_boxes_are_sentences(before, phrase, after):
    span = (len(before), len(before) + len(phrase), [(0, 0, 1, 1)])
    marked = f"{before}||{phrase} [0.00,0.00,0.50,0.50]||{after}"
    for published, wanted in ((True, released(marked)), (False, marked)):
        found = prompts.grounded_captioning(before + phrase + after, [span], 2, 2, published=published)
        assert found[1].text == wanted + END


def test_published_captions_may_begin_with_a_phrase():
    found = prompts.grounded_captioning("Red Cup here", [(0, 7, [(0, 0, 1, 1)])], 2, 2, published=True)
    assert found[1].text == f"||red cup [0.00,0.00,0.50,0.50]|| here.{END}"


def test_questions_that_keep_their_case_begin_with_a_capital_unless_published():
    asked = [("what is on p. A3", "iOS")]
    for published, first in ((False, "W"), (True, "w")):
        found = prompts.vqa(asked, keep_case=True, published=published)
        assert found[1].text == f"\nQuestion: {first}hat is on p. A3.\nAnswer: "
        assert found[2].text == f"iOS.{END}"


def test_published_boxes_are_rounded_after_they_were_scaled():
    """The released code: arrays of float64, times 336 / side, divided by 336."""
    differ = 0
    for side in (200, 400, 427, 480, 500, 640, 800):
        for x in range(side):
            box, scale = np.array([x, 0.0, side, 1.0]), np.array([336 / side, 336 / 10] * 2)
            shares = box * scale / np.array([336, 336] * 2)
            wanted = "[" + ",".join(f"{share:.2f}" for share in shares) + "]"
            assert prompts.box_text((x, 0, side, 1), side, 10, published=True) == wanted
            plain = prompts.box_text((x, 0, side, 1), side, 10)
            assert plain.startswith(f"[{x / side:.2f},")
            differ += plain != wanted
    assert differ > 10


def test_boxes_are_cut_at_the_far_edges_unless_published():
    box = (2, 3, 12, 10.1)
    assert prompts.box_text(box, 10, 10) == "[0.20,0.30,1.00,1.00]"
    assert prompts.box_text(box, 10, 10, published=True) == "[0.20,0.30,1.20,1.01]"
    head = dict(id="1", source="s", split="train", image="a.jpg", width=10, height=10)
    span = Span(start=0, end=1, boxes=(box,), score=1.0)
    region = Grounded(**head, phrase="p", box=box)
    shown = Choice(**head, question="q", choices=("a", "b"), answer=0, boxes=(box, box))
    for task, record in (
        (tasks.GROUNDING, region), (tasks.DENSE_CAPTIONING, region), (tasks.POINTING, shown),
        (tasks.GROUNDED_CAPTIONING, GroundedCaption(**head, caption="a b", spans=(span,))),
    ):  # fmt: skip
        for published, edge in ((False, "1.00"), (True, "1.20")):
            assert f",{edge}," in text_of(task.prompt([record], True, lambda _: (10, 10), published))


# --- samples ------------------------------------------------------------------------------------------------


def test_released_evaluators_wording(tmp_path):
    published = replace(ASKED, published=True)
    assert [c.text for c in source("pope", tmp_path, published)[0].chunks] == [VQA + "\n", "Q?\n"]
    source("textvqa", tmp_path)
    write(tmp_path, {"TextVQA_Rosetta_OCR_v0.2_val.json": {"data": []}})
    wordless = FileSource("textvqa", tmp_path, tmp_path, "val", rules=published)[0]
    assert text_of(wordless.chunks) == f"{VQA}\nOCR text:\n\nQuestion: Q?\nAnswer: "
    picture(tmp_path)
    question = V7W | {"question": " Which ONE"} | {"answer": 1, "multiple_choices": [2, 3, 4]}
    files = CASES["visual7w-pointing"][1] | {
        "dataset_v7w_pointing.json": {
            "images": [{"split": "val", "filename": "v7w_1.jpg", "image_id": 1, "qa_pairs": [question]}]
        }
    }
    write(tmp_path, files)
    asked = FileSource("visual7w-pointing", tmp_path, tmp_path / "images", "val", rules=published)[0]
    assert [c.text for c in asked.chunks[:2]] == [CHOICE, "\nQuestion: Which ONE.\n"]


@pytest.mark.parametrize("name", ["gqa", "textvqa", "visual7w-pointing"])
def test_the_image_stands_between_instruction_and_question(name, tmp_path):
    """Also in the released evaluators' wording. GPT-NeoX splits text at the chunks' ends by itself, so an
    evaluator that tokenises a prompt as one string, as the released ones of GQA and TextVQA, gives these ids.
    """
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    picture(tmp_path)
    chunks = source(name, tmp_path, replace(ASKED, published=True))[0].chunks
    before = image_place(chunks, "instruction-first")
    said = ["".join(c.text for c in part) for part in (chunks[:before], chunks[before:])]
    assert said[0].startswith((VQA, CHOICE)) and "Question:" not in said[0]
    assert said[1].startswith("\nQuestion: ")
    whole, ends = "".join(said), set()
    for piece, (_, stop) in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(whole):
        assert piece
        ends.add(stop)
    assert {len("".join(c.text for c in chunks[: i + 1])) for i in range(len(chunks))} <= ends


PUBLISHED = {  # name: (files of CASES that change, first chunks by default, first chunks as published)
    "llava-instruct": (
        {"llava_instruct_150k.json": [{**CHAT[0], "conversations": [
            {"from": "human", "value": "Is it NASA's\n<image>"}, {"from": "gpt", "value": "Yes, by NASA"},
        ]}]},
        ["Is it NASA's\n", f"Yes, by NASA\n{END}"], ["Is it nasa's.\n", f"Yes, by nasa.\n{END}"],
    ),
    "llava-pretrain": ({}, ["Say.\n", f"A dog.{END}"], ["Say.\n", f"A dog.{END}"]),
    "grit": (
        {"00000/1.json": {"caption": "see A dog", "width": 100, "height": 50,
                          "noun_chunks": [[4, 9, 0.5, 0, 1, 1, 0.9]]}},
        [MENTION, f"see ||A dog [0.50,0.00,1.00,1.00]||{END}"],
        [MENTION, f"See ||a dog [0.50,0.00,1.00,1.00]||.{END}"],
    ),
    "docvqa": (
        {"val_v1.0_withQT.json": {"data": [
            {"questionId": 1, "question": "what is on p. A3", "answers": ["iOS"], "image": "a.png"}]}},
        [VQA, "\nQuestion: What is on p. A3.\nAnswer: ", f"iOS.{END}"],
        [VQA, "\nQuestion: What is on p. A3.\nAnswer: ", f"iOS.{END}"],
    ),
    "infographicvqa": (
        {"infographicsVQA_val_v1.0_withQT.json": {"data": [
            {"questionId": 1, "question": "what is on p. A3", "answers": ["iOS"],
             "image_local_name": "a.png"}]}},
        [VQA, "\nQuestion: What is on p. A3.\nAnswer: ", f"iOS.{END}"],
        [VQA, "\nQuestion: what is on p. A3.\nAnswer: ", f"iOS.{END}"],
    ),
    "refcoco": (
        {"instances.json": {"images": [{**INSTANCES["images"][0], "width": 200}],
                            "annotations": [{"id": 3, "image_id": 7, "bbox": [0, 0, 55, 40]}]}},
        [LOCATE, "\nLeft dog.\n", f"[0.00,0.00,0.28,0.50].{END}"],
        [LOCATE, "\nLeft dog.\n", f"[0.00,0.00,0.27,0.50].{END}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_samples_are_the_released_ones_if_asked_for(name, tmp_path):
    split, files, _ = CASES[name]
    changed, *wanted = PUBLISHED[name]
    write(tmp_path, files | changed)
    for published, chunks in zip((False, True), wanted, strict=True):
        told = FileSource(name, tmp_path, tmp_path, split, rules=Rules(published=published))[0]
        assert [c.text for c in told.chunks] == chunks
        assert [c.supervised for c in told.chunks] == [*[False] * (len(chunks) - 1), True]
        asked = FileSource(name, tmp_path, tmp_path, split, rules=replace(ASKED, published=published))[0]
        assert [c.text for c in asked.chunks] == chunks[:-1]
