"""What a run leaves on disk, written so that a crash at any moment loses at most a few seconds of work.

A run trains one model:

    runs/<id>/config.json              what was asked, what was settled, and what for (report or validation)
              environment.json         versions, hardware, commit: of the latest session, and of all in order
              metrics.jsonl            tidy: one line per evaluation
              by_position.jsonl        tidy: the final accuracy by target position
              by_length.jsonl          tidy: the final accuracy by context length
              checkpoint.safetensors   weights, optimiser, progress: what resuming needs
              model.safetensors        final weights, which config.json says how to rebuild
              result.json              the final numbers; its presence means finished
              outcome.png

A comparison is a view of several: figures only, in runs/compare-<hash of the runs' names>/ (`view_of`).

Whole files are written under a temporary name, flushed to the disk and renamed (`ssm_retrieval.files`).
What is read back is checked by `ssm_retrieval.training.records`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssm_retrieval import __version__
from ssm_retrieval.errors import UserError
from ssm_retrieval.files import collect, replacing, write_bytes
from ssm_retrieval.training import records
from ssm_retrieval.training.optimizers import make_state, state_tensors
from ssm_retrieval.training.records import CONFIG, ENVIRONMENT, METRICS, RESULT, Row

__all__ = ["CONFIG", "ENVIRONMENT", "METRICS", "RESULT", "Row", "replacing", "write_bytes"]

CHECKPOINT = "checkpoint.safetensors"  # of one process; `distributed.POINTER` leads to those of several
WEIGHTS = "model.safetensors"


def write_json(path: Path, value: Any) -> None:
    """Raises ValueError for NaN and infinities, which JSON does not have."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises UserError, naming file and line, for what is no JSON."""
    return records.json_of(records.text_of(path), str(path))


def prepare(folder: Path, settings: Row, threads: int) -> None:
    """Make a run's folder with its settings in config.json, unless they are there, and add this session.

    The caller holds the folder's lock. Temporary files that killed processes have left are removed.

    Args:
        folder: Folder of the run.
        settings: Settings for config.json.
        threads: CPU threads of this session.
    """
    folder.mkdir(parents=True, exist_ok=True)
    collect(folder, *(folder.parent / name for name in ("results", "targets")))
    if not (folder / CONFIG).exists():
        write_json(folder / CONFIG, {"format": records.FORMAT, **json.loads(json.dumps(settings))})
    add_session(folder / ENVIRONMENT, environment(threads))


def run_folders(places: Iterable[str | Path]) -> list[Path]:
    """The folders of runs among `places`, each of which is one or holds some; each once, in their order.

    Raises:
        UserError: For a place that is neither.
    """
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        runs = [place] if (place / CONFIG).is_file() else runs_in(place)
        if not runs:
            raise UserError(
                f"{place} has no config.json; give the folder of a run (runs/<id>), or one of runs"
            )
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    return list(found.values())


def runs_in(place: Path) -> list[Path]:
    """The folders of runs in a folder, sorted."""
    return sorted(path.parent for path in place.glob(f"*/{CONFIG}"))


