"""Answers without the image, learned from training samples: a model that sees must do better."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssm_retrieval.errors import UserError
from vlm.data.samples import Sample
from vlm.metrics import boxes, vqa
from vlm.prompts import box_text

MOST_BOXES = 2000  # candidates for the best single box


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
    hits = [(boxes.iou(np.broadcast_to(one, shares.shape), shares) > 0.5).sum() for one in shares]
    best = targets[int(np.argmax(hits))]
    return [box_text(tuple(best["box"]), best["width"], best["height"])] * len(test)


def asked(sample: Sample) -> str:
    """Return the text of a sample without its answers."""
    return "".join(chunk.text for chunk in sample.chunks if not chunk.supervised)


def _answer(target: Mapping[str, Any]) -> Any:
    """The right answer; of several annotators' the most frequent one."""
    return target["answer"] if "answer" in target else vqa.most_frequent(target["answers"])


def _need(known: Sequence[Sample]) -> None:
    if not known:
        raise UserError("no training samples to learn answers from; give some")
