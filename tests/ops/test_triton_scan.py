"""The selective scan by Triton kernels in Triton's interpreter, against its equations in float64.

The interpreter runs one program after the other, on NumPy arrays. It shows wrong numbers, masks, positions
and carries. It cannot show races, misaligned or out-of-range accesses that happen to hit memory, registers
that spill, or the rounding of a GPU's exponentials; docs/gpu.md has a recipe for compute-sanitizer. With
TRITON_INTERPRET=0 the same tests run on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_inputs import NAMES, Largest, inputs, outputs
from torch.nn import functional as F

from ssm_retrieval import ops
from ssm_retrieval.errors import MissingPackage
from ssm_retrieval.ops import _triton
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.selective_scan import selective_scan

pytest.importorskip("triton")
HERE = Path(__file__).parent
DEVICE = "cpu" if _triton.interpreted() else "cuda"


def on_device(arguments, dtype=None):
    """Leaves with the same numbers where the kernels run."""
    return {name: x.detach().to(DEVICE, dtype).requires_grad_() for name, x in arguments.items()}


def home(tensors):
    return [x.detach().cpu() for x in tensors]


def compare(arguments, positions, softplus=True, tolerance=1e-10):
    """Every result and every gradient against the loop over time."""
    ours, exact = on_device(arguments), {k: v.detach().requires_grad_() for k, v in arguments.items()}
    got, want = outputs(ours, "triton", positions, softplus), outputs(exact, "reference", positions, softplus)
    torch.testing.assert_close(home(got), home(want), rtol=tolerance, atol=tolerance)
    weights = [torch.randn(r.shape, generator=torch.Generator().manual_seed(1), dtype=r.dtype) for r in want]
    for r, w, leaves, found in ((got, weights, ours, grads := {}), (want, weights, exact, exact_grads := {})):
        total = sum((x * y.to(x.device)).sum() for x, y in zip(r, w, strict=True))
        made = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found.update(zip(leaves, home(made), strict=True))
    for name, grad in exact_grads.items():
        torch.testing.assert_close(
            grads[name], grad, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("b, L, E, N", [(1, 1, 1, 1), (2, 8, 4, 2), (2, 19, 5, 3), (1, 3, 2, 17)])
def test_equals_the_loop(b, L, E, N):
    """One tile and several of 8 tokens and 4 channels, whole and not; positions in any order, twice."""
    compare(inputs(b, L, E, N), [L - 1, 0, L // 2, 0])


def test_states_at_no_positions():
    compare(inputs(1, 2, 2, 1), [])


@settings(deadline=None, max_examples=6)
@given(
    L=st.integers(1, 18),
    E=st.integers(1, 5),
    N=st.integers(1, 3),
    absent=st.sets(st.sampled_from(("D", "z", "dt_bias", "initial_state"))),
    softplus=st.booleans(),
    data=st.data(),
)
def test_equals_the_loop_for_any_arguments(L, E, N, absent, softplus, data):
    positions = data.draw(st.lists(st.integers(0, L - 1), max_size=3))
    arguments = inputs(1, L, E, N, absent=absent)
    if not softplus:  # without it steps may be negative, and states grow beyond any tolerance
        arguments["dt"] = arguments["dt"].detach().abs()
        arguments.pop("dt_bias", None)
    compare(arguments, positions, softplus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """Float32 inside whatever comes in, gradients in its dtype."""
    low = {k: v.detach().to(dtype) for k, v in inputs(1, 12, 4, 2).items()}
    ours, exact = on_device(low), {k: v.double().requires_grad_() for k, v in low.items()}
    got, want = outputs(ours, "triton", [3]), outputs(exact, "reference", [3])
    assert [x.dtype for x in got] == [dtype, torch.float32, torch.float32]
    near = max(4 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(got[0].double().cpu(), want[0], rtol=near, atol=near)
    torch.testing.assert_close([x.double().cpu() for x in got[1:]], list(want[1:]), rtol=1e-5, atol=1e-5)
    for r in (got, want):
        sum((x.double() * x.detach().double()).sum() for x in r).backward()
    for name in NAMES:
        assert ours[name].grad.dtype == dtype
        size = exact[name].grad.abs().max().item()
        torch.testing.assert_close(
            ours[name].grad.double().cpu(), exact[name].grad, rtol=0, atol=2 * near * size
        )


def test_views_and_strides():
    """Transposed, sliced, expanded and lazily negated arguments give what their copies give."""
    a = {k: v.detach().to(DEVICE) for k, v in inputs(2, 9, 4, 2).items()}
    odd = dict(a)
    odd["u"] = a["u"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["z"] = torch.cat([a["z"], a["z"]], dim=-1)[..., 4:]
    odd["dt"] = a["dt"].transpose(0, 1).contiguous().transpose(0, 1)
    odd["B"] = torch._neg_view(-a["B"])
    odd["A"] = a["A"].t().contiguous().t()
    odd["initial_state"] = a["initial_state"].transpose(1, 2).contiguous().transpose(1, 2)
    a["D"], odd["D"] = a["D"][:1].repeat(4), a["D"][:1].expand(4)
    assert not any(odd[name].is_contiguous() for name in ("u", "z", "dt", "A", "D", "initial_state"))
    found = []
    for arguments in (a, odd):
        leaves = {name: x.requires_grad_() for name, x in arguments.items() if name not in ("B", "D")}
        results = outputs(arguments, "triton", [7])
        y_grad = torch.ones((), device=DEVICE, dtype=torch.float64).expand_as(results[0])  # strides of 0
        found.append((results, torch.autograd.grad(results[0], list(leaves.values()), y_grad)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_kernels_refuse_channels_that_are_apart(monkeypatch):
    """What makes copies is taken away: no kernel may start on strides that it is not given."""
    monkeypatch.setattr(_triton, "unit_stride", lambda x: x)
    a = {k: v.detach().to(DEVICE) for k, v in inputs(1, 4, 4, 2).items()}
    a["u"] = a["u"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(AssertionError):
        outputs(a, "triton", [0])


@pytest.mark.parametrize("b, L", [(2, 0), (0, 3)])
def test_nothing(b, L):
    a = on_device(inputs(b, L, 5, 3))
    y, last, states = outputs(a, "triton", [])
    assert y.shape == (b, L, 5) and states.shape == (b, 0, 5, 3)
    assert torch.equal(last, a["initial_state"]) and last.requires_grad


def test_decays_near_zero_leave_the_latest_write():
    """exp(dt A) underflows at every token: h_t = dt_t B_t u_t, and no gradient is lost or infinite."""
    a = inputs(1, 10, 2, 2, torch.float32, absent=("D", "z", "dt_bias", "initial_state"))
    a["A"], a["dt"] = torch.full((2, 2), -1e4), 1 + a["dt"].detach().abs()
    a = on_device(a)
    y = selective_scan(**a, backend="triton")
    want = a["dt"] * a["u"] * (a["B"] * a["C"]).sum(-1, keepdim=True)
    torch.testing.assert_close(y, want)
    got, exact = (
        torch.autograd.grad(r.square().sum(), [a[n] for n in ("u", "dt", "B", "C")]) for r in (y, want)
    )
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


def test_extreme_values():
    """Large steps forget, large negative ones do nothing, small ones keep their digits, NaN stays visible."""
    a = {k: v.detach().float().to(DEVICE) for k, v in inputs(1, 9, 2, 2, absent=("initial_state",)).items()}

    def scan(**change):
        return selective_scan(**{**a, **change}, dt_softplus=True, backend="triton")

    skip = a["D"] * a["u"] * F.silu(a["z"])
    torch.testing.assert_close(scan(dt=torch.full_like(a["dt"], -1e4)), skip)
    assert scan(dt=torch.full_like(a["dt"], 1e4)).isfinite().all()
    broken = a["u"].clone()
    broken[0, 3, 0] = float("nan")
    y = scan(u=broken)
    assert y[0, 3].isnan().any() and not y[0, :3].isnan().any()
    one = {k: v[:, :1] if v.dim() == 3 else v for k, v in a.items() if k not in ("D", "z", "dt_bias")}
    one["dt"] = torch.tensor([[[-12.0, -30.0]]], device=DEVICE)  # 1 + e^-12 has lost digits
    y = selective_scan(**one, dt_softplus=True, backend="triton")
    want = F.softplus(one["dt"].double()) * one["u"] * (one["B"] * one["C"]).sum(-1)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=0)


def test_stretches_of_tokens_join_in_any_order():
    """A GPU scans by pieces, the interpreter one token after the other, so that it does not show this."""
    from ssm_retrieval.ops import _scan_triton_kernels as kernels

    for join, size in ((kernels._after.fn, 2), (kernels._then.fn, 4)):
        a, b, c = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).tolist()
        assert join(*join(*a, *b), *c) == pytest.approx(join(*a, *join(*b, *c)))


def test_gradients_of_gradients():
    def second(arguments, backend):
        y, last, states = outputs(arguments, backend, [1])
        total = y.square().sum() + last.sum() + states.sum()
        grads = torch.autograd.grad(total, list(arguments.values()), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), list(arguments.values()))

    made = inputs(1, 3, 2, 2)
    got, want = second(on_device(made), "triton"), second(made, "reference")
    torch.testing.assert_close(home(got), list(want), rtol=1e-9, atol=1e-9)


def test_compiled_whole(monkeypatch):
    """One operator each way in the graphs of torch.compile, the choice of `auto` on a GPU included."""
    monkeypatch.setattr(_triton, "on_gpu", lambda x: True)

    def scan(a):
        y, last, states = outputs(a, "auto", [2, 0])
        return y.sum() + last.sum() + states.sum()

    torch._dynamo.reset()
    eager, traced = on_device(inputs(1, 4, 2, 2)), on_device(inputs(1, 4, 2, 2))
    got = torch.compile(scan, backend="aot_eager", fullgraph=True)(traced)
    want = scan(eager)
    torch.testing.assert_close(got, want)
    found = (torch.autograd.grad(x, list(a.values())) for x, a in ((got, traced), (want, eager)))
    torch.testing.assert_close(*found)


def test_no_state_for_every_position_is_made():
    """Forward and backward: nothing has as many numbers as (batch, length, d_inner, d_state)."""
    a = on_device(inputs(1, 32, 4, 12, torch.float32))
    with Largest() as largest:
        sum(r.sum() for r in outputs(a, "triton", [3])).backward()
    assert 32 * 4 <= largest.numel <= 32 * 4 * 12 // 2


def test_the_backend_says_what_it_needs(monkeypatch):
    a = {k: v.detach() for k, v in inputs(1, 3, 4, 2).items()}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^backend='triton' got tensors on cpu; use backend='auto'$"):
        selective_scan(**a, backend="triton")
    with ops.backend("triton"), pytest.raises(ValueError, match="got tensors on cpu"):
        causal_conv1d(a["u"], torch.ones(4, 2))
    monkeypatch.setattr(_triton, "installed", lambda: False)
    with pytest.raises(MissingPackage, match=r"^backend='triton' needs triton, .*: pip install triton "):
        selective_scan(**a, backend="triton")


@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path):
    """For NVIDIA's A100 and AMD's MI300, which needs no GPU: what the interpreter takes need not compile."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = HERE.parent / "support" / "triton_compile.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} >= {"tile_ends", "tile_starts", "carry", "scan_forward", "scan_backward"}
    shuffles = {row[0]: row[3] for row in rows if row[1:3] == ["sm_80", "bfloat16"]}
    assert shuffles["scan_forward"] == "0"  # a thread scans its own channel
