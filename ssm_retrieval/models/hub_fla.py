"""DeltaNet and its kin as flash-linear-attention (0.6) stores them: its configs <-> ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ssm_retrieval.models.architecture import Hub
from ssm_retrieval.models.configuration import require
from ssm_retrieval.models.hub_schema import (
    Fields,
    NotNegative,
    Positive,
    Size,
    from_hub,
    names,
    parse,
    to_hub,
    unlike,
)

# Of speed, or of training only
IGNORED = names("attn_mode fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp")
# A field of our config: fla's
SPELLINGS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "short_conv": "use_short_conv",
    "d_conv": "conv_size",
    "gate": "use_gate",
    "negative_eigenvalues": "allow_neg_eigval",
    "max_position_embeddings": "max_position_embeddings",
    "norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}


class Fla(Fields):
    """What these configs have in common."""

    vocab_size: Size = 32000
    hidden_size: Size = 2048
    num_hidden_layers: Size
    num_heads: Size
    expand_v: Positive
    use_short_conv: bool = True
    conv_size: Size = 4
    use_gate: bool
    allow_neg_eigval: bool = False
    max_position_embeddings: Size = 2048
    hidden_ratio: Literal[4] | None = 4
    intermediate_size: Size | None = None
    hidden_act: Literal["swish"] = "swish"
    norm_eps: NotNegative = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: NotNegative = 0.02
    attn: None = None
    attnres_block_size: None = None


class DeltaNet(Fla):
    """`DeltaNetConfig` of fla."""

    num_hidden_layers: Size = 24
    num_heads: Size = 16
    expand_k: Positive = 1.0
    expand_v: Positive = 1.0
    use_gate: bool = False
    use_beta: Literal[True] = True
    use_output_norm: Literal[True] = True
    qk_norm: Literal["l2"] = "l2"
    qk_activation: Literal["silu"] = "silu"


class GatedDeltaNet(Fla):
    """`GatedDeltaNetConfig` of fla."""

    num_hidden_layers: Size = 21
    num_heads: Size = 6
    head_dim: Size = 256
    expand_v: Positive = 2.0
    use_gate: bool = True
    num_v_heads: Annotated[int, Field(ge=1)] | None = None
    output_gate_activation: Literal["swish", "silu"] = "swish"


class Kda(Fla):
    """`KDAConfig` of fla."""

    num_hidden_layers: Size = 24
    num_heads: Size = 16
    head_dim: Size = 128
    expand_v: Positive = 1.0
    use_gate: Literal[True] = True  # no field of fla's: there is always a gate
    num_v_heads: Annotated[int, Field(ge=1)] | None = None
    safe_gate: Literal[False] = False
    lower_bound: None = None


class Gla(Fla):
    """`GLAConfig` of fla."""

    num_hidden_layers: Size = 24
    num_heads: Size = 4
    expand_k: Positive = 0.5
    expand_v: Positive = 1.0
    use_short_conv: bool = False
    use_gate: bool = True  # "use_output_gate" there
    use_output_gate: bool = True
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    feature_map: None = None
    clamp_min: None = None
    elementwise_affine: Literal[True] = True
    use_gk: Literal[True] = True
    use_gv: Literal[False] = False


def _channels(name: str, width: float, parts: int, where: str) -> int:
    """A whole number of channels for each head."""
    share = width / parts
    require(share == round(share), f"{where}: {name} makes {share:g} channels of a head; fetch it again")
    return round(share)


def _common(fields: Fla, headdim: int) -> dict[str, Any]:
    """Options of any of these configs."""
    expand = fields.num_heads * headdim / fields.hidden_size
    more = dict(headdim=headdim, expand=expand, d_mlp=fields.intermediate_size or 0)
    return dict(from_hub(fields, SPELLINGS), **more, embedding_std=fields.initializer_range)


def read_deltanet(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read` of DeltaNet.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors, which decide nothing here.
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `DeltaNetConfig`.

    Raises:
        UserError: For what a `DeltaNetConfig` cannot be.
    """
    fields = parse(DeltaNet, raw, where, {*beside, *IGNORED})
    return _by_width(fields, fields.expand_k, where)


