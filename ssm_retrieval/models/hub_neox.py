"""GPT-NeoX as `transformers` stores it: `GPTNeoXConfig` <-> `TransformerConfig`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from ssm_retrieval.models.architecture import Hub
from ssm_retrieval.models.configuration import require
from ssm_retrieval.models.hub_schema import (
    Fields,
    Nested,
    NotNegative,
    Positive,
    Share,
    Size,
    from_hub,
    names,
    parse,
    same,
    to_hub,
    unlike,
)

DROPOUTS = names("attention_dropout hidden_dropout classifier_dropout dropout")  # 0 here
# A field of our config: the one of `transformers`
SPELLINGS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "parallel_residual": "use_parallel_residual",
    "norm_eps": "layer_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "embedding_std": "initializer_range",
}


class Rope(Nested):
    """`rope_parameters`, or `rope_scaling` in older files."""

    rope_type: Literal["default"] | None = None
    type: Literal["default"] | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Share | None = None


class GPTNeoX(Fields):
    """`GPTNeoXConfig` of `transformers`."""

    vocab_size: Size = 50432
    hidden_size: Size = 6144
    num_hidden_layers: Size = 44
    num_attention_heads: Size = 64
    intermediate_size: Size = 24576
    max_position_embeddings: Size = 2048
    hidden_act: Literal["gelu"] = "gelu"
    attention_bias: Literal[True] = True
    use_parallel_residual: bool = True
    layer_norm_eps: NotNegative = 1e-5
    initializer_range: NotNegative = 0.02
    tie_word_embeddings: bool = False
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    rotary_pct: Share | None = None
    rotary_emb_base: Positive | None = None
    # read by other models of `transformers`, not by this one: they may repeat the two above
    partial_rotary_factor: Share | None = None
    rope_theta: Positive | None = None


def read(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str]
) -> dict[str, Any]:
    """`Hub.read` of GPT-NeoX.

    Args:
        raw: The contents of `config.json`.
        keys: Names of the tensors.
        where: The file, for errors.
        beside: Fields that have no meaning here.

    Returns:
        Options of `TransformerConfig`.

    Raises:
        UserError: For what a `TransformerConfig` cannot be.
    """
    fields = parse(GPTNeoX, raw, where, {*beside, *DROPOUTS})
    # the order of `transformers`: the older field goes before the newer one, if it is not empty
    rope = (fields.rope_scaling if raw.get("rope_scaling") else fields.rope_parameters) or Rope()
    theta = _first(rope.rope_theta, fields.rotary_emb_base, 10000.0)
    share = _first(rope.partial_rotary_factor, fields.rotary_pct, 0.25)
    same("rope_theta", fields.rope_theta, "rotary_emb_base", theta, where)
    same("partial_rotary_factor", fields.partial_rotary_factor, "rotary_pct", share, where)
    width, heads = fields.hidden_size, fields.num_attention_heads
    rotated = int(width // heads * share)
    require(
        rotated % 2 == 0,
        f"{where}: rotary_pct={share} rotates an odd number of a head's {width // heads} dimensions, which "
        "is not supported",
    )
    mlp = fields.intermediate_size
    return dict(
        from_hub(fields, SPELLINGS),
        d_mlp=0 if mlp == 4 * width else mlp,
        position="rope" if rotated else "none",  # as `transformers`, which then rotates nothing
        **({"rotary_pct": share} if rotated else {}),
        rope_theta=theta,
        init_std=fields.initializer_range,
    )


def _first(*values: float | None) -> float:
    """The first that is given: newer and older releases have different places for it."""
    return float(next(value for value in values if value is not None))


def lacks(config: Any) -> str | None:
    """`Hub.lacks` of GPT-NeoX: other positions, norms and streams, windows, and rotations of half a pair."""
    dims = config.d_head * config.rotary_pct
    if config.position == "rope" and not (config.rotary_dims > 0 and int(dims) == config.rotary_dims):
        return f"rotary_pct={config.rotary_pct}"
    return unlike(config, position="rope", norm="layer", residual_in_fp32=False, window=0)


def write(config: Any) -> dict[str, Any]:
    """`Hub.write` of GPT-NeoX."""
    return dict(
        to_hub(config, SPELLINGS),
        intermediate_size=config.mlp_width,
        hidden_act="gelu",
        attention_bias=True,
        rotary_pct=config.rotary_pct,  # the spelling that every release reads
        rotary_emb_base=config.rope_theta,
    )


GPT_NEOX = Hub(
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    read=read,
    write=write,
    lacks=lacks,
    extras=("init_std",),  # `initializer_range` is both of ours
)
