"""Scores of predictions, and the tidy table that they go to.

runs/vlm/results/<run>.parquet   a row per task and metric of an evaluated run
runs/vlm/results/<run>.jsonl     what was asked and answered, example by example
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssm_retrieval.errors import UserError
from ssm_retrieval.statistics import wilson
from vlm.data.samples import Sample
from vlm.data.turns import usual
from vlm.metrics import boxes, choices, vqa
from vlm.prompts import box_text, parse_box
from vlm.schema import remove_left, shortened

if TYPE_CHECKING:
    from vlm.config import Run

Row = dict[str, Any]
VERSION = 1  # raise it when the same answers lead to other rows
RESULTS = "results"
MOST_BOXES = 2000  # that the best single box is sought among
COLUMNS = {
    "run": ("string", "name in the config file"),
    "stage": ("string", "folder of the trained weights"),
    "evaluation": ("string", "hash of what was asked, how, and how it was scored"),
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
NEEDED = ("run", "stage", "evaluation", "family", "task", "metric", "value")  # never missing


def table_path(out: Path, run: str) -> Path:
    """Where a run's rows go; runs that share their last stage have a table each."""
    return out / RESULTS / f"{run}.parquet"


def answers_path(out: Path, run: str) -> Path:
    """Where a run's answers go."""
    return out / RESULTS / f"{run}.jsonl"


def right(sample: Sample, said: str) -> bool | None:
    """Whether an answer is the right one; None where that is no matter of yes or no, or hidden.

    Boxes: IoU above 0.5. Letters, true/false, yes/no: as `vlm.metrics.choices` reads them. One short answer:
    `vlm.metrics.vqa.exact_match`, as GQA is scored. Of several annotators: what most said, normalised.
    """
    target = sample.target
    if "width" in target and "box" in target:
        return overlap(sample, said) > 0.5
    if "label" in target:
        says = choices.says_yes if sample.source == "pope" else choices.says_true
        return bool(says(said) == target["label"])
    if "choices" in target or "boxes" in target:
        return None if target["answer"] is None else choices.letter(said) == target["answer"]
    if "answers" in target:
        most = usual(target["answers"])
        if most is None:
            return None
        if sample.source == "gqa":
            return bool(vqa.exact_match(said, most))
        return vqa.normalise(said) == vqa.normalise(most)
    return bool(vqa.exact_match(said, target["answer"])) if "answer" in target else None


def overlap(sample: Sample, said: str) -> float:
    """IoU of the answered box with the sample's; 0 where the answer is no box."""
    box = parse_box(said, sample.target["width"], sample.target["height"])
    return 0.0 if box is None else float(boxes.iou([box], [sample.target["box"]])[0])


def score(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
    """Rows (metric, value, count, and ci_low, ci_high of shares) of one task's samples and answers to them.

    Which metrics a sample has is decided by its target (`vlm.data.turns`); [] for tasks without one, such as
    conversations, for captions where pycocoevalcap is missing, and for hidden answers.
    """
    first, pairs = samples[0], list(zip(samples, answers, strict=True))
    if "captions" in first.target and "box" not in first.target:
        return captioning(samples, answers)
    if first.source != "gqa" and first.target.get("answers") and "label" not in first.target:
        accuracies = {"vqa_accuracy": vqa.accuracy, "vqa_accuracy_published": vqa.published_accuracy}
        return [
            dict(
                metric=name,
                value=_mean([rule(said, s.target["answers"]) for s, said in pairs]),
                count=len(pairs),
            )
            for name, rule in accuracies.items()
        ]
    known = [found for sample, said in pairs if (found := right(sample, said)) is not None]
    if not known:
        return []
    grounded = "box" in first.target
    rows = [_share("iou@0.5" if grounded else "accuracy", sum(known), len(known))]
    if grounded:
        rows.append(dict(metric="mean_iou", value=_mean([overlap(s, x) for s, x in pairs]), count=len(pairs)))
    if "label" in first.target:
        says = choices.says_yes if first.source == "pope" else choices.says_true
        more = choices.binary([says(said) for said in answers], [s.target["label"] for s in samples])
        rows += [dict(metric=k, value=v, count=len(pairs)) for k, v in more.items() if k != "accuracy"]
    return rows


def _share(metric: str, hits: int, count: int) -> Row:
    low, high = wilson(hits, count)
    return dict(metric=metric, value=hits / count, ci_low=low, ci_high=high, count=count)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def captioning(samples: Sequence[Sample], answers: Sequence[str]) -> list[Row]:
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
    """Whether pycocoevalcap is installed."""
    return importlib.util.find_spec("pycocoevalcap") is not None


@lru_cache(maxsize=1)  # once a process
def _warn_of_captions() -> None:
    print(
        "warning: captions are answered but not scored (CIDEr, BLEU, ROUGE-L): pycocoevalcap is missing; "
        'pip install -e ".[vlm-metrics]" and evaluate again',
        file=sys.stderr,
    )


def question_only(train: Iterable[Sample], test: Sequence[Sample]) -> list[str]:
    """Answers without looking: the most frequent training answer to the same question, else to its task.

    Where a box is asked for, the one training box that overlaps most others by more than half.
    """
    known = list(train)
    if not known:
        raise UserError("no training samples to learn answers from; give some")
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


def fingerprint(run: Run) -> str:
    """Hash of what a table of this run depends on beside its weights: what is asked, how, and the scores."""
    from vlm.scenes import VERSION as SCENES

    asked = [(name, dataclasses.asdict(data)) for name, data in run.evaluation.items()]
    said = [VERSION, SCENES, asked, run.layout, run.max_new_tokens, captions_are_scored()]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def write(out: Path, run: str, rows: Sequence[Mapping[str, Any]], answers: Sequence[Row]) -> Any:
    """One run's rows as Parquet with exactly COLUMNS, and its answers; returns the table."""
    from filelock import FileLock

    from ssm_retrieval.training import store
    from synthetic.results import to_parquet

    table, said = table_path(out, run), answers_path(out, run)
    table.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(table.with_name(f".{run}.lock")):
        remove_left(said)
        store.write_rows(said, answers)
        remove_left(table)
        store.write_bytes(table, to_parquet([dict(row) for row in rows], COLUMNS))
    return read(table)


def read(path: Path) -> Any:
    """A table that `write` has made, as a data frame. Raises UserError for a damaged one."""
    import pyarrow as pa
    from pyarrow import compute, parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({shortened(str(error))})") from None
    for name, (kind, _) in COLUMNS.items():
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r}: it is damaged, or of another version")
        column = table[name]
        if column.type != pa.type_for_alias(kind):
            raise UserError(f"{path} is damaged (column {name!r} is {column.type}, not {kind})")
        if name in NEEDED and (
            column.null_count or (kind == "float64" and compute.any(compute.is_nan(column)).as_py())
        ):
            raise UserError(f"{path} is damaged (column {name!r} has missing values)")
    return table.to_pandas()
