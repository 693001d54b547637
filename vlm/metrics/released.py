"""Answers as the paper's released evaluators read them, behind the rows "accuracy_published".

They cut a generated text at a full stop with the end token behind it. An answer without that full stop keeps
the end token, and so is no answer that they know.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm.metrics import vqa
from vlm.prompts import LETTERS


def ended(said: str) -> str | None:
    """Return the text before a final full stop; None if there is none."""
    return said[:-1] if said.endswith(".") else None


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """Return the accuracy of VQAv2 and TextVQA: 0, 0.3, 0.6, 0.9 or 1 for 0, 1, 2, 3 or more equal answers.

    Nobody is left out, and only the prediction is normalised (`vqa.m4c`), so answers written with capitals or
    articles cannot be matched.

    Args:
        said: The answer.
        answers: Answers of the ten annotators.

    Returns:
        0 .. 1.

    Raises:
        UserError: If there are not ten answers.
    """
    vqa.require_ten(answers)
    text = ended(said)
    agree = 0 if text is None else sum(answer == vqa.m4c(text) for answer in answers)
    return min(1.0, round(0.3 * agree, 1))


def says(said: str, answer: str) -> bool:
    """Return whether an answer is right in GQA: equal but for case, with a full stop."""
    text = ended(said)
    return text is not None and text.lower() == answer.lower()


def says_letter(said: str, right: int) -> bool:
    """Return whether an answer is right in AI2D: the capital letter and a full stop."""
    return ended(said) == LETTERS[right]


def begins_with_letter(said: str, right: int) -> bool:
    """Return whether an answer is right in Visual7W: the capital letter before the first full stop."""
    return said.split(".")[0] == LETTERS[right]


def says_yes(said: str) -> bool:
    """Return whether an answer counts as yes in POPE: unless it is "no", so that "No." counts as yes."""
    return said.lower() != "no"


def says_true(said: str) -> bool:
    """Return whether an answer counts as true in VSR: unless it is "False."."""
    return ended(said) != "False"
