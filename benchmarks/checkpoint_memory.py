"""Peak memory of writing and reading full-size checkpoints, against the size of the model.

    python -m benchmarks.checkpoint_memory --folder /tmp/checkpoints
    python -m benchmarks.checkpoint_memory --models mamba-130m --folder /tmp/checkpoints

Random bfloat16 weights; each step in a process of its own. What is printed is the most that the process ever
had resident (VmHWM: Python and torch, mapped pages of files and everything else included). It takes disk for
a copy of a model at a time, which is deleted, and memory for 1.2 of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import fresh, machine
from ssm_retrieval import models
from ssm_retrieval.models.checkpoints import load, save
from ssm_retrieval.models.hub_configs import write_config

SEED = 0


def memory(name: str) -> float:
    """MiB of one of the kernel's counts of this process: VmHWM (most ever), VmRSS, RssAnon, RssFile."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":")) / 1024


def random_model(name: str) -> models.LanguageModel:
    """A preset in bfloat16, made without a float32 copy of it."""
    model = models.build(name, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    embedding, head = model.embedding, model.head
    if model.config.tie_word_embeddings:  # `to_empty` parts what was tied
        head.weight = embedding.weight
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05, generator=generator)
    return model


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write(name: str, folder: Path, shard: str) -> dict[str, Any]:
    model = random_model(name)
    before, started = memory("VmRSS"), time.perf_counter()
    save(model, folder, max_shard_size=shard)
    return measured(model, before, started)


def write_pickled(name: str, folder: Path, shard: str) -> dict[str, Any]:
    """One pytorch_model.bin, as state-spaces/mamba-* have it; torch writes it, for us to read."""
    model = random_model(name)
    before, started = memory("VmRSS"), time.perf_counter()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(write_config(model.config, "bfloat16")))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return measured(model, before, started)


def read(name: str, folder: Path, shard: str) -> dict[str, Any]:
    before, started = memory("VmRSS"), time.perf_counter()
    return measured(load(folder), before, started)


def measured(model: nn.Module, before: float, started: float) -> dict[str, Any]:
    size = sum(p.nbytes for p in model.parameters()) / 2**20
    counts = {name: memory(name) for name in ("VmHWM", "RssAnon", "RssFile")}
    took = time.perf_counter() - started
    return dict(size=size, before=before, seconds=took, digest=digest(model), **counts)


FORMS = {"safetensors": write, "pytorch_model.bin": write_pickled}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["pythia-2.8b", "mamba-2.8b"], help="presets")
    parser.add_argument("--folder", type=Path, required=True, help="where to write; each copy is deleted")
    parser.add_argument("--shard", default="1GB", help="max_shard_size of the safetensors files")
    options = parser.parse_args()
    print(machine())
    ratios = {}
    for name in options.models:
        for form, writer in FORMS.items():
            place = options.folder / f"{name}-{form}"
            try:
                written = fresh(writer, name, place, options.shard)
                files = len(list(place.glob("*.safetensors"))) or 1
                found = fresh(read, name, place, options.shard)
            finally:
                shutil.rmtree(place, ignore_errors=True)
            if found["digest"] != written["digest"]:
                raise SystemExit(f"{name} from {form} is not what was written")
            print(f"{name}: {written['size']:.0f} MiB in bfloat16, {files} file(s) {form}")
            for step, row in (("write", written), ("read", found)):
                print(
                    f"  {step:5} {row['seconds']:6.1f} s, peak {row['VmHWM']:.0f} MiB (before: "
                    f"{row['before']:.0f}; after: {row['RssAnon']:.0f} own, {row['RssFile']:.0f} of files)"
                )
                if (step, form) != ("write", "pytorch_model.bin"):  # which is torch's
                    ratios[f"{step}_{name}_{form}"] = row["VmHWM"] / row["size"]
    for name, ratio in ratios.items():
        print(f"ratio {name}_peak_per_model {ratio:.3f}")


if __name__ == "__main__":
    main()
