"""Scores of predictions, and the tidy table that they go to.

runs/vlm/results/<run>.parquet     a row per task and metric of an evaluated run
runs/vlm/<stage>/predictions.jsonl what was asked and answered, example by example
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from synthetic.evaluate import wilson
from vlm.data.samples import Sample
from vlm.metrics import boxes
from vlm.prompts import box_text, parse_box

Row = dict[str, Any]
RESULTS = "results"
MOST_BOXES = 2000  # that the best single box is sought among
COLUMNS = {
    "run": ("string", "name in the config file"),
    "stage": ("string", "folder of the trained weights"),
    "family": ("string", "mamba, transformer, ..."),
    "model": ("string", "preset"),
    "layout": ("string", "agnostic, instruction-first or query-first"),
    "image_size": ("int64", "pixels a side that the encoder sees"),
    "image_tokens": ("int64", "places of an image in the sequence"),
    "seed": ("int64", "of weights and order of data"),
    "task": ("string", "name in the run's evaluation"),
    "split": ("string", "of the evaluation data"),
    "metric": ("string", "accuracy, iou@0.5, mean_iou, cider, ..."),
    "value": ("float64", "0 .. 1 (CIDEr: 0 .. 10)"),
    "ci_low": ("float64", "Wilson 95 % interval of shares, of this evaluation alone"),
    "ci_high": ("float64", "its upper end"),
    "count": ("int64", "examples"),
    "chance": ("float64", "of a guess among the answers that a question allows; missing where there is none"),
    "question_only": ("float64", "of the best answer without the image, learned from training questions"),
    "parameters": ("int64", "of language model and connector"),
    "steps": ("int64", "optimiser steps of all stages"),
    "seconds": ("float64", "of training, all stages"),
    "commit": ("string", "of this project; + if files differed from it"),
}


def right(sample: Sample, said: str) -> bool | None:
    """Whether an answer is the right one, up to case and a final period; None where no single answer is."""
    if "box" in sample.target:
        return overlap(sample, said) > 0.5
    if "answer" not in sample.target:
        return None
    return plain(said) == plain(sample.target["answer"])


def plain(text: str) -> str:
    """Stripped, lower-case, without a final period: exact match as for GQA's short answers."""
    return text.strip().rstrip(".").strip().lower()


def overlap(sample: Sample, said: str) -> float:
    """IoU of the answered box with the sample's; 0 where the answer is no box."""
    box = parse_box(said, sample.target["width"], sample.target["height"])
    return 0.0 if box is None else float(boxes.iou([box], [sample.target["box"]])[0])


def score(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    """Rows (metric, value, ci_low, ci_high, count) of one task's samples and the answers to them."""
    if "references" in samples[0].target:
        return captioning(samples, answers)
    known = [right(sample, said) for sample, said in zip(samples, answers, strict=True)]
    hits, count = sum(map(bool, known)), len(known)
    low, high = wilson(hits, count)
    grounded = "box" in samples[0].target
    name = "iou@0.5" if grounded else "accuracy"
    rows = [dict(metric=name, value=hits / count, ci_low=low, ci_high=high, count=count)]
    if grounded:
        overlaps = [overlap(sample, said) for sample, said in zip(samples, answers, strict=True)]
        rows.append(dict(metric="mean_iou", value=float(np.mean(overlaps)), count=count))
    return rows


def captioning(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    """CIDEr and BLEU-4 by pycocoevalcap where it is installed; [] without it."""
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        return []
    from vlm.metrics.captions import scores

    names = [str(i) for i in range(len(samples))]
    found = scores(
        dict(zip(names, answers, strict=True)),
        {name: sample.target["references"] for name, sample in zip(names, samples, strict=True)},
    )
    return [dict(metric=metric.lower(), value=value, count=len(samples)) for metric, value in found.items()]


def question_only(train: Iterable[Sample], test: Sequence[Sample]) -> list[str]:
    """Answers without looking: the most frequent training answer to the same question, else to its task.

    Where a box is asked for, the one training box that overlaps most others by more than half.
    """
    known = list(train)
    if not known:
        raise ValueError("no training samples to learn answers from; give some")
    if "box" in known[0].target:
        return [best_box(known)] * len(test)
    same: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in known:
        same[asked(sample)][sample.target["answer"]] += 1
    every = sum(same.values(), Counter())
    return [(same.get(asked(sample)) or every).most_common(1)[0][0] for sample in test]


def best_box(known: Sequence[Sample]) -> str:
    """The answer among those of `known` that is right for most of them."""
    targets = [sample.target for sample in known[:MOST_BOXES]]
    shares = np.array([t["box"] for t in targets]) / [[t["width"], t["height"]] * 2 for t in targets]
    hits = [(boxes.iou(np.broadcast_to(one, shares.shape), shares) > 0.5).sum() for one in shares]
    best = targets[int(np.argmax(hits))]
    return box_text(tuple(best["box"]), best["width"], best["height"])


def asked(sample: Sample) -> str:
    """The text of a sample before its answer."""
    return "".join(chunk.text for chunk in sample.chunks if not chunk.supervised)


def write(path: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """One run's rows as Parquet with exactly COLUMNS."""
    from synthetic import store
    from synthetic.results import to_parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_bytes(path, to_parquet([dict(row) for row in rows], COLUMNS))
