"""The causal convolution by Triton kernels in Triton's interpreter, against its definition in float64.

What the interpreter cannot show: see `test_triton_scan.py`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_inputs import conv_inputs
from torch.nn import functional as F

from ssm_retrieval.ops import _triton
from ssm_retrieval.ops.causal_conv1d import causal_conv1d

pytest.importorskip("triton")
DEVICE = "cpu" if _triton.interpreted() else "cuda"


def by_definition(x, weight, bias=None, initial_state=None, activation=None):
    """y_t = act(bias + sum_k weight[:, k] x_{t - K + 1 + k}), term by term, and the last K - 1 inputs."""
    (b, L, E), K = x.shape, weight.shape[1]
    before = x.new_zeros(b, K - 1, E) if initial_state is None else initial_state
    history = torch.cat([before, x], dim=1)
    y = sum(weight[:, k] * history[:, k : k + L] for k in range(K)) + (0 if bias is None else bias)
    return F.silu(y) if activation == "silu" else y, history[:, L:]


def results(function, arguments, **options):
    """y, the last state and the gradients of all arguments, for weights drawn for both."""
    leaves = {k: v.detach().to(DEVICE).requires_grad_() for k, v in arguments.items()}
    y, state = function(**leaves, **options)
    generator = torch.Generator().manual_seed(2)
    drawn = (torch.randn(r.shape, generator=generator, dtype=torch.float64).to(DEVICE) for r in (y, state))
    total = sum((r.double() * w).sum() for r, w in zip((y, state), drawn, strict=True))
    return [y, state, *torch.autograd.grad(total, list(leaves.values()))]


def ours(**arguments):
    return causal_conv1d(**arguments, return_last_state=True, backend="triton")


@pytest.mark.parametrize("K", range(1, 9))
def test_equals_its_definition(K):
    """Every number of taps; two tiles of 8 tokens and of 8 channels, neither of them whole."""
    a = conv_inputs(2, 11, 9, K)
    torch.testing.assert_close(
        results(ours, a, activation="silu"), results(by_definition, a, activation="silu")
    )


@settings(deadline=None, max_examples=10)
@given(
    b=st.integers(1, 2),
    L=st.integers(1, 17),
    E=st.integers(1, 9),
    K=st.integers(1, 8),
    absent=st.sets(st.sampled_from(("bias", "initial_state"))),
    activation=st.sampled_from((None, "silu")),
)
def test_equals_its_definition_for_any_arguments(b, L, E, K, absent, activation):
    a = {k: v for k, v in conv_inputs(b, L, E, K).items() if k not in absent}
    torch.testing.assert_close(
        results(ours, a, activation=activation), results(by_definition, a, activation=activation)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """Float32 inside whatever comes in: close to float64 on the rounded inputs."""
    low = {k: v.detach().to(dtype) for k, v in conv_inputs(1, 9, 3, 4).items()}
    got = results(ours, low, activation="silu")
    want = results(by_definition, {k: v.double() for k, v in low.items()}, activation="silu")
    assert all(x.dtype == dtype for x in got)
    near = 4 * torch.finfo(dtype).eps
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=near * max(1.0, y.abs().max().item()))


def test_views_and_nothing():
    a = {k: v.detach().to(DEVICE) for k, v in conv_inputs(2, 6, 4, 3).items()}
    odd = dict(a)
    odd["x"] = a["x"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["initial_state"] = torch.cat([a["initial_state"]] * 2, dim=-1)[..., 4:]
    odd["weight"] = torch._neg_view(-a["weight"])
    torch.testing.assert_close(ours(**odd), ours(**a), rtol=0, atol=0)
    sliced = torch.cat([a["x"]] * 2, dim=-1)[..., :4]
    torch.testing.assert_close(ours(**{**a, "x": sliced})[0], ours(**a)[0], rtol=0, atol=0)
    for empty in (a["x"][:, :0], a["x"][:0]):
        state = a["initial_state"][: len(empty)]
        y, same = ours(**{**a, "x": empty, "initial_state": state})
        assert y.shape == empty.shape and torch.equal(same, state)


def test_gradients_of_gradients_and_compile():
    a = conv_inputs(1, 4, 2, 3)
    arguments = [a[name].to(DEVICE) for name in ("x", "weight", "bias", "initial_state")]

    def convolve(x, weight, bias, before):
        return causal_conv1d(x, weight, bias, "silu", before, backend="triton")

    assert torch.autograd.gradgradcheck(convolve, [x.detach().requires_grad_() for x in arguments])
    torch._dynamo.reset()
    compiled = torch.compile(convolve, backend="aot_eager", fullgraph=True)
    found = []
    for function in (convolve, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in arguments]
        y = function(*leaves)
        found.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    torch.testing.assert_close(*found)


def test_more_taps_are_refused():
    with pytest.raises(ValueError, match=r"^backend='triton' takes up to 8 taps; got 9; use backend='auto'$"):
        causal_conv1d(torch.ones(1, 2, 3, device=DEVICE), torch.ones(3, 9, device=DEVICE), backend="triton")
