"""BLEU, ROUGE-L and CIDEr by pycocoevalcap, and NoCaps by domain.

METEOR and SPICE are left out: they are Java programs, and SPICE downloads models.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence

from ssm_retrieval.errors import MissingPackage, UserError

# Tokens as the official tokenizer makes them: words and numbers keep their inner marks, clitics are split off
_TOKEN = re.compile(r"(?:n't\b)|'(?:s|m|d|ll|re|ve)\b|[^\W_]+?(?=n't\b)|[^\W_]+(?:[.,:/&-][^\W_]+)*|[^\w\s]")
_BRACKETS = dict(zip("()[]{}", ["-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"], strict=True))
_DROPPED = frozenset(
    ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", "[", "]", "{", "}", '"']
)
DOMAINS = ("in-domain", "near-domain", "out-domain")


def words(text: str) -> str:
    """Return lower-case tokens joined by spaces, close to the official Penn Treebank tokenizer (Java).

    Ordinary captions get the same tokens; rare marks, emoji and abbreviations with full stops may differ.
    """
    return " ".join(
        _BRACKETS.get(token, token) for token in _TOKEN.findall(text.lower()) if token not in _DROPPED
    )


def _tokens(captions: Mapping[str, Sequence[str]], tokenizer: str) -> dict[str, list[str]]:
    if tokenizer == "regex":
        return {key: [words(text) for text in texts] for key, texts in captions.items()}
    if tokenizer != "ptb":
        raise UserError(f"tokenizer={tokenizer!r} must be 'regex' or 'ptb'")
    if shutil.which("java") is None:
        raise UserError(
            "tokenizer='ptb' runs Java, which is not on PATH: install a JRE or use tokenizer='regex'"
        )
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize(
        {key: [{"caption": text} for text in texts] for key, texts in captions.items()}
    )


def scores(
    predicted: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: str = "regex"
) -> dict[str, float]:
    """Score one caption per image, all images together.

    Args:
        predicted: Caption by image id.
        references: Captions by image id.
        tokenizer: "regex" (`words`), or "ptb", the official one, which needs Java. State which one you used
            next to a number.

    Returns:
        bleu1 .. bleu4, rouge_l and cider; 1.0 is 100 in published tables.

    Raises:
        UserError: If ids differ, an image has no reference, or the tokenizer is unknown or lacks Java.
        MissingPackage: If pycocoevalcap is not installed.
    """
    if predicted.keys() != references.keys() or not predicted:
        raise UserError(
            f"{len(predicted)} predictions and {len(references)} references must have the same ids"
        )
    empty = [key for key, texts in references.items() if not texts]
    if empty:
        raise UserError(f"image {empty[0]} has no reference caption: a hidden test is scored by its server")
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise MissingPackage(
            "caption metrics need pycocoevalcap: pip install 'ssm-retrieval[vlm-metrics]'"
        ) from error
    gold = _tokens(references, tokenizer)
    said = _tokens({key: [predicted[key]] for key in references}, tokenizer)
    bleu, _ = Bleu(4).compute_score(gold, said, verbose=0)
    result = {f"bleu{n}": float(value) for n, value in enumerate(bleu, 1)}
    result["rouge_l"] = float(Rouge().compute_score(gold, said)[0])
    result["cider"] = float(Cider().compute_score(gold, said)[0])
    return result


def by_domain(
    predicted: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    domains: Mapping[str, str],
    tokenizer: str = "regex",
) -> dict[str, dict[str, float]]:
    """Score NoCaps by domain, each domain by itself, and all images as "entire".

    Args:
        predicted: Caption by image id.
        references: Captions by image id.
        domains: One of DOMAINS by image id.
        tokenizer: As for `scores`.

    Returns:
        Scores by domain.

    Raises:
        UserError: If an image has no domain or an unknown one.
    """
    unknown = set(domains.values()) - set(DOMAINS)
    if unknown or domains.keys() != predicted.keys():
        raise UserError(f"domains must give one of {', '.join(DOMAINS)} to each predicted image id")
    result = {"entire": scores(predicted, references, tokenizer)}
    for domain in DOMAINS:
        keys = [key for key in predicted if domains[key] == domain]
        if keys:
            result[domain] = scores(
                {k: predicted[k] for k in keys}, {k: references[k] for k in keys}, tokenizer
            )
    return result
