"""`config.json` of published checkpoints <-> our configs.

The record of an architecture says how `transformers` stores it (`Architecture.hub`; ours are in hub_mamba.py
and hub_neox.py). state-spaces' own dialect (`d_model`, `ssm_cfg`) is read as well. What our models cannot be
is an error that names the field.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.architecture import Architecture
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hub_mamba import read_state_spaces
from ssm_retrieval.models.hub_schema import PASSED_OVER, shown
from ssm_retrieval.models.own_configs import check_sizes, respelt, typed
from ssm_retrieval.models.registry import architecture_of
from ssm_retrieval.registry import ARCHITECTURES

TOKENS = dict(bos_token_id=0, eos_token_id=0)  # <|endoftext|> of the tokenizer that all these models share
EXTRAS = "ssm_retrieval"  # options of ours that `transformers` has no field for


def read_config(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str] = ()
) -> Config:
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
    others = bool(set(beside) - PASSED_OVER)  # then `model_type` may be that of other code
    try:
        config = _read(raw, keys, where, {*PASSED_OVER, *beside}, others)
    except UserError as error:  # of our configs: they do not know the file
        if str(error).startswith(where):
            raise
        raise UserError(respelt(f"{where}: {error}", raw)) from error
    if isinstance(keys, Mapping):
        check_sizes(config, raw, keys, where)
    return config


def _read(
    raw: Mapping[str, Any], keys: Collection[str], where: str, beside: Collection[str], others: bool
) -> Config:
    kind = raw.get("model_type")
    known = {record.hub.model_type: record for record in ARCHITECTURES.values() if record.hub is not None}
    if isinstance(kind, str) and kind in known:
        record: Architecture = known[kind]
        assert record.hub is not None
        config: Any = record.config(**record.hub.read(raw, keys, where, {*beside, EXTRAS}))
        return _with_extras(config, record.hub.extras, raw, where)
    if "d_model" in raw and (kind in (None, "") or others):
        name, options = read_state_spaces(raw, keys, where, beside)
        return ARCHITECTURES[name].config(**options)
    raise UserError(
        f"{where}: model_type={shown(kind)} is not supported; only {', '.join(known)}, ssm-retrieval, "
        "and state-spaces' own config with d_model and ssm_cfg"
    )


def _with_extras(config: Any, known: Collection[str], raw: Mapping[str, Any], where: str) -> Config:
    """With the options of `EXTRAS`, which `write_config` has added."""
    extras = raw.get(EXTRAS, {})
    right = isinstance(extras, dict) and set(extras) <= set(known)
    only = ", ".join(known) or "none"
    require(right, f"{where}: {EXTRAS}={shown(extras)} is not supported, its options are {only}; remove it")
    return typed(type(config), config.to_dict() | extras, f"{where}: {EXTRAS}")


def lacking(config: Config) -> str | None:
    """What part of a config no class of `transformers` has, as "name=value"; None if one has all of it."""
    record = architecture_of(config)
    return f"architecture={record.name!r}" if record.hub is None else record.hub.lacks(config)


def write_config(config: Config, dtype: str | None) -> dict[str, Any]:
    """`config.json` of our config for `transformers`.

    Args:
        config: The config.
        dtype: "bfloat16", ..., of all weights; None if they differ.

    Returns:
        The contents.

    Raises:
        UserError: If `transformers` has no class for such a model.
    """
    lacks = lacking(config)
    require(lacks is None, f"transformers has no class for a model with {lacks}")
    hub = architecture_of(config).hub
    assert hub is not None
    fields = dict(TOKENS, model_type=hub.model_type, architectures=[hub.model_class], **hub.write(config))
    without = type(config)(**hub.read(fields, (), "config.json", PASSED_OVER))
    extras = {n: getattr(config, n) for n in hub.extras if getattr(config, n) != getattr(without, n)}
    fields |= {EXTRAS: extras} if extras else {}
    return fields | ({} if dtype is None else {"dtype": dtype, "torch_dtype": dtype})
