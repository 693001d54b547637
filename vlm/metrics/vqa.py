"""VQA accuracy and exact match of short answers, by their official definitions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from ssm_retrieval.errors import UserError
from vlm.metrics.contractions import CONTRACTIONS

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
TEN = 10  # annotators of a question


def normalise(answer: str) -> str:
    """Normalise an answer as the official evaluation does.

    Punctuation is removed where it touches a space, or everywhere if the answer has a comma between digits,
    and becomes a space elsewhere. Full stops are removed unless a digit follows. Then: lower case, number
    words as digits, no articles, contractions with their apostrophes.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    joined = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        touches = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if touches or joined else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # the official code passes a flag in the place of a count
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def m4c(answer: str) -> str:
    """Normalise an answer as TextVQA's evaluation does (M4C).

    Commas and question marks are dropped, not made spaces, and 's becomes a word; then as `normalise`.
    """
    return normalise(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def accuracy(prediction: str, answers: Sequence[str], normal: Callable[[str], str] = normalise) -> float:
    """Return the official accuracy of one prediction.

    Each annotator is left out in turn, and the prediction scores a third of the others' agreeing answers, at
    most 1; the result is the mean. Prediction and answers are always normalised. TextVQA's evaluation does
    the same. VQAv2's compares them as written if all annotators wrote the same, so that "Red." is wrong where
    all ten wrote "red"; models that end answers with a full stop cannot be scored so.

    Args:
        prediction: The answer.
        answers: Answers of the ten annotators.
        normal: Normalises prediction and answers: `normalise` (VQAv2) or `m4c` (TextVQA).

    Returns:
        0 .. 1.

    Raises:
        UserError: If there are not ten answers.
    """
    require_ten(answers)
    said = normal(prediction)
    agree = [normal(answer) == said for answer in answers]
    return sum(min(1.0, (sum(agree) - this) / 3) for this in agree) / len(agree)


def require_ten(answers: Sequence[str]) -> None:
    """Check that these are the answers of ten annotators.

    Args:
        answers: One per annotator.

    Raises:
        UserError: If there are more or fewer.
    """
    if not answers:
        raise UserError("answers is empty: a hidden test set has to be scored by its server")
    if len(answers) != TEN:
        raise UserError(
            f"{len(answers)} answers: VQA accuracy is defined for {TEN} annotators; declare another metric, "
            "such as vlm.metrics.USUAL or vlm.metrics.ANLS"
        )


def exact_match(prediction: str, answer: str) -> float:
    """Return the accuracy of one prediction, 0 or 1: equal but for case and one final full stop."""
    said, right = (text.strip().removesuffix(".").lower() for text in (prediction, answer))
    return float(said == right)


def most_frequent(answers: Sequence[str]) -> str | None:
    """Return what most annotators said, the first of equally frequent answers; None without answers."""
    return Counter(answers).most_common(1)[0][0] if answers else None
