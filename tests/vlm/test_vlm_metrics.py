"""Metrics against the official implementation, closed forms and cases of the official definitions."""

import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm import metrics
from vlm.data.samples import Sample
from vlm.metrics import boxes, captions, choices, vqa

REFS = {
    "1": ["A man's dog isn't on the table.", "Two dogs, near a table!"],
    "2": ["A red bus on a street.", "The bus (red) is parked."],
    "3": ["A bowl of soup.", "Some soup in a bowl with 2.5 spoons"],
}
SAID = {"1": "a dog on the table", "2": "a red bus on the street.", "3": "a cat"}


@pytest.mark.parametrize(
    "raw, normal",
    [
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        # the official rule: a mark that touches a space anywhere goes everywhere, else it becomes a space
        ("semi-final", "semi final"),
        ("semi-final - two", "semifinal 2"),
        ("semi-final\t-two", "semifinal 2"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("yes, sir", "yes sir"),
        ("3.5", "3.5"),
        ("none", "0"),
        ("a\nb", "b"),
    ],
)
def test_vqa_normalisation(raw, normal):
    assert vqa.normalise(raw) == normal


def test_vqa_accuracy_leaves_one_out():
    # k of 10 agree: k leave-outs see k - 1, the others k
    for k, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        answers = ["Red"] * k + [f"x{i}" for i in range(10 - k)]
        assert vqa.accuracy("red", answers) == pytest.approx(expected)
        assert vqa.published_accuracy("red", answers) == 0  # "Red" is not normalised there
        assert vqa.published_accuracy("Red", [a.lower() for a in answers]) == pytest.approx(
            [0, 0.3, 0.6, 0.9, 1, 1][k]
        )
    assert vqa.published_accuracy("dog's", ["dog 's", "dogs"]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="answers"):
        vqa.accuracy("red", [])
    with pytest.raises(ValueError, match=r"^answers is empty"):
        vqa.published_accuracy("red", [])


def test_published_accuracy_reads_commas_and_question_marks_as_nothing():
    """The official rule would make a space of a mark that touches none."""
    for said in ("red,blue", "red?blue", "Red,?blue"):
        assert vqa.published_accuracy(said, ["redblue"] * 10) == 1
        assert vqa.published_accuracy(said, ["red blue"] * 10) == 0


def test_contractions_are_found_with_any_one_apostrophe_or_all_of_them_missing():
    assert vqa._without_some_apostrophes("couldn't've") == ["couldntve", "couldnt've", "couldn'tve"]
    assert set(vqa._without_some_apostrophes("isn't")) == {"isnt"}


def test_exact_match_forgives_case_and_one_full_stop():
    same = ("Yes.", " yes ", "YES", "yes")
    assert [vqa.exact_match(said, "Yes ") for said in same] == [1.0] * 4
    assert [vqa.exact_match(said, "yes") for said in ("yes..", "y", "yes!", "the yes")] == [0.0] * 4


corner = st.integers(0, 30)
side = st.integers(1, 20)


@given(corner, corner, side, side, corner, corner, side, side)
def test_iou_counts_pixels(x, y, w, h, u, v, k, m):
    a = {(i, j) for i in range(x, x + w) for j in range(y, y + h)}
    b = {(i, j) for i in range(u, u + k) for j in range(v, v + m)}
    found = boxes.iou([[x, y, x + w, y + h]], [[u, v, u + k, v + m]])
    assert found[0] == pytest.approx(len(a & b) / len(a | b))


def _asked(target):
    return Sample("0", "any", "0", "any", (), target)


def test_boxes_at_the_threshold_and_answers_that_are_no_box():
    gold = [[0, 0, 2, 1]] * 4
    said = [[0, 0, 1, 1], [0, 0, 2, 1], [2, 1, 0, 0], [math.nan] * 4]
    answers = [f"[{','.join(str(value / 2) for value in box)}]" for box in said]
    assert answers[3] == "[nan,nan,nan,nan]"
    samples = [_asked({"box": box, "width": 2, "height": 2}) for box in gold]
    rows = {row["metric"]: row["value"] for row in metrics.BOX.rows(samples, answers)}
    assert rows == {"iou@0.5": 0.25, "mean_iou": 0.375}
    with pytest.raises(ValueError, match="gold"):
        boxes.iou([[0, 0, 1, 1]], [[1, 1, 0, 0]])


def test_choices_and_yes_no():
    (row,) = metrics.LETTER.rows([_asked({"answer": i}) for i in (1, 0, 2, 0)], ["B.", "a", "Cat.", ""])
    assert row["metric"] == "accuracy" and row["value"] == 0.5 and row["count"] == 4
    assert [choices.says_yes(t) for t in ("No.", "Yes, no doubt", "There is not. Yes", "Yes.")] == [
        0,
        0,
        0,
        1,
    ]
    assert [choices.says_yes(t, "published") for t in ("No.", "no")] == [True, False]
    found = choices.binary([True, True, True, False], [True, True, False, True])
    assert found == pytest.approx(
        {"accuracy": 0.5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_rate": 0.75}
    )
    assert [choices.says_true(t) for t in ("False.", "Maybe", "True.")] == [False, True, True]


def test_caption_scores_are_the_official_ones():
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    gold = {
        "1": ["a man 's dog is n't on the table", "two dogs near a table"],
        "2": ["a red bus on a street", "the bus -lrb- red -rrb- is parked"],
        "3": ["a bowl of soup", "some soup in a bowl with 2.5 spoons"],
    }
    said = {"1": ["a dog on the table"], "2": ["a red bus on the street"], "3": ["a cat"]}
    found = captions.scores(SAID, REFS)
    assert found["cider"] == pytest.approx(Cider().compute_score(gold, said)[0])
    if shutil.which("java"):
        assert captions.scores(SAID, REFS, tokenizer="ptb") == pytest.approx(found)


def test_nocaps_by_domain():
    pytest.importorskip("pycocoevalcap")
    domains = {"1": "in-domain", "2": "in-domain", "3": "out-domain"}
    found = captions.by_domain(SAID, REFS, domains)
    assert found.keys() == {"entire", "in-domain", "out-domain"}
    two = ("1", "2")
    assert found["in-domain"] == captions.scores({k: SAID[k] for k in two}, {k: REFS[k] for k in two})
    with pytest.raises(ValueError, match="reference"):
        captions.scores({"1": "a"}, {"1": []})
