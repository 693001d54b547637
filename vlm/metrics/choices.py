"""Read letters, true or false, and yes or no from answers; `released` has the released evaluators' rules."""

from __future__ import annotations

from collections.abc import Sequence

from ssm_retrieval.errors import UserError
from vlm.prompts import LETTERS


def letter(text: str) -> int | None:
    """Return the index of the option whose letter, of either case, stands before the first full stop.

    None if there is no single letter. The official scripts compare chosen texts, so the rule is our own.
    """
    said = text.split(".")[0].strip().upper()
    return LETTERS.index(said) if len(said) == 1 and said in LETTERS else None


def says_yes(text: str) -> bool:
    """Return whether an answer counts as yes, by POPE's official rule.

    Yes, unless "no", "No" or "not" is a word of the first sentence. Words are what stands between spaces.
    """
    return not {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" "))


def says_true(text: str) -> bool:
    """Return whether an answer of VSR counts as true: unless its first sentence is "False", of any case.

    VSR has no official rule for generated text; this one is our own.
    """
    return text.split(".")[0].strip().lower() != "false"


def binary(predicted: Sequence[bool], gold: Sequence[bool]) -> dict[str, float]:
    """Return precision, recall and F1 of yes, and the share of yes; undefined ratios are 0."""
    _same_length(predicted, gold)
    hits = sum(p and g for p, g in zip(predicted, gold, strict=True))
    said, right = sum(predicted), sum(gold)
    return {
        "precision": hits / said if said else 0.0,
        "recall": hits / right if right else 0.0,
        "f1": 2 * hits / (said + right) if said + right else 0.0,
        "yes_rate": said / len(predicted),
    }


def _same_length(predicted: Sequence, gold: Sequence) -> None:
    if len(predicted) != len(gold) or not gold:
        raise UserError(
            f"{len(predicted)} predictions for {len(gold)} gold answers: there must be one for each"
        )