def read_gated_deltanet(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read` of gated DeltaNet.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors, which decide nothing here.
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `GatedDeltaNetConfig`.

    Raises:
        UserError: For what a `GatedDeltaNetConfig` cannot be.
    """
    fields = parse(GatedDeltaNet, raw, where, {*beside, *IGNORED})
    return _by_head(fields, fields.head_dim, fields.num_v_heads, where)


def _by_head(fields: Fla, head_dim: int, num_v_heads: int | None, where: str) -> dict[str, Any]:
    """Options of a config whose heads have their own width."""
    _as_many("num_v_heads", num_v_heads, fields.num_heads, where)
    headdim = _channels("expand_v", head_dim * fields.expand_v, 1, where)
    return dict(_common(fields, headdim), d_state=head_dim)


def _as_many(name: str, value: int | None, heads: int, where: str) -> None:
    said = f"{where}: {name}={value} is not supported; only num_heads={heads}"
    require(value in (None, heads), said)


def _by_width(fields: Fla, expand_k: float, where: str) -> dict[str, Any]:
    """Options of a config whose heads share out the model's width."""
    D, H = fields.hidden_size, fields.num_heads
    headdim = _channels("expand_v", D * fields.expand_v, H, where)
    return dict(_common(fields, headdim), d_state=_channels("expand_k", D * expand_k, H, where))


def read_kda(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read` of Kimi delta attention.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors, which decide nothing here.
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `KDAConfig`.

    Raises:
        UserError: For what a `KDAConfig` cannot be.
    """
    fields = parse(Kda, raw, where, {*beside, *IGNORED})
    options = _by_head(fields, fields.head_dim, fields.num_v_heads, where)
    return {name: value for name, value in options.items() if name != "gate"}


def read_gla(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read` of gated linear attention.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors, which decide nothing here.
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `GLAConfig`.

    Raises:
        UserError: For what a `GLAConfig` cannot be.
    """
    fields = parse(Gla, raw, where, {*beside, *IGNORED})
    _as_many("num_kv_heads", fields.num_kv_heads, fields.num_heads, where)
    options = _by_width(fields, fields.expand_k, where)
    options |= dict(gate=fields.use_output_gate)
    return {name: value for name, value in options.items() if name != "negative_eigenvalues"}


def _write(config: Any) -> dict[str, Any]:
    """What all have in common."""
    fixed = dict(hidden_act="swish", hidden_ratio=4, pad_token_id=None)
    known = {ours: theirs for ours, theirs in SPELLINGS.items() if hasattr(config, ours)}
    return to_hub(config, known) | fixed | dict(num_heads=config.n_head, intermediate_size=config.mlp_width)


def write_deltanet(config: Any) -> dict[str, Any]:
    """`Hub.write` of DeltaNet."""
    keys = config.n_head * config.d_state
    return dict(_write(config), expand_k=keys / config.d_model, expand_v=config.expand)


def write_gated_deltanet(config: Any) -> dict[str, Any]:
    """`Hub.write` of gated DeltaNet."""
    return dict(_write(config), head_dim=config.d_state, expand_v=config.headdim / config.d_state)


def write_kda(config: Any) -> dict[str, Any]:
    """`Hub.write` of Kimi delta attention, which always has a gate."""
    fields = write_gated_deltanet(config)
    fields.pop("use_gate")
    return fields


def write_gla(config: Any) -> dict[str, Any]:
    """`Hub.write` of gated linear attention."""
    fields = write_deltanet(config)
    return fields | dict(use_output_gate=fields.pop("use_gate"))


def lacks(config: Any) -> str | None:
    """`Hub.lacks` of all: positions, and a residual stream wider than the weights."""
    return unlike(config, position="none", residual_in_fp32=False)


OURS = ("ssm_init", "d_mlp", "embedding_std")  # without effect on given weights, but fields of the config
DELTANET = Hub("delta_net", "DeltaNetForCausalLM", read_deltanet, write_deltanet, lacks, extras=OURS)
GATED_DELTANET = Hub(
    "gated_deltanet", "GatedDeltaNetForCausalLM", read_gated_deltanet, write_gated_deltanet, lacks,
    extras=(*OURS, "dt_min", "dt_max"),
)  # fmt: skip
KDA = Hub("kda", "KDAForCausalLM", read_kda, write_kda, lacks, extras=(*OURS, "dt_min", "dt_max"))
GLA = Hub("gla", "GLAForCausalLM", read_gla, write_gla, lacks, extras=OURS)
