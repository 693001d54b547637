"""Peak memory of writing and reading full-size checkpoints, against the size of the model.

    python -m benchmarks.checkpoint_memory --folder /tmp/checkpoints
    python -m benchmarks.checkpoint_memory --models mamba-130m --folder /tmp/checkpoints
    python -m benchmarks.checkpoint_memory --quick

The weights are random, in bfloat16, and each step has a process of its own. Printed is the most that the
process ever had resident (VmHWM), which includes Python, torch and mapped pages of files. One copy of a model
at a time is on disk, and is deleted; memory has to hold 1.2 of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import command, finish, fresh, machine, parse
from benchmarks.peers import hollow
from ssm_retrieval import models
from ssm_retrieval.models.checkpoints import load, save
from ssm_retrieval.models.hub_configs import write_config

SEED = 0


def memory(name: str) -> float:
    """One of the kernel's counts of this process in MiB: VmHWM (the most ever), VmRSS, RssAnon, RssFile."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":")) / 1024


def random_model(name: str) -> models.LanguageModel:
    """A preset in bfloat16 with random weights."""
    model = hollow(name)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
    return model


def digest(model: nn.Module) -> str:
    """The SHA-256 of all parameters in hexadecimal."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


# `name` is a preset, `shard` the `max_shard_size` of safetensors files; each returns what `measured` does.


def write(name: str, folder: Path, shard: str) -> dict[str, Any]:
    """Save a random model as safetensors, and measure that."""
    model = random_model(name)
    before, started = memory("VmRSS"), time.perf_counter()
    save(model, folder, max_shard_size=shard)
    return measured(model, before, started)


def write_pickled(name: str, folder: Path, shard: str) -> dict[str, Any]:
    """The same as one pytorch_model.bin, like state-spaces/mamba-*; torch writes it, for us to read."""
    model = random_model(name)
    before, started = memory("VmRSS"), time.perf_counter()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(model.config, "bfloat16")))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return measured(model, before, started)


def read(name: str, folder: Path, shard: str) -> dict[str, Any]:
    """Load it again, and measure that."""
    before, started = memory("VmRSS"), time.perf_counter()
    return measured(load(folder), before, started)


def measured(model: nn.Module, before: float, started: float) -> dict[str, Any]:
    """Describe the work that ends now.

    Args:
        model: What was written or read.
        before: Resident MiB before the work.
        started: When it began, by `time.perf_counter`.

    Returns:
        `size` of the weights, `before` and the kernel's counts in MiB, `seconds`, and the `digest`.
    """
    size = sum(p.nbytes for p in model.parameters()) / 2**20
    counts = {name: memory(name) for name in ("VmHWM", "RssAnon", "RssFile")}
    took = time.perf_counter() - started
    return dict(size=size, before=before, seconds=took, digest=digest(model), **counts)


FORMS = {"safetensors": write, "pytorch_model.bin": write_pickled}


def compare(name: str, folder: Path, shard: str) -> dict[str, float]:
    """Write and read a model in both forms, and print what that took.

    Args:
        name: A preset.
        folder: Where each copy is written, and deleted again.
        shard: The largest safetensors file, such as "1GB".

    Returns:
        Peak memory over the size of the model, by the name of the ratio.

    Raises:
        RuntimeError: If what is read is not what was written.
    """
    ratios = {}
    for form, writer in FORMS.items():
        place = folder / f"{name}-{form}"
        try:
            written = fresh(writer, name, place, shard)
            files = len(list(place.glob("*.safetensors"))) or 1
            found = fresh(read, name, place, shard)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if found["digest"] != written["digest"]:
            raise RuntimeError(f"{name} from {form} is not what was written")
        print(f"{name}: {written['size']:.0f} MiB in bfloat16, {files} file(s) {form}")
        for step, row in (("write", written), ("read", found)):
            print(
                f"  {step:5} {row['seconds']:6.1f} s, peak {row['VmHWM']:.0f} MiB (before: "
                f"{row['before']:.0f}; after: {row['RssAnon']:.0f} own, {row['RssFile']:.0f} of files)"
            )
            if (step, form) != ("write", "pytorch_model.bin"):  # which is torch's
                ratios[f"{step}_{name}_{form}_peak_per_model"] = row["VmHWM"] / row["size"]
    return ratios


def main() -> None:
    """Run the benchmark."""
    parser = command(__doc__)
    parser.add_argument("--models", nargs="+", help="presets")
    parser.add_argument("--folder", type=Path, help="where to write; each copy is deleted")
    parser.add_argument("--shard", help="max_shard_size of the safetensors files")
    full = dict(models=["pythia-2.8b", "mamba-2.8b"], folder=None, shard="1GB")
    options = parse(parser, full, quick=dict(models=["mamba-tiny"], folder=Path(tempfile.gettempdir())))
    if options.folder is None:
        parser.error("--folder is missing: name one on a disk with room for a copy of a model")
    print(machine())
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ratios = [compare(name, Path(folder), options.shard) for name in options.models]
    finish(options, {name: ratio for found in ratios for name, ratio in found.items()})


if __name__ == "__main__":
    main()
