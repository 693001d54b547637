"""`config.json` of published checkpoints <-> our configs.

Three dialects are read: state-spaces/mamba's own (`d_model`, `ssm_cfg`), and `transformers`' for the
`model_type`s mamba, mamba2 and gpt_neox; the latter are written. `models.hub_schema` says which fields there
are, and which of them change nothing; what our models cannot be is an error that names the field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import Config, require
from ssm_retrieval.models.hub_schema import (
    CARRIED,
    DROPOUTS,
    PASSED_OVER,
    SECOND_ONLY,
    SSM_PASSED_OVER,
    GPTNeoX,
    Rope,
    StateSpaces,
    TransformersMamba,
    TransformersMamba2,
    only_known,
    parse,
    same,
    shown,
)
from ssm_retrieval.models.mamba import MambaConfig
from ssm_retrieval.models.mamba2 import Mamba2Config
from ssm_retrieval.models.own_configs import check_sizes, respelt, typed
from ssm_retrieval.models.registry import architecture_of
from ssm_retrieval.models.transformer import TransformerConfig

Raw = Mapping[str, Any]
NORM_BIAS = re.compile(r"backbone\.(norm_f|layers\.\d+\.norm)\.bias")
INFINITE = (float("inf"), {"__float__": "Infinity"}, "inf")  # how JSON files spell it
UNLIMITED = [None, *([0.0, spelt] for spelt in INFINITE)]
TOKENS = dict(bos_token_id=0, eos_token_id=0)  # <|endoftext|> of the tokenizer that all these models share
OPEN_CHUNK = 256  # of Mamba-2 as published: a choice of speed, and ours is for CPUs
# Our options that `transformers` has no field for, kept beside its own where they are not the default.
EXTRAS = "ssm_retrieval"
EXTRA_OPTIONS = ("chunk_size", "init_std")


def read_config(raw: Raw, keys: Collection[str], where: str, beside: Collection[str] = ()) -> Config:
    """The config of a checkpoint with these contents of `config.json` and these tensors.

    `model_type` names the dialect; a file without one is state-spaces'. Mamba's norm is LayerNorm if the
    tensors include biases of norms, else RMSNorm, whatever the file says: the code behind the Mamba-VL
    checkpoints never passed its `rms_norm` and `residual_in_fp32` on, so it trained with LayerNorm and the
    residual in working precision under a config that says otherwise.

    Args:
        raw: The contents.
        keys: The tensors' names, or a mapping from them to what is stored, which sizes are checked against.
        where: The file, for errors.
        beside: Fields that the caller reads itself.

    Returns:
        The config of one of our models.

    Raises:
        UserError: For what our models cannot be; the line names file and field.
    """
    beside = {*PASSED_OVER, *beside}
    try:
        config = _dialect(raw, where, bool(set(beside) - PASSED_OVER))(raw, norm_of(keys), where, beside)
    except UserError as error:  # of our configs: they do not know the file
        if str(error).startswith(where):
            raise
        raise UserError(respelt(f"{where}: {error}", raw)) from error
    if isinstance(keys, Mapping):
        check_sizes(config, raw, keys, where)
    return config


def norm_of(keys: Collection[str]) -> str:
    """ "layer" if there are biases of Mamba's norms among the names of tensors, else "rms"."""
    return "layer" if any(NORM_BIAS.fullmatch(key) for key in keys) else "rms"


def _dialect(raw: Raw, where: str, others: bool) -> Callable[..., Config]:
    """The reader of a file. others: the caller knows fields of other code, so `model_type` may be its own."""
    kind = raw.get("model_type")
    known = {"mamba": _mamba, "mamba2": _mamba2, "gpt_neox": _gpt_neox}
    if isinstance(kind, str) and kind in known:
        return known[kind]
    if "d_model" in raw and (kind in (None, "") or others):
        return _state_spaces
    raise UserError(
        f"{where}: model_type={shown(kind)} is not supported; only {', '.join(known)}, ssm-retrieval, "
        "and state-spaces' own config with d_model and ssm_cfg"
    )


def _state_spaces(raw: Raw, norm: str, where: str, beside: Collection[str]) -> Config:
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
    return Mamba2Config(**options) if second else MambaConfig(**options)


