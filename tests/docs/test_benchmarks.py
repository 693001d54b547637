"""Benchmarks: the slow suite runs each with --quick, and whatever the registry holds, they can run."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import all as every
from benchmarks import common, data
from synthetic import tasks

ROOT = Path(__file__).parents[2]
NUMBER = r"(\d+\.?\d*(?:e[+-]\d+)?)"
RATIO = re.compile(rf"ratio (\w\S*) {NUMBER}(?: \[{NUMBER}, {NUMBER}\])?")  # `NAME NUMBER`, and its range
NAMES = {  # of one ratio that each benchmark ends with
    "checkpoint_memory": "read_mamba-tiny_safetensors_peak_per_model",
    "cuda": "train_step_mamba-130m_triton_vs_chunks",
    "data": "data_vs_model",
    "delta": "gated_delta_vs_transformers",
    "hooks": "hook_overhead_unused",
    "inference": "decode_transformer-tiny_vs_transformers",
    "limits": "share_selective_scan",
    "plan": "plan_memory_kept",
    "probes": "patch_grid_vs_transformer_lens",
    "scan": "scan_memory_vs_mambapy",
    "scenes": "scenes_vs_matplotlib",
    "start": "help_vs_import_torch",
    "train_step": "memory_mamba_tiny_float32_vs_mambapy",
}
MISSING = {  # what few machines have: without it a benchmark says so
    "cuda": not torch.cuda.is_available(),
    "probes": importlib.util.find_spec("transformer_lens") is None,
}


def test_every_benchmark_has_a_quick_run():
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(NAMES) == files - {
        "__init__", "all", "common", "gguf_file", "goals", "page", "peers", "turns",
    }  # fmt: skip
    assert set(every.NAMES) == set(NAMES) - {"cuda"}  # which is for another machine


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES, key=lambda name: name != "train_step"))  # the longest first
def test_a_quick_run_ends_with_ratios(name, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    if MISSING.get(name):
        assert done.returncode == 2 and not done.stdout
        assert re.fullmatch(rf"error: benchmarks\.{name} .+\n", done.stderr)
        return
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("ratio"):
            match = RATIO.fullmatch(line)
            assert match, line
            found[match[1]] = float(match[2])
    assert NAMES[name] in found
    assert all(math.isfinite(ratio) and ratio >= 0 for ratio in found.values())
    assert done.stdout.splitlines()[-1].startswith("ratio")
    assert not list(tmp_path.rglob("*.safetensors"))  # copies of models are deleted


@pytest.mark.parametrize(
    "argv, sizes",
    [("", (8, 100)), ("--quick", (1, 2)), ("--quick --repeats 3", (3, 2)), ("--repeats 3", (3, 100))],
)
def test_quick_has_other_sizes_and_an_argument_wins(argv, sizes):
    parser = common.command("A benchmark.")
    parser.add_argument("--repeats", type=int)
    full, quick = dict(repeats=8, length=100), dict(repeats=1, length=2)
    options = common.parse(parser, full, quick, argv.split())
    assert (options.repeats, options.length) == sizes


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_makes_the_benchmark_batches(name):
    for length in data.LENGTHS:
        task = data.make_task(name, length, "suffix")
        assert task.seq_len == length
    assert data.batches(data.make_task(name, 16, "suffix"), "heldout")().length == 16
