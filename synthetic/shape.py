"""The shape of a model that starts from random weights: its preset's, with what the options change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ssm_retrieval.errors import UserError
from synthetic.checks import check, lacks, option, position

if TYPE_CHECKING:
    from ssm_retrieval.models.architecture import Architecture
    from synthetic.config import RunConfig
    from synthetic.tasks import Task

# Option: the field of the config that it sets. --heads sets different ones, see `_heads`.
FIELDS = {
    "d_model": "d_model",
    "layers": "n_layer",
    "d_state": "d_state",
    "d_conv": "d_conv",
    "window": "window",
    "ssm_init": "ssm_init",
}
# What suits position retrieval better than the preset: room for hundreds of symbols in one layer. It answers
# a query behind the context from its state. If the query comes first, one layer can only find out, at each
# symbol, whether it is the one asked for; a second has to carry its place to the end.
# Mamba-3 learns sooner with its published memory (studies/what_mamba_lacks).
_OWN: dict[str, dict[str, Any]] = {"mamba3-tiny": dict(ssm_init="tied")}
RECALL: dict[str, dict[str, Any]] = _OWN | {"mamba-tiny": dict(n_layer=1, d_state=128)}
RECALL_TOLD: dict[str, dict[str, Any]] = _OWN | {"mamba-tiny": dict(n_layer=2, d_state=64)}  # --layout prefix


def model(
    config: RunConfig, architecture: Architecture, task: Task, queries: int
) -> tuple[str, dict[str, Any], int]:
    """The model that a run starts from random weights.

    Args:
        config: What the user asks for.
        architecture: Architecture of the model.
        task: What it is trained on.
        queries: The most queries of a sequence.

    Returns:
        Its name in the registry, its overrides, and its width.

    Raises:
        UserError: For a preset, scheme or shape that the architecture does not have.
    """
    from ssm_retrieval import models
    from ssm_retrieval.models.registry import preset_of

    paper = config.protocol == "paper"
    overrides: dict[str, Any] = {"vocab_size": task.vocab_size}
    scheme = position(config, architecture) if architecture.positions else "none"
    if scheme != "none" or not architecture.knows_order:
        # the longest evaluation and training sequence, whichever layout
        overrides |= {"max_position_embeddings": task.max_length(queries) + 1, "position": scheme}
    try:
        name = preset_of(architecture.name, config.preset)
        usual: Any = models.config(name)
    except ValueError as error:
        raise UserError(f"--preset {config.preset}: {error}") from error
    learned = overrides.get("position") == "learned"
    # Not of hybrids: their attention retrieves, and learns it later beside layers that sum up the context.
    recalls = architecture.has("ssm_init") and architecture.knows_order
    if task.positional and learned and recalls and not paper:
        shapes = RECALL_TOLD if config.layout == "prefix" else RECALL
        ready = {"ssm_init": "recall", **shapes.get(name, {})}
        overrides |= ready
        usual = usual.replace(**ready)
    changed = changes(config, architecture, usual)
    if overrides.get("position") == "rope":
        bare: Any = models.config(name, **changed, position="none")
        width = (bare.attention_config() if hasattr(bare, "attention_config") else bare).d_head
        check(
            int(width * config.rotary_pct) >= 2,  # RoPE rotates pairs of dimensions
            f"--rotary-pct {config.rotary_pct} rotates none of the {width} dimensions of a head; "
            f"use at least {2 / width:g}, or --position none",
        )
        overrides["rotary_pct"] = config.rotary_pct
    overrides |= changed
    width = models.config(name, **overrides).d_model
    if not paper:
        if architecture.has("embedding_std"):
            overrides["embedding_std"] = 0.1
        if architecture.has("init_std"):  # as wide as torch's default, which the SSM blocks have
            overrides["init_std"] = round((3 * width) ** -0.5, 6)
    return name, overrides, width


def changes(config: RunConfig, architecture: Architecture, usual: Any) -> dict[str, Any]:
    """Fields in which a model differs from the usual one.

    A value that equals the usual one leads to the same run as leaving it out. An option that the architecture
    lacks is for another model of the same command (`checks.check_architecture`).

    Args:
        config: What the user asks for.
        architecture: Architecture of the model.
        usual: The config if the user asks for nothing: the preset's, or what suits the task better.

    Returns:
        New values by field.

    Raises:
        UserError: If heads do not divide the width, or the architecture cannot have a value.
    """
    asked = {field: getattr(config, name) for name, field in FIELDS.items() if not lacks(architecture, name)}
    asked |= _heads(config, architecture, usual)
    found = {name: value for name, value in asked.items() if value not in (None, getattr(usual, name))}
    bare = {"position": "none"} if architecture.positions else {}  # `config.plan` checks what RoPE needs
    try:
        usual.replace(**found, **bare)
    except UserError as error:
        raise UserError(f"{said(config)}: {error}") from error
    return found


def _heads(config: RunConfig, architecture: Architecture, usual: Any) -> dict[str, Any]:
    """--heads as a field: the number of attention's heads, or the channels of each head with a state."""
    width, model = config.d_model or usual.d_model, f"{said(config)}: --model {architecture.name} has"
    if architecture.has("n_head"):
        channels, heads = width, config.heads or usual.n_head
        found = {"n_head": config.heads}
    elif architecture.has("headdim"):
        channels = round(usual.expand * width)
        fitting = channels // math.gcd(channels, usual.headdim)
        check(
            config.heads is not None or fitting * usual.headdim == channels,
            f"{model} {channels} channels, which heads of {usual.headdim} do not divide; give --heads, as in "
            f"--heads {fitting}",
        )
        heads = config.heads or fitting
        found = {"headdim": channels // heads if config.heads else None}
    else:
        return {}
    check(
        channels % heads == 0,
        f"{model} {channels} channels, which {heads} heads do not divide; change --d-model or --heads",
    )
    return found


def said(config: RunConfig) -> str:
    """The options of the shape that were given, as on the command line: "--d-model 64 --heads 2"."""
    names = (*FIELDS, "heads")
    given = [(option(name), getattr(config, name)) for name in names if getattr(config, name) is not None]
    return " ".join(f"{name} {value}" for name, value in given)
