"""Models and operators under torch.func, double backward, torch.compile and torch.export.

What is wanted comes from `ops.backend("reference")`, the equations token by token, or from torch's operators.
"""

from __future__ import annotations

import shutil
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from ssm_retrieval import models, ops
from ssm_retrieval.ops import linear as linear_ops
from ssm_retrieval.ops.attention import attention
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.linear import linear
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd

SIZES = {
    "mamba": dict(d_model=16, n_layer=2),
    "mamba2": dict(d_model=16, n_layer=2, headdim=8, d_state=8),
    "transformer": dict(d_model=16, n_layer=2, n_head=2, position="learned"),
    "hybrid": dict(d_model=16, n_layer=2, n_head=2),
    "gated-deltanet": dict(d_model=16, n_layer=2, headdim=8, d_state=8, d_mlp=24),
}
IDS = torch.randint(0, 13, (2, 70), generator=torch.Generator().manual_seed(0))  # beyond one block of 64


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def reference(function):
    with ops.backend("reference"):
        return function()


@pytest.fixture(params=SIZES)
def model(request):
    return models.build(request.param, vocab_size=13, seed=0, **SIZES[request.param])


def hessian_vector_product(model, loss):
    """(d/dw)^2 loss times a fixed direction, by differentiating the gradient."""
    weights = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(w.shape, generator=generator) for w in weights]
    grads = torch.autograd.grad(loss(), weights, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(grads, direction, strict=True))
    return torch.autograd.grad(along, weights)


def test_hessian_vector_product(model):
    def loss():
        return model.loss(IDS, labels=IDS)[0]

    with ops.backend("reference"):
        want = hessian_vector_product(model, loss)
    assert any(h.abs().max() > 1e-3 for h in want)
    close(hessian_vector_product(model, loss), want)


def test_vmap_over_sequences(model):
    close(torch.func.vmap(lambda row: model(row[None])[0])(IDS), reference(lambda: model(IDS)))


def test_gradients_of_each_sequence(model):
    """vmap of grad: the mean over sequences is the gradient of the batch."""
    weights = {name: w.detach() for name, w in model.named_parameters()}

    def loss(weights, row):
        logits = torch.func.functional_call(model, weights, (row[None],))
        return F.cross_entropy(logits[0], row)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, IDS)
    total = reference(lambda: F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()))
    want = torch.autograd.grad(total, list(model.parameters()))
    close([g.mean(0) for g in each.values()], list(want))


def test_directional_derivative(model):
    """jvp is the inner product of the gradient with the direction."""
    weights = {name: w.detach() for name, w in model.named_parameters()}
    direction = {name: torch.randn_like(w) for name, w in weights.items()}

    def total(weights):
        return torch.func.functional_call(model, weights, (IDS,)).sin().mean()

    value, slope = torch.func.jvp(total, (weights,), (direction,))
    with ops.backend("reference"):
        want = model(IDS).sin().mean()
        grads = torch.autograd.grad(want, list(model.parameters()))
    close(value, want)
    close(slope, sum((g * v).sum() for g, v in zip(grads, direction.values(), strict=True)))


@pytest.mark.slow
def test_compiled_whole_is_the_model(model):
    """fullgraph refuses any break; a second length; the loss; values and gradients."""
    weights = list(model.parameters())

    def everything(forward, loss):
        y, total = forward(IDS), loss(IDS)
        summed = y.sin().mean() + total
        return [y, total, forward(IDS[:, :9]), *torch.autograd.grad(summed, weights)]

    def loss(ids):
        return model.loss(ids, labels=ids)[0]

    torch._dynamo.reset()
    compiled = (torch.compile(f, backend="aot_eager", fullgraph=True) for f in (model, loss))
    close(everything(*compiled), reference(lambda: everything(model, loss)))


@pytest.mark.slow
def test_no_graph_break_inside_a_block(model):
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(IDS)
    assert (found.graph_break_count, found.graph_count) == (0, 1)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)
