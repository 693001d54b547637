"""VQA accuracy: the official definition, and the variant behind the paper's numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ssm_retrieval.errors import UserError

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))

_NEGATED = [
    "ai",
    "are",
    "ca",
    "could",
    "did",
    "does",
    "do",
    "had",
    "has",
    "have",
    "is",
    "might",
    "must",
    "need",
    "sha",
    "should",
    "was",
    "were",
    "wo",
    "would",
]
_CONTRACTIONS = (
    *(f"{verb}n't" for verb in _NEGATED),
    *(f"{verb}n't've" for verb in ("could", "had", "might", "should", "would")),
    *(f"{verb}'ve" for verb in ("could", "might", "must", "should", "would")),
    *(
        f"{who}'s"
        for who in [
            "he",
            "she",
            "that",
            "there",
            "what",
            "when",
            "where",
            "who",
            "why",
            "how",
            "somebody",
            "someone",
            "something",
        ]
    ),
    *(f"{who}'ve" for who in ["i", "they", "we", "what", "who", "you"]),
    *(f"{who}'re" for who in ["they", "there", "what", "you"]),
    *(
        f"{who}'d"
        for who in ["how", "it", "that", "there", "they", "what", "when", "where", "who", "why", "you"]
    ),
    *(f"{who}'d've" for who in ["he", "i", "it", "she", "there", "they", "we", "who", "you"]),
    *(f"{who}'ll" for who in ["it", "somebody", "something", "that", "they", "what", "who", "why", "you"]),
    *("i'm", "let's", "ma'am", "o'clock", "y'all", "'twas", "'tis", "not've"),
)


def _without_some_apostrophes(word: str) -> list[str]:
    """The ways of writing a contraction with an apostrophe missing, all of them missing first."""
    places = [i for i, letter in enumerate(word) if letter == "'"]
    return [word.replace("'", ""), *(word[:i] + word[i + 1 :] for i in places)]


CONTRACTIONS = {wrong: word for word in _CONTRACTIONS for wrong in _without_some_apostrophes(word)}


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
    text = re.sub(r"\.(?!\d)", "", text)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the official accuracy of one prediction.

    Each annotator is left out in turn, and the prediction scores a third of the others' agreeing answers, at
    most 1; the result is the mean. Prediction and answers are normalised. (The official code skips this if
    all annotators wrote the same; doing it always is what the text-VQA benchmarks do.)

    Args:
        prediction: The answer.
        answers: Answers of the annotators.

    Returns:
        0 .. 1.

    Raises:
        UserError: If there are no answers.
    """
    if not answers:
        raise UserError("answers is empty: a hidden test set has to be scored by its server")
    said = normalise(prediction)
    agree = [normalise(answer) == said for answer in answers]
    return sum(min(1.0, (sum(agree) - this) / 3) for this in agree) / len(agree)


def published_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the paper's accuracy of one prediction.

    It is 0, 0.3, 0.6, 0.9 or 1 for 0, 1, 2, 3 or more equal answers. Nobody is left out, and only the
    prediction is normalised, so answers written with capitals or articles cannot be matched.

    Args:
        prediction: The answer.
        answers: Answers of the annotators.

    Returns:
        0 .. 1.

    Raises:
        UserError: If there are no answers.
    """
    if not answers:
        raise UserError("answers is empty: a hidden test set has to be scored by its server")
    text = prediction.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    agree = sum(answer == normalise(text) for answer in answers)
    return min(1.0, round(0.3 * agree, 1))


def exact_match(prediction: str, answer: str) -> float:
    """Return GQA's accuracy of one prediction, 0 or 1: equal but for case and one final full stop."""
    return float(prediction.strip().removesuffix(".").lower() == answer.strip().lower())


def most_frequent(answers: Sequence[str]) -> str | None:
    """Return what most annotators said, the first of equally frequent answers; None without answers."""
    return Counter(answers).most_common(1)[0][0] if answers else None
