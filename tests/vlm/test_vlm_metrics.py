"""Metrics against the official implementation, closed forms and cases of the official definitions."""

import itertools
import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm import metrics
from vlm.data.samples import Sample
from vlm.metrics import anls, boxes, captions, catalogue, choices, objects, released, vqa

REFS = {
    "1": ["A man's dog isn't on the table.", "Two dogs, near a table!"],
    "2": ["A red bus on a street.", "The bus (red) is parked."],
    "3": ["A bowl of soup.", "Some soup in a bowl with 2.5 spoons"],
}
SAID = {"1": "a dog on the table", "2": "a red bus on the street.", "3": "a cat"}


OFFICIAL = json.loads((Path(__file__).parent / "official_vqa.json").read_text(encoding="utf-8"))
TOKENS = json.loads((Path(__file__).parent / "official_tokens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("raw, official, m4c", OFFICIAL["normalised"])
def test_vqa_normalisation_is_the_official_code_s(raw, official, m4c):
    """All 120 keys of its contractions, and strings of every rule; values by the two evaluators' own code."""
    assert (vqa.normalise(raw), vqa.m4c(raw)) == (official, m4c)


@pytest.mark.parametrize("said, answers, official, m4c", OFFICIAL["accuracy"])
def test_vqa_accuracy_is_the_official_code_s_but_for_unanimous_annotators(said, answers, official, m4c):
    assert vqa.accuracy(said, answers, vqa.m4c) == pytest.approx(m4c)
    if len(set(answers)) == 1:  # compared as written there: "Red." is not "red"
        official = float(vqa.normalise(said) == vqa.normalise(answers[0]))
    assert vqa.accuracy(said, answers) == pytest.approx(official)


def test_vqa_accuracy_leaves_one_out():
    # k of 10 agree: k leave-outs see k - 1, the others k
    for k, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        answers = ["Red"] * k + [f"x{i}" for i in range(10 - k)]
        assert vqa.accuracy("red", answers) == pytest.approx(expected)
        assert released.vqa_accuracy("red.", answers) == 0  # "Red" is not normalised there
        lower = [a.lower() for a in answers]
        assert released.vqa_accuracy("Red.", lower) == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1][k])
        assert released.vqa_accuracy("Red", lower) == 0  # keeps its end token there


@pytest.mark.parametrize("rule", [vqa.accuracy, released.vqa_accuracy])
def test_vqa_accuracy_wants_ten_annotators(rule):
    with pytest.raises(ValueError, match=r"^answers is empty: a hidden test"):
        rule("red.", [])
    for count in (1, 9, 11):
        with pytest.raises(ValueError, match=rf"^{count} answers: .* for 10 annotators; declare another"):
            rule("red.", ["red"] * count)
    sample = _asked({"answers": ["red"] * 3})
    with pytest.raises(ValueError, match=r"^any 0: 3 answers: VQA accuracy"):
        metrics.ANNOTATORS.rows([sample], ["red."])


def test_the_released_vqa_accuracy_reads_commas_and_question_marks_as_nothing():
    """The official rule would make a space of a mark that touches none."""
    for said in ("red,blue.", "red?blue.", "Red,?blue."):
        assert released.vqa_accuracy(said, ["redblue"] * 10) == 1
        assert released.vqa_accuracy(said, ["red blue"] * 10) == 0


@pytest.mark.parametrize(
    "said, answers, wanted",
    [
        # the example of the competition's page: shares of 9 letters
        *((s, ["Coca Cola", "Coca Cola Company"], v) for s, v in [
            ("The Coca", 0), ("CocaCola", 8 / 9), ("Coca cola", 1), ("Cola", 0), ("Cat", 0)]),
        ("ab", ["abcd"], 0.5),  # at the threshold
        ("ab", ["abcde"], 0),
        (" 1/8/93 ", ["1/8/93"], 1 - 0 / 8),
        ("1/8/93.", ["1/8/93"], 1),  # the prompt's full stop
        ("p. 12.", ["p. 12."], 1),
        ("p. 12", ["p. 12."], 5 / 6),
        ("12..", ["12"], 2 / 3),
        ("a  b", ["a b"], 1),
        ("", ["a"], 0),
        ("x", ["y", "x"], 1),
        ("Straße", ["strasse"], 5 / 7),  # lower case, in which these are two letters apart
    ],
)  # fmt: skip
def test_anls_is_the_official_one(said, answers, wanted):
    assert anls.anls(said, answers) == pytest.approx(wanted)


