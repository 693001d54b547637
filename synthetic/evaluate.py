"""Accuracy on unseen sequences, overall and by target position, with Wilson intervals; extrapolation; several
answers.

There are two sets of unseen sequences, which share none: "validation" decides when training stops and which
learning rate is taken, "heldout" is what is reported. A sequence has a single query, except in tasks whose
definition says more (`Task.usual_queries`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ssm_retrieval.errors import UserError
from ssm_retrieval.models import LanguageModel, generate
from ssm_retrieval.statistics import wilson
from ssm_retrieval.training import distributed
from ssm_retrieval.training.distributed import World
from synthetic.tasks import Batch, Task
from synthetic.tasks.base import Place

EVAL_SEED = 2409_05395  # of both streams; the same for every training seed, model and length
EVAL_TOKENS = 32768  # per forward pass


@dataclass(frozen=True)
class Evaluation:
    """The answers to some sequences of one length.

    The intervals take answers as independent, which several of one sequence need not be.

    Attributes:
        length: Context length.
        correct: (answers,) bool.
        target: (answers,) int64, 0-based position of the queried symbol.
        loss: Mean cross-entropy of the answers' tokens in nats.
        chance: Accuracy of a guess.
    """

    length: int
    correct: np.ndarray
    target: np.ndarray
    loss: float
    chance: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def by_target(self, bins: int) -> list[tuple[int, int, int, int]]:
        """(low, high, correct, count) of the answers whose target lies in low .. high - 1, for up to `bins`
        equal parts of the context."""
        edges = np.unique(np.linspace(0, self.length, bins + 1).round().astype(int))
        part = np.searchsorted(edges, self.target, side="right") - 1
        count = np.bincount(part, minlength=len(edges) - 1)
        hits = np.bincount(part[self.correct], minlength=len(edges) - 1)
        return [
            (int(low), int(high), int(h), int(c))
            for low, high, h, c in zip(edges[:-1], edges[1:], hits, count, strict=True)
        ]

    def by_position(self) -> list[dict[str, float | int]]:
        """Tidy rows: for every position that was asked for, rate = correct / count with its interval."""
        rows = []
        for position in np.unique(self.target):
            hits = self.correct[self.target == position]
            low, high = wilson(int(hits.sum()), len(hits))
            rows.append(
                dict(
                    position=int(position),
                    correct=int(hits.sum()),
                    count=len(hits),
                    rate=float(hits.mean()),
                    ci_low=low,
                    ci_high=high,
                )
            )
        return rows


def autocast(device: str, precision: str) -> AbstractContextManager[object]:
    """A block in which products have this precision."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def rows_at_once(task: Task, examples: int, length: int) -> int:
    """Sequences of a batch of `heldout`.

    Args:
        task: What they are of.
        examples: Examples that are wanted in all.
        length: Context length.

    Returns:
        As many as `EVAL_TOKENS` allows, at least one.
    """
    return max(1, min(examples, EVAL_TOKENS // task.max_length(task.usual_queries(length))))


def heldout(
    task: Task,
    examples: int,
    length: int,
    split: str = "heldout",
    start: int = 0,
    place: Place = "first",
) -> Iterator[Batch]:
    """Exactly `examples` sequences that no run trains on, from number `start`, about EVAL_TOKENS at a time.

    Sequence i is the same in every set that contains it.

    Args:
        task: What they are of.
        examples: How many.
        length: Context length.
        split: "heldout" or "validation".
        start: Number of the first one.
        place: "first", or "gap" for models that were trained so (`synthetic.curricula`).

    Returns:
        Batches, in order.
    """
    return task.examples(
        examples,
        seed=EVAL_SEED,
        split=split,
        length=length,
        start=start,
        batch_size=rows_at_once(task, examples, length),
        place=place,
    )


def evaluate(
    model: LanguageModel,
    task: Task,
    *,
    examples: int,
    length: int,
    device: str,
    precision: str,
    place: Place = "first",
) -> Evaluation:
    """Accuracy of the arg-max over the whole vocabulary at the answers of `examples` sequences.

    An answer of several tokens is teacher-forced: right if every token is the arg-max after those before
    it, which greedy generation would then give as well.

    Args:
        model: What answers.
        task: What is asked.
        examples: How many sequences.
        length: Context length.
        device: "cpu", "cuda" or "mps".
        precision: "float32" or "bfloat16".
        place: As in `heldout`; of a run's model `curricula.place(run.plan, length)`.

    Returns:
        Every answer, and the mean loss.
    """
    batches = heldout(task, examples, length, place=place)
    return score(model, batches, device=device, precision=precision)


@torch.no_grad()
def score(model: LanguageModel, batches: Iterable[Batch], *, device: str, precision: str) -> Evaluation:
    """As `evaluate`, for given batches of one length, those of a file say.

    Args:
        model: What answers.
        batches: What is asked.
        device: "cpu", "cuda" or "mps".
        precision: "float32" or "bfloat16".

    Returns:
        Every answer, and the mean loss.

    Raises:
        UserError: If there is no batch.
    """
    correct, target, loss, tokens, last = [], [], 0.0, 0, None
    for batch in batches:
        asked = batch.retrieved
        with autocast(device, precision):
            there = batch.to(device)
            logits = model(there.input_ids, logits_at=there.answer_at[..., :asked], **there.places())
        logits, gold = logits.float().cpu(), batch.labels[:, :asked]
        correct.append(batch.right(logits.argmax(-1)).flatten().numpy())
        target.append(batch.target_index.flatten().numpy())
        loss += float(F.cross_entropy(logits.flatten(0, 1), gold.flatten(), reduction="sum"))
        tokens += gold.numel()
        last = batch
    if last is None:
        raise UserError("there is no batch to evaluate")
    return Evaluation(
        last.length, np.concatenate(correct), np.concatenate(target), loss / tokens, last.chance
    )


@torch.no_grad()
def score_together(
    model: LanguageModel, batches: Iterable[Batch], world: World, *, device: str, precision: str
) -> Evaluation:
    """`score`, each process on its rows of every batch.

    Args:
        model: What answers.
        batches: What is asked.
        world: The processes, which all call this.
        device: "cpu", "cuda" or "mps".
        precision: "float32" or "bfloat16".

    Returns:
        The whole result, in all processes.
    """
    if world.size == 1:
        return score(model, batches, device=device, precision=precision)
    mine: list[Evaluation | None] = []
    for batch in batches:
        parts = batch.split(world.size)
        part, empty = parts[world.rank], len(parts[world.rank].labels) == 0
        # a process without rows takes part in the forward pass all the same
        result = score(model, [parts[0] if empty else part], device=device, precision=precision)
        mine.append(None if empty else result)
    distributed.reshard(model)
    in_order = zip(*world.gathered(mine), strict=True)  # batch by batch, its parts by rank
    found: list[Evaluation] = [result for results in in_order for result in results if result is not None]
    counts = [len(result.correct) for result in found]
    return Evaluation(
        found[0].length,
        np.concatenate([result.correct for result in found]),
        np.concatenate([result.target for result in found]),
        float(np.average([result.loss for result in found], weights=counts)),
        found[0].chance,
    )


def extrapolate(
    model: LanguageModel, task: Task, lengths: Iterable[int], *, examples: int, device: str, precision: str
) -> list[Evaluation]:
    """`evaluate` at every length, also beyond task.seq_len, of a model trained on `task`.

    The papers train n-grams on 50 .. 100 (min_seq_len=50, seq_len=100) and test at 100 .. 400. Answers that
    are positions need a vocabulary for the longest length, so there the model is trained at shorter ones of
    it.

    Args:
        model: What answers.
        task: Task that it was trained on.
        lengths: Context lengths.
        examples: How many sequences of each.
        device: "cpu", "cuda" or "mps".
        precision: "float32" or "bfloat16".

    Returns:
        An evaluation per length.

    Raises:
        UserError: If the vocabulary or the model's table of positions is too small for a length.
    """
    return [
        evaluate(model, task.at(n), examples=examples, length=n, device=device, precision=precision)
        for n in lengths
    ]


def evaluate_blocks(
    model: LanguageModel, task: Task, *, examples: int, length: int, device: str, precision: str
) -> list[dict[str, float | int | str]]:
    """Which of several right answers a model gives (task `ngram-duplicate`).

    Answers are generated greedily.

    Args:
        model: What answers.
        task: What is asked.
        examples: How many sequences.
        length: Context length.
        device: "cpu", "cuda" or "mps".
        precision: "float32" or "bfloat16".

    Returns:
        Tidy rows: block "0" (the earliest) .., and "missed" for answers that are none of them; how many of
        the answers it has, their share `rate` and its interval.

    Raises:
        UserError: If the task has one right answer.
    """
    chosen = []
    rows: list[dict[str, float | int | str]] = []
    for batch in heldout(task, examples, length):
        if batch.alternatives is None:
            raise UserError(f"task {task.name} has one right answer; evaluate_blocks is for ngram-duplicate")
        question = batch.input_ids[:, : int(batch.answer_at[0]) + 1].to(device)
        with autocast(device, precision):
            answer = generate(model, question, batch.answer_tokens).cpu()
        same = (batch.alternatives == answer[:, None]).all(-1)  # (B, M), at most one true in a row
        chosen.append(torch.where(same.any(1), same.int().argmax(1), same.shape[1]).numpy())
    block = np.concatenate(chosen)
    for b in range(same.shape[1] + 1):
        hits = int((block == b).sum())
        low, high = wilson(hits, examples)
        name = "missed" if b == same.shape[1] else str(b)
        rows.append(
            dict(block=name, answers=hits, count=examples, rate=hits / examples, ci_low=low, ci_high=high)
        )
    return rows