def view_of(folders: Sequence[Path]) -> Path:
    """Where figures of these runs belong: in the folder of a single one, else beside them."""
    if len(folders) == 1:
        return folders[0]
    names = json.dumps(sorted(folder.resolve().name for folder in folders))
    return folders[0].parent / f"compare-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def add_session(path: Path, session: Row) -> None:
    """Append to the sessions of environment.json, unless it is equal to the last; the file's own fields are
    those of the latest."""
    earlier = records.environment(path.parent)["sessions"] if path.exists() else []
    session = json.loads(json.dumps(session))
    if not earlier or earlier[-1] != session:
        write_json(path, {"format": records.FORMAT, **session, "sessions": [*earlier, session]})


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a JSON Lines file as a whole. Raises ValueError for NaN and infinities."""
    write_bytes(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())


def append_row(path: Path, row: Row) -> None:
    """Add a line to a JSON Lines file, on the disk when this returns. Raises ValueError as `write_rows`."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON Lines file; a last line that a crash cut short is left out.

    Raises:
        UserError: Naming file and line, for damaged ones.
    """
    if not path.exists():
        return []
    rows = records.json_lines(path)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {i} is no object with fields; {records.REMEDY}")
    return rows


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Row) -> None:
    """Write a safetensors file whose header carries JSON values beside the tensors.

    It is written straight from the tensors: as bytes first, they would be in memory three times.

    Args:
        path: Path of the file.
        tensors: Tensors by name.
        header: The JSON values.

    Raises:
        OSError: If the disk is full, or the file cannot be written.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"state": json.dumps(header)})
        except SafetensorError as error:  # the library's own error, with the system's number in its text
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of a safetensors file by name; each is read when it is asked for, and not kept.

    Args:
        path: Path of the file.

    Raises:
        SafetensorError: For a damaged file.
    """

    def __init__(self, path: Path):
        self._file = safe_open(path, framework="pt")
        self._names = frozenset(self._file.keys())

    @property
    def metadata(self) -> dict[str, str]:
        """The texts of the file's header."""
        return self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def stored_tensors(path: Path, remedy: str = "") -> tuple[StoredTensors, Row]:
    """What `save_tensors` wrote, to be read tensor by tensor.

    Args:
        path: Path of the file.
        remedy: What to do about a damaged file; by default `anew`.

    Returns:
        The tensors by name, and the header.

    Raises:
        UserError: For a damaged file.
    """
    try:
        tensors = StoredTensors(path)
        header = json.loads(tensors.metadata["state"])
    except (SafetensorError, KeyError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy or anew(path)}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged (its header is no object); {remedy or anew(path)}")
    return tensors, header


def load_tensors(path: Path, remedy: str = "") -> tuple[dict[str, Tensor], Row]:
    """`stored_tensors`, all of them in memory."""
    tensors, header = stored_tensors(path, remedy)
    return dict(tensors), header


def anew(path: Path) -> str:
    """What to do about a model's damaged file: while its result is there, a model is not trained again."""
    if records.finished(path.parent):
        return f"delete the folder {path.parent} and run its command again, which trains this model anew"
    return "delete it and run its command again, which starts this model anew"


def checkpoint_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights as `model.*`, the optimiser's as `exp_avg.*`, ... (see `state_tensors`); tied weights once."""
    weights = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    return weights | state_tensors(model, optimizer)


@torch.no_grad()
def restore(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], step: int
) -> None:
    """Copy a checkpoint into a model, whole or sharded, and an optimizer made for it.

    Args:
        model: Model whose parameters are filled.
        optimizer: Optimizer whose state is made and filled.
        tensors: What `checkpoint_tensors` gave.
        step: The number of optimizer steps that they stand at.

    Raises:
        UserError: For a tensor that is missing, of another shape or kind, or holds NaN.
    """
    from ssm_retrieval.training.distributed import fill

    make_state(model, optimizer, step)
    wanted = checkpoint_tensors(model, optimizer)
    for name, target in wanted.items():
        _check_fits(name, tensors.get(name), target)
    for name, target in wanted.items():
        fill(target, tensors[name])


def _check_fits(name: str, found: Tensor | None, target: Tensor) -> None:
    if found is None:
        raise UserError(f"the checkpoint lacks {name}")
    if found.shape != target.shape:
        shapes = f"{tuple(found.shape)} instead of {tuple(target.shape)}"
        raise UserError(f"the checkpoint has {name} of shape {shapes}")
    if found.is_floating_point() != target.is_floating_point():
        raise UserError(f"the checkpoint has {name} in {found.dtype} instead of {target.dtype}")
    if found.is_floating_point() and found.isnan().any():
        raise UserError(f"the checkpoint has NaN in {name}")


def load_model(folder: str | Path) -> Any:
    """The trained model in runs/<id>/, ready for inference or probing: `models.load` of a folder.

    Raises:
        UserError: If there is no finished run.
    """
    from ssm_retrieval import models

    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder; give that of a finished run, runs/<id>")
    return models.load(Path(folder))


def environment(threads: int) -> Row:
    """Versions and hardware that a reader of the numbers may want to know."""
    packages = ("torch", "numba", "numpy", "safetensors", "mamba-ssm", "causal-conv1d")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The project's git commit, with "+" if the working tree differs from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
