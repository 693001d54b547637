"""BLEU, ROUGE-L and CIDEr by pycocoevalcap, and NoCaps by domain.

METEOR and SPICE are left out: they are Java programs, and SPICE downloads models.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Mapping, Sequence

from ssm_retrieval.errors import MissingPackage, UserError

Tokens = dict[str, list[str]]  # captions of an image, their tokens joined by spaces

# Tokens as the official tokenizer makes them (Stanford's, of 2014), by the first pattern that fits.
_ABBREVIATED = (
    "mrs?|ms|dr|st|mt|jr|sr|prof|gen|col|lt|capt|sgt|rev|hon|gov|sen|rep|jan|feb|mar|apr|jun|jul|aug|sept?"
    "|oct|nov|dec|mon|tue|wed|thu|fri|inc|co|ltd|corp|bros|vs|etc|ave|blvd|rd|dept|est|ft|ph|al|p"
)
_TOKEN = re.compile(
    r"""
    [^\W\d_]+?(?=n['’]t\b) | n['’]t\b                     # is + n't
    | ['’](?:s|m|d|ll|re|ve)\b                            # man + 's
    | ['’]\d0s\b | '(?:em|cause|til)\b | 'n\b'? | ['’]t(?=is\b|was\b)     # '90s, 'em, 'n', 't + is
    | \b(?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b)|y'(?=all\b))
    | \b(?:[odl]['’][^\W\d_]{2,}|[cs]'mo\w+|ma'am|[en]?e'er|ol')               # o'clock, d'oeuvres
    | (?:\b|(?<=:\d\d))(?:[a-z]\.){2,}(?:[a-z](?!\w)|-\w+)? | \b(?:ph\.d|[a-z])\.(?!\w)   # p.m., J.
    | \b(?:ABBREVIATED)\.(?!\w) | \bno\.(?=\s*\d)
    | \b(?-i:[A-Z]+&[A-Z]+)                               # R&B
    | \d+(?:[.,:]\d+)+(?:-\w+)*                          # 1,000, 10:30 + pm
    | (?<!\w)[\#@][^\W\d]\w* | \w+(?:[./-]\w+)*
    | [!?]{2,} | [^\w\s\U00010000-\U0010ffff]            # emoji are dropped
    """.replace("ABBREVIATED", _ABBREVIATED),
    re.VERBOSE | re.IGNORECASE,
)
_SIGNS = str.maketrans({"–": " ", "—": " ", "…": " ", "€": "$", "£": "#"})
_BRACKETS = dict(zip("()[]{}", ["-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"], strict=True))
_DROPPED = frozenset(".,:;?!-'`\"“”‘’«»")
DOMAINS = ("in-domain", "near-domain", "out-domain")


def words(text: str) -> str:
    """Return lower-case tokens joined by spaces, close to the official Penn Treebank tokenizer (Java).

    Captions as people and models write them get the same tokens. Web addresses, smileys, fractions such as
    "½", marks without a space between words ("a!b") and rare abbreviations may get others.
    """
    tokens = (token for token in _TOKEN.findall(text.translate(_SIGNS)) if token not in _DROPPED)
    return " ".join(_BRACKETS.get(token, _apostrophe(token.lower())) for token in tokens)


def _apostrophe(token: str) -> str:
    """A clitic with a straight apostrophe; others keep theirs, as in "o’clock"."""
    return token.replace("’", "'") if token[0] == "’" or token == "n’t" else token


def _tokens(captions: Mapping[str, Sequence[str]], tokenizer: str) -> Tokens:
    if tokenizer == "regex":
        return {key: [words(text) for text in texts] for key, texts in captions.items()}
    if tokenizer != "ptb":
        raise UserError(f"tokenizer={tokenizer!r} must be 'regex' or 'ptb'")
    if shutil.which("java") is None:
        raise UserError(
            "tokenizer='ptb' runs Java, which is not on PATH: install a JRE or use tokenizer='regex'"
        )
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # it reads a caption a line, and Java knows more ends of lines than "\n"
    lines = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
    return PTBTokenizer().tokenize(lines)


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
    gold, said = _compared(predicted, references, tokenizer)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(gold, said, verbose=0)
    result = {f"bleu{n}": float(value) for n, value in enumerate(bleu, 1)}
    return result | {"rouge_l": float(Rouge().compute_score(gold, said)[0]), "cider": _cider(gold, said)}


def cider(predicted: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """Return CIDEr alone, with `words` as tokens; arguments and errors are those of `scores`."""
    return _cider(*_compared(predicted, references, "regex"))


def _cider(gold: Tokens, said: Tokens) -> float:
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(gold, said)[0])


def _compared(
    predicted: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: str
) -> tuple[Tokens, Tokens]:
    """References and predictions as tokens, after checks; pycocoevalcap can be imported after this."""
    if predicted.keys() != references.keys() or not predicted:
        raise UserError(
            f"{len(predicted)} predictions and {len(references)} references must have the same ids"
        )
    empty = [key for key, texts in references.items() if not texts]
    if empty:
        raise UserError(f"image {empty[0]} has no reference caption: a hidden test is scored by its server")
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise MissingPackage("caption metrics need pycocoevalcap: pip install 'ssm-retrieval[vlm-metrics]'")
    gold = _tokens(references, tokenizer)
    return gold, _tokens({key: [predicted[key]] for key in references}, tokenizer)


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
