"""The metrics that data sets declare, one `Metric` per kind of target."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import wilson
from vlm.data.samples import Sample
from vlm.metrics import anls, boxes, captions, choices, objects, released, vqa
from vlm.prompts import parse_box

Row = dict[str, Any]
Target = Mapping[str, Any]
Rows = Callable[[Sequence[Sample], Sequence[str]], list[Row]]


@dataclass(frozen=True)
class Metric:
    """How answers are scored.

    Attributes:
        name: Name of the main row.
        rule: When an answer is right, in words.
        right: (target, answer) -> whether it is right; None if that is no matter of yes or no, or hidden.
        rows: (samples, answers) -> rows with metric, value and count, and ci_low and ci_high of shares; [] if
            the right answers are hidden.
    """

    name: str
    rule: str
    right: Callable[[Target, str], bool | None]
    rows: Rows


def _share(metric: str, hits: int, count: int) -> Row:
    low, high = wilson(hits, count)
    return dict(metric=metric, value=hits / count, ci_low=low, ci_high=high, count=count)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _shares(name: str, right: Callable[[Target, str], bool | None]) -> Rows:
    """The share of right answers among those that are known."""

    def rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
        pairs = zip(samples, answers, strict=True)
        known = [found for sample, said in pairs if (found := right(sample.target, said)) is not None]
        return [_share(name, sum(known), len(known))] if known else []

    return rows


# --- the sum of two lists of rows, and the paper's variants -------------------------------------------------


def _published(right: Callable[[Target, str], bool | None]) -> Rows:
    """The share of what the paper's released evaluators count as right."""
    return _shares("accuracy_published", right)


def _and(first: Rows, second: Rows) -> Rows:
    return lambda samples, answers: first(samples, answers) + second(samples, answers)


# --- short answers and letters ------------------------------------------------------------------------------


def _exact(target: Target, said: str) -> bool | None:
    return bool(vqa.exact_match(said, target["answer"]))


def _known(right: Callable[[str, Sequence[str]], bool]) -> Callable[[Target, str], bool | None]:
    """A rule for (answer, right answers), or None where those are hidden."""
    return lambda target, said: right(said, target["answers"]) if target["answers"] else None


def _most(answers: Sequence[str]) -> str:
    return vqa.most_frequent(answers) or ""


def _usual(said: str, answers: Sequence[str]) -> bool:
    return bool(vqa.exact_match(said, _most(answers)))


def _letter(target: Target, said: str) -> bool | None:
    return None if target["answer"] is None else choices.letter(said) == target["answer"]


def _letters(rule: Callable[[str, int], bool]) -> Metric:
    """LETTER, and a released evaluator's rule."""
    published = _published(lambda t, said: None if t["answer"] is None else rule(said, t["answer"]))
    return replace(LETTER, rows=_and(LETTER.rows, published))


def _means(rules: Mapping[str, Callable[[str, Sequence[str]], float]]) -> Rows:
    """The mean of every rule for (answer, right answers); no rows if those are hidden."""

    def rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
        if not samples[0].target["answers"]:
            return []
        values: dict[str, list[float]] = {name: [] for name in rules}
        for sample, said in zip(samples, answers, strict=True):
            for name, rule in rules.items():
                try:
                    values[name].append(rule(said, sample.target["answers"]))
                except UserError as error:
                    raise UserError(f"{sample.source} {sample.id}: {error}") from None
        return [dict(metric=name, value=_mean(found), count=len(found)) for name, found in values.items()]

    return rows


def _annotators(normal: Callable[[str], str]) -> Metric:
    """VQA accuracy, of answers that are normalised so."""
    right = _known(lambda said, answers: normal(said) == normal(_most(answers)))
    accuracy = partial(vqa.accuracy, normal=normal)
    rows = _means({"vqa_accuracy": accuracy, "vqa_accuracy_published": released.vqa_accuracy})
    return Metric("vqa_accuracy", "as most of ten annotators; scored by how many", right, rows)


EXACT = Metric("accuracy", "the same text but for case and a full stop", _exact, _shares("accuracy", _exact))
USUAL = Metric("accuracy", "as the most frequent answer, but for case and a full stop", _known(_usual),
               _shares("accuracy", _known(_usual)))  # fmt: skip
