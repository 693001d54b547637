"""Tokenizers of a VLM: any of the hub's, or a small one made from the text that it must read.

Both are objects of the `tokenizers` library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_retrieval.errors import MissingPackage, UserError
from vlm.prompts import END

# A piece: a number of a box, a word with the space before it, or one character; nothing is lost or added.
PIECES = r"<\|endoftext\|>|###|&&|\d\.\d\d| ?[A-Za-z]+|\n|[^A-Za-z]"
SPECIAL = (END, "###", "&&", "<|unknown|>")
OWN = "own"  # names the tokenizer that is made of a run's own training texts
HELP = 'text needs tokenizers: pip install -e ".[vlm]"'


@dataclass(frozen=True)
class Text:
    """A `tokenizers.Tokenizer` without special tokens, and the ids of the image's markers."""

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids up to the first end token."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text.partition(END)[0]

    @property
    def markers(self) -> tuple[int, int]:
        """Ids of an image's begin and end, and of its row separator.

        Raises:
            UserError: If the tokenizer splits a marker into several tokens.
        """
        found = [self.encode(text) for text in ("###", "&&")]
        if [len(ids) for ids in found] != [1, 1]:
            raise UserError(
                f"the tokenizer splits the image markers '###' and '&&' into {found}; use another one"
            )
        return found[0][0], found[1][0]

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def digest(self) -> str:
        """Identify the ids that a tokenizer of `from_words` gives."""
        return _digest(repr((PIECES, SPECIAL, sorted(self.tokenizer.get_vocab().items()))).encode())


def from_words(texts: Iterable[str]) -> Text:
    """Make a tokenizer with a token for every piece of `texts` (see PIECES).

    Args:
        texts: All text that it must read.

    Returns:
        The tokenizer; the end token is id 0, and pieces that `texts` lack become one unknown token.

    Raises:
        MissingPackage: If tokenizers is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise MissingPackage(HELP) from error
    split = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    found = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *sorted(found - set(SPECIAL))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[-1]))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return Text(tokenizer)


def fingerprint(name: str) -> str:
    """Identify the ids that a tokenizer gives.

    The tokenizer of scenes is identified by what it is made from, a file by its content, one of the hub by
    its name.
    """
    if name == "scenes":
        from vlm.scenes import VERSION

        return f"scenes-v{VERSION}-{_digest(repr((PIECES, SPECIAL)).encode())}"
    path = _file(name)
    return f"file-{_digest(path.read_bytes())}" if path.is_file() else name


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _file(name: str) -> Path:
    return Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)


def read(name: str) -> Text:
    """Read a tokenizer.

    Args:
        name: A name on the hub, a folder with tokenizer.json, or such a file.

    Returns:
        The tokenizer.

    Raises:
        MissingPackage: If tokenizers is not installed.
        UserError: If there is no such tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackage(HELP) from error
    path = _file(name)
    try:
        return Text(Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(name))
    except Exception as error:  # the library raises Exception itself, for files and for the network
        said = " ".join(str(error).split())
        raise UserError(
            f"tokenizer={name!r} cannot be read ({said}); give a folder with tokenizer.json"
        ) from error
