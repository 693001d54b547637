"""What a run leaves on disk, written so that a crash at any moment loses at most a few seconds of work.

    runs/<id>/config.json           what was asked, what was settled, and what for (report or validation)
              environment.json      versions, hardware, commit
              metrics.jsonl         tidy: one line per evaluation of every model
              by_position.jsonl     tidy: the final accuracy by target position
              learning_curve.png
              <family>/checkpoint.safetensors   weights, optimiser, progress: what resuming needs
              <family>/model.safetensors        final weights
              <family>/config.json              {"name": ..., "config": ...}: rebuilds the model
              <family>/result.json              the final numbers; its presence means finished

Whole files are written under a temporary name, flushed to the disk and renamed.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import UserError
from synthetic.optimizers import make_state, state_tensors

Row = dict[str, Any]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole or not at all. Raises OSError and leaves the old file if that fails."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, whose file takes the place of `path` at the end, flushed to the disk.

    Several processes may write the same file: each has a temporary one of its own, and the last one stays.
    A link stays a link: what it points to is replaced. Raises UserError if `path` is a folder, a device or
    anything else that is not a regular file.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file and is not replaced; choose another name")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # the usual one: safetensors leaves a file that only its owner reads
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def prepare(folder: Path, asked: Row, plans: list[Row], threads: int, purpose: str = "report") -> None:
    """Make a run's folder with what was asked, what was settled from it, and the environment.

    Its caller holds the folder's lock, so temporary files there are what a killed process has left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)
    if not (folder / "config.json").exists():
        asked = json.loads(json.dumps(asked))
        write_json(folder / "config.json", {"run": asked, "plans": plans, "purpose": purpose})
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", environment(threads))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_row(path: Path, row: Row) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON Lines file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def drop_rows_after(path: Path, family: str, step: int) -> None:
    """Forget a family's evaluations after `step`: a resumed run will make them again."""
    rows = read_rows(path)
    write_rows(path, [row for row in rows if row["model"] != family or row["step"] <= step])


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Row) -> None:
    """One safetensors file whose header carries JSON values beside the tensors. Raises OSError.

    Written straight from the tensors: as bytes first, they would be in memory three times.
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"state": json.dumps(header)})
        except SafetensorError as error:  # the library's own error, with the system's number in its text
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Row]:
    """What `save_tensors` wrote. Raises UserError, in one line, for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to start this model anew") from error


def checkpoint_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights as `model.*`, the optimiser's as `exp_avg.*`, ... (see `state_tensors`); tied weights once."""
    weights = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    return weights | state_tensors(model, optimizer)


@torch.no_grad()
def restore(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], step: int
) -> None:
    """Copy a checkpoint into a model, whole or sharded, and an optimiser made for it."""
    from synthetic.distributed import fill

    make_state(model, optimizer, step)
    for name, target in checkpoint_tensors(model, optimizer).items():
        fill(target, tensors[name])


def load_model(folder: str | Path) -> Any:
    """The trained model in runs/<id>/<family>/, ready for inference or probing: `models.load` of a folder."""
    import models

    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder; give that of one finished model, runs/<id>/<family>")
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
