"""`benchmarks.cuda` without a GPU: its floors, limits, JSON and tables, and its own check of itself."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cuda
from benchmarks.gpu import measure, operators, presets, table
from ssm_retrieval import models, ops
from ssm_retrieval.training.store import read_json, write_json

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
TINY = dict(d_model=16, n_layer=1, vocab_size=30, d_state=4)


def test_floors_are_the_bytes_of_arguments_and_results():
    """Counted by hand, for 2 x 5 tokens, 32 channels and 4 states, in bfloat16."""
    c = models.config("mamba", **TINY)
    tokens, single = 2 * 5 * (4 * 32 + 2 * 4) * 2, 4 * (32 * 4 + 32 + 32)  # u, dt, z, y, B, C; A, D, bias
    y, inputs = 2 * 5 * 32 * 2, 2 * 5 * (3 * 32 + 2 * 4) * 2 + single
    assert operators.moved("selective_scan", c, 2, 5, BF16) == {
        "forward": tokens + single, "both": 3 * inputs + 2 * y
    }  # fmt: skip
    x, W, labels = 2 * 5 * 16 * 2, 30 * 16 * 2, 2 * 5 * 8
    found = operators.moved("linear_cross_entropy", c, 2, 5, BF16)
    assert found["forward"] == x + W + labels + 4 + labels  # a loss in float32, and predictions
    assert found["both"] == found["forward"] + (x + W + labels) + (x + W) + 4


def test_floors_of_models():
    """AdamW's two moments have the weights' dtype: 10 times the weights for a step."""
    assert presets.training_floor(100, 200) == 1000
    assert presets.decoding_floor(100, 7) == 114


@pytest.mark.parametrize("name, family", [("selective_scan", "mamba"), ("ssd", "mamba2")])
def test_limits_pass_plain_pytorch_and_no_wrong_carry(name, family):
    """A state that is lost at a chunk's border is far beyond every limit, in both dtypes."""
    config = models.config(family, **TINY, **({} if family == "mamba" else dict(headdim=8)))
    for dtype in (torch.float32, BF16):
        given = operators.make_inputs(name, config, 2, 12, dtype, "cpu", states=True)
        want, limits = operators.compare(name, given, True, operators.roundoff_of(name, dtype, "triton"))
        assert {key: x.shape for key, x in want.items() if key[0] == "d"}.items() == {
            f"d{key}": x.shape for key, x in given.items()
        }.items()
        assert all(x.dtype == torch.float64 for x in want.values())
        assert all(0 < limit < 0.3 for limit in limits.values()), limits
        with ops.backend("chunks"):
            got = operators.forward_and_backward(name, given, True)
        found = operators.errors(got, want)
        assert all(found[key] <= limits[key] for key in want)
        with ops.backend("chunks"), torch.no_grad():
            lost = {
                key: x[:, 6:] if x.shape[:2] == (2, 12) else x
                for key, x in given.items()
                if key != "initial_state"
            }
            y = operators.OPERATORS[name].call(lost, False)["y"]
        wrong = torch.cat([want["y"][:, :6], y.double()], dim=1)
        assert operators.errors({"y": wrong}, {"y": want["y"]})["y"] > limits["y"]


def test_limits_know_what_matrix_products_round():
    """A unit roundoff of each operand; mamba-ssm's products take float32 as TF32."""
    assert operators.roundoff_of("ssd", BF16, "triton") == 2**-8
    assert operators.roundoff_of("ssd", torch.float32, "triton") == 2**-24
    assert operators.roundoff_of("ssd", torch.float32, "mamba-ssm") == 2**-11
    assert operators.roundoff_of("selective_scan", BF16, "mamba-ssm") == 2**-24  # it has no products
    given = {"x": torch.ones(1000, dtype=BF16), "labels": torch.arange(3)}
    off = operators.widened(given, 2**-9)
    assert set(off["x"].tolist()) == {1 - 2**-9, 1 + 2**-9} and off["labels"] is given["labels"]
    config = models.config("mamba2", **TINY, headdim=8)
    given = operators.make_inputs("ssd", config, 2, 12, torch.float32, "cpu", states=False)
    exact, tf32 = (operators.compare("ssd", given, False, unit)[1] for unit in (2**-24, 2**-11))
    assert all(tf32[key] > 100 * exact[key] for key in exact)


def test_errors_beyond_a_limit_and_nan_are_named():
    fine, off, nan = (dict(error=e, limit=1e-3) for e in (1e-3, 2e-3, None))
    exact, inexact = (dict(error=e, limit=0.0) for e in (0.0, 1e-9))
    row = dict(preset="p", operator="o", route="r", errors={"y": fine, "dx": off, "dA": nan})
    row["errors"] |= {"last_state": exact, "states": inexact}
    assert cuda.exceeded([row, row, dict(why="absent")]) == ["p o r dA", "p o r dx", "p o r states"]


