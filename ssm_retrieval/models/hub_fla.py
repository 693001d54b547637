"""DeltaNet and its kin, and Mamba-3, as flash-linear-attention (0.6) stores them: its configs <-> ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from ssm_retrieval.models import hub_mamba
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
    same,
    to_hub,
    unlike,
)

# Of speed, or of training only
IGNORED = names("attn_mode fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp")
MAMBA3_IGNORED = names("""
    chunk_size dt_init_floor rescale_prenorm_residual mimo_rank
    fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp
""")
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


# The same of Mamba-3
MAMBA3_SPELLINGS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_state": "state_size",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "rope_fraction": "rope_fraction",
    "A_floor": "A_floor",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "norm_eps": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_word_embeddings",
    "embedding_std": "initializer_range",
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


class Mamba3(Fields):
    """`Mamba3Config` of fla, for one input and output."""

    vocab_size: Size = 32000
    hidden_size: Size = 2048
    num_hidden_layers: Size = 48
    state_size: hub_mamba.StateSize = 128
    expand: Size = 2
    head_dim: Size = 64
    num_heads: Size | None = None
    n_groups: Size = 1
    rope_fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    A_floor: Positive = 1e-4
    dt_min: Positive = 0.001
    dt_max: Positive = 0.1
    norm_eps: NotNegative = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False
    initializer_range: NotNegative = 0.02
    hidden_act: Literal["silu"] = "silu"
    use_bias: Literal[False] = False
    is_mimo: Literal[False] = False
    is_outproj_norm: Literal[False] = False


F = TypeVar("F", bound=Fields)


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


def _deltanet(fields: DeltaNet, where: str) -> dict[str, Any]:
    """Options of `DeltaNetConfig`."""
    return _by_width(fields, fields.expand_k, where)


def _gated_deltanet(fields: GatedDeltaNet, where: str) -> dict[str, Any]:
    """Options of `GatedDeltaNetConfig`."""
    return _by_head(fields, fields.head_dim, fields.num_v_heads, where)


def _kda(fields: Kda, where: str) -> dict[str, Any]:
    """Options of `KDAConfig`, which always has a gate."""
    options = _by_head(fields, fields.head_dim, fields.num_v_heads, where)
    return {name: value for name, value in options.items() if name != "gate"}


def _gla(fields: Gla, where: str) -> dict[str, Any]:
    """Options of `GLAConfig`."""
    _as_many("num_kv_heads", fields.num_kv_heads, fields.num_heads, where)
    options = dict(_by_width(fields, fields.expand_k, where), gate=fields.use_output_gate)
    return {name: value for name, value in options.items() if name != "negative_eigenvalues"}


def _mamba3(fields: Mamba3, where: str) -> dict[str, Any]:
    """Options of `Mamba3Config`."""
    heads = fields.expand * fields.hidden_size // fields.head_dim
    same("num_heads", fields.num_heads, "expand * hidden_size / head_dim", heads, where)
    return from_hub(fields, MAMBA3_SPELLINGS)


def _reader(
    kind: type[F], options: Callable[[F, str], dict[str, Any]], ignored: Collection[str] = IGNORED
) -> Callable[..., dict[str, Any]]:
    """`Hub.read` of one of these configs.

    Args:
        kind: The fields that it may have.
        options: Maps these fields and the name of the file, for errors, to options of our config.
        ignored: Fields without a meaning here.

    Returns:
        The function. Names of the tensors decide nothing here.
    """

    def read(
        raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
    ) -> dict[str, Any]:
        return options(parse(kind, raw, where, {*beside, *ignored}), where)

    return read


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


def write_mamba3(config: Any) -> dict[str, Any]:
    """`Hub.write` of Mamba-3."""
    fixed = dict(hidden_act="silu", pad_token_id=0)
    return dict(to_hub(config, MAMBA3_SPELLINGS), **fixed, num_heads=config.n_head)


def lacks_of_mamba3(config: Any) -> str | None:
    """`Hub.lacks` of Mamba-3: as of Mamba, and other shares of turning channels than a half and all."""
    half_or_all = config.rope_fraction in (0.5, 1.0)
    return hub_mamba.lacks(config) or (None if half_or_all else f"rope_fraction={config.rope_fraction}")


def lacks(config: Any) -> str | None:
    """`Hub.lacks` of all others: positions, and a residual stream wider than the weights."""
    return unlike(config, position="none", residual_in_fp32=False)


OURS = ("ssm_init", "d_mlp", "embedding_std")  # without effect on given weights, but fields of the config
DECAYS = (*OURS, "dt_min", "dt_max")
DELTANET = Hub(
    "delta_net", "DeltaNetForCausalLM", _reader(DeltaNet, _deltanet), write_deltanet, lacks, extras=OURS
)
GATED_DELTANET = Hub(
    "gated_deltanet", "GatedDeltaNetForCausalLM", _reader(GatedDeltaNet, _gated_deltanet),
    write_gated_deltanet, lacks, extras=DECAYS,
)  # fmt: skip
KDA = Hub("kda", "KDAForCausalLM", _reader(Kda, _kda), write_kda, lacks, extras=DECAYS)
GLA = Hub("gla", "GLAForCausalLM", _reader(Gla, _gla), write_gla, lacks, extras=OURS)
MAMBA3 = Hub(
    "mamba3", "Mamba3ForCausalLM", _reader(Mamba3, _mamba3, MAMBA3_IGNORED), write_mamba3,
    lacks_of_mamba3, hub_mamba.published, hub_mamba.OURS,
)  # fmt: skip
