"""Guesses that a model must do better than: without the image, and without the question's object."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssm_retrieval.errors import UserError
from vlm.data.samples import Sample
from vlm.metrics import Metric, boxes, captions, catalogue, objects, vqa
from vlm.prompts import box_text

MOST_BOXES = 2000  # candidates for the best single box
CAPTIONS, REFERENCES = 20, 400  # candidates for the best single caption, and those that it is compared with


def most_frequent_answer(known: Sequence[Sample], test: Sequence[Sample]) -> list[str]:
    """Give the most frequent training answer to the same question, or else to any question.

    Args:
        known: Training samples.
        test: Questions.

    Returns:
        One answer per question.

    Raises:
        UserError: If there are no training samples.
    """
    _need(known)
    same: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in known:
        same[asked(sample)][_answer(sample.target)] += 1
    every = sum(same.values(), Counter())
    return [(same.get(asked(sample)) or every).most_common(1)[0][0] for sample in test]


def best_box(known: Sequence[Sample], test: Sequence[Sample]) -> list[str]:
    """Give for every question the one training box that overlaps most others by more than half.

    Args:
        known: Training samples.
        test: Questions.

    Returns:
        One answer per question.

    Raises:
        UserError: If there are no training samples.
    """
    _need(known)
    targets = [sample.target for sample in known[:MOST_BOXES]]
    shares = np.array([t["box"] for t in targets]) / [[t["width"], t["height"]] * 2 for t in targets]
    hits = [boxes.above_half(boxes.iou(np.broadcast_to(one, shares.shape), shares)).sum() for one in shares]
    best = targets[int(np.argmax(hits))]
    return [box_text(tuple(best["box"]), best["width"], best["height"])] * len(test)


def best_caption(known: Sequence[Sample], test: Sequence[Sample]) -> list[str]:
    """Give for every picture the one training caption that fits those of other training pictures best.

    The first CAPTIONS are compared with the REFERENCES behind them by CIDEr, or without pycocoevalcap by the
    objects that they name.

    Args:
        known: Training samples.
        test: Pictures.

    Returns:
        One answer per picture.

    Raises:
        UserError: If there are no training samples.
    """
    _need(known)
    told = [sample.target["captions"][0] for sample in known[: CAPTIONS + REFERENCES]]
    others = {str(i): [caption] for i, caption in enumerate(told[CAPTIONS:] or told)}

    def fit(caption: str) -> float:
        if catalogue.caption_tokenizer() is None:
            return sum(objects.named(caption, other)[1] for (other,) in others.values())
        return captions.cider(dict.fromkeys(others, caption), others)

    return [max(told[:CAPTIONS], key=fit)] * len(test)


def expected(metric: Metric, test: Sequence[Sample], guesses: Sequence[Sequence[str]]) -> float:
    """Return the share of right answers of a guess that draws one of several answers by lot.

    Args:
        metric: Says which answers are right.
        test: Questions with known answers.
        guesses: The answers to draw from, for each question.

    Returns:
        0 .. 1.
    """
    shares = [
        np.mean([bool(metric.right(sample.target, said)) for said in answers])
        for sample, answers in zip(test, guesses, strict=True)
    ]
    return float(np.mean(shares))


def asked(sample: Sample) -> str:
    """Return the text of a sample without its answers."""
    return "".join(chunk.text for chunk in sample.chunks if not chunk.supervised)


def _answer(target: Mapping[str, Any]) -> Any:
    """The right answer; of several annotators' the most frequent one."""
    return target["answer"] if "answer" in target else vqa.most_frequent(target["answers"])


def _need(known: Sequence[Sample]) -> None:
    if not known:
        raise UserError("no training samples to learn answers from; give some")
