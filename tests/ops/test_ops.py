"""Convolution, affine map and cross-entropy against torch's and causal-conv1d's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import import_without_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_inputs import conv_inputs
from torch.nn import functional as F

from ssm_retrieval import models
from ssm_retrieval.ops import linear as linear_ops
from ssm_retrieval.ops.causal_conv1d import causal_conv1d, in_causal_conv1d_layout
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from ssm_retrieval.ops.linear import Linear, linear

# --- causal_conv1d -----------------------------------------------------------------------------------


def by_definition(x, weight, bias, initial_state):
    """y_t = silu(bias + sum_k weight[:, k] x_{t - K + 1 + k}), term by term."""
    K, L = weight.shape[1], x.shape[1]
    history = torch.cat([initial_state, x], dim=1)
    return F.silu(bias + sum(weight[:, k] * history[:, k : k + L] for k in range(K)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("L, E, K", [(1, 1, 1), (2, 17, 4), (50, 16, 2), (33, 40, 4), (9, 3, 7)])
def test_conv_equals_its_definition(backend, L, E, K):
    a, b = conv_inputs(2, L, E, K), conv_inputs(2, L, E, K)
    y, state = causal_conv1d(**a, activation="silu", return_last_state=True, backend=backend)
    want = by_definition(**b)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, torch.cat([b["initial_state"], b["x"]], 1)[:, L:])
    weights = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    got = torch.autograd.grad((y * weights).sum() + state.sum(), list(a.values()))
    kept = torch.cat([b["initial_state"], b["x"]], 1)[:, L:].sum()
    torch.testing.assert_close(got, torch.autograd.grad((want * weights).sum() + kept, list(b.values())))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_equals_causal_conv1d(activation):
    peer = import_without_kernels("causal_conv1d.causal_conv1d_interface").causal_conv1d_ref
    a = {k: v.detach().float() for k, v in conv_inputs(2, 30, 24, 4).items() if k != "initial_state"}
    y = causal_conv1d(**a, activation=activation, backend="cpu")
    want = peer(a["x"].transpose(1, 2), a["weight"], a["bias"], activation=activation)
    torch.testing.assert_close(y, want.transpose(1, 2))
    torch.testing.assert_close(in_causal_conv1d_layout(peer, **a, activation=activation), y)


def test_conv_in_two_pieces_and_nothing():
    a = {k: v.detach() for k, v in conv_inputs(2, 10, 5, 4).items()}
    whole, end = causal_conv1d(**a, return_last_state=True)
    first, middle = causal_conv1d(**{**a, "x": a["x"][:, :2]}, return_last_state=True)
    second, last = causal_conv1d(**{**a, "x": a["x"][:, 2:], "initial_state": middle}, return_last_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert torch.equal(last, end)
    nothing, same = causal_conv1d(**{**a, "x": a["x"][:, :0]}, return_last_state=True)
    assert nothing.shape == (2, 0, 5) and torch.equal(same, a["initial_state"])


def test_conv_rejects():
    x, w = torch.ones(1, 3, 4), torch.ones(4, 2)
    for change, said in (
        (dict(backend="gpu"), "backend='gpu'"),
        (dict(activation="relu"), "activation='relu'"),
        (dict(weight=torch.ones(3, 2)), "weight"),
        (dict(bias=torch.ones(5)), "bias has shape"),
        (dict(initial_state=torch.ones(1, 2, 4)), "initial_state has shape"),
    ):
        with pytest.raises(ValueError, match=said):
            causal_conv1d(**{"x": x, "weight": w, **change})


# --- linear ------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def route(request, monkeypatch):
    """Both routes on every machine that has oneDNN, whichever it would choose."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(linear_ops, "ONEDNN_IS_FASTER", request.param)


@pytest.mark.parametrize("shape, N", [((5, 7), 3), ((2, 9, 16), 40), ((1, 1, 1), 1), ((0, 4), 3)])
def test_linear_equals_float64(route, shape, N):
    x = torch.randn(shape, requires_grad=True)
    layer = Linear(shape[-1], N)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    leaves = [x, layer.weight, layer.bias]
    got = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(exact.square().sum(), leaves), rtol=1e-4, atol=1e-4)


def test_linear_takes_views(route):
    x, w = torch.randn(6, 10)[:, ::2], torch.randn(5, 4).t()
    torch.testing.assert_close(linear(x, w), x @ w.t())


def test_linear_keeps_autocast_and_float64(route):
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert linear(x.double(), w.double()).dtype == torch.float64


NO_ONEDNN = pytest.mark.skipif(not linear_ops.HAS_ONEDNN, reason="this build of torch has no oneDNN")


