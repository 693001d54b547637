"""Prompts, boxes and the image's place, against the published formats and the hashes of the instructions."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm import layout, prompts
from vlm.prompts import END, LAYOUTS, Chunk

PUBLISHED = {  # length and first 16 hex digits of SHA-256 of the released strings
    "captioning": (54, "494392f0754c0f3a"),
    "grounded captioning": (69, "a31fae47c0bc111e"),
    "vqa": (50, "c0525726b5f85518"),
    "multiple choice": (64, "47c8841afab3019f"),
    "dense captioning": (42, "d0627f6d7fc89a30"),
    "grounding": (39, "9603ebe90fa79c33"),
    "image-text match": (47, "39e216b607dda711"),
}


def encode(text):
    return [ord(letter) for letter in text]


def text_of(chunks):
    return "".join(f"<<{chunk.text}>>" if chunk.supervised else chunk.text for chunk in chunks)


def test_instructions_are_the_released_ones():
    found = {
        name: (len(text), hashlib.sha256(text.encode()).hexdigest()[:16])
        for name, text in prompts.INSTRUCTIONS.items()
    }
    assert found == PUBLISHED


def test_every_task_has_the_published_form():
    i = prompts.INSTRUCTIONS
    assert text_of(prompts.captioning("a DOG runs ")) == f"{i['captioning']}\n<<A dog runs.{END}>>"
    assert text_of(prompts.captioning()) == i["captioning"] + "\n"
    found = prompts.vqa([("what colour?", "Red"), ("How MANY", None)])
    assert text_of(found) == (
        f"{i['vqa']}\nQuestion: What colour?\nAnswer: <<Red.{END}>>\nQuestion: How many.\nAnswer: "
    )
    found = prompts.vqa([("What is on p. A3", "NASA")], keep_case=True)
    assert text_of(found) == f"{i['vqa']}\nQuestion: What is on p. A3.\nAnswer: <<NASA.{END}>>"
    found = prompts.multiple_choice([("Who?", ["a Man", "dog"], 1)], ocr=["T0: leaf"], keep_case=True)
    assert text_of(found) == (
        f"{i['multiple choice']}\nOCR text:\nT0: leaf\nQuestion: Who?\nA: A man\nB: Dog\nAnswer: <<B.{END}>>"
    )
    found = prompts.pointing([("which one", [(0, 0, 50, 50), (10, 20, 100, 50)], 0)], 100, 200)
    assert text_of(found) == (
        f"{i['multiple choice']}\n\nQuestion: Which one.\nA: [0.00,0.00,0.50,0.25].\n"
        f"B: [0.10,0.10,1.00,0.25].\nAnswer: <<A.{END}>>"
    )
    found = prompts.grounding([("left dog", (12, 34, 56, 78))], 100, 100)
    assert text_of(found) == f"{i['grounding']}\nLeft dog.\n<<[0.12,0.34,0.56,0.78].{END}>>"
    found = prompts.dense_captioning([((0, 0, 1, 1), "sky"), ((1, 1, 2, 2), "sea")], 2, 2)
    assert text_of(found) == (
        f"{i['dense captioning']}\n[0.00,0.00,0.50,0.50].\n<<Sky.\n>>[0.50,0.50,1.00,1.00].\n<<Sea.\n{END}>>"
    )
    assert text_of(prompts.image_text_match("cat ON mat", False)) == (
        f"{i['image-text match']}\nCat on mat.\n<<False.{END}>>"
    )
    spans = [(11, 15, [(0, 0, 1, 1), (1, 1, 2, 2)]), (2, 5, [(0, 0, 2, 2)])]  # in any order
    assert text_of(prompts.grounded_captioning("a cat on a sofa", spans, 2, 2)) == (
        f"{i['grounded captioning']}\n<<a ||cat [0.00,0.00,1.00,1.00]|| on a "
        f"||sofa [0.00,0.00,0.50,0.50][0.50,0.50,1.00,1.00]||{END}>>"
    )
    found = prompts.chat([("human", "<image>\nHi"), ("gpt", "Yo"), ("human", "Bye"), ("gpt", "Ciao")])
    assert text_of(found) == f"Hi\n<<Yo\n>>Bye\n<<Ciao\n{END}>>"


@pytest.mark.parametrize(
    "text, wanted",
    [("ßA", "Ssa."), ("ǆ", "ǅ."), ("ﬁN", "Fin."), ("ΑΣ", "Ας."), ("éTÉ", "Été."), ("9A", "9a.")],
)
def test_sentences_begin_as_python_capitalizes(text, wanted):
    """As the released code does, also where a letter becomes two or has a title case."""
    assert (prompts.sentence(text), prompts.answer_text(text)) == (wanted, wanted[:-1])


@given(st.tuples(*[st.integers(0, 99)] * 4), st.integers(1, 4000), st.integers(1, 4000))
def test_boxes_survive_printing_to_half_a_percent(corners, width, height):
    x = sorted((corners[0], corners[1] + 100))
    y = sorted((corners[2], corners[3] + 100))
    box = tuple(v / 200 * side for v, side in zip((x[0], y[0], x[1], y[1]), (width, height) * 2, strict=True))
    parsed = prompts.parse_box("It is " + prompts.box_text(box, width, height) + ".", width, height)
    for found, wanted, side in zip(parsed, box, (width, height) * 2, strict=True):
        assert abs(found - wanted) <= 0.005 * side + 1e-6


def test_what_is_no_box():
    unclosed = ("[0.1,0.2", "0.1,0.2,0.3,0.4", "[[0.1,0.2,0.3,0.4]]", "[ [0.1,0.2,0.3,0.4]", "[x] [0,0,1,1]")
    others = ("", "none", "[1,2,3]", "[a,b,c,d]", "[0.1,0.2,0.3,0.4,0.5]", "[nan,0,1,1]", "[0,0,inf,1]")
    for text in (*unclosed, *others, "[0,0,1e308,1]", "[]", "[,,,]", "[0.1 0.2 0.3 0.4]"):
        assert prompts.parse_box(text, 10, 10) is None
    for text in (
        "[0.1,0.2,0.3,0.4] or [9,9,9,9]",
        "[0.1,0.2,0.3,0.4",  # the released evaluators' rules for brackets that are not closed
        "at [0.1,0.2,0.3,0.4.",
        "[ 0.1, 0.2,0.3, 0.4 ]]. ",
        "x]y[0.1,0.2,0.3,0.4].",
    ):
        assert prompts.parse_box(text, 10, 20) == pytest.approx((1, 4, 3, 8))
    for box in ((-1, 0, 1, 1), (1, 0, 1, 1), (0, 2, 1, 1)):
        with pytest.raises(ValueError, match="clip or drop it"):
            prompts.box_text(box, 10, 10)
    with pytest.raises(ValueError, match="overlaps another or leaves"):
        prompts.grounded_captioning("abc", [(0, 2, []), (1, 3, [])], 1, 1)
    with pytest.raises(ValueError, match="1 choices: a question needs 2 to 26"):
        prompts.multiple_choice([("q", ["a"], 0)])


@pytest.mark.parametrize("pixels, length", [(224, 273), (336, 601), (480, 1191)])
def test_lengths_of_images(pixels, length):
    side = layout.grid_side(pixels)
    ids = layout.image_ids(side)
    assert len(ids) == length == side * (side + 1) + 1
    assert ids.count(layout.PLACEHOLDER) == side**2 and ids.count(layout.ROW) == side - 1
    assert ids[0] == ids[-1] == 4118


def test_where_the_image_stands():
    chunks = prompts.grounding([("left dog", (0, 0, 1, 1))], 2, 2)
    before = {"agnostic": 0, "instruction-first": 1, "query-first": 2, "two-pass": 0}
    assert tuple(before) == LAYOUTS
    for name, count in before.items():
        ids, labels = layout.sequence(chunks, encode, 2, name)
        texts = ["".join(chunk.text for chunk in part) for part in (chunks[:count], chunks[count:])]
        image = layout.image_ids(2) * (2 if name == "two-pass" else 1)
        assert ids == encode(texts[0]) + image + encode(texts[1])
        assert [label for label in labels if label != layout.IGNORE] == encode(chunks[-1].text)
        assert all(label in (layout.IGNORE, i) for label, i in zip(labels, ids, strict=True))
    assert prompts.image_place(prompts.captioning("x"), "query-first") == 1
    with pytest.raises(ValueError, match="layout 'last' is unknown"):
        prompts.image_place(chunks, "last")


def test_cutting_a_sequence():
    chunks = [Chunk("ask"), Chunk("answer", supervised=True)]
    whole, labels = layout.sequence(chunks, encode, 2)
    assert layout.sequence(chunks, encode, 2, max_length=12) == (whole[:12], labels[:12])
    with pytest.raises(ValueError, match="max_length=10 leaves no token of an answer"):
        layout.sequence(chunks, encode, 2, max_length=10)
    with pytest.raises(ValueError, match="max_length=6 cuts the image, which ends at token 7"):
        layout.sequence(chunks, encode, 2, max_length=6)


def test_splicing():
    ids = torch.tensor([[*layout.image_ids(2), 5], [1, *layout.image_ids(2)]])
    table, patches = torch.randn(10495, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    vectors = layout.splice(table, ids, patches)
    for row in range(2):
        at = 0
        for place, token in enumerate(ids[row].tolist()):
            wanted = patches[row, at] if token < 0 else table[token]
            at += token < 0
            assert torch.equal(vectors[row, place], wanted)
    twice = torch.tensor([layout.image_ids(2) * 2, layout.image_ids(2) * 2])
    again = layout.splice(table, twice, patches)
    assert torch.equal(again[0, twice[0] < 0], torch.cat([patches[0], patches[0]]))
    assert torch.equal(again[1, twice[1] < 0], torch.cat([patches[1], patches[1]]))
    vectors.sum().backward()
    assert torch.equal(patches.grad, torch.ones_like(patches)) and int(table.grad.sum()) == 3 * 8
    with pytest.raises(ValueError, match=r"\[4\] placeholders a row for 3 patches"):
        layout.splice(table, ids, patches[:, :3])