def test_anls_wants_an_answer():
    with pytest.raises(ValueError, match="answers is empty"):
        anls.anls("a", [])


texts = st.text("abc ", max_size=8)


@given(texts, texts, texts)
def test_the_distance_is_a_metric_and_that_of_a_recursion(a, b, c):
    @cache
    def slow(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert anls.distance(a, b) == slow(len(a), len(b)) == anls.distance(b, a)
    assert anls.distance(a, c) <= anls.distance(a, b) + anls.distance(b, c)


def test_exact_match_forgives_case_and_one_full_stop():
    same = ("Yes.", " yes ", "YES", "yes")
    assert [vqa.exact_match(said, "Yes ") for said in same] == [1.0] * 4
    assert [vqa.exact_match(said, "yes") for said in ("yes..", "y", "yes!", "the yes")] == [0.0] * 4
    assert vqa.exact_match("Green.", "Green.") == vqa.exact_match("green", "Green.") == 1.0


corner = st.integers(0, 30)
side = st.integers(1, 20)


@given(corner, corner, side, side, corner, corner, side, side)
def test_iou_counts_pixels(x, y, w, h, u, v, k, m):
    a = {(i, j) for i in range(x, x + w) for j in range(y, y + h)}
    b = {(i, j) for i in range(u, u + k) for j in range(v, v + m)}
    found = boxes.iou([[x, y, x + w, y + h]], [[u, v, u + k, v + m]])
    assert found[0] == pytest.approx(len(a & b) / len(a | b))


def test_every_pair_of_boxes_has_its_own_overlap():
    """Sizes differ, one of the answers is no box, and numbers may be whole."""
    gold = [[0, 0, 4, 4], [0, 0, 1, 2], [3, 3, 5, 9]]
    said = [[0, 0, 2, 4], [math.nan, 0, 1, 1], [3, 3, 5, 6]]
    assert boxes.iou(said, gold).tolist() == [0.5, 0.0, 0.5]
    with pytest.raises(ValueError, match=r"predicted \(1, 4\) and gold \(3, 4\) must both be"):
        boxes.iou(said[:1], gold)


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


def test_an_overlap_of_one_half_is_not_above_it_whatever_its_rounding():
    """Boxes of whole pixels, so that overlaps are exact fractions; printed as shares with two decimals."""
    wrong = 0
    for left, width in itertools.product(range(0, 40), range(2, 60, 2)):
        gold = {"box": [left, 0, left + width, 100], "width": 100, "height": 100}
        half = f"[{left / 100:.2f},0.00,{(left + width // 2) / 100:.2f},1.00]."
        more = f"[{left / 100:.2f},0.00,{(left + width // 2 + 1) / 100:.2f},1.00]."
        assert metrics.BOX.right(gold, half) is False and metrics.BOX.right(gold, more) is True
        wrong += catalogue.overlap(gold, half) > 0.5
        hits = metrics.BOX.rows([_asked(gold)] * 2, [half, more])[0]
        assert hits["value"] == 0.5
    assert wrong > 0  # there are such cases


def test_choices_and_yes_no():
    (row,) = metrics.LETTER.rows([_asked({"answer": i}) for i in (1, 0, 2, 0)], ["B.", "a", "Cat.", ""])
    assert row["metric"] == "accuracy" and row["value"] == 0.5 and row["count"] == 4
    for text in ("No.", "No, never", "Yes, no doubt", "There is not. Yes"):
        assert not choices.says_yes(text)
    for text in ("Yes.", "Yes. No", "no\nidea", "a no\u00a0b", "NO", ""):
        assert choices.says_yes(text)
    found = choices.binary([True, True, True, False], [True, True, False, True])
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_rate": 0.75})
    assert [choices.says_true(t) for t in ("False.", " false", "Maybe", "True.")] == [0, 0, 1, 1]


def test_the_released_rules_want_a_full_stop_and_capitals():
    assert [released.says_yes(text) for text in ("No.", "no", "NO", " no")] == [1, 0, 0, 1]
    assert [released.says_true(text) for text in ("False.", "False", "false.", " False.")] == [0, 1, 1, 1]
    assert [released.says(text, "Yes") for text in ("yes.", "YES.")] == [1, 1]
    assert not any(released.says(text, "Yes") for text in ("yes", "yes. ", " yes.", "yess", "Yes,"))
    assert [released.says_letter(text, 1) for text in ("B.", "B", "b.", "B. x", "A.")] == [1, 0, 0, 0, 0]
    assert [released.begins_with_letter(text, 1) for text in ("B.", "B", "B. x")] == [1, 1, 1]
    assert not any(released.begins_with_letter(text, 1) for text in ("b.", " B."))


def test_objects_are_counted_as_often_as_they_are_named():
    right = "A small red star, the blue digit 7, a small red star and the red word lake."
    assert objects.named(right, right) == (1, 1)
    assert objects.named("the  Red word lake and a small red star", right) == (1, 0.5)
    assert objects.named("A small red star, a small red star, a small red star, a dog.", right) == (0.5, 0.5)
    assert objects.named("a small star, a sandy beach", right) == (0, 0)  # half a phrase is none
    assert objects.named("", right) == objects.named(".", right) == (0, 0)
    assert objects.named("The blue digit 7.", "The blue digit 7.") == (1, 1)  # a single object
    assert objects.named("The blue digit 7.", right) == (1, 0.25)
    samples = [_asked({"captions": [right]})] * 2
    rows = {row["metric"]: row for row in metrics.OBJECTS.rows(samples, [right, ""])}
    assert rows["object_precision"]["value"] == rows["object_recall"]["value"] == 0.5


@pytest.mark.parametrize("caption, tokens", TOKENS)
def test_tokens_of_captions_are_the_official_tokenizer_s(caption, tokens):
    """The values are pycocoevalcap's PTBTokenizer's, run with Java 17."""
    assert captions.words(caption) == tokens


def test_java_gives_the_tokens_of_the_table():
    pytest.importorskip("pycocoevalcap")
    if catalogue.caption_tokenizer() != "ptb":
        pytest.skip("Java is not installed")
    lines = {str(i): [caption] for i, (caption, _) in enumerate(TOKENS)}
    lines["ends of lines"] = ["a\rb\u2028c\x0bd"]  # of one caption
    found = captions._tokens(lines, "ptb")
    assert [found[key][0] for key in lines] == [*(tokens for _, tokens in TOKENS), "a b c d"]


@pytest.mark.parametrize("java, writable, wanted", [(1, 1, "ptb"), (1, 0, "regex"), (0, 1, "regex")])
def test_the_official_tokenizer_is_taken_where_it_can_run(monkeypatch, java, writable, wanted):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(catalogue.shutil, "which", lambda name: "/bin/java" if java else None)
    monkeypatch.setattr(catalogue.os, "access", lambda path, mode: bool(writable))
    assert catalogue.caption_tokenizer() == wanted
    asked = []
    monkeypatch.setattr(captions, "scores", lambda *given: asked.append(given[-1]) or {"cider": 1.0})
    (row,) = metrics.CAPTIONS.rows([_asked({"captions": ["a"]})], ["a"])
    assert asked == [wanted] and row["tokenizer"] == wanted


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
    assert captions.cider(SAID, REFS) == found["cider"]
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
