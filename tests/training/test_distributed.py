"""One run in two processes (gloo, CPU): the numbers of one, checkpoints for any number, a clear end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ssm_retrieval.training import distributed, store
from ssm_retrieval.training.distributed import World

ROOT = Path(__file__).parents[2]
RUN = shlex.split(
    "-m synthetic.run --model mamba --seq-len 16 --layers 2 --eval-every 5 --eval-examples 33 --threads 1 "
    "--final-eval-examples 65 --precision float32 --batch-tokens 512 --curriculum 4 --stop-at 1.01"
)
# what docs/scale.md and configs/slurm.sbatch ask for beyond --parallel fsdp, and two parts a step
SCALE = ("--checkpointing", "--accumulate", "2")
RECIPE = (*SCALE, "--label-smoothing", "0.1", "--ssm-lr", "0.3")
# 100 steps of a model that learns slowly: numbers of a fast one part sooner, by the order of sums alone
LONG = ("--steps", "100", "--position", "none", "--schedule", "constant")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def start(out: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*(launcher or [sys.executable]), *RUN, "--out", str(out), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, errors = process.communicate(timeout=240)
    return process.returncode, out + errors


def ran(out: Path, *more: str, launcher: tuple[str, ...] = ()) -> Path:
    """The folder of a run that must succeed."""
    status, text = finish(start(out, *more, launcher=launcher))
    assert status == 0, text
    return folder_of(out)


def folder_of(out: Path) -> Path:
    (found,) = (path for path in out.iterdir() if path.name.startswith("position"))
    return found


def assert_same_numbers(one: Path, other: Path, near: float = 1e-4) -> None:
    """Rows, curve and weights, up to the order in which numbers are added.

    In 15 steps weights move by more than ten times `near`, so that another learning rate shows.
    """
    assert one.name == other.name
    a, b = (store.read_rows(path / "metrics.jsonl") for path in (one, other))
    fixed = ("step", "length", "examples", "tokens", "count", "train_length")
    assert [[row[k] for k in fixed] for row in a] == [[row[k] for k in fixed] for row in b]
    for name in ("loss", "train_loss", "train_accuracy"):
        assert np.allclose([row[name] for row in a], [row[name] for row in b], rtol=near, atol=near), name
    u, v = (store.load_tensors(next(path.glob("model.safetensors")))[0] for path in (one, other))
    assert u.keys() == v.keys()
    for name in u:
        assert torch.allclose(u[name], v[name], rtol=0, atol=near), name
    u, v = (store.read_rows(path / "by_position.jsonl") for path in (one, other))
    assert [(row["position"], row["count"]) for row in u] == [(row["position"], row["count"]) for row in v]


def assert_same_checkpoint(one: Path, several: Path) -> None:
    """All weights and moments of one process' last checkpoint are in the shards of the other run's."""
    wanted, header = store.load_tensors(one / store.CHECKPOINT)
    place, progress = distributed.saved(several)
    assert progress["step"] == header["step"]
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in wanted.items()}
    distributed.load(place, found, World())
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-4), name


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return ran(tmp_path_factory.mktemp("one"), "--steps", "15", *RECIPE)


def test_ddp_and_fsdp_have_the_curve_of_one_process(single, tmp_path):
    for strategy in ("ddp", "fsdp"):
        options = ("--steps", "15", *RECIPE, "--parallel", strategy)
        found = ran(tmp_path / strategy, *options, launcher=tuple(TORCHRUN))
        assert_same_numbers(single, found)
        files = [path.name for path in found.rglob("*.safetensors")]
        assert sum(name.startswith("shard-") for name in files) == 2, files
        assert_same_checkpoint(single, found)  # written right after an evaluation, which must leave no trace
        assert (found.parent / "results").exists()  # written once, by the first process


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, precision, near",
    [(family, "bfloat16", 1e-2) for family in ("transformer", "mamba", "mamba2", "hybrid")]
    + [("hybrid", "float32", 1e-4)],
)
def test_fsdp_of_every_family(tmp_path, family, precision, near):
    """Sharded, checkpointed, in parts and in bfloat16, all at once: the numbers of one process."""
    layers = "3" if family == "hybrid" else "2"
    options = ("--model", family, "--layers", layers, "--precision", precision, "--steps", "15", *SCALE)
    alone = ran(tmp_path / "one", *options)
    sharded = ran(tmp_path / "two", *options, "--parallel", "fsdp", launcher=tuple(TORCHRUN))
    assert_same_numbers(alone, sharded, near)


@pytest.mark.slow
def test_accelerate_configurations_of_the_repository(single, tmp_path):
    """configs/*.yaml, on two CPU processes instead of eight GPUs."""
    for name in ("ddp", "fsdp2"):
        text = (ROOT / "configs" / f"{name}.yaml").read_text()
        changes = {
            "num_processes: 8": "num_processes: 2",
            "use_cpu: false": "use_cpu: true",
            "MULTI_GPU": "MULTI_CPU",
        }
        for old, new in changes.items():
            text = text.replace(old, new)
        config = tmp_path / f"{name}.yaml"
        config.write_text(text)
        launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config))
        assert_same_numbers(single, ran(tmp_path / name, "--steps", "15", *RECIPE, launcher=launcher))


@pytest.mark.slow
def test_a_killed_process_ends_the_run_clearly_and_another_number_of_processes_resumes(tmp_path):
    whole, out = ran(tmp_path / "whole", *LONG), tmp_path / "killed"
    process = start(out, *LONG, "--parallel", "fsdp", launcher=tuple(TORCHRUN))
    ours, pointer = Path(f"/proc/{process.pid}/task/{process.pid}/children"), None
    limit = time.monotonic() + 200
    while pointer is None and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.05)
        pointer = next(out.glob("position*/checkpoint.json"), None)
    assert pointer is not None and process.poll() is None, finish(process)
    workers = [int(pid) for pid in ours.read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    status, text = finish(process)
    assert status != 0
    assert "lost the connection to another one" in text or "Signal 9" in text
    step = json.loads(pointer.read_text())["progress"]["step"]
    assert 0 < step < 100
    assert_same_numbers(whole, ran(out, *LONG), near=2e-3)  # one process goes on from two shards
