"""`accelerate launch -m vlm.train` on two CPU processes: the numbers of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from vlm_two_stages import IMPORT

from ssm_retrieval.training import store
from vlm import stages
from vlm.config import read_file

ROOT = Path(__file__).parents[2]
CONFIG = (
    IMPORT
    + """
def get_config():
    return [run("mamba", layout="query-first")]
"""
)
LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "vlm.train")


@pytest.mark.slow
def test_two_processes_have_the_losses_and_weights_of_one(tmp_path):
    import vlm_runs

    config = tmp_path / "one.py"
    config.write_text(CONFIG)
    (wanted,) = read_file(config)
    found = []
    for name, launcher in (("one", ("-m", "vlm.train")), ("two", LAUNCH)):
        out = tmp_path / name
        vlm_runs.save_encoder(out)
        done = subprocess.run(
            [sys.executable, *launcher, str(config), "--out", str(out), "--threads", "1"],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next: python -m vlm.evaluate") == 1  # the first process speaks for all
        found.append([out / stage for stage in wanted.stage_ids()])
    for one, two in zip(*found, strict=True):
        a, b = (store.read_rows(folder / stages.METRICS) for folder in (one, two))
        assert [row["tokens"] for row in a] == [row["tokens"] for row in b]
        assert np.allclose([row["loss"] for row in a], [row["loss"] for row in b], rtol=1e-4)
        u, v = (store.load_tensors(folder / stages.WEIGHTS)[0] for folder in (one, two))
        assert u.keys() == v.keys()
        assert all(torch.allclose(u[name], v[name], rtol=0, atol=1e-4) for name in u)