@pytest.mark.parametrize("name", ["mamba", "mamba2"])  # whose kernels are ours
def test_compiled_by_default_is_the_model(name, monkeypatch, tmp_path):
    """One block of a tiny model by inductor, whose C++ takes a minute: loss and gradient, to 1e-5."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = models.build(f"{name}-tiny", vocab_size=40, n_layer=1)
    weights = list(model.parameters())

    def loss(ids):
        return model.loss(ids, labels=ids.roll(-1, 1))[0]

    def both(function):
        value = function(IDS)
        return [value.detach(), *torch.autograd.grad(value, weights)]

    torch._dynamo.reset()
    got = both(torch.compile(loss, fullgraph=True))
    for ours, exact in zip(got, reference(lambda: both(loss)), strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_computes_and_trains(model, strict):
    torch._dynamo.reset()
    exported = torch.export.export(model, (IDS,), strict=strict).module()
    weights = dict(exported.named_parameters())
    y = exported(IDS)
    grads = torch.autograd.grad(y.sin().mean(), [weights[name] for name, _ in model.named_parameters()])
    with ops.backend("reference"):
        want = model(IDS)
        exact = torch.autograd.grad(want.sin().mean(), list(model.parameters()))
    close([y, *grads], [want, *exact])


def test_a_compiled_function_follows_the_switch():
    """The graph is made anew under another backend: token by token it has many more nodes."""
    u, A = torch.randn(1, 20, 4), -torch.rand(4, 2)
    B = torch.randn(1, 20, 2)
    sizes = []

    def count(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda: selective_scan(u, u, A, B, B), backend=count, fullgraph=True)
    fast = compiled()
    slow = reference(compiled)
    close(fast, slow)
    assert len(sizes) == 2 and sizes[1] > 3 * sizes[0]


# --- the operators -----------------------------------------------------------------------------------


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def scan(u, dt, A, B, C, D, z, h):
    return selective_scan(u, dt, -A.exp(), B, C, D, z, None, True, h, [1, 8], True)


def dual(x, dt, A, B, C):
    return ssd(x, F.softplus(dt), -A.exp(), B, C, chunk_size=4, return_last_state=True)


def delta(q, k, v, beta, decay, h):
    return delta_rule(
        q, F.normalize(k, dim=-1), v, beta.sigmoid(), -decay.exp(), initial_state=h, states_at=[1, 8]
    )


def additive(q, k, v, decay):
    return delta_rule(q, k, v, None, -decay.exp(), erase=False, return_last_state=True)


def convolution(x, weight, bias, before):
    return causal_conv1d(x, weight, bias, "silu", before)


def loss(x, weight):
    return linear_cross_entropy(x, weight, torch.tensor([[0, 3, -100], [1, 6, 2]]))[0]


def masked_attention(q, k, v):
    return attention(q, k, v, torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())


def causal_attention(q, k, v):
    return attention(q, k, v, causal=True)


e = (2, 9, 3)
OPERATORS = {
    "selective_scan": (scan, drawn(e, e, (3, 2), (2, 9, 2), (2, 9, 2), (3,), e, (2, 3, 2))),
    "ssd": (dual, drawn((2, 9, 2, 3), (2, 9, 2), (2,), (2, 9, 1, 2), (2, 9, 1, 2))),
    "delta_rule": (delta, drawn(*[(2, 9, 2, 4)] * 2, (2, 9, 2, 3), *[(2, 9, 2)] * 2, (2, 2, 3, 4))),
    "linear_attention": (additive, drawn(*[(2, 9, 2, 4)] * 2, (2, 9, 2, 3), (2, 9, 2, 4))),
    "causal_conv1d": (convolution, drawn(e, (3, 4), (3,), (2, 3, 3))),
    "linear_cross_entropy": (loss, drawn((2, 3, 5), (7, 5))),
    "linear": (linear, drawn((2, 3, 5), (7, 5), (7,))),
    "causal_attention": (causal_attention, drawn(*[(2, 2, 4, 3)] * 3)),
    "masked_attention": (masked_attention, drawn(*[(2, 2, 4, 3)] * 3)),
}


def first(out):
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("operator", OPERATORS)
def test_derivatives_of_both_orders(operator):
    """Against differences; then forward mode against the gradient."""
    function, arguments = OPERATORS[operator]
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)
    given = tuple(x.detach() for x in arguments)
    (slope,) = torch.func.jvp(lambda *a: (first(function(*a)).sin().sum(),), given, given)[1]
    grads = torch.autograd.grad(first(function(*arguments)).sin().sum(), arguments)
    y = first(function(*arguments)).sin().sum()
    close(torch.autograd.grad(y, arguments, create_graph=True), grads)  # another function than the kernel's
    want = sum((g * x).sum() for g, x in zip(grads, given, strict=True))
    close(slope, want)
    with forward_ad.dual_level():
        value = first(function(*(forward_ad.make_dual(x, x) for x in given))).sin().sum()
        close(forward_ad.unpack_dual(value).tangent, want)


@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_over_every_argument(operator):
    """As calls one after the other, the parameters mapped as well."""
    function, arguments = OPERATORS[operator]
    many = [torch.stack([x.detach(), 0.5 * x.detach()]) for x in arguments]
    got = torch.func.vmap(lambda *a: first(function(*a)))(*many)
    close(got, torch.stack([first(function(*each)) for each in zip(*many, strict=True)]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_backend_of_a_cpu_agrees(operator):
    function, arguments = OPERATORS[operator]
    want = reference(lambda: first(function(*arguments)))
    for name in ("auto", "chunks", "cpu"):
        with ops.backend(name):
            torch.testing.assert_close(first(function(*arguments)), want, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not linear_ops.HAS_ONEDNN, reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("faster", [True, False])
def test_linear_composes_on_processors_of_every_vendor(faster, monkeypatch):
    """The route is the processor's; what can be asked of the function is not."""
    monkeypatch.setattr(linear_ops, "ONEDNN_IS_FASTER", faster)
    x, w = torch.randn(4, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)

    def penalty(multiply):
        gx, gw = torch.autograd.grad(multiply(x, w).sin().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(gx.square().sum() + gw.square().sum(), (x, w))

    close(penalty(linear), penalty(F.linear))
    close(torch.func.vmap(linear, in_dims=(0, None))(x[:, None], w)[:, 0], x @ w.t())


# --- the switch --------------------------------------------------------------------------------------


def test_switch_is_restored_and_local_to_its_thread():
    from ssm_retrieval.ops._route import asked

    seen = []
    with ops.backend("reference"):
        with pytest.raises(KeyError), ops.backend("chunks"):
            assert asked("auto") == "chunks" and asked("cpu") == "cpu"
            raise KeyError
        assert asked("auto") == "reference"
        thread = threading.Thread(target=lambda: seen.append(asked("auto")))
        thread.start()
        thread.join()
    assert seen == ["auto"] and asked("auto") == "auto"


def test_switch_refuses_another_name_and_what_it_cannot_run():
    said = "backend='gpu' is unknown; use one of auto, reference, chunks"
    with pytest.raises(ValueError, match=said), ops.backend("gpu"):
        raise AssertionError
    u, A = torch.ones(1, 3, 4), -torch.ones(4, 2)
    with ops.backend("cuda"), pytest.raises(ValueError, match="use backend='auto'"):
        selective_scan(u.double(), u, A, u[..., :2], u[..., :2])
