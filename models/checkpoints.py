"""Published checkpoints in and out: `load("state-spaces/mamba-130m")`, `save(model, folder)`.

A model is made without memory for its weights and filled tensor by tensor, so that loading takes little more
than the model itself.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import hub, hub_configs
from models.common import Config, LanguageModel, require
from models.registry import from_config

LISTED = 12  # keys that an error names, of each kind


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files and what they hold; no weights are in memory."""

    folder: Path
    files: list[Path]
    stored: dict[str, hub.Stored]  # by the file's own key
    config: Config


def examine(name_or_path: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint (see `load`) and read everything about it but the weights."""
    folder = hub.find_folder(name_or_path, revision)
    raw = hub.read_json(folder / "config.json")
    files = hub.weight_files(folder)
    stored = hub.contents(files)
    return Checkpoint(
        folder, files, stored, hub_configs.read_config(raw, stored, str(folder / "config.json"))
    )


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> LanguageModel:
    """The model of a checkpoint, ready for inference: a local folder, or a name on the Hugging Face hub.

    Names: state-spaces/mamba-*, state-spaces/mamba2-*, EleutherAI/pythia-*, and what `transformers` saves of
    MambaForCausalLM, Mamba2ForCausalLM and GPTNeoXForCausalLM. A copy in the hub's cache needs no network.
    revision: branch, tag or commit on the hub; a commit names the same weights for ever.
    dtype: of all weights; None leaves each as the file has it. device: anything `torch.device` takes.

    Raises ValueError, in one line, for a checkpoint that is not there, is damaged, is of a model that this
    package does not have, or whose tensors are not exactly those that its config asks for.
    """
    checkpoint = examine(name_or_path, revision=revision)
    model = from_config(checkpoint.config, device="meta")
    sources = dict(checkpoint.stored)
    model.accept_hub_spellings(sources)
    fill(model, sources, checkpoint.folder, dtype=dtype, device=device)
    return model.eval()


def fill(
    model: nn.Module,
    sources: dict[str, hub.Stored],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> None:
    """Give a module that was made on "meta" its weights, tensor by tensor. sources: by the module's names.

    Raises ValueError if they are not exactly those of the module.
    """
    homes = _homes(model)
    _compare(sources, {name: shape for names, shape in homes for name in names}, folder)
    names_of = {names[0]: names for names, _ in homes}
    source_of = {sources[name]: name for name in names_of}
    for stored, tensor in hub.tensors(source_of):
        require(tensor.is_floating_point(), f"{stored.file}: {stored.key} is {tensor.dtype}, not floating")
        mapped = stored.file.suffix != ".safetensors"
        _assign(model, names_of[source_of[stored]], tensor.to(device=device, dtype=dtype, copy=mapped))
    _check_ties(model, homes, sources)


def _homes(model: nn.Module) -> list[tuple[list[str], tuple[int, ...]]]:
    """Every weight's names, more than one if it is tied, and its shape."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = tuple(parameter.shape)
    return [(names[key], shapes[key]) for key in names]


def _compare(sources: dict[str, hub.Stored], wanted: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raises ValueError that lists every tensor missing, in excess or of another shape."""
    missing = [name for name in wanted if name not in sources]
    extra = [stored.key for name, stored in sources.items() if name not in wanted]
    wrong = [
        f"{sources[name].key} {list(sources[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in sources and sources[name].shape != shape
    ]
    parts = (("missing", missing), ("not of this model", extra), ("wrongly shaped", wrong))
    said = "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)
    require(not said, f"the weights in {folder} do not fit its config.json: {said}")


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _assign(model: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Make one parameter of `tensor`, under all of its names."""
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
    """Write `config.json` and safetensors into a new folder that `transformers`, and `load`, open.

    max_shard_size: of one file, in bytes or as "5GB"; several files have an index. The tokenizer is not part
    of a model: those of the published models are EleutherAI/gpt-neox-20b's. Returns the folder, which appears
    when it is complete.
    Raises ValueError if the folder is not empty, or if `transformers` has no such model (hybrids, learned or
    no positions, another norm than the architecture's).
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} exists and is not empty; choose a new folder",
    )
    tensors = dict(_published(model))
    dtypes = {tensor.dtype for tensor in tensors.values()}
    dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
    config = hub_configs.write_config(model.config, dtype)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir()
    try:
        for name, keys in split.filename_to_tensors.items():
            save_file({key: tensors[key] for key in keys}, temporary / name, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(temporary / (hub.SAFETENSORS + hub.INDEX), index)
        _write_json(temporary / "config.json", config)
        for file in temporary.iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _published(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its name on the hub, tied ones once."""
    for name, parameter in model.named_parameters():
        yield name.replace("backbone.embedding.", "backbone.embeddings."), parameter.detach().contiguous()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
