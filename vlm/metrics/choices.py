"""Letters, true or false, yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from ssm_retrieval.errors import UserError


def letter(text: str) -> int | None:
    """Index of the option whose letter stands before the first full stop; None where no single
    letter does.
    """
    said = text.split(".")[0].strip().upper()
    return ascii_uppercase.index(said) if len(said) == 1 and said in ascii_uppercase else None


def multiple_choice(predicted: Sequence[str], gold: Sequence[int]) -> float:
    """Share of answers that name the right option's letter."""
    _same_length(predicted, gold)
    return sum(letter(said) == right for said, right in zip(predicted, gold, strict=True)) / len(gold)


def says_yes(text: str, rule: str = "official") -> bool:
    """Whether an answer counts as yes.

    "official" (POPE): unless "no", "No" or "not" is a word of the first sentence. "published" (the paper's):
    unless the whole answer is "no", so that "No." counts as yes.
    """
    if rule == "published":
        return text.strip().lower() != "no"
    if rule != "official":
        raise UserError(f"rule={rule!r} must be 'official' or 'published'")
    return not {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split())


def says_true(text: str) -> bool:
    """Whether an answer of VSR counts as true: unless it is "False", which is the paper's rule as well."""
    return text.split(".")[0].strip().lower() != "false"


def binary(predicted: Sequence[bool], gold: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of yes; undefined ratios are 0."""
    _same_length(predicted, gold)
    pairs = list(zip(predicted, gold, strict=True))
    hits, said, right = sum(p and g for p, g in pairs), sum(predicted), sum(gold)
    return {
        "accuracy": sum(p == g for p, g in pairs) / len(pairs),
        "precision": hits / said if said else 0.0,
        "recall": hits / right if right else 0.0,
        "f1": 2 * hits / (said + right) if said + right else 0.0,
        "yes_rate": said / len(pairs),
    }


def _same_length(predicted: Sequence, gold: Sequence) -> None:
    if len(predicted) != len(gold) or not gold:
        raise UserError(
            f"{len(predicted)} predictions for {len(gold)} gold answers: there must be one for each"
        )
