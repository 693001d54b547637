"""`config.json` of our own models, which `models.save` writes where `transformers` has no class:

    {"model_type": "ssm-retrieval", "format": 1, "family": "hybrid", "d_model": 128, ...}

and of a run, runs/<id>/config.json:

    {"plan": {"model": preset or architecture, "model_overrides": {..}, ..}, ..}

Configs of every form pass `check_sizes`, which compares them with the tensors before anything is made.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, cast, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.common import Config, require
from ssm_retrieval.models.hub import Stored
from ssm_retrieval.models.hub_schema import STRICT, NotNegative, Positive, explain, shown
from ssm_retrieval.models.registry import ARCHITECTURES, architecture_of, resolve

MODEL_TYPE, FORMAT = "ssm-retrieval", 1
POSITIVE = ("dt_min", "dt_max", "rope_theta")  # numbers that must not be 0
WIDE = 2**16  # sizes up to this need no tensor of that width, because they allocate little
# our size -> its name in files of `transformers`
SPELLINGS = dict(
    d_model="hidden_size", n_layer="num_hidden_layers", d_state="state_size", d_conv="conv_kernel",
    dt_rank="time_step_rank", n_head="num_attention_heads", d_mlp="intermediate_size", headdim="head_dim",
    ngroups="n_groups",
)  # fmt: skip


def write_config(config: Config) -> dict[str, Any]:
    """All fields of a config, and what is needed to read them."""
    family = architecture_of(config).name
    return {"model_type": MODEL_TYPE, "format": FORMAT, "family": family, **config.to_dict()}


def is_own(raw: Mapping[str, Any]) -> bool:
    """Whether these contents of a `config.json` are for `read_config`."""
    return raw.get("model_type") == MODEL_TYPE or (
        "model_type" not in raw and ("plan" in raw or "plans" in raw)
    )


def read_config(raw: Mapping[str, Any], where: str) -> Config:
    """The config in a file of ours.

    Args:
        raw: The contents.
        where: The file, for errors.

    Returns:
        The config.

    Raises:
        UserError: If they are not a config; the line names file and field.
    """
    if "plans" in raw:
        raise UserError(
            f"{where} is of an older version, which kept several models in a run; train them again"
        )
    if "model_type" not in raw:
        return _of_run(raw, where)
    version = raw.get("format")
    require(
        version == FORMAT,
        f"{where}: format={shown(version)} is not supported, only {FORMAT}; update ssm-retrieval",
    )
    family = raw.get("family")
    require(
        isinstance(family, str) and family in ARCHITECTURES,
        f"{where}: family={shown(family)} is unknown; only {', '.join(ARCHITECTURES)}, or one of your own, "
        "whose module must be imported first (--import)",
    )
    options = {name: value for name, value in raw.items() if name not in ("model_type", "format", "family")}
    return typed(ARCHITECTURES[cast(str, family)].config, options, where)


def _of_run(raw: Mapping[str, Any], where: str) -> Config:
    plan = raw.get("plan")
    require(isinstance(plan, dict), f"{where}: plan={shown(plan)} must be an object; train it again")
    plan = cast("dict[str, Any]", plan)
    name, options = plan.get("model"), plan.get("model_overrides")
    require(
        isinstance(name, str), f"{where}: model={shown(name)} must be a preset or a family; train it again"
    )
    require(
        isinstance(options, dict),
        f"{where}: model_overrides={shown(options)} must be an object; train it again",
    )
    name, options = cast(str, name), cast("dict[str, Any]", options)
    if name in ARCHITECTURES:
        return typed(ARCHITECTURES[name].config, options, where)
    try:
        preset = resolve(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    family, _, size = preset.rpartition("-")
    record = ARCHITECTURES[family]
    return typed(record.config, {**record.presets[size], **options}, where)


def typed(kind: type[Config], options: Mapping[str, Any], where: str) -> Config:
    """A config in which every field has its type and a possible value.

    Args:
        kind: The config class.
        options: Fields and their values.
        where: The file, for errors.

    Returns:
        The config.

    Raises:
        UserError: For wrong values and unknown fields; the line names file and field.
    """
    known = [field.name for field in dataclasses.fields(cast(Any, kind))]
    unknown = sorted(set(options) - set(known))
    require(
        not unknown,
        f"{where}: {', '.join(unknown)[:200]} is no option of {kind.__name__}; another release may know it",
    )
    try:
        _schema(cast(Any, kind)).model_validate(dict(options))
    except ValidationError as error:
        raise UserError(explain(error, where)) from error
    try:
        return kind(**options)
    except UserError as error:  # of the config, which does not know the file
        raise UserError(f"{where}: {error}") from error


@cache
def _schema(kind: Any) -> type[BaseModel]:
    """A pydantic model with the types of a config's fields; numbers are finite and not negative."""
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, kind)):
        hint: Any = hints[field.name]
        if hint is int:
            hint = Annotated[int, Field(ge=0, le=2**31)]
        elif hint is float:
            hint = Positive if field.name in POSITIVE else NotNegative
        fields[field.name] = (hint, field.default)
    return create_model(kind.__name__, __config__=STRICT, **fields)


def check_sizes(config: Config, raw: Mapping[str, Any], stored: Mapping[str, Stored], where: str) -> None:
    """Refuse sizes that no tensor has, before a model is made.

    Making one takes time that grows with n_layer, and torch cannot even describe a tensor of 2^63 bytes.

    Args:
        config: The config to check.
        raw: The contents of the file, for the names that it has for our fields.
        stored: The tensors by name.
        where: The file, for errors.

    Raises:
        UserError: If a size does not fit the tensors.
    """
    mine = config.to_dict()
    widest = max((n for s in stored.values() if s.numbers for n in s.shape), default=0)
    sizes = {name: n for name, n in mine.items() if isinstance(n, int) and not isinstance(n, bool)}
    free = ["chunk_size"]
    free += ["max_position_embeddings"] if mine.get("position") != "learned" else []
    limit = f"no tensor is wider than {widest:,}", max(widest, WIDE)
    limits = {name: limit for name in sizes if name not in free}
    limits["n_layer"] = (f"there are only {len(stored)} tensors", len(stored))
    for name, (what, most) in limits.items():
        size = mine["d_model"] * mine["expand"] if name == "expand" else mine[name]
        said = f"{where}: {name}={shown(mine[name])} does not fit the weights beside it: {what}; mend one"
        require(size <= most, respelt(said, raw))


def respelt(said: str, raw: Mapping[str, Any]) -> str:
    """An error about our options, with the file's names for them."""
    for ours, theirs in SPELLINGS.items():
        if theirs in raw:
            said = re.sub(rf"\b{ours}=", f"{theirs}=", said)
    return said
