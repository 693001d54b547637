"""Token strings and their integer ids, in the order of the original code (gpantaz/retrievit).

| id             | token                | meaning                                              |
|----------------|----------------------|------------------------------------------------------|
| 0              | `<pad>`              | padding                                              |
| 1              | `<bos>`              | starts the context; also ends a sequence             |
| 2              | `<query>`            | stands before a queried symbol                       |
| 3 .. 3+V-1     | `<s0>` .. `<s{V-1}>` | symbols, which are retrieved                         |
| 3+V .. 3+V+P-1 | `<p0>` .. `<p{P-1}>` | positions, the answers                               |
| 3+V+P          | `<task>`             | generic instruction; last, so that no id above moves |
| 4+V+P ..       | extra                | further markers, of the tasks that have any          |

All ids are higher by `first_id` if the tokens are added to the vocabulary of a trained model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from ssm_retrieval.errors import UserError

PAD, BOS, QUERY = "<pad>", "<bos>", "<query>"
TASK = "<task>"
# Markers that single tasks add. The first two strings the original reserves without using them; the others
# frame an image and part its rows in the papers' vision-language models.
WHITE, COPY = "<white>", "<copy>"
IMAGE, ROW = "###", "&&"
UNKNOWN = "<UNK>"
SPECIAL = (PAD, BOS, QUERY)


@dataclass(frozen=True)
class Vocabulary:
    """Special tokens, symbols, position tokens and extra markers.

    Attributes:
        num_symbols: V.
        num_positions: P; may be 0.
        extra: Further marker strings.
        first_id: The id of the first token; lower ids belong to other tokens.

    Raises:
        UserError: If num_symbols < 1, or num_positions or first_id < 0.
    """

    num_symbols: int
    num_positions: int
    extra: tuple[str, ...] = ()
    first_id: int = 0

    def __post_init__(self) -> None:
        if self.num_symbols < 1:
            raise UserError(f"num_symbols {self.num_symbols} must be at least 1")
        if self.num_positions < 0:
            raise UserError(f"num_positions {self.num_positions} must not be negative")
        if self.first_id < 0:
            raise UserError(f"first_id {self.first_id} must not be negative")

    @property
    def pad(self) -> int:
        """Id of `<pad>`."""
        return self.first_id + SPECIAL.index(PAD)

    @property
    def bos(self) -> int:
        """Id of `<bos>`."""
        return self.first_id + SPECIAL.index(BOS)

    @property
    def query(self) -> int:
        """Id of `<query>`."""
        return self.first_id + SPECIAL.index(QUERY)

    @property
    def first_symbol(self) -> int:
        """Id of `<s0>`."""
        return self.first_id + len(SPECIAL)

    @property
    def first_position(self) -> int:
        """Id of `<p0>`, if there are positions."""
        return self.first_symbol + self.num_symbols

    @property
    def task(self) -> int:
        """Id of `<task>`."""
        return self.first_position + self.num_positions

    def __len__(self) -> int:
        return len(SPECIAL) + self.num_symbols + self.num_positions + 1 + len(self.extra)

    def marker(self, token: str) -> int:
        """Id of one of `extra`."""
        return self.task + 1 + self.extra.index(token)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All token strings; the index is the id minus `first_id`."""
        symbols = (f"<s{i}>" for i in range(self.num_symbols))
        positions = (f"<p{k}>" for k in range(self.num_positions))
        return (*SPECIAL, *symbols, *positions, TASK, *self.extra)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token string -> id."""
        return {token: i for i, token in enumerate(self.tokens, self.first_id)}

    def encode(self, tokens: Iterable[str] | str) -> list[int]:
        """Ids of `tokens`, given as strings or as one string with spaces between them.

        Raises:
            UserError: For a token that is not in the vocabulary.
        """
        tokens = tokens.split() if isinstance(tokens, str) else list(tokens)
        for token in tokens:
            if token not in self.ids:
                raise UserError(
                    f"token {token!r} is not in the vocabulary of {self.num_symbols} symbols "
                    f"and {self.num_positions} positions"
                )
        return [self.ids[token] for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Token strings of `ids` (integers, or a 1-D array or tensor of them).

        Ids outside the vocabulary give `<UNK>`: a model whose table was padded to a round number of rows can
        predict them.
        """
        places = (int(i) - self.first_id for i in ids)
        return [self.tokens[place] if 0 <= place < len(self) else UNKNOWN for place in places]
