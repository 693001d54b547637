"""`config.json` of published checkpoints <-> our configs.

Three dialects are read: state-spaces/mamba's own (`d_model`, `ssm_cfg`), and `transformers`' for the
`model_type`s mamba, mamba2 and gpt_neox; the latter are written. What our models do not have is an error that
names the field, never ignored; fields that only initialise, regularise or speed up are (dropout is 0 here).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from models.common import Config, require
from models.errors import UserError
from models.mamba import MambaConfig
from models.mamba2 import Mamba2Config
from models.transformer import TransformerConfig

Fields = Mapping[str, Any]
NORM_BIAS = re.compile(r"backbone\.(norm_f|layers\.\d+\.norm)\.bias")
INFINITE = (float("inf"), {"__float__": "Infinity"}, "inf")  # how JSON files spell it
UNLIMITED = [[0.0, spelt] for spelt in INFINITE]
TOKENS = dict(bos_token_id=0, eos_token_id=0)  # <|endoftext|> of the tokenizer that all these models share
OPEN_CHUNK = 256  # of Mamba-2 as published: a choice of speed, and ours is for CPUs


def read_config(raw: Fields, keys: Collection[str], where: str) -> Config:
    """The config of a checkpoint with these contents of `config.json` and names of tensors.

    Mamba's norm is LayerNorm if there are biases of norms among the names, else RMSNorm, whatever the config
    says: the code behind the Mamba-VL checkpoints never passed its `rms_norm` and `residual_in_fp32` on, so
    that it trained with LayerNorm and the residual in working precision under a config that says otherwise.
    Raises UserError, naming `where` and the field, for what our models cannot be.
    """
    raw = _Strict(raw, where)
    raw.only("quantization_config", None, [None])
    norm = "layer" if any(NORM_BIAS.fullmatch(key) for key in keys) else "rms"
    kind = raw.get("model_type")
    if "ssm_cfg" in raw or (kind is None and "d_model" in raw):
        return _state_spaces(raw, norm)
    if kind == "mamba":
        return _mamba(raw, norm)
    if kind == "mamba2":
        return _mamba2(raw, norm)
    if kind == "gpt_neox":
        return _gpt_neox(raw)
    raise UserError(
        f"{where}: model_type={kind!r} is not supported; only mamba, mamba2, gpt_neox, and state-spaces' own "
        "config with d_model and ssm_cfg"
    )


class _Strict(dict[str, Any]):
    """Fields of a file, with errors that name file and field."""

    def __init__(self, raw: Fields, where: str):
        super().__init__(raw)
        self.where = where

    def need(self, name: str) -> int:
        value = self.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole, f"{self.where}: {name}={value!r} must be a whole number")
        return int(self[name])

    def only(self, name: str, default: Any, supported: list[Any]) -> None:
        value = self.get(name, default)
        require(
            value in supported,
            f"{self.where}: {name}={value!r} is not supported; only {supported[0]!r}",
        )


def _state_spaces(raw: _Strict, norm: str) -> Config:
    raw.only("d_intermediate", 0, [0])
    raw.only("attn_layer_idx", [], [[], None])
    ssm = _Strict(raw.get("ssm_cfg") or {}, f"{raw.where}: ssm_cfg")
    ssm.only("layer", "Mamba1", ["Mamba1", "Mamba2"])
    second = ssm.get("layer") == "Mamba2"
    shape = ["d_state", "d_conv", "expand"] + (["headdim", "ngroups"] if second else [])
    fixed: dict[str, list[Any]] = {"conv_bias": [True], "bias": [False]}
    free = {"layer", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}
    if second:
        fixed |= {"D_has_hdim": [False], "rmsnorm": [True], "norm_before_gate": [False], "d_ssm": [None]}
        fixed |= {"dt_limit": UNLIMITED}
        free |= {"chunk_size", "conv_init", "A_init_range", "use_mem_eff_path", "sequence_parallel"}
    unknown = sorted(set(ssm) - set(shape) - set(fixed) - free)
    require(not unknown, f"{ssm.where}: {', '.join(unknown)} is not supported; only {', '.join(shape)}")
    for name, supported in fixed.items():
        ssm.only(name, supported[0], supported)
    multiple = raw.need("pad_vocab_size_multiple") if "pad_vocab_size_multiple" in raw else 8
    require(multiple >= 1, f"{raw.where}: pad_vocab_size_multiple={multiple} must be at least 1")
    disguised = norm == "layer" and raw.get("rms_norm", True)  # see `read_config`
    options: dict[str, Any] = {name: ssm.need(name) for name in shape if name in ssm}
    options |= dict(
        vocab_size=-(-raw.need("vocab_size") // multiple) * multiple,
        d_model=raw.need("d_model"),
        n_layer=raw.need("n_layer"),
        norm=norm,
        residual_in_fp32=bool(raw.get("residual_in_fp32", True)) and not disguised,
        tie_word_embeddings=bool(raw.get("tie_embeddings", True)),
    )
    if second:
        return Mamba2Config(**options)
    return MambaConfig(**options, dt_rank=_rank(ssm, "dt_rank", options["d_model"]))


def _rank(raw: _Strict, name: str, width: int) -> int:
    """Our dt_rank: 0 for the usual ceil(width / 16)."""
    rank = raw.get(name, "auto")
    return 0 if rank in ("auto", -(-width // 16)) else raw.need(name)


def _transformers_mamba(raw: _Strict, norm: str, tied: bool) -> dict[str, Any]:
    """What mamba and mamba2 of `transformers` have in common."""
    raw.only("hidden_act", "silu", ["silu", "swish"])
    raw.only("use_bias", False, [False])
    raw.only("use_conv_bias", True, [True])
    return dict(
        vocab_size=raw.need("vocab_size"),
        d_model=raw.need("hidden_size"),
        n_layer=raw.need("num_hidden_layers"),
        d_state=raw.need("state_size"),
        d_conv=raw.need("conv_kernel"),
        expand=raw.need("expand"),
        norm=norm,
        norm_eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        residual_in_fp32=bool(raw.get("residual_in_fp32", True)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", tied)),
        embedding_std=float(raw.get("initializer_range", 0.1)),
    )


def _mamba(raw: _Strict, norm: str) -> MambaConfig:
    options = _transformers_mamba(raw, norm, tied=True)
    raw.only("intermediate_size", None, [options["expand"] * options["d_model"], None])
    return MambaConfig(**options, dt_rank=_rank(raw, "time_step_rank", options["d_model"]))


def _mamba2(raw: _Strict, norm: str) -> Mamba2Config:
    options = _transformers_mamba(raw, norm, tied=False)
    raw.only("time_step_limit", UNLIMITED[0], UNLIMITED)
    width = raw.need("head_dim")
    require(
        raw.need("num_heads") * width == options["expand"] * options["d_model"],
        f"{raw.where}: num_heads={raw['num_heads']} times head_dim={width} is not expand * hidden_size",
    )
    return Mamba2Config(**options, headdim=width, ngroups=raw.need("n_groups"))


def _gpt_neox(raw: _Strict) -> TransformerConfig:
    raw.only("hidden_act", "gelu", ["gelu"])
    raw.only("attention_bias", True, [True])
    rope = _Strict(raw.get("rope_parameters") or raw.get("rope_scaling") or {}, f"{raw.where}: rope")
    rope.only("rope_type", rope.get("type", "default"), ["default"])
    theta = _first((rope, "rope_theta"), (raw, "rotary_emb_base"), (raw, "rope_theta"), default=10000.0)
    share = _first(
        (rope, "partial_rotary_factor"), (raw, "rotary_pct"), (raw, "partial_rotary_factor"), default=0.25
    )
    width, heads = raw.need("hidden_size"), raw.need("num_attention_heads")
    require(
        int(width // heads * share) % 2 == 0,
        f"{raw.where}: rotary_pct={share} rotates an odd number of a head's {width // heads} dimensions",
    )
    mlp = raw.need("intermediate_size")
    return TransformerConfig(
        vocab_size=raw.need("vocab_size"),
        d_model=width,
        n_layer=raw.need("num_hidden_layers"),
        n_head=heads,
        d_mlp=0 if mlp == 4 * width else mlp,
        rotary_pct=share,
        rope_theta=theta,
        max_position_embeddings=raw.need("max_position_embeddings"),
        parallel_residual=bool(raw.get("use_parallel_residual", True)),
        norm_eps=float(raw.get("layer_norm_eps", 1e-5)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        embedding_std=float(raw.get("initializer_range", 0.02)),
        init_std=float(raw.get("initializer_range", 0.02)),
    )


def _first(*places: tuple[Fields, str], default: float) -> float:
    """The first field that is there: newer and older releases name it differently."""
    return float(next((raw[name] for raw, name in places if raw.get(name) is not None), default))


def write_config(config: Config, dtype: str | None) -> dict[str, Any]:
    """`config.json` of our config for `transformers`. dtype: "bfloat16", ...; None if weights differ in it.

    Raises UserError for a model that `transformers` has no class for.
    """
    shared = dict(TOKENS, **({} if dtype is None else {"dtype": dtype, "torch_dtype": dtype}))
    if isinstance(config, TransformerConfig):
        _representable("position", config.position, "rope")
        _representable("norm", config.norm, "layer")
        _representable("residual_in_fp32", config.residual_in_fp32, False)
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
    if not isinstance(config, MambaConfig | Mamba2Config):
        _representable("architecture", type(config).__name__.removesuffix("Config").lower(), "mamba")
    assert isinstance(config, MambaConfig | Mamba2Config)
    _representable("norm", config.norm, "rms")
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


def _representable(name: str, value: Any, supported: Any) -> None:
    require(
        value == supported,
        f"transformers cannot open a model with {name}={value!r} (only {supported!r}); keep it with "
        "safetensors.torch.save_model(model, file), and open it with "
        "load_model(models.from_config(model.config), file, strict=False)",
    )