@NO_ONEDNN
def test_no_transposed_slice_reaches_onednn(monkeypatch):
    """It takes a thousand times as long. Slices come from split inputs and from gradients of a `cat`."""
    monkeypatch.setattr(linear_ops, "ONEDNN_IS_FASTER", True)
    given, matmul = [], linear_ops.matmul
    monkeypatch.setattr(linear_ops, "matmul", lambda a, b, *bias: given.append((a, b)) or matmul(a, b, *bias))
    wide = torch.randn(9, 24, requires_grad=True)
    weights = [torch.randn(5, 8, requires_grad=True), torch.randn(12, 16, requires_grad=True)]
    parts = wide.split([8, 16], dim=1)
    y = torch.cat([linear(x, w) for x, w in zip(parts, weights, strict=True)], dim=1)
    got = torch.autograd.grad(y.sin().sum(), [wide, *weights])
    want = torch.cat([x @ w.t() for x, w in zip(parts, weights, strict=True)], dim=1)
    torch.testing.assert_close(got, torch.autograd.grad(want.sin().sum(), [wide, *weights]))
    assert len(given) == 6
    for x in itertools.chain(*given):
        assert x.stride(1) == 1 or x.t().is_contiguous()


@NO_ONEDNN
@pytest.mark.parametrize("rows, K, N", [(3, 5, 7), (64, 256, 32), (17, 1025, 4)])
def test_processors_differ_by_the_rounding_of_float32_sums_only(monkeypatch, rows, K, N):
    """Outputs and gradients of both routes are within the bound for any order of float32 additions."""
    x, w, b, g = (torch.randn(shape) for shape in ((rows, K), (N, K), (N,), (rows, N)))

    def products(x, w, b, g):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = linear(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    exact = products(*(t.double() for t in (x, w, b, g)))
    sizes = products(*(t.double().abs() for t in (x, w, b, g)))  # sums of |products|
    for faster in (True, False):
        monkeypatch.setattr(linear_ops, "ONEDNN_IS_FASTER", faster)
        assert linear_ops.by_onednn(x.dtype, x.device) is faster
        terms = (K + 1, N, rows, rows)
        for got, want, size, n in zip(products(x, w, b, g), exact, sizes, terms, strict=True):
            assert ((got - want).abs() <= n * 2.0**-23 * size).all()


@NO_ONEDNN
def test_a_training_step_is_the_same_on_processors_of_every_vendor(monkeypatch):
    """Loss and gradient of mamba-tiny by both routes, to 1e-5."""
    model = models.build("mamba-tiny", vocab_size=50)
    ids = torch.randint(0, 50, (4, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for faster in (True, False):
        monkeypatch.setattr(linear_ops, "ONEDNN_IS_FASTER", faster)
        loss = model.loss(ids, labels=ids.roll(-1, 1))[0]
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradient])))
    (loss, gradient), (other_loss, other_gradient) = found
    assert (loss - other_loss).abs() < 1e-5 * loss
    assert (gradient - other_gradient).norm() < 1e-5 * gradient.norm()


# --- linear_cross_entropy ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    M=st.integers(1, 40),
    V=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_cross_entropy_equals_torch(M, V, dtype, smoothing, seed):
    torch.manual_seed(seed)
    x = torch.randn(M, 8, dtype=dtype, requires_grad=True)
    W = torch.randn(V, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (M,))
    labels[torch.rand(M) < 0.3] = -100
    labels[0] = V - 1
    loss, predictions = linear_cross_entropy(x, W, labels, label_smoothing=smoothing)
    logits = x @ W.t()
    want = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss, want)
    assert torch.equal(predictions, logits.argmax(-1)) or V < 2 or dtype == torch.float32
    got = torch.autograd.grad(3 * loss, (x, W))
    torch.testing.assert_close(got, torch.autograd.grad(3 * want, (x, W)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 20, 21])
def test_cross_entropy_rejects_labels_outside_the_vocabulary(label):
    with pytest.raises(ValueError, match=f"label {label} is outside"):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(20, 3), torch.tensor([1, label]))


def test_cross_entropy_in_blocks(monkeypatch, route):
    """Several blocks of rows, the last one short, sum up to one."""
    from ssm_retrieval.ops import cross_entropy

    x, W = torch.randn(2, 25, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
    labels = torch.randint(0, 33, (2, 25))
    whole, predictions = linear_cross_entropy(x, W, labels)
    grads = torch.autograd.grad(whole, (x, W))
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", 33 * 7)
    parts, again = linear_cross_entropy(x, W, labels)
    torch.testing.assert_close(parts, whole)
    assert torch.equal(predictions, again) and predictions.shape == (2, 25)
    torch.testing.assert_close(torch.autograd.grad(parts, (x, W)), grads)


def test_cross_entropy_rows_of_other_devices():
    """The path of GPUs, run here: same losses, predictions and gradients as the CPU's kernel."""
    from ssm_retrieval.ops.cross_entropy import _cpu_rows, _reference_rows

    logits, labels = 5 * torch.randn(20, 37), torch.randint(0, 37, (20,))
    labels[3] = -100
    a, b, scale = logits.clone(), logits.clone(), torch.tensor(0.25)
    torch.testing.assert_close(_cpu_rows(a, labels, scale), _reference_rows(b, labels, scale))
    torch.testing.assert_close(a, b)


def test_cross_entropy_under_autocast_and_extremes():
    x, W = torch.randn(30, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (30,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(x, W, labels)
        want = F.cross_entropy(F.linear(x, W).float(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want)
    assert linear_cross_entropy(x, W, torch.full((30,), -100))[0].isnan()
    assert linear_cross_entropy(1e4 * x, W, labels)[0].isfinite()
    with torch.no_grad():
        x[2, 3] = float("nan")
    assert linear_cross_entropy(x, W, labels)[0].isnan()
