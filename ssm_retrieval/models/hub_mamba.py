"""Mamba and Mamba-2 as others store them: `transformers`, and state-spaces' own `config.json`.

{"model_type": "mamba", "hidden_size": 768, ...}      `MambaConfig`, `Mamba2Config` of `transformers`
{"d_model": 768, "ssm_cfg": {...}, ...}               mamba_ssm, without model_type, of either version
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ssm_retrieval.models.architecture import Hub
from ssm_retrieval.models.configuration import require
from ssm_retrieval.models.hub_schema import (
    STRICT,
    Fields,
    NotNegative,
    Positive,
    Size,
    from_hub,
    names,
    only_known,
    parse,
    same,
    shown,
    to_hub,
    unlike,
)
from ssm_retrieval.ops.selective_scan import MAX_D_STATE

StateSize = Annotated[int, Field(ge=1, le=MAX_D_STATE)]
NORM_BIAS = re.compile(r"backbone\.(norm_f|layers\.\d+\.norm)\.bias")
INFINITE = (float("inf"), {"__float__": "Infinity"}, "inf")  # how JSON files spell it
UNLIMITED = [None, *([0.0, spelt] for spelt in INFINITE)]
OPEN_CHUNK = 256  # chunk_size of Mamba-2 as published: a choice of speed, and ours is for CPUs
# In mamba and mamba2 of `transformers`: fields that only initialise or speed up, and mamba_ssm's names, which
# published -hf configs carry along although `transformers` does not read them
CARRIED = names("""
    time_step_scale time_step_init_scheme time_step_floor rescale_prenorm_residual use_mambapy
    use_associative_scan layer_types

    d_model n_layer d_inner ssm_cfg attn_cfg attn_layer_idx d_intermediate pad_vocab_size_multiple rms_norm
    fused_add_norm tie_embeddings
""")


# A field of our configs: the one of `transformers`, in both versions of Mamba
SPELLINGS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "norm_eps": "layer_norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_word_embeddings",
    "embedding_std": "initializer_range",
}


class _TransformersMamba(Fields):
    """What mamba and mamba2 of `transformers` have in common, with its defaults."""

    num_hidden_layers: Size = 32
    conv_kernel: Size = 4
    expand: Size = 2
    hidden_act: Literal["silu", "swish"] = "silu"
    use_bias: Literal[False] = False
    use_conv_bias: Literal[True] = True
    layer_norm_epsilon: NotNegative = 1e-5
    residual_in_fp32: bool = True
    initializer_range: NotNegative = 0.1
    time_step_min: Positive = 0.001
    time_step_max: Positive = 0.1


class TransformersMamba(_TransformersMamba):
    """`MambaConfig` of `transformers`."""

    vocab_size: Size = 50280
    hidden_size: Size = 768
    state_size: StateSize = 16
    intermediate_size: Size | None = None
    time_step_rank: Literal["auto"] | Size = "auto"
    tie_word_embeddings: bool = True


class TransformersMamba2(_TransformersMamba):
    """`Mamba2Config` of `transformers`."""

    vocab_size: Size = 32768
    hidden_size: Size = 4096
    num_hidden_layers: Size = 64
    state_size: StateSize = 128
    num_heads: Size = 128
    head_dim: Size = 64
    n_groups: Size = 8
    chunk_size: Size = 256  # a choice of speed: ours is for CPUs
    time_step_limit: Any = None
    tie_word_embeddings: bool = False


class SSMConfig(BaseModel):
    """`ssm_cfg` of mamba_ssm."""

    model_config = STRICT
    layer: Literal["Mamba1", "Mamba2"] = "Mamba1"
    d_state: StateSize | None = None
    d_conv: Size = 4
    expand: Size = 2
    dt_rank: Literal["auto"] | Size = "auto"
    dt_min: Positive = 0.001
    dt_max: Positive = 0.1
    conv_bias: Literal[True] = True
    bias: Literal[False] = False
    headdim: Size = 64
    ngroups: Size = 1
    D_has_hdim: Literal[False] = False
    rmsnorm: Literal[True] = True
    norm_before_gate: Literal[False] = False
    d_ssm: None = None
    dt_limit: Any = None


# of `ssm_cfg`: what only initialises or speeds up
SSM_PASSED_OVER = names("""
    dt_init dt_scale dt_init_floor use_fast_path chunk_size conv_init A_init_range use_mem_eff_path
    sequence_parallel
""")
SECOND_ONLY = ("headdim", "ngroups", "D_has_hdim", "rmsnorm", "norm_before_gate", "d_ssm", "dt_limit")


class StateSpaces(Fields):
    """state-spaces/mamba's own form, with the defaults of mamba_ssm."""

    d_model: Size
    n_layer: Size
    vocab_size: Size
    d_intermediate: Literal[0] = 0
    ssm_cfg: SSMConfig | None = None
    attn_layer_idx: Annotated[list[int], Field(max_length=0)] | None = None
    attn_cfg: Any = None  # of attention layers, of which there are none
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: Any = None  # speed
    pad_vocab_size_multiple: Size = 8
    tie_embeddings: bool = True


def _norm(keys: Collection[str]) -> str:
    return "layer" if any(NORM_BIAS.fullmatch(key) for key in keys) else "rms"


