"""Where a checkpoint's files are, and what is in them: names and shapes first, tensors one after the other.

A checkpoint is a folder with `config.json` and its weights, in the first of these forms that is there:
`model.safetensors`, its shards by `model.safetensors.index.json`, `pytorch_model.bin`, its shards.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.common import require
from models.errors import UserError

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# A .bin file is mapped, and its pages count as ours for as long as the mapping lives: it is opened anew
# after so many numbers.
MAPPED_NUMBERS = 2**26


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    file: Path
    key: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()


def find_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder of that name, or the hub's snapshot, downloaded unless the cache has it.

    Raises UserError, in one line, for what is neither, an unknown name or revision, and a lack of network.
    """
    path = Path(name_or_path)
    if path.is_dir():
        require(
            revision is None, f"revision={revision!r} is for names on the hub, but {path} is a local folder"
        )
        return path
    require(not path.exists(), f"{path} is a file; give the folder that holds it and config.json")
    name = str(name_or_path)
    require(
        HUB_NAME.fullmatch(name) is not None,
        f"{name!r} is neither a folder nor a name on the hub such as 'state-spaces/mamba-130m'",
    )
    folder = _download(name, revision, SAFETENSORS)
    if not any((folder / (SAFETENSORS + end)).exists() for end in ("", INDEX)):
        folder = _download(name, revision, PICKLED)
    return folder


def _download(name: str, revision: str | None, weights: str) -> Path:
    """Raises UserError where huggingface_hub has any of its errors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    stem, ending = weights.split(".")
    patterns = ["config.json", weights, weights + INDEX, f"{stem}-*-of-*.{ending}"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        reason = "asks for its licence to be accepted on its page, and for `hf auth login`"
        raise UserError(f"{name} on the hub {reason}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name} is no folder here, and no (public) model on the hub; check it") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} on the hub has no revision {revision!r}; see its page for those") from error
    except Exception as error:  # whatever the network stack raises, for which the library has no base class
        at = "" if revision is None else f" at revision {revision!r}"
        reason = str(error).split("\n")[0][:120]
        raise UserError(
            f"{name}{at} is no folder here, not (wholly) in the hub's cache, and could not be downloaded "
            f"({type(error).__name__}: {reason}); mend the network, or copy its files and give their folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is missing or no JSON object."""
    require(path.exists(), f"{path.parent} has no {path.name}; give the folder of a checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    require(isinstance(value, dict), f"{path} is no JSON object; fetch it again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises UserError if there are none, or shards are missing."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).exists():
            return [folder / name]
        if (index := folder / (name + INDEX)).exists():
            shards = read_json(index).get("weight_map") or {}
            require(len(shards) > 0, f"{index} lists no weights; fetch it again")
            files = [folder / shard for shard in sorted(set(shards.values()))]
            missing = [file.name for file in files if not file.exists()]
            require(not missing, f"{folder} lacks {', '.join(missing)}; fetch what {index.name} lists")
            return files
    raise UserError(f"{folder} has neither {SAFETENSORS} nor {PICKLED}, whole or sharded")


def contents(files: Iterable[Path]) -> dict[str, Stored]:
    """Key -> where it is, without reading the weights. Raises UserError for damaged files."""
    found: dict[str, Stored] = {}
    for file in files:
        for key, shape in _shapes(file):
            require(key not in found, f"{key} is in two files, {file} is the second; fetch them again")
            found[key] = Stored(file, key, shape)
    return found


def _shapes(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return [(key, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}); fetch it again") from error
    return [(key, tuple(tensor.shape)) for key, tensor in _unpickle(file).items()]


def tensors(stored: Iterable[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Each with its tensor on the CPU, file by file; valid until the next one is asked for.

    Beside the tensor at hand little more than MAPPED_NUMBERS numbers of the files are in memory.
    """
    files: dict[Path, list[Stored]] = {}
    for each in stored:
        files.setdefault(each.file, []).append(each)
    for file, wanted in files.items():
        if file.suffix == ".safetensors":
            # read rather than mapped: else the whole file could stay in memory beside the copies of it
            with safe_open(file, framework="pt", backend="pread") as opened:
                for each in wanted:
                    yield each, opened.get_tensor(each.key)
        else:
            for group in _groups(wanted):
                opened = _unpickle(file)
                for each in group:
                    yield each, opened[each.key]
                del opened


def _groups(stored: list[Stored]) -> Iterator[list[Stored]]:
    """Neighbours of up to MAPPED_NUMBERS numbers together."""
    group: list[Stored] = []
    for each in stored:
        if group and sum(s.numbers for s in (*group, each)) > MAPPED_NUMBERS:
            yield group
            group = []
        group.append(each)
    yield group


def _unpickle(file: Path) -> dict[str, Tensor]:
    """A .bin file's tensors as views of the mapped file; nothing in it is executed."""
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} cannot be read as a file of weights ({reason}); fetch it again") from error
    named = isinstance(state, dict) and all(isinstance(tensor, Tensor) for tensor in state.values())
    require(named, f"{file} does not hold named tensors alone; save the model's state_dict in it")
    return state