def test_nan_is_null_in_the_json_and_no_limit_hides_it(monkeypatch, tmp_path):
    config = models.config("mamba", **TINY)
    run = operators.forward_and_backward

    def broken(name, inputs, states):
        found = run(name, inputs, states)
        return found if found["y"].dtype == torch.float64 else found | {"dx": found["dx"] * float("nan")}

    monkeypatch.setattr(operators, "forward_and_backward", broken)
    sizes = argparse.Namespace(compared=5, dtypes=(torch.float32,))
    errors = cuda.compare("causal_conv1d", config, "chunks", "cpu", sizes)["errors"]
    assert errors["float32 dx"]["error"] is None and errors["float32 y"]["error"] > 0
    write_json(tmp_path / "cuda.json", errors)
    row = dict(preset="p", operator="o", route="r", errors=read_json(tmp_path / "cuda.json"))
    assert cuda.exceeded([row]) == ["p o r float32 dx"]


def test_a_missing_route_and_too_little_memory_have_a_reason():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    def cannot():
        raise ValueError("backend='cuda' cannot\nstart from initial_state")

    assert measure.attempt(full, "cpu") == {"why": "out of memory"}
    assert measure.attempt(cannot, "cpu") == {"why": "backend='cuda' cannot start from initial_state"}
    assert measure.missing("mamba-ssm", None) and measure.missing("chunks", None) is None
    with pytest.raises(ZeroDivisionError):  # a bug is none
        measure.attempt(lambda: {"x": 1 / 0}, "cpu")


def found() -> dict:
    """What a GPU might have said."""
    at = dict(preset="mamba-130m", operator="selective_scan", length=2048, batch=1)
    floor = dict(floor_seconds={"forward": 1e-4, "both": 3e-4})
    fast = dict(seconds={"forward": 2e-4, "both": 6e-4}, errors={"float32 y": dict(error=1e-6, limit=4e-6)})
    training = dict(tokens_per_second=1234.5, seconds=0.5, floor_bytes=5e8, peak_bytes=3 * 2**29)
    decoding = dict(tokens_per_second=99.0, seconds=0.25, floor_bytes=1e8)
    return dict(
        environment=dict(
            device="H100", driver="550.54", packages={"torch": "2.11.0", "triton": "3.6.0", "mamba-ssm": None}
        ),
        bandwidth=2e9,
        routes=["mamba-ssm", "triton"],
        operators=[
            at | floor | fast | dict(route="triton"),
            at | floor | dict(route="mamba-ssm", why="not installed"),
        ],
        models=[
            dict(preset="mamba-130m", route="triton", training=training, decoding=decoding),
            dict(preset="mamba-130m", route="mamba-ssm", training=dict(why="out of memory"),
                 decoding=dict(why="x" * 60)),
        ],
        exceeded=[],
    )  # fmt: skip


def test_tables_of_a_json(tmp_path, capsys):
    """Time (worst error over its limit), floor over time, reasons in place of numbers."""
    write_json(tmp_path / "cuda.json", found())
    assert cuda.main(["--table", str(tmp_path / "cuda.json")]) == 0
    said = capsys.readouterr().out
    assert said == table.markdown(read_json(tmp_path / "cuda.json")) + "\n"
    assert "H100, driver 550.54; torch 2.11.0, triton 3.6.0. A copy moves 2 GB/s." in said
    assert "| mamba-130m | selective_scan | 1 x 2,048 | 0.300 | - | 0.600 (0.25) |" in said
    assert "| mamba-130m | triton | 1,234 | 1.50 | 0.50 | 99 | 0.20 |" in said
    assert "| mamba-130m | mamba-ssm | out of memory | - | - | - | - |" in said
    assert {line.count("|") for line in said.splitlines() if line.startswith("| mamba-130m | t")} == {8}


def test_wrong_options_are_one_line(tmp_path, capsys):
    for words in (["--presets", "mamba-131m"], ["--table", str(tmp_path / "none.json")]):
        assert cuda.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert cuda.main([]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and "torch.cuda.is_available() is False" in error


@pytest.mark.slow
def test_it_checks_itself(tmp_path):
    """The whole program in tiny sizes, with the kernels in Triton's interpreter where they are."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.cuda", "--selfcheck"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "selfcheck: all is as it should be"
    assert "error selective_scan mamba-tiny chunks float32 dA" in done.stdout
    assert not list(tmp_path.iterdir())
