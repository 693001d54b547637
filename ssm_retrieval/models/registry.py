"""From a name to a model: `build("mamba-130m")`, `build("pythia-160m")`, ...

A name is ARCHITECTURE-SIZE; the record at the end of an architecture's file lists its sizes. Published shapes
are those of Gu & Dao 2023 (`state-spaces/mamba-*`), Dao & Gu 2024 (`state-spaces/mamba2-*`) and Biderman et
al. 2023 (`EleutherAI/pythia-*`). `150m` are those of Retrievit (arXiv 2603.02874), without its vocabulary.
`tiny` models have about 0.5 M parameters with the default synthetic task and train in minutes on a CPU.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ssm_retrieval.errors import UserError
from ssm_retrieval.models.architecture import Architecture
from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.configuration import require
from ssm_retrieval.models.seeding import defaults, seeded
from ssm_retrieval.registry import ARCHITECTURES

# Sizes that are compared with each other: for any name in a row, `--preset` takes the one an architecture has
SIZES = (("130m", "160m"), ("370m", "410m"), ("790m", "780m", "1b"), ("1.4b", "1.3b"), ("2.8b", "2.7b"))


def register(architecture: Architecture) -> Architecture:
    """Make a user's architecture known to `models.build`, the command line, tables and figures.

    Registering a name again replaces its record, as when a notebook's cell is run again.

    Raises:
        UserError: If the name is one of the toolkit's, or if another model has the same config class.
    """
    aliases = {alias: ours for ours in ARCHITECTURES.ours for alias in ARCHITECTURES[ours].aliases}
    clash = {architecture.name, *architecture.aliases} & {*aliases, *ARCHITECTURES.ours}
    require(not clash, f"model {', '.join(clash)} is one of this toolkit's; give yours another name")
    same = [known.name for known in ARCHITECTURES.values() if known.config is architecture.config]
    require(
        same in ([], [architecture.name]),
        f"{architecture.config.__name__} is the config of model {', '.join(same)}; derive your own",
    )
    ARCHITECTURES.add(architecture.name, architecture)
    return architecture


def architecture_of(config: Any) -> Architecture:
    """The architecture that a config belongs to.

    Raises:
        UserError: For anything but the config of a registered one.
    """
    found = next((record for record in ARCHITECTURES.values() if type(config) is record.config), None)
    known = ", ".join(record.config.__name__ for record in ARCHITECTURES.values())
    require(
        found is not None,
        f"a model's config is one of {known}, not {type(config).__name__}; models.config(name) makes one",
    )
    return cast(Architecture, found)


def presets() -> list[str]:
    """The name of every preset, by architecture and size."""
    return [f"{record.name}-{size}" for record in ARCHITECTURES.values() for size in record.presets]


def resolve(name: str) -> str:
    """The preset that a name stands for, aliases included: "pythia-160m" is transformer-160m.

    Raises:
        UserError: If there is none; the line names the nearest.
    """
    family, _, size = name.lower().rpartition("-")
    family = next((record.name for record in ARCHITECTURES.values() if family in record.aliases), family)
    if family in ARCHITECTURES and size in ARCHITECTURES[family].presets:
        return f"{family}-{size}"
    sizes = [f"{record.name}-{{{','.join(record.presets)}}}" for record in ARCHITECTURES.values()]
    raise UserError(ARCHITECTURES.unknown(name, presets(), _compared(family, size), sizes))


def preset_of(family: str, size: str) -> str:
    """The preset that is compared with others of this size: ("mamba", "160m") is mamba-130m.

    Args:
        family: Name of an architecture.
        size: A size of any architecture.

    Returns:
        The preset's name.

    Raises:
        UserError: If the architecture has none; the line lists those that it has.
    """
    record = ARCHITECTURES.find(family)
    if found := _compared(family, size):
        return found
    has = ", ".join(record.presets) or "none; give its Architecture some presets"
    raise UserError(f"model {family} has no size {size!r}; it has {has}")


def _compared(family: str, size: str) -> str | None:
    size = size.lower()
    row = next((row for row in SIZES if size in row), ())
    sizes = ARCHITECTURES[family].presets if family in ARCHITECTURES else ()
    return next((f"{family}-{same}" for same in (size, *row) if same in sizes), None)


def config(name: str, **overrides: Any) -> Any:
    """The frozen config of a preset, with some fields replaced.

    Args:
        name: A preset, or an architecture, "mamba", for the defaults of its config.
        **overrides: New values by field.

    Returns:
        The config.

    Raises:
        UserError: For unknown names, fields and values.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].config().replace(**overrides)
    family, _, size = resolve(name).rpartition("-")
    record = ARCHITECTURES[family]
    return record.config().replace(**{**record.presets[size], **overrides})


def state_size(config: Any, seq_len: int) -> int:
    """How many numbers decoding keeps for one sequence after seq_len tokens.

    Raises:
        UserError: If the config's architecture is not registered, or does not say.
    """
    record = architecture_of(config)
    require(
        record.state_size is not None, f"model {record.name} has no state_size; give its Architecture one"
    )
    return cast(Any, record).state_size(config, seq_len)


def from_config(
    config: Any, *, seed: int = 0, device: Any = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """A freshly initialised model for a config object. The global random state is left untouched.

    The weights are drawn on the CPU in float32 and rounded to dtype part by part: no more than one block is
    ever in float32 beside the model, and a bfloat16 model is the rounded float32 one.

    Args:
        config: The config of a registered architecture.
        seed: Fixes the initial weights.
        device: Anything that `torch.device` takes; "meta" allocates nothing. Default: torch's default device.
        dtype: Dtype of the weights. Default: torch's default dtype.

    Returns:
        The model, in training mode.

    Raises:
        UserError: For anything but a config of a registered architecture.
    """
    record = architecture_of(config)
    device = torch.get_default_device() if device is None else torch.device(device)
    dtype = dtype or torch.get_default_dtype()
    meta = device.type == "meta"
    with seeded(seed), defaults(device if meta else torch.device("cpu")):
        built = record.model(config, dtype)
    return built.to(device=None if meta else device, dtype=dtype)  # shards may have memory by now


def build(
    name: str, *, seed: int = 0, device: Any = None, dtype: torch.dtype | None = None, **overrides: Any
) -> LanguageModel:
    """A freshly initialised model by name, such as `build("mamba-tiny", vocab_size=515, d_state=32)`.

    Args:
        name: A preset, or an architecture for the defaults of its config.
        seed: As in `from_config`, like the next two.
        device: Where the model lives.
        dtype: Dtype of the weights.
        **overrides: Fields of the architecture's config.

    Returns:
        The model, in training mode.

    Raises:
        UserError: For unknown names, fields or values.
    """
    require(isinstance(name, str), f"model name {name!r} must be a string such as 'mamba-130m'")
    return from_config(config(name, **overrides), seed=seed, device=device, dtype=dtype)