GQA = replace(
    USUAL,
    rows=_and(USUAL.rows, _published(_known(lambda said, answers: released.says(said, answers[0])))),
)
ANNOTATORS = _annotators(vqa.normalise)
ANNOTATORS_M4C = _annotators(vqa.m4c)
ANLS = Metric(
    "anls",
    "an answer of which at most half is misread",
    _known(lambda said, answers: anls.anls(said, answers) > 0),
    _means({"anls": anls.anls}),
)
LETTER = Metric("accuracy", "the letter before the first full stop", _letter, _shares("accuracy", _letter))
AI2D, VISUAL7W = _letters(released.says_letter), _letters(released.begins_with_letter)


# --- yes or no ----------------------------------------------------------------------------------------------


def _binary(says: Callable[[str], bool], published: Callable[[str], bool], rule: str) -> Metric:
    def right(target: Target, said: str) -> bool | None:
        return bool(says(said) == target["label"])

    shares = _and(
        _shares("accuracy", right), _published(lambda target, said: published(said) == target["label"])
    )

    def rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
        more = choices.binary([says(said) for said in answers], [s.target["label"] for s in samples])
        others = [dict(metric=k, value=v, count=len(samples)) for k, v in more.items()]
        return shares(samples, answers) + others

    return Metric("accuracy", rule, right, rows)


YES_NO = _binary(choices.says_yes, released.says_yes, "yes, unless no or not is a word of its first sentence")
TRUE_FALSE = _binary(choices.says_true, released.says_true, "true, unless it is False")


# --- boxes --------------------------------------------------------------------------------------------------


def overlap(target: Target, said: str) -> float:
    """Return the IoU of the answered box with the target's; 0 if the answer has no box."""
    box = parse_box(said, target["width"], target["height"])
    return 0.0 if box is None else float(boxes.iou([box], [target["box"]])[0])


def _overlaps(target: Target, said: str) -> bool | None:
    return bool(boxes.above_half(overlap(target, said)))


def _box_rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    overlaps = [overlap(sample.target, said) for sample, said in zip(samples, answers, strict=True)]
    return [
        _share("iou@0.5", int(boxes.above_half(overlaps).sum()), len(overlaps)),
        dict(metric="mean_iou", value=_mean(overlaps), count=len(overlaps)),
    ]


BOX = Metric("iou@0.5", "a box with an IoU above 0.5", _overlaps, _box_rows)


# --- captions -----------------------------------------------------------------------------------------------


def _nothing(target: Target, said: str) -> bool | None:
    """A caption is neither right nor wrong."""
    return None


def _caption_rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    """CIDEr, BLEU and ROUGE-L, of NoCaps by domain as well (metric "cider/in-domain", ...)."""
    tokenizer = caption_tokenizer()
    if tokenizer is None:
        _warn_of_captions()
        return []
    said = {sample.id: text for sample, text in zip(samples, answers, strict=True)}
    references = {sample.id: sample.target["captions"] for sample in samples}
    domains = {sample.id: str(sample.target.get("domain") or "") for sample in samples}
    if all(domains.values()):
        found = captions.by_domain(said, references, domains, tokenizer)
    else:
        found = {"entire": captions.scores(said, references, tokenizer)}
    return [
        dict(metric=metric if part == "entire" else f"{metric}/{part}", value=value, count=len(samples),
             tokenizer=tokenizer)
        for part, scored in found.items()
        for metric, value in scored.items()
    ]  # fmt: skip


def _object_rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    pairs = [
        objects.named(said, sample.target["captions"][0])
        for sample, said in zip(samples, answers, strict=True)
    ]
    names = ("object_precision", "object_recall")
    return [
        dict(metric=name, value=_mean(values), count=len(pairs))
        for name, values in zip(names, zip(*pairs, strict=True), strict=True)
    ]


def caption_tokenizer() -> str | None:
    """Return which tokenizer captions are scored with: "ptb", the official one, if it can run, else "regex".

    It needs Java and writes its input into its own folder. None if pycocoevalcap is not installed, and
    captions are not scored.
    """
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None:
        return None
    folder = Path((found.submodule_search_locations or [""])[0], "tokenizer")
    return "ptb" if shutil.which("java") and os.access(folder, os.W_OK) else "regex"


@lru_cache(maxsize=1)  # once a process
def _warn_of_captions() -> None:
    print(
        "warning: captions are answered but not scored (CIDEr, BLEU, ROUGE-L): pycocoevalcap is missing; "
        'pip install -e ".[vlm-metrics]" and evaluate again',
        file=sys.stderr,
    )


CAPTIONS = Metric("cider", "CIDEr, BLEU and ROUGE-L of all references", _nothing, _caption_rows)
OBJECTS = Metric(
    "object_recall", "the share of objects that it names, and as `cider`", _nothing,
    _and(_object_rows, _caption_rows),
)  # fmt: skip
