"""`Architecture`: all that the toolkit needs to know of a kind of model, in one record.

The file of an architecture ends with its record, and `ssm_retrieval.registry` has a line with its name.
Command line, tables, figures, planner and probes read the record, so nothing else has to be touched. A user's
own is made known by `models.register`; `models.from_mixer` makes one of a sequence mixer (docs/extending.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ssm_retrieval.models.block_memory import BlockMemory, Step
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.configuration import POSITIONS, Config, require
from ssm_retrieval.registry import NAME

# Of the size of this name: about 0.5 M parameters with the default task, trained in minutes.
TINY: Mapping[str, Any] = dict(d_model=128, vocab_size=2051, tie_word_embeddings=True)


@dataclass(frozen=True)
class Architecture:
    """One kind of language model.

    Attributes:
        name: what `--model` and folders call it.
        config: frozen dataclass derived from `Config`, with at least `vocab_size`, `d_model` and `n_layer`;
            its defaults are those of `models.config(name)`.
        model: (config, dtype) -> `LanguageModel` with freshly drawn weights, usually its class.
        label: its name in tables and figures. Default: `name`.
        color: in figures, as matplotlib writes it. Default: one that no other architecture has.
        marker: one character that stands for it in curves of the terminal. Default: of `label` the first.
        presets: size ("tiny", "130m") -> options of the config: what `--preset` and `models.build` know.
        positions: the schemes of `config.position` that a run may choose, its default first; () if order is
            known without any. A config of such an architecture also has `max_position_embeddings`.
        state_size: (config, seq_len) -> numbers that decoding keeps for one sequence after seq_len tokens.
        memory: (config, step) -> bytes of each block in training, for `--plan`; None: not known.
        hub: `model_type` of the class of `transformers` that reads its checkpoints; None: there is none.
        aliases: other names that `models.build` takes for it.

    Raises:
        UserError: for names and options that cannot be.
    """

    name: str
    config: type[Config]
    model: Callable[[Any, torch.dtype | None], LanguageModel]
    label: str = ""
    color: str | None = None
    marker: str = ""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    positions: tuple[str, ...] = ()
    state_size: Callable[[Any, int], int] | None = None
    memory: Callable[[Any, Step], list[BlockMemory]] | None = None
    hub: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)
        object.__setattr__(self, "marker", self.marker or self.label[:1].upper())
        require(len(self.marker) == 1, f"marker={self.marker!r} of model {self.name} must be one character")
        for size in self.presets:
            fits = NAME.fullmatch(f"m{size}") is not None and "-" not in size
            require(fits, f"size {size!r} of model {self.name} must be small letters, digits, _ and .")
        for scheme in self.positions:
            require(scheme in POSITIONS, f"position {scheme!r} of model {self.name} is none of {POSITIONS}")
        options = [
            *(["position", "max_position_embeddings"] if self.positions else ()),
            "vocab_size",
            "d_model",
        ]
        for option in (*options, "n_layer"):
            require(self.has(option), f"{self.config.__name__} of model {self.name} lacks the field {option}")

    def has(self, option: str) -> bool:
        """Whether the config has a field of this name."""
        return option in {f.name for f in dataclasses.fields(cast(Any, self.config))}
