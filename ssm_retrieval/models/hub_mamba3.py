"""Mamba-3 as flash-linear-attention (0.6) stores it: its config <-> ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ssm_retrieval.models import hub_mamba
from ssm_retrieval.models.architecture import Hub
from ssm_retrieval.models.hub_mamba import OURS, StateSize, published
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
)

# Of speed, of first weights, or of training only
IGNORED = names("""
    chunk_size dt_init_floor rescale_prenorm_residual mimo_rank
    fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp
""")
# A field of our config: fla's
SPELLINGS = {
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


class Mamba3(Fields):
    """`Mamba3Config` of fla, for one input and output."""

    vocab_size: Size = 32000
    hidden_size: Size = 2048
    num_hidden_layers: Size = 48
    state_size: StateSize = 128
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


def read(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read`.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors, which decide nothing here.
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `Mamba3Config`.

    Raises:
        UserError: For what a `Mamba3Config` cannot be.
    """
    fields = parse(Mamba3, raw, where, {*beside, *IGNORED})
    heads = fields.expand * fields.hidden_size // fields.head_dim
    same("num_heads", fields.num_heads, "expand * hidden_size / head_dim", heads, where)
    return from_hub(fields, SPELLINGS)


def write(config: Any) -> dict[str, Any]:
    """`Hub.write`."""
    return dict(to_hub(config, SPELLINGS), num_heads=config.n_head, hidden_act="silu", pad_token_id=0)


def lacks(config: Any) -> str | None:
    """`Hub.lacks`: what Mamba's class lacks too, and other shares of turning channels than a half and all."""
    half_or_all = config.rope_fraction in (0.5, 1.0)
    return hub_mamba.lacks(config) or (None if half_or_all else f"rope_fraction={config.rope_fraction}")


MAMBA3 = Hub("mamba3", "Mamba3ForCausalLM", read, write, lacks, published, OURS)
