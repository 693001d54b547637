"""The compiled kernels in other environments: caches that cannot be written or read, torch.compile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOSS = """
import torch
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
x, weight = torch.linspace(-1, 1, 40).view(5, 8), torch.linspace(-2, 2, 160).view(20, 8)
labels = torch.arange(5)
want = torch.nn.functional.cross_entropy(x @ weight.T, labels)
print(float(linear_cross_entropy(x, weight, labels)[0]), float(want))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of ssm_retrieval/ops by itself, which nothing has compiled yet."""
    ops = tmp_path / "tree" / "ssm_retrieval" / "ops"
    shutil.copytree(ROOT / "ssm_retrieval" / "ops", ops, ignore=shutil.ignore_patterns("__pycache__"))
    (ops.parent / "__init__.py").touch()
    shutil.copy(ROOT / "ssm_retrieval" / "errors.py", ops.parent)
    return ops


def python(code, where, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_", "PYTHONPATH"))}
    ours = {"PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment = {**inherited, **ours, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True
    )


def assert_right(done):
    assert done.returncode == 0, done.stderr
    loss, want = map(float, done.stdout.split())
    assert loss == pytest.approx(want, rel=1e-5)


def test_no_writable_folder_for_the_cache(tree):
    """As for a user without a home in a read-only tree, here by files where folders should be."""
    (tree / "__pycache__").touch()
    done = python(LOSS, tree.parent.parent, HOME="/dev/null", NUMBA_CACHE_DIR="/dev/null/x")
    assert_right(done)
    said = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(said) == 1 and "set NUMBA_CACHE_DIR to one that is" in said[0]


@pytest.mark.slow
def test_damaged_and_stale_caches_are_compiled_again(tree, tmp_path):
    cache = tmp_path / "cache"

    def run():
        done = python(LOSS, tree.parent.parent, NUMBA_CACHE_DIR=str(cache))
        assert not done.stderr
        return done

    def files(kind):
        return sorted(cache.rglob(f"*.{kind}"))

    assert_right(run())
    (index,), (data,) = files("nbi"), files("nbc")
    whole = data.read_bytes()
    assert_right(run())
    assert data.stat().st_size == len(whole)  # read, not written
    for path, content in ((data, whole[: len(whole) // 2]), (index, b"garbage")):
        path.write_bytes(content)
        assert_right(run())
    simd = tree / "_simd.py"
    text = simd.read_text(encoding="utf-8")
    old, new = "x = builder.fadd(low, high)", "x = builder.fsub(low, high)"
    assert text.count(old) == 1
    simd.write_text(text.replace(old, new), encoding="utf-8")
    loss, want = map(float, run().stdout.split())
    assert not abs(loss - want) < 0.1  # the kernel now subtracts where it added


def test_jit_turned_off_runs_plain_loops(tree):
    code = (
        LOSS
        + """
from ssm_retrieval.ops.selective_scan import selective_scan
u = torch.ones(1, 3, 4)
assert selective_scan(u, u, -torch.ones(4, 2), torch.ones(1, 3, 2), torch.ones(1, 3, 2)).isfinite().all()
try:
    selective_scan(u, u, -torch.ones(4, 2), torch.ones(1, 3, 2), torch.ones(1, 3, 2), backend="cpu")
except ValueError as error:
    assert "NUMBA_DISABLE_JIT" in str(error) and "reference" in str(error), error
else:
    raise AssertionError
"""
    )
    done = python(code, tree.parent.parent, NUMBA_DISABLE_JIT="1")
    assert_right(done)
    assert done.stderr.count("NUMBA_DISABLE_JIT is set") == 1


@pytest.mark.slow
def test_compile_in_a_fresh_process_with_one_thread(tmp_path):
    """Dynamo must not trace into numba's compiler: values and gradients are those without it."""
    code = """
import torch
from ssm_retrieval import models
torch.set_num_threads(1)
model = models.build("mamba-tiny", vocab_size=13, d_model=16, n_layer=1)
ids = torch.arange(18).view(2, 9) % 13

def grads(call):
    y = call(ids)
    return [y, *torch.autograd.grad(y.sin().sum(), list(model.parameters()))]

got = grads(torch.compile(model, backend="aot_eager"))
torch.testing.assert_close(got, grads(model), rtol=1e-4, atol=1e-5)
"""
    done = python(code, ROOT, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_bounds_checks_see_a_short_array(tmp_path):
    """Under NUMBA_BOUNDSCHECK a vector that reaches behind its array is an IndexError, here by 8."""
    code = """
import numpy as np
from ssm_retrieval.ops._softmax_kernels import softmax_rows
logits, labels = np.zeros(88, "f4"), np.array([1, 2])
try:
    softmax_rows((0, 2), 48, -100, 1.0, logits, labels, np.zeros(2, "f4"), np.zeros(2, "i8"))
except IndexError as error:
    assert "outside of its array" in str(error)
else:
    raise AssertionError("nothing was seen")
"""
    done = python(code, ROOT, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_BOUNDSCHECK="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_kernels_stay_inside_their_arrays(tmp_path):
    """The tests of all operators, with kernels that check every load and store."""
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    files = ["tests/ops/test_scan.py", "tests/ops/test_ops.py", "tests/ops/test_ops_checks.py"]
    command = [sys.executable, "-m", "pytest", "-x", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
