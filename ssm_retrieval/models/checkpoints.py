"""Checkpoints in and out: `load("state-spaces/mamba-130m")`, `load("runs/<id>")`, `save(model, path)`.

A model is built without memory for its weights and filled tensor by tensor, so loading takes little more
memory than the model itself.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssm_retrieval.models import hub, hub_configs, own_configs
from ssm_retrieval.models.common import Config, LanguageModel, require
from ssm_retrieval.models.quantized import is_quantized
from ssm_retrieval.models.registry import architecture_of, from_config

# dtypes of weights that models here compute with; weights of others must be converted
COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# computed in float32 whatever the others are, so that they may be wider
APART = (".A_log", ".D", ".dt_bias", ".dt_proj.bias")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files and what they hold; no weights are in memory.

    Attributes:
        folder: Where it lies.
        files: The files that decide the weights.
        stored: Maps a file's own key to the tensor.
        config: The model's config.
    """

    folder: Path
    files: list[Path]
    stored: dict[str, hub.Stored]
    config: Config


def examine(name_or_path: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint (see `load`) and read everything about it except the weights."""
    folder = hub.find_folder(name_or_path, revision)
    place = folder / "config.json"
    raw = hub.read_json(place)
    require(
        "plan" not in raw or (folder / "model.safetensors").exists(),
        f"{folder} is of a run that has not finished; give its command again, it goes on from there",
    )
    if own_configs.is_own(raw):
        config = own_configs.read_config(raw, str(place))
        weights = hub.weight_files(folder)
        stored = hub.contents(weights)
        own_configs.check_sizes(config, raw, stored, str(place))
    else:
        weights = hub.weight_files(folder)
        stored = hub.contents(weights)
        config = hub_configs.read_config(raw, stored, str(place))
    index = [] if weights.index is None else [weights.index]
    return Checkpoint(folder, [*weights.files, *index], stored, config)


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> LanguageModel:
    """The model of a checkpoint, ready for inference: a local folder, or a name on the Hugging Face hub.

    A folder may hold what `save` has written, a run (`runs/<id>`), what `transformers` saves of
    MambaForCausalLM, Mamba2ForCausalLM and GPTNeoXForCausalLM, or a copy of a published model. The published
    names are `state-spaces/mamba-*`, `state-spaces/mamba2-*` and `EleutherAI/pythia-*`; a copy in the hub's
    cache needs no network. Nothing in a file is executed. One line warns of fields in config.json that have
    no effect.

    Args:
        name_or_path: The folder, or the name on the hub.
        revision: Branch, tag or commit on the hub. Only a commit always names the same weights.
        dtype: Dtype for all weights. Default: each keeps the file's.
        device: Anything that `torch.device` takes.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: If the checkpoint is missing or damaged, if this package does not have its model, if its
            tensors are not exactly those that its config asks for, or if weights of these dtypes cannot be
            multiplied.
    """
    checkpoint = examine(name_or_path, revision=revision)
    model, sources = outline(checkpoint)
    fill(model, sources, checkpoint.folder, dtype=dtype, device=device)
    return model.eval()


def outline(checkpoint: Checkpoint) -> tuple[LanguageModel, dict[str, hub.Stored]]:
    """The model without memory for its weights, and where each weight is, by the model's names.

    Raises:
        UserError: If the weights are not exactly those of the model.
    """
    model = from_config(checkpoint.config, device="meta")
    sources = dict(checkpoint.stored)
    model.accept_hub_spellings(sources)
    _match(model, sources, checkpoint.folder)
    return model, sources


def fill(
    model: nn.Module,
    sources: dict[str, hub.Stored],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> None:
    """Give a module that was made on the "meta" device its weights, tensor by tensor.

    Tied weights may be stored under one of their names or all of them. Parameters that have memory already
    keep it, and their dtype.

    Args:
        model: The module.
        sources: Maps the module's names to stored tensors; it gets all names of tied ones.
        folder: What an error names.
        dtype: Dtype for all weights. Default: each keeps the file's.
        device: Anything that `torch.device` takes.

    Raises:
        UserError: If the weights are not exactly those of the module, or if a language model cannot compute
            with their dtypes.
    """
    homes = _match(model, sources, folder)
    names_of = {names[0]: names for names, _ in homes}
    source_of = {sources[name]: name for name in names_of}
    for stored, tensor in hub.tensors(source_of):
        what = f"{stored.file}: {stored.key} is {_short(tensor.dtype)}"
        require(tensor.is_floating_point(), f"{what}, not floating; fetch weights that are not quantised")
        require(
            dtype is not None or tensor.dtype in COMPUTED,
            f"{what}, in which nothing is computed; give dtype=torch.bfloat16 or a wider one",
        )
        mapped = stored.file.suffix != ".safetensors"
        _assign(model, names_of[source_of[stored]], tensor.to(device=device, dtype=dtype, copy=mapped))
    _check_ties(model, homes, sources)
    if isinstance(model, LanguageModel):
        _check_dtypes(model, folder)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dtypes(model: LanguageModel, folder: Path) -> None:
    """Weights that are multiplied with each other must have one dtype."""
    found: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(APART):
            found.setdefault(parameter.dtype, name)
    said = ", ".join(f"{_short(dtype)} ({name}, ...)" for dtype, name in found.items())
    widest = max(found, key=lambda dtype: dtype.itemsize)
    require(
        len(found) < 2,
        f"the weights in {folder} are of several dtypes, {said}, which cannot be multiplied with each other; "
        f"give dtype={widest}",
    )


def _match(
    model: nn.Module, sources: dict[str, hub.Stored], folder: Path
) -> list[tuple[list[str], tuple[int, ...]]]:
    """The homes of a module's weights; `sources` gets all names of tied ones. Refuses what `fill` refuses."""
    homes = _homes(model)
    for names, _ in homes:
        present = [name for name in names if name in sources]
        sources |= {name: sources[present[0]] for name in names if present and name not in sources}
    _compare(sources, {name: shape for names, shape in homes for name in names}, folder)
    return homes


def _homes(model: nn.Module) -> list[tuple[list[str], tuple[int, ...]]]:
    """Every weight's names, more than one if it is tied, and its shape."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = tuple(parameter.shape)
    return [(names[key], shapes[key]) for key in names]


def _compare(sources: dict[str, hub.Stored], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuse, and list, every tensor that is missing, in excess or wrongly shaped."""
    missing = [name for name in wanted if name not in sources]
    extra = [stored.key for name, stored in sources.items() if name not in wanted]
    wrong = [
        f"{sources[name].key} {list(sources[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in sources and sources[name].shape != shape
    ]
    parts = (("missing", missing), ("not of this model", extra), ("wrongly shaped", wrong))
    said = "; ".join(f"{what}: {hub.listing(names)}" for what, names in parts if names)
    require(not said, f"the weights in {folder} do not fit its config.json: {said}; fetch both anew")


def _assign(model: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Make one parameter of `tensor`, under all of its names; one that has memory is filled where it is."""
    there = model.get_parameter(names[0])
    if not there.is_meta:  # a shard: `training.distributed.build`
        with torch.no_grad():
            there.copy_(tensor)
        return
    parameter = nn.Parameter(tensor)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)


def _check_ties(
    model: nn.Module, homes: list[tuple[list[str], tuple[int, ...]]], sources: dict[str, hub.Stored]
) -> None:
    """A file may hold tied weights twice, but not different ones."""
    twice = {sources[name]: names for names, _ in homes for name in names[1:]}
    twice = {stored: names for stored, names in twice.items() if stored != sources[names[0]]}
    for stored, tensor in hub.tensors(twice):
        kept = model.get_parameter(twice[stored][0])
        require(
            torch.equal(tensor.to(kept), kept),
            f"{stored.file}: {stored.key} differs from {sources[twice[stored][0]].key}, to which config.json "
            "ties it (tie_word_embeddings or tie_embeddings); set that to false",
        )


def save(model: LanguageModel, folder: str | Path, *, max_shard_size: int | str = "5GB") -> Path:
    """Write `config.json` and safetensors into a new folder, from which `load` makes the same model.

    `transformers` opens it as well, unless it has no class for the model (hybrids, learned positions,
    attention without positions, another norm than the architecture's, ...): `config.json` then has our own
    form, with model_type "ssm-retrieval". A tokenizer is not part of a model; the published models use that
    of EleutherAI/gpt-neox-20b.

    Args:
        model: The model.
        folder: A new or empty folder. It appears when it is complete.
        max_shard_size: Largest file, in bytes or as "5GB". Several files get an index.

    Returns:
        The folder.

    Raises:
        UserError: If the folder is not empty, or the model's weights are in 8 bits.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    require(not is_quantized(model), "a model in 8 bits cannot be saved; save it before models.quantize")
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} exists and is not empty; choose a new folder",
    )
    form = architecture_of(model.config).hub
    own = form is None or form.lacks(model.config) is not None
    spell = str if own or form is None else form.published
    tensors = {spell(name): parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    if own:
        config = own_configs.write_config(model.config)
    else:
        dtypes = {_short(tensor.dtype) for tensor in tensors.values()}
        config = hub_configs.write_config(model.config, dtypes.pop() if len(dtypes) == 1 else None)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir()
    try:
        _write_json(temporary / "config.json", config)
        mode = (temporary / "config.json").stat().st_mode
        for name, keys in split.filename_to_tensors.items():
            save_file({key: tensors[key] for key in keys}, temporary / name, metadata={"format": "pt"})
            os.chmod(temporary / name, mode)  # safetensors leaves a file for its owner alone
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(temporary / (hub.SAFETENSORS + hub.INDEX), index)
        for file in temporary.iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
