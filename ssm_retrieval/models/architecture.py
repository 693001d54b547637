"""`Architecture`: everything that the toolkit needs to know about a kind of model, in one record.

The file of an architecture ends with its record, and `ssm_retrieval.registry` has one line with its name.
The command line, tables, figures, planner and probes read the record. `models.register` makes a user's own
record known, and `models.from_mixer` makes one from a sequence mixer (docs/extending.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from ssm_retrieval.models.block_memory import BlockMemory, Step
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.configuration import POSITIONS, Config, require
from ssm_retrieval.registry import NAME

# The size "tiny": about 0.5 M parameters with the default task, trained in minutes
TINY: Mapping[str, Any] = dict(d_model=128, vocab_size=2051, tie_word_embeddings=True)


@dataclass(frozen=True)
class Hub:
    """How `transformers` stores an architecture: what `models.save` writes and `models.load` reads.

    Attributes:
        model_type: `model_type` in its config.json.
        model_class: Its class, named under `architectures`.
        read: Maps (raw, keys, where, beside) to options of our config: the contents of config.json, the names
            of the tensors, the file for errors, and fields that have no meaning. It raises UserError for what
            our model cannot be.
        write: Maps a config to the fields of config.json that are particular to the class.
        lacks: Maps a config to what the class cannot be, as "name=value"; None if it can be all of it.
        published: Maps our name of a weight to the class's. The other way, and for older spellings, a model
            has `LanguageModel.accept_hub_spellings`. Default: names are the same.
        extras: Options of ours that the class has no field for. They stand in config.json under
            "ssm_retrieval", where they differ from what `read` makes of the other fields.
    """

    model_type: str
    model_class: str
    read: Callable[[Mapping[str, Any], Collection[str], str, Collection[str]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    lacks: Callable[[Any], str | None]
    published: Callable[[str], str] = str
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """One kind of language model.

    Attributes:
        name: Its name for `--model` and in folders.
        config: Frozen dataclass derived from `Config`, with at least `vocab_size`, `d_model` and `n_layer`.
            `models.config(name)` has its defaults.
        model: Maps (config, dtype) to a `LanguageModel` with fresh weights; usually its class.
        label: Its name in tables and figures. Default: `name`.
        color: Its colour in figures, as matplotlib spells it. Default: one that no other architecture has.
        marker: One character that draws its curve in the terminal. Default: the first of `label`.
        presets: Maps a size ("tiny", "130m") to options of the config, for `--preset` and `models.build`.
        positions: Values of `config.position` that a run may choose, the default first; () if there is no
            choice. Otherwise the config also has `max_position_embeddings`. "none" comes first if the model
            knows the order of tokens by itself.
        state_size: Maps (config, seq_len) to how many numbers decoding keeps for a sequence of seq_len
            tokens.
        memory: Maps (config, step) to the bytes of each block in training, for `--plan`. None: unknown.
        block: Maps a config to a block that may stand in the pattern of a hybrid. It is called as
            block(x, context, cache); a parallel block runs its `norm` and `mixer` alone. None: it cannot.
        hub: How `transformers` stores it. None: it has no such class.
        aliases: Other names that `models.build` accepts.

    Raises:
        UserError: For an impossible name, size, scheme or marker, and for a config without these fields.
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
    block: Callable[[Any], nn.Module] | None = None
    hub: Hub | None = None
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

    @property
    def knows_order(self) -> bool:
        """Whether the model knows the order of tokens without positions, as state space models do."""
        return self.positions[:1] in ((), ("none",))

    def has(self, option: str) -> bool:
        """Whether the config has a field with this name."""
        return option in {f.name for f in dataclasses.fields(cast(Any, self.config))}