def _rank(rank: int | str, width: int) -> int:
    """Our dt_rank: 0 for the usual ceil(width / 16)."""
    return 0 if rank in ("auto", -(-width // 16)) else int(rank)


def _unlimited(name: str, value: Any, where: str) -> None:
    require(value in UNLIMITED, f"{where}: {name}={shown(value)} is not supported; only [0.0, Infinity]")


def _transformers_mamba(fields: TransformersMamba | TransformersMamba2, norm: str) -> dict[str, Any]:
    """What mamba and mamba2 of `transformers` have in common."""
    return dict(
        vocab_size=fields.vocab_size,
        d_model=fields.hidden_size,
        n_layer=fields.num_hidden_layers,
        d_state=fields.state_size,
        d_conv=fields.conv_kernel,
        expand=fields.expand,
        dt_min=fields.time_step_min,
        dt_max=fields.time_step_max,
        norm=norm,
        norm_eps=fields.layer_norm_epsilon,
        residual_in_fp32=fields.residual_in_fp32,
        tie_word_embeddings=fields.tie_word_embeddings,
        embedding_std=fields.initializer_range,
    )


def _mamba(raw: Raw, norm: str, where: str, beside: Collection[str]) -> Config:
    fields = parse(TransformersMamba, raw, where, {*beside, *CARRIED, EXTRAS})
    same("intermediate_size", fields.intermediate_size, "expand * hidden_size",
         fields.expand * fields.hidden_size, where)  # fmt: skip
    rank = _rank(fields.time_step_rank, fields.hidden_size)
    return _with_extras(MambaConfig(**_transformers_mamba(fields, norm), dt_rank=rank), raw, where)


def _mamba2(raw: Raw, norm: str, where: str, beside: Collection[str]) -> Config:
    ignored = {"time_step_rank", "norm_before_gate", "rms_norm", "intermediate_size"}  # as in its class
    fields = parse(TransformersMamba2, raw, where, {*beside, *CARRIED, *ignored, EXTRAS})
    _unlimited("time_step_limit", fields.time_step_limit, where)
    require(
        fields.num_heads * fields.head_dim == fields.expand * fields.hidden_size,
        f"{where}: num_heads={fields.num_heads} times head_dim={fields.head_dim} is not expand * "
        "hidden_size; fetch it again",
    )
    options = _transformers_mamba(fields, norm)
    config = Mamba2Config(**options, headdim=fields.head_dim, ngroups=fields.n_groups)
    return _with_extras(config, raw, where)


def _gpt_neox(raw: Raw, norm: str, where: str, beside: Collection[str]) -> Config:
    fields = parse(GPTNeoX, raw, where, {*beside, *DROPOUTS, EXTRAS})
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
    config = TransformerConfig(
        vocab_size=fields.vocab_size,
        d_model=width,
        n_layer=fields.num_hidden_layers,
        n_head=heads,
        d_mlp=0 if mlp == 4 * width else mlp,
        position="rope" if rotated else "none",  # as `transformers`, which then rotates nothing
        rotary_pct=share if rotated else TransformerConfig.rotary_pct,
        rope_theta=theta,
        max_position_embeddings=fields.max_position_embeddings,
        parallel_residual=fields.use_parallel_residual,
        norm_eps=fields.layer_norm_eps,
        tie_word_embeddings=fields.tie_word_embeddings,
        embedding_std=fields.initializer_range,
        init_std=fields.initializer_range,
    )
    return _with_extras(config, raw, where)


def _first(*values: float | None) -> float:
    """The first that is given: newer and older releases have different places for it."""
    return float(next(value for value in values if value is not None))


def _with_extras(config: Any, raw: Raw, where: str) -> Config:
    """With the options of `EXTRAS`, which `write_config` has added."""
    extras = raw.get(EXTRAS, {})
    have = [name for name in EXTRA_OPTIONS if name in config.to_dict()]
    right = isinstance(extras, dict) and set(extras) <= set(have)
    only = ", ".join(have) or "none"
    require(right, f"{where}: {EXTRAS}={shown(extras)} is not supported, its options are {only}; remove it")
    return typed(type(config), config.to_dict() | extras, f"{where}: {EXTRAS}")


def lacking(config: Config) -> str | None:
    """What of a config no class of `transformers` has, as name=value; None if one has all of it."""
    record = architecture_of(config)
    if record.hub is None:
        return f"architecture={record.name!r}"
    if isinstance(config, TransformerConfig):
        dims = config.d_head * config.rotary_pct
        if config.position == "rope" and not (config.rotary_dims > 0 and int(dims) == config.rotary_dims):
            return f"rotary_pct={config.rotary_pct}"
        wanted = dict(position="rope", norm="layer", residual_in_fp32=False)
    else:
        wanted = dict(norm="rms")
    found = ((name, getattr(config, name)) for name in wanted)
    return next((f"{name}={value!r}" for name, value in found if value != wanted[name]), None)


def write_config(config: Config, dtype: str | None) -> dict[str, Any]:
    """`config.json` of our config for `transformers`. dtype: "bfloat16", ...; None if weights differ in it.

    Raises UserError for a model that `transformers` has no class for.
    """
    lacks = lacking(config)
    require(lacks is None, f"transformers has no class for a model with {lacks}")
    shared = dict(TOKENS, **({} if dtype is None else {"dtype": dtype, "torch_dtype": dtype}))
    defaults, mine = type(config)().to_dict(), config.to_dict()
    extras = {n: mine[n] for n in EXTRA_OPTIONS if n in mine and mine[n] != defaults[n]}
    if isinstance(config, TransformerConfig):
        if config.init_std == config.embedding_std:
            extras.pop("init_std", None)
        else:  # else `initializer_range` is both
            extras["init_std"] = config.init_std
    shared |= {EXTRAS: extras} if extras else {}
    if isinstance(config, TransformerConfig):
        return shared | dict(
            architectures=["GPTNeoXForCausalLM"],
            model_type="gpt_neox",
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            intermediate_size=config.mlp_width,
            hidden_act="gelu",
            attention_bias=True,
            use_parallel_residual=config.parallel_residual,
            max_position_embeddings=config.max_position_embeddings,
            rotary_pct=config.rotary_pct,  # the spelling that every release reads
            rotary_emb_base=config.rope_theta,
            layer_norm_eps=config.norm_eps,
            initializer_range=config.embedding_std,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    assert isinstance(config, MambaConfig | Mamba2Config)
    shared |= dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layer,
        state_size=config.d_state,
        conv_kernel=config.d_conv,
        expand=config.expand,
        hidden_act="silu",
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=config.norm_eps,
        residual_in_fp32=config.residual_in_fp32,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.embedding_std,
        time_step_min=config.dt_min,
        time_step_max=config.dt_max,
        pad_token_id=0,
    )
    if isinstance(config, Mamba2Config):
        return shared | dict(
            architectures=["Mamba2ForCausalLM"],
            model_type="mamba2",
            num_heads=config.n_head,
            head_dim=config.headdim,
            n_groups=config.ngroups,
            chunk_size=OPEN_CHUNK,
        )
    return shared | dict(
        architectures=["MambaForCausalLM"],
        model_type="mamba",
        intermediate_size=config.d_inner,
        time_step_rank=config.rank,
    )
