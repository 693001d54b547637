"""Held-out accuracy with a single query: overall and by target position, with Wilson intervals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from models import LanguageModel
from synthetic.tasks import Batch, Task

EVAL_SEED = 2409_05395  # of the held-out stream; the same for every training seed, model and length
EVAL_TOKENS = 32768  # per forward pass


@dataclass(frozen=True)
class Evaluation:
    """correct, target: one entry per held-out example; loss: mean cross-entropy in nats."""

    length: int
    correct: np.ndarray  # (examples,) bool
    target: np.ndarray  # (examples,) int64, 0-based position of the queried symbol
    loss: float
    chance: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

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


def wilson(correct: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927); (0, 1) for no observations."""
    if count == 0:
        return 0.0, 1.0
    p, n = correct / count, count
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def autocast(device: str, precision: str) -> AbstractContextManager[object]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def heldout(task: Task, examples: int, length: int) -> Iterator[Batch]:
    """Exactly `examples` single-query held-out sequences, in batches of about EVAL_TOKENS tokens."""
    rows = max(1, min(examples, EVAL_TOKENS // (task.max_length(1))))
    for index, start in enumerate(range(0, examples, rows)):
        size = min(rows, examples - start)
        yield task.batch(size, seed=EVAL_SEED, index=index, split="heldout", queries=1, length=length)


@torch.no_grad()
def evaluate(
    model: LanguageModel, task: Task, *, examples: int, length: int, device: str, precision: str
) -> Evaluation:
    """Accuracy of the arg-max over the whole vocabulary at the first answer of `examples` sequences."""
    correct, target, loss, chance = [], [], 0.0, 0.0
    for batch in heldout(task, examples, length):
        with autocast(device, precision):
            logits = model(batch.input_ids.to(device), logits_at=batch.answer_at[:1].to(device))
        logits, gold = logits[:, 0].float().cpu(), batch.labels[:, 0]
        correct.append((logits.argmax(-1) == gold).numpy())
        target.append(batch.target_index[:, 0].numpy())
        loss += float(F.cross_entropy(logits, gold, reduction="sum"))
        chance = batch.chance
    return Evaluation(length, np.concatenate(correct), np.concatenate(target), loss / examples, chance)
