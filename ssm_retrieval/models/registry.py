"""One registry from name to configuration: `build("mamba-130m")`, `build("pythia-160m")`, ...

A name is FAMILY-SIZE. Sizes that the papers compare stand in one row of `SIZES` (130m with 160m, ...), and
either spelling finds every family: `build("mamba-160m")` is mamba-130m. Published shapes: Gu & Dao 2023
(state-spaces/mamba-*), Dao & Gu 2024 (state-spaces/mamba2-*), Biderman et al. 2023 (EleutherAI/pythia-*);
`150m` are the models of Retrievit (arXiv 2603.02874), without its vocabulary.
`tiny` models have about 0.5 M parameters with the default synthetic task and train in minutes on a CPU.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hybrid import HybridConfig, HybridForCausalLM
from ssm_retrieval.models.mamba import MambaConfig, MambaForCausalLM
from ssm_retrieval.models.mamba2 import Mamba2Config, Mamba2ForCausalLM
from ssm_retrieval.models.seeding import defaults, seeded
from ssm_retrieval.models.transformer import TransformerConfig, TransformerForCausalLM

FAMILIES: dict[str, tuple[type[Config], type[LanguageModel]]] = {
    "transformer": (TransformerConfig, TransformerForCausalLM),
    "mamba": (MambaConfig, MambaForCausalLM),
    "mamba2": (Mamba2Config, Mamba2ForCausalLM),
    "hybrid": (HybridConfig, HybridForCausalLM),
}
FAMILY_ALIASES = {"pythia": "transformer"}
# sizes that are compared with each other, and so may be used for one another
SIZES = (("130m", "160m"), ("370m", "410m"), ("790m", "780m", "1b"), ("1.4b", "1.3b"), ("2.8b", "2.7b"))


def _pythia(d_model: int, n_layer: int, n_head: int) -> dict[str, Any]:
    return dict(d_model=d_model, n_layer=n_layer, n_head=n_head)


def _mamba(d_model: int, n_layer: int) -> dict[str, Any]:
    return dict(d_model=d_model, n_layer=n_layer)


_TINY: dict[str, Any] = dict(d_model=128, vocab_size=2051, tie_word_embeddings=True)

PRESETS: dict[str, dict[str, Any]] = {
    "transformer-tiny": dict(_TINY, n_layer=2, n_head=4, max_position_embeddings=2048),
    "transformer-14m": _pythia(128, 6, 4),
    "transformer-31m": _pythia(256, 6, 8),
    "transformer-70m": _pythia(512, 6, 8),
    "transformer-150m": dict(_pythia(1024, 12, 16), vocab_size=50280),
    "transformer-160m": _pythia(768, 12, 12),
    "transformer-410m": _pythia(1024, 24, 16),
    "transformer-1b": _pythia(2048, 16, 8),
    "transformer-1.4b": _pythia(2048, 24, 16),
    "transformer-2.8b": _pythia(2560, 32, 32),
    "mamba-tiny": dict(_TINY, n_layer=4),
    "mamba-130m": _mamba(768, 24),
    "mamba-150m": _mamba(1024, 24),
    "mamba-370m": _mamba(1024, 48),
    "mamba-790m": _mamba(1536, 48),
    "mamba-1.4b": _mamba(2048, 48),
    "mamba-2.8b": _mamba(2560, 64),
    "mamba2-tiny": dict(_TINY, n_layer=4, d_state=64),
    "mamba2-130m": _mamba(768, 24),
    "mamba2-150m": dict(_mamba(1024, 24), d_state=16),
    "mamba2-370m": _mamba(1024, 48),
    "mamba2-780m": _mamba(1536, 48),
    "mamba2-1.3b": _mamba(2048, 48),
    "mamba2-2.7b": _mamba(2560, 64),
    "hybrid-tiny": dict(_TINY, n_layer=3, pattern="M M A", n_head=4),
    "hybrid-130m": dict(d_model=768, n_layer=16, n_head=12),
    "hybrid-150m": dict(d_model=1024, n_layer=16, n_head=16),
    "hybrid-370m": dict(d_model=1024, n_layer=32, n_head=16),
    "hybrid-790m": dict(d_model=1536, n_layer=34, n_head=12),
    "hybrid-1.4b": dict(d_model=2048, n_layer=34, n_head=16),
    "hybrid-2.8b": dict(d_model=2560, n_layer=44, n_head=20),
}


def presets() -> list[str]:
    """Every preset name, in the order families and sizes are listed."""
    return list(PRESETS)


def resolve(name: str) -> str:
    """The preset that a name means: aliases of families and sizes resolved.

    Raises UserError, naming the nearest presets, if there is none.
    """
    family, _, size = name.lower().partition("-")
    family = FAMILY_ALIASES.get(family, family)
    sizes = next((row for row in SIZES if size in row), (size,))
    for candidate in (f"{family}-{s}" for s in (size, *sizes)):
        if candidate in PRESETS:
            return candidate
    near = difflib.get_close_matches(f"{family}-{size}", PRESETS, n=1, cutoff=0.6)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"unknown model {name!r}{hint}; known: {', '.join(PRESETS)}")


def config(name: str, **overrides: Any) -> Any:
    """The frozen config of a preset, with fields replaced. Raises UserError for unknown names.

    A family alone, "mamba", is its config's defaults: for overrides that say everything.
    """
    if name in FAMILIES:
        return FAMILIES[name][0]().replace(**overrides)
    preset = resolve(name)
    family = FAMILIES[preset.partition("-")[0]][0]
    return family().replace(**{**PRESETS[preset], **overrides})


def from_config(
    config: Any, *, seed: int = 0, device: Any = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """A freshly initialised model for a config object. The global random state is left untouched.

    The weights are drawn on the CPU in float32 and rounded to dtype (default: torch's default dtype) part by
    part, so that no more than one block is ever held in float32 beside the model, and a bfloat16 model is the
    rounded float32 one. Raises UserError for anything but a config of `FAMILIES`.
    """
    model: Any = next((model for kind, model in FAMILIES.values() if type(config) is kind), None)
    known = ", ".join(kind.__name__ for kind, _ in FAMILIES.values())
    require(
        model is not None,
        f"from_config takes one of {known}, not {type(config).__name__}; models.config(name) makes one",
    )
    device = torch.get_default_device() if device is None else torch.device(device)
    dtype = dtype or torch.get_default_dtype()
    meta = device.type == "meta"
    with seeded(seed), defaults(device if meta else torch.device("cpu")):
        built = model(config, dtype)
    return built.to(device=device, dtype=dtype)


def build(
    name: str, *, seed: int = 0, device: Any = None, dtype: torch.dtype | None = None, **overrides: Any
) -> LanguageModel:
    """A freshly initialised model by name, e.g. `build("mamba-tiny", vocab_size=515, d_state=32)`.

    seed: fixes the initial weights. device: anything `torch.device` takes, "meta" allocates nothing.
    overrides: fields of the family's config. Raises UserError for unknown names, fields or values.
    """
    require(isinstance(name, str), f"model name {name!r} must be a string such as 'mamba-130m'")
    return from_config(config(name, **overrides), seed=seed, device=device, dtype=dtype)
