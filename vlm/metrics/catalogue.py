"""The metrics that data sets declare, one `Metric` per kind of target."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ssm_retrieval.statistics import wilson
from vlm.data.samples import Sample
from vlm.metrics import boxes, choices, vqa
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


# --- short answers and letters ------------------------------------------------------------------------------


def _exact(target: Target, said: str) -> bool | None:
    return bool(vqa.exact_match(said, target["answer"]))


def _exact_usual(target: Target, said: str) -> bool | None:
    most = vqa.most_frequent(target["answers"])
    return None if most is None else bool(vqa.exact_match(said, most))


def _normalised_usual(target: Target, said: str) -> bool | None:
    most = vqa.most_frequent(target["answers"])
    return None if most is None else vqa.normalise(said) == vqa.normalise(most)


def _letter(target: Target, said: str) -> bool | None:
    return None if target["answer"] is None else choices.letter(said) == target["answer"]


def _annotators(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    if not samples[0].target["answers"]:  # hidden
        return []
    pairs = list(zip(samples, answers, strict=True))
    rules = {"vqa_accuracy": vqa.accuracy, "vqa_accuracy_published": vqa.published_accuracy}
    return [
        dict(
            metric=name, value=_mean([rule(said, s.target["answers"]) for s, said in pairs]), count=len(pairs)
        )
        for name, rule in rules.items()
    ]


EXACT = Metric("accuracy", "the same text but for case and a full stop", _exact, _shares("accuracy", _exact))
USUAL = Metric("accuracy", "as the most frequent answer, but for case and a full stop", _exact_usual,
               _shares("accuracy", _exact_usual))  # fmt: skip
ANNOTATORS = Metric("vqa_accuracy", "as several of ten annotators", _normalised_usual, _annotators)
LETTER = Metric("accuracy", "the letter before the first full stop", _letter, _shares("accuracy", _letter))


# --- yes or no ----------------------------------------------------------------------------------------------


def _binary(says: Callable[[str], bool], rule: str) -> Metric:
    def right(target: Target, said: str) -> bool | None:
        return bool(says(said) == target["label"])

    share = _shares("accuracy", right)

    def rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
        more = choices.binary([says(said) for said in answers], [s.target["label"] for s in samples])
        others = [dict(metric=k, value=v, count=len(samples)) for k, v in more.items() if k != "accuracy"]
        return share(samples, answers) + others

    return Metric("accuracy", rule, right, rows)


YES_NO = _binary(choices.says_yes, "yes, unless no or not is a word of its first sentence")
TRUE_FALSE = _binary(choices.says_true, "true, unless it is False")


# --- boxes --------------------------------------------------------------------------------------------------


def overlap(target: Target, said: str) -> float:
    """Return the IoU of the answered box with the target's; 0 if the answer has no box."""
    box = parse_box(said, target["width"], target["height"])
    return 0.0 if box is None else float(boxes.iou([box], [target["box"]])[0])


def _overlaps(target: Target, said: str) -> bool | None:
    return overlap(target, said) > 0.5


def _box_rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    overlaps = [overlap(sample.target, said) for sample, said in zip(samples, answers, strict=True)]
    hits = sum(value > 0.5 for value in overlaps)
    return [
        _share("iou@0.5", hits, len(overlaps)),
        dict(metric="mean_iou", value=_mean(overlaps), count=len(overlaps)),
    ]


BOX = Metric("iou@0.5", "a box with an IoU above 0.5", _overlaps, _box_rows)


# --- captions -----------------------------------------------------------------------------------------------


def _caption_rows(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    """CIDEr, BLEU and ROUGE-L, of NoCaps by domain as well (metric "cider/in-domain", ...)."""
    if not captions_are_scored():
        _warn_of_captions()
        return []
    from vlm.metrics import captions

    said = {sample.id: text for sample, text in zip(samples, answers, strict=True)}
    references = {sample.id: sample.target["captions"] for sample in samples}
    domains = {sample.id: str(sample.target.get("domain") or "") for sample in samples}
    if all(domains.values()):
        found = captions.by_domain(said, references, domains)
    else:
        found = {"entire": captions.scores(said, references)}
    return [
        dict(metric=metric if part == "entire" else f"{metric}/{part}", value=value, count=len(samples))
        for part, scored in found.items()
        for metric, value in scored.items()
    ]


def captions_are_scored() -> bool:
    """Return whether pycocoevalcap is installed."""
    return importlib.util.find_spec("pycocoevalcap") is not None


@lru_cache(maxsize=1)  # once a process
def _warn_of_captions() -> None:
    print(
        "warning: captions are answered but not scored (CIDEr, BLEU, ROUGE-L): pycocoevalcap is missing; "
        'pip install -e ".[vlm-metrics]" and evaluate again',
        file=sys.stderr,
    )


CAPTIONS = Metric(
    "cider", "CIDEr, BLEU and ROUGE-L of all references", lambda target, said: None, _caption_rows
)
