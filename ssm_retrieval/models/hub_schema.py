"""What the dialects of `config.json` have in common: how a class of fields reads a file, and what errors say.

Every field of a file is in one of three places: in its dialect's class (hub_mamba.py, hub_neox.py), and then
it counts; in `PASSED_OVER` or the dialect's own list of such fields, and then it changes nothing that a model
here computes; or in neither, and then `parse` names it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.configuration import require

Size = Annotated[int, Field(ge=1, le=2**31)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# In every dialect: fields that name files and tokens, shape outputs, or belong to generation
PASSED_OVER = names("""
    architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash
    auto_map tokenizer_class prefix finetuning_task task_specific_params torchscript use_bfloat16
    tf_legacy_loss attn_implementation _attn_implementation _attn_implementation_autoset unsloth_version
    unsloth_fixed

    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id mask_token_id cls_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens

    use_cache return_dict return_dict_in_generate output_hidden_states output_attentions output_scores
    id2label label2id num_labels problem_type chunk_size_feed_forward gradient_checkpointing is_decoder
    is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder

    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty
""")
STRICT = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Fields(BaseModel):
    """Base of the dialects: no conversions between types, neither NaN nor infinity."""

    model_config = STRICT
    quantization_config: None = None


class Nested(BaseModel):
    """Base of objects within a file, whose unknown fields `parse` names as well."""

    model_config = STRICT


Kind = TypeVar("Kind", bound=BaseModel)


def parse(kind: type[Kind], raw: Mapping[str, Any], where: str, beside: Collection[str]) -> Kind:
    """The fields of a file. One line warns of unknown fields, which `transformers` does not read either.

    Args:
        kind: The dialect's class.
        raw: The contents.
        where: The file, for errors.
        beside: Fields that have no meaning here and are ignored.

    Returns:
        An object of that class.

    Raises:
        UserError: For a field of another type or out of range; the line names file, field and value.
    """
    try:
        fields = kind.model_validate(dict(raw))
    except ValidationError as error:
        raise UserError(explain(error, where)) from error
    unknown = _unknown(fields, beside)
    if unknown:
        warnings.warn(
            f"{where}: without effect here: {', '.join(unknown)}; the model is what the other fields say",
            stacklevel=2,
        )
    return fields


def only_known(fields: BaseModel, beside: Collection[str], where: str) -> None:
    """Refuse unknown fields, as mamba_ssm does.

    Args:
        fields: What `parse` has made.
        beside: Fields that are allowed all the same.
        where: The file, for the error.

    Raises:
        UserError: If there are any.
    """
    unknown = [name for name in fields.model_extra or {} if name not in beside]
    require(not unknown, f"{where}: {', '.join(unknown)} is not a field that is supported here; remove it")


def _unknown(fields: BaseModel, beside: Collection[str], prefix: str = "") -> list[str]:
    """Fields, at any depth, that their class does not have and that are not null."""
    extra = fields.model_extra or {}
    found = [prefix + name for name, value in extra.items() if name not in beside and value is not None]
    for name in type(fields).model_fields:
        if isinstance(value := getattr(fields, name), Nested):
            found += _unknown(value, (), f"{prefix}{name}.")
    return found


WORDS = {"a valid integer": "a whole number", "greater than or equal to": "at least",
         "less than or equal to": "at most", "greater than": "above", "a valid number": "a number",
         "a valid boolean": "true or false", "a valid dictionary": "an object"}  # fmt: skip


def explain(error: ValidationError, where: str) -> str:
    """The first error, as one line with file, field and value."""
    errors = error.errors(include_url=False)
    # where there is a choice ("auto" or a number), the error for the value's own type
    first = next((e for e in errors if e["loc"] == errors[-1]["loc"]), errors[0])
    name = ".".join(str(part) for part in first["loc"] if str(part).isidentifier()) or "it"
    own = first.get("ctx", {}).get("error")
    if first["type"] == "value_error" and isinstance(own, UserError):
        return f"{where}: {own}"
    if first["type"] == "missing":
        return f"{where}: {name} is missing; fetch it again"
    said = first["msg"].removeprefix("Input should be ")
    for theirs, ours in WORDS.items():
        said = said.replace(theirs, ours)
    value = shown(first["input"])
    if first["type"] in ("literal_error", "none_required", "too_long"):
        only = {"none_required": "None", "too_long": "[]"}.get(first["type"], said.partition(" or ")[0])
        return f"{where}: {name}={value} is not supported; only {only}"
    return f"{where}: {name}={value} must be {said}"


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever a file holds."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def same(name: str, value: Any, other: str, expected: Any, where: str) -> None:
    """Refuse a field that contradicts the one that decides.

    Args:
        name: The field.
        value: Its value; None never contradicts.
        other: The field that decides.
        expected: Its value.
        where: The file, for the error.

    Raises:
        UserError: If they differ.
    """
    require(
        value is None or value == expected,
        f"{where}: {name}={shown(value)} contradicts {other}={shown(expected)}; make them equal",
    )


def from_hub(fields: BaseModel, spellings: Mapping[str, str]) -> dict[str, Any]:
    """Options of our config that `transformers` only calls by another name.

    Args:
        fields: What `parse` has made.
        spellings: A field of ours: the one of `transformers`.

    Returns:
        Values by our names.
    """
    return {ours: getattr(fields, theirs) for ours, theirs in spellings.items()}


def to_hub(config: Any, spellings: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `from_hub`.

    Args:
        config: One of ours.
        spellings: A field of ours: the one of `transformers`.

    Returns:
        Values by the names of `transformers`.
    """
    return {theirs: getattr(config, ours) for ours, theirs in spellings.items()}


def unlike(config: Any, **wanted: Any) -> str | None:
    """The first option of a config that has not the wanted value, as "name=value"; None if all have."""
    found = ((name, getattr(config, name)) for name in wanted)
    return next((f"{name}={value!r}" for name, value in found if value != wanted[name]), None)
