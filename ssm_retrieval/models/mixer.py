"""`from_mixer`: a language model around any sequence mixer, in the manner of Zoology (arXiv 2312.04927).

    x = x + mixer(norm(x))          (B, L, D) -> (B, L, D), causal; made by mixer(d_model, **options)
    x = x + mlp(norm(x))            two matrices around a GELU, d_mlp wide; not in a hybrid

Letters as in `ssm_retrieval.models.common`. A mixer need not know about padding or a cache. Because it is
causal, what stands to the right of a token changes nothing, so the real tokens of a row are moved to its
front; and decoding runs the mixer again over everything that it has read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import Context, LanguageModel, LayerCache, part
from ssm_retrieval.models.configuration import Config, derived, require
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import init_normal, learned_positions, make_norm
from ssm_retrieval.ops.linear import Linear

POSITIONS = ("learned", "none")
KINDS = ("int", "float", "bool")  # types that a mixer's options may have


@dataclass(frozen=True)
class MixerConfig(Config):
    """Shape of a model around a mixer; `from_mixer` adds the mixer's own options."""

    vocab_size: int = 50280
    d_model: int = 768
    n_layer: int = 12
    d_mlp: int = 0  # 0 = 4 * d_model
    position: str = "none"  # or "learned"
    max_position_embeddings: int = 2048
    norm: str = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.position in POSITIONS, f"position={self.position!r} is not a mixer's; use {POSITIONS}")


class CausalMixer(nn.Module):
    """A mixer x -> y, (B, L, D) each, made to heed padding and a cache.

    Args:
        inner: The mixer.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """The mixer's outputs; meaningless at padding, as everywhere.

        Args:
            x: (B, L, D).
            context: Which tokens are real.
            cache: Its `x` holds the earlier inputs; those of this call are appended.

        Returns:
            (B, L, D).

        Raises:
            UserError: If the mixer returns another shape.
        """
        L, mask = x.shape[1], context.key_mask
        if cache is not None:
            x = cache["x"] = torch.cat([cache["x"], x], dim=1) if "x" in cache else x
        if mask is None:
            y = self.inner(x)
        else:
            order = torch.argsort((~mask).byte(), dim=1, stable=True).unsqueeze(-1)
            y = self.inner(x.take_along_dim(order, dim=1)).take_along_dim(order.argsort(dim=1), dim=1)
        require(
            isinstance(y, Tensor) and y.shape == x.shape,
            f"{type(self.inner).__name__} must map {tuple(x.shape)} to the same shape; it returned "
            f"{tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}",
        )
        return y[:, -L:]


class MixerBlock(Hooked, nn.Module):
    """Norm -> mixer -> add, norm -> MLP -> add."""

    hook_axes: ClassVar = {
        "hook_resid_pre": "B L D",
        "hook_mixer_out": "B L D",
        "hook_resid_mid": "B L D",
        "hook_mlp_out": "B L D",
        "hook_resid_post": "B L D",
    }

    def __init__(self, config: Any, mixer: nn.Module):
        super().__init__()
        self.config = config
        D, M = config.d_model, config.d_mlp or 4 * config.d_model
        self.norm1 = make_norm(config)
        self.mixer = CausalMixer(mixer)
        self.norm2 = make_norm(config)
        self.up, self.down = Linear(D, M), Linear(M, D)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        mixed = self.tap("hook_mixer_out", self.mixer(self.norm1(x), context, cache))
        x = self.tap("hook_resid_mid", x + mixed)
        out = self.tap("hook_mlp_out", self.down(F.gelu(self.up(self.norm2(x)))))
        return self.tap("hook_resid_post", x + out)


class HybridMixerBlock(Hooked, nn.Module):
    """Norm -> mixer -> add, as a Mamba block: what stands in the pattern of a hybrid."""

    hook_axes: ClassVar = {"hook_resid_pre": "B L D", "hook_mixer_out": "B L D", "hook_resid_post": "B L D"}

    def __init__(self, config: Any, mixer: nn.Module):
        super().__init__()
        self.config = config
        self.norm = make_norm(config)
        self.mixer = CausalMixer(mixer)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        x = x + self.tap("hook_mixer_out", self.mixer(self.norm(x), context, cache))
        return self.tap("hook_resid_post", x)


class MixerForCausalLM(LanguageModel):
    """Language model of `MixerBlock`s with a tied head.

    Args:
        config: A `MixerConfig` with the mixer's options.
        dtype: Dtype of the weights.
        make: Maps the config to a mixer.
    """

    embed_pos = part("positions")

    def __init__(self, config: Any, dtype: torch.dtype | None, make: Callable[[Any], nn.Module]):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model).to(dtype)
        if config.position == "learned":
            self.positions = learned_positions(config).to(dtype)
        self.blocks = nn.ModuleList(MixerBlock(config, make(config)).to(dtype) for _ in range(config.n_layer))
        self.norm = make_norm(config).to(dtype)
        self.head = Linear(config.d_model, config.vocab_size, bias=False).to(dtype)
        init_normal(self.embedding.weight, std=config.embedding_std)
        init_normal(self.head.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight


def from_mixer(
    name: str,
    mixer: Callable[..., nn.Module],
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    positions: tuple[str, ...] = (),
    **looks: Any,
) -> Architecture:
    """The architecture of language models around a mixer, for `models.register`.

    Args:
        name: Its name for `--model`.
        mixer: mixer(d_model, **options) makes a module that maps (B, L, D) to (B, L, D) causally. Options
            have defaults and the type int, float or bool; they become fields of the config, which presets and
            `models.build` can set.
        presets: Maps a size to fields of the config. Default: "tiny", with 128 channels and 2 blocks.
        positions: () for a mixer that knows the order of tokens; ("learned", "none") for one that must be
            told, as attention must.
        **looks: `label`, `color`, `marker` and other fields of `Architecture`.

    Returns:
        The record.

    Raises:
        UserError: For options of another type, or without a default.
    """
    parameters = [*inspect.signature(mixer).parameters.values()][1:]  # without d_model
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    fields = [_field(name, parameter) for parameter in named]
    options = [field for field, *_ in fields]

    def make(config: Any) -> nn.Module:
        return mixer(config.d_model, **{option: getattr(config, option) for option in options})

    return Architecture(
        name=name,
        config=derived(name, MixerConfig, fields),
        model=lambda config, dtype: MixerForCausalLM(config, dtype, make),
        block=lambda config: HybridMixerBlock(config, make(config)),
        presets={"tiny": dict(TINY, n_layer=2)} if presets is None else presets,
        positions=positions,
        **{"state_size": _inputs, **looks},
    )


def _inputs(config: Any, seq_len: int) -> int:
    """Numbers that decoding keeps: everything that the mixers have read."""
    return int(config.n_layer * config.d_model * seq_len)


def _field(name: str, parameter: inspect.Parameter) -> tuple[str, str, Any]:
    """Name, kind and default of a mixer's option, as a field of its config."""
    kind = parameter.annotation if isinstance(parameter.annotation, str) else parameter.annotation.__name__
    said = f"option {parameter.name} of the mixer of model {name}"
    require(kind in KINDS, f"{said} must be annotated as one of {', '.join(KINDS)}")
    require(parameter.default is not parameter.empty, f"{said} needs a default")
    require(
        parameter.name not in MixerConfig.__dataclass_fields__, f"{said} is one of every model's; rename it"
    )
    return parameter.name, kind, parameter.default
