"""Average normalised Levenshtein similarity, the metric of DocVQA and InfographicVQA."""

from __future__ import annotations

from collections.abc import Sequence

from ssm_retrieval.errors import UserError

THRESHOLD = 0.5  # less alike than this is wrong


def distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: the fewest letters to insert, delete or replace."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i  # `before`: the distance without this letter of `a` and of `b`
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the official score of one prediction; the data set's ANLS is the mean.

    One minus the distance to the nearest answer, as a share of the longer text; 0 below one half. Case and
    the width of white space do not count. Prompts end an answer with a full stop (`vlm.prompts.sentence`), so
    the prediction's last one is dropped where the answer ends without.

    Args:
        prediction: The answer.
        answers: The accepted answers.

    Returns:
        0, or 0.5 .. 1.

    Raises:
        UserError: If there are no answers.
    """
    if not answers:
        raise UserError("answers is empty: a hidden test set has to be scored by its server")
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= THRESHOLD else 0.0


def _similarity(prediction: str, answer: str) -> float:
    said, cut = prediction, prediction.rstrip()
    if cut.endswith(".") and not answer.rstrip().endswith("."):
        said = cut[:-1]
    longest = max(len(said), len(answer))  # as written, with all its white space, in the official code
    return 1 - distance(*(" ".join(text.lower().split()) for text in (said, answer))) / max(1, longest)