def read_state_spaces(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """state-spaces' own `config.json`, of either version.

    Args:
        raw: The contents.
        keys: Names of the tensors, which decide the norm (`models.hub_configs.read_config`).
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        "mamba" or "mamba2", and options of its config.

    Raises:
        UserError: For what neither can be.
    """
    norm = _norm(keys)
    fields = parse(StateSpaces, raw, where, {*beside, *raw})
    only_known(fields, beside, where)
    ssm = fields.ssm_cfg
    options: dict[str, Any] = {}
    second = ssm is not None and ssm.layer == "Mamba2"
    if ssm is not None:
        only_known(ssm, SSM_PASSED_OVER, f"{where}: ssm_cfg")
        options = dict(d_conv=ssm.d_conv, expand=ssm.expand, dt_min=ssm.dt_min, dt_max=ssm.dt_max)
        options |= {} if ssm.d_state is None else {"d_state": ssm.d_state}
        if second:
            _unlimited("ssm_cfg.dt_limit", ssm.dt_limit, where)
            options |= dict(headdim=ssm.headdim, ngroups=ssm.ngroups)
        else:
            given = [name for name in SECOND_ONLY if name in ssm.model_fields_set]
            require(not given, f"{where}: ssm_cfg.{', '.join(given)} is of Mamba2, but the layer is Mamba1")
            options |= {"dt_rank": _rank(ssm.dt_rank, fields.d_model)}
    require(
        fields.rms_norm or norm == "layer",
        f"{where}: rms_norm=False asks for LayerNorm, but the weights have no biases of norms; mend one",
    )
    disguised = norm == "layer" and fields.rms_norm  # see `read_config`
    multiple = fields.pad_vocab_size_multiple
    options |= dict(
        vocab_size=-(-fields.vocab_size // multiple) * multiple,
        d_model=fields.d_model,
        n_layer=fields.n_layer,
        norm=norm,
        residual_in_fp32=fields.residual_in_fp32 and not disguised,
        tie_word_embeddings=fields.tie_embeddings,
    )
    return "mamba2" if second else "mamba", options


def _rank(rank: int | str, width: int) -> int:
    """Our dt_rank: 0 for the usual ceil(width / 16)."""
    return 0 if rank in ("auto", -(-width // 16)) else int(rank)


def _unlimited(name: str, value: Any, where: str) -> None:
    require(value in UNLIMITED, f"{where}: {name}={shown(value)} is not supported; only [0.0, Infinity]")


def read_mamba(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read` of Mamba.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors, which decide the norm (`models.hub_configs.read_config`).
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `MambaConfig`.

    Raises:
        UserError: For what a `MambaConfig` cannot be.
    """
    fields = parse(TransformersMamba, raw, where, {*beside, *CARRIED})
    same("intermediate_size", fields.intermediate_size, "expand * hidden_size",
         fields.expand * fields.hidden_size, where)  # fmt: skip
    rank = _rank(fields.time_step_rank, fields.hidden_size)
    return dict(from_hub(fields, SPELLINGS), norm=_norm(keys), dt_rank=rank)


def read_mamba2(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read` of Mamba-2.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors, which decide the norm (`models.hub_configs.read_config`).
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `Mamba2Config`.

    Raises:
        UserError: For what a `Mamba2Config` cannot be.
    """
    ignored = {"time_step_rank", "norm_before_gate", "rms_norm", "intermediate_size"}  # as in its class
    fields = parse(TransformersMamba2, raw, where, {*beside, *CARRIED, *ignored})
    _unlimited("time_step_limit", fields.time_step_limit, where)
    require(
        fields.num_heads * fields.head_dim == fields.expand * fields.hidden_size,
        f"{where}: num_heads={fields.num_heads} times head_dim={fields.head_dim} is not expand * "
        "hidden_size; fetch it again",
    )
    return dict(
        from_hub(fields, SPELLINGS), norm=_norm(keys), headdim=fields.head_dim, ngroups=fields.n_groups
    )


def lacks(config: Any) -> str | None:
    """`Hub.lacks` of both versions: another norm than RMSNorm, and learned positions."""
    return unlike(config, norm="rms", position="none")


def published(name: str) -> str:
    """`Hub.published` of both versions."""
    return name.replace("backbone.embedding.", "backbone.embeddings.")


def _write(config: Any) -> dict[str, Any]:
    """What both versions have in common."""
    fixed = dict(hidden_act="silu", use_bias=False, use_conv_bias=True, pad_token_id=0)
    return to_hub(config, SPELLINGS) | fixed


def write_mamba(config: Any) -> dict[str, Any]:
    """`Hub.write` of Mamba."""
    return dict(_write(config), intermediate_size=config.d_inner, time_step_rank=config.rank)


def write_mamba2(config: Any) -> dict[str, Any]:
    """`Hub.write` of Mamba-2."""
    heads = dict(num_heads=config.n_head, head_dim=config.headdim, n_groups=config.ngroups)
    return dict(_write(config), **heads, chunk_size=OPEN_CHUNK)


OURS = ("ssm_init", "max_position_embeddings")  # without effect on given weights, but fields of the config
MAMBA = Hub("mamba", "MambaForCausalLM", read_mamba, write_mamba, lacks, published, OURS)
MAMBA2 = Hub(
    "mamba2", "Mamba2ForCausalLM", read_mamba2, write_mamba2, lacks, published, ("chunk_size", *OURS)
)
