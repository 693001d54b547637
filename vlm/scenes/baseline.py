"""What the question text alone gives away: a floor that any claim of sight must clear."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from ssm_retrieval.errors import UserError
from vlm.scenes.questions import Example


def question_only_baseline(train: Iterable[Example], test: Iterable[Example]) -> dict[str, float]:
    """Accuracy per task of answering, unseen, the most frequent training answer to the same question.

    Questions that training never asked get the most frequent answer of their task. Raises UserError where
    the test has a task that training lacks.
    """
    by_question: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    by_task: dict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        by_question[example.task, example.question][example.answer] += 1
        by_task[example.task][example.answer] += 1
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for example in test:
        if example.task not in by_task:
            raise UserError(f"no training example of task {example.task!r}: add some to the training list")
        counts = by_question.get((example.task, example.question), by_task[example.task])
        right[example.task] += counts.most_common(1)[0][0] == example.answer
        asked[example.task] += 1
    return {task: right[task] / asked[task] for task in asked}
