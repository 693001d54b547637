"""Where a checkpoint's files are, and what is in them: names and shapes first, then tensor by tensor.

A checkpoint is a folder with `config.json` and its weights, in the first of these forms that is there:
`model.safetensors`, its shards by `model.safetensors.index.json`, `pytorch_model.bin`, its shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssm_retrieval.errors import UserError
from ssm_retrieval.models import pickled
from ssm_retrieval.models.common import require
from ssm_retrieval.models.damage import AGAIN, damaged, what_it_is

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# A .bin file is mapped, and its pages count as ours while the mapping lives, so it is reopened after this
# many numbers
MAPPED_NUMBERS = 2**26
LISTED = 12  # names of each kind in an error
MOST_JSON = 2**27  # bytes; the index of a thousand shards has a few million


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        file: The file.
        key: The tensor's name in it.
        shape: The tensor's shape.
    """

    file: Path
    key: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Weights:
    """The files that hold a checkpoint's weights.

    Attributes:
        files: The files.
        index: The file that says which of them holds which tensor, if there is one.
        assigned: What it says: the file by the tensor's key.
    """

    files: list[Path]
    index: Path | None = None
    assigned: dict[str, Path] | None = None


def find_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder with this name, or the hub's snapshot, downloaded unless it is in the cache.

    Args:
        name_or_path: A folder, or a name on the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        The folder.

    Raises:
        UserError: If it is neither, if the hub has no such name or revision, or if there is no network.
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
    """The hub's snapshot; each error of huggingface_hub becomes a UserError."""
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
    """A JSON object in UTF-8, -16 or -32, with or without a byte order mark.

    Raises:
        UserError: If the file is missing or holds anything else.
    """
    require(path.exists(), f"{path.parent} has no {path.name}; give the folder of a checkpoint")
    require(path.is_file(), f"{path} is not a regular file; give the folder of a checkpoint")
    require(path.stat().st_size <= MOST_JSON, f"{path} is larger than {MOST_JSON:,} bytes; {AGAIN}")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise damaged(path, "nests lists or objects too deep") from error
    except ValueError as error:  # no JSON, no text, or a number of thousands of digits
        raise damaged(path, what_it_is(path) or f"is not JSON ({error})") from error
    require(isinstance(value, dict), f"{path} is no JSON object; {AGAIN}")
    return value


def weight_files(folder: Path) -> Weights:
    """The files that hold the weights. An index counts only if there is no single file, as in `transformers`.

    Raises:
        UserError: If there are none, or if shards are missing.
    """
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).exists():
            return Weights([folder / name])
        if (index := folder / (name + INDEX)).exists():
            return _indexed(folder, index)
    raise UserError(f"{folder} has neither {SAFETENSORS} nor {PICKLED}, whole or sharded")


def _indexed(folder: Path, index: Path) -> Weights:
    listed: Any = read_json(index).get("weight_map")
    names = isinstance(listed, dict) and all(isinstance(shard, str) for shard in listed.values())
    require(names, f"{index}: weight_map is no object of file names by tensor; {AGAIN}")
    require(len(listed) > 0, f"{index} lists no weights; {AGAIN}")
    shards = sorted(set(listed.values()))
    for shard in shards:
        inside = shard and not PurePath(shard).is_absolute() and ".." not in PurePath(shard).parts
        require(inside, f"{index} leads to {shard!r}, outside its folder; {AGAIN}")
    missing = [shard for shard in shards if not (folder / shard).exists()]
    require(not missing, f"{folder} lacks {listing(missing)}; fetch what {index.name} lists")
    assigned = {key: folder / shard for key, shard in listed.items()}
    return Weights([folder / shard for shard in shards], index, assigned)


def listing(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def contents(weights: Weights) -> dict[str, Stored]:
    """Every tensor by its key, without reading the weights. If two shards have a tensor, the index decides.

    Raises:
        UserError: For damaged files, and for an index that does not belong to them.
    """
    found: dict[str, Stored] = {}
    elsewhere: dict[str, Path] = {}
    assigned = weights.assigned or {}
    for file in weights.files:
        for key, shape in _shapes(file):
            if assigned.get(key, file) == file:
                require(key not in found, f"{key} is in two files, {file} is the second; {AGAIN}")
                found[key] = Stored(file, key, shape)
            else:
                elsewhere.setdefault(key, file)
    for key, file in elsewhere.items():
        require(
            key in found,
            f"{weights.index} says that {key} is in {assigned[key].name}, but it is in {file.name}: the "
            "index is not that of these files; fetch them again",
        )
    return found


def _shapes(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    require(file.is_file(), f"{file} is not a regular file; {AGAIN}")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return [(key, tuple(opened.get_slice(key).get_shape())) for key in opened.keys()]  # noqa: SIM118
        except SafetensorError as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise damaged(file, what_it_is(file) or f"is damaged ({reason})") from error
    return [(key, entry.shape) for key, entry in pickled.entries(file).items()]


def tensors(stored: Iterable[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Each with its tensor on the CPU, file by file. A tensor is valid until the next one is requested.

    Beside that tensor, little more than MAPPED_NUMBERS numbers of the files are in memory.
    """
    files: dict[Path, list[Stored]] = {}
    for each in stored:
        files.setdefault(each.file, []).append(each)
    for file, wanted in files.items():
        if file.suffix == ".safetensors":
            # read, not mapped: otherwise the whole file could stay in memory beside its copies
            with safe_open(file, framework="pt", backend="pread") as opened:
                for each in wanted:
                    yield each, opened.get_tensor(each.key)
        else:
            # a file that cannot be mapped is read as a whole, so only once
            for group in _groups(wanted) if pickled.is_archive(file) else [wanted]:
                opened = pickled.tensors(file)
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
