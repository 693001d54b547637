"""The selective scan: every backend against the loop, mamba-ssm's own reference, gradcheck and properties."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import import_without_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_inputs import NAMES, Largest, gradients, inputs, outputs
from torch.nn import functional as F

from ssm_retrieval.ops import GROUP, scan_group
from ssm_retrieval.ops._threads import _with_pool
from ssm_retrieval.ops.selective_scan import selective_scan


@pytest.mark.parametrize("backend", ["cpu", "chunks"])
@pytest.mark.parametrize("N", [1, 2, 3, 15, 16, 17, 64, 256])
@pytest.mark.parametrize("L, E", [(1, 16), (63, 5), (64, 16), (65, 40), (200, 130)])
def test_equals_the_loop(N, L, E, backend):
    """Output, last state, chosen states and every gradient, at lengths around the chunks."""
    positions = sorted({0, L // 2, L - 1})
    a, b = inputs(2, L, E, N), inputs(2, L, E, N)
    got, want = outputs(a, backend, positions), outputs(b, "reference", positions)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for name, g, w in zip(NAMES, gradients(a, got), gradients(b, want), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["cpu", "chunks"])
@settings(deadline=None, max_examples=40)
@given(
    b=st.integers(1, 3),
    L=st.integers(1, 150),
    E=st.integers(1, 40),
    N=st.integers(1, 20),
    absent=st.sets(st.sampled_from(("D", "z", "dt_bias", "initial_state"))),
    softplus=st.booleans(),
    data=st.data(),
)
def test_equals_the_loop_for_any_arguments(backend, b, L, E, N, absent, softplus, data):
    """Optional arguments present or not; positions in any order and repeated."""
    positions = data.draw(st.lists(st.integers(0, L - 1), max_size=5))
    x, y = inputs(b, L, E, N, absent=absent), inputs(b, L, E, N, absent=absent)
    if not softplus:  # without it steps may be negative, and states grow beyond any tolerance
        x["dt"], y["dt"] = (t["dt"].detach().abs().requires_grad_() for t in (x, y))
        x.pop("dt_bias", None), y.pop("dt_bias", None)
    got, want = outputs(x, backend, positions, softplus), outputs(y, "reference", positions, softplus)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(x, got), gradients(y, want), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["cpu", "chunks", "reference"])
def test_equals_mamba_ssm(backend):
    """state-spaces/mamba's selective_scan_ref (channels before time), output, last state and gradients."""
    peer = import_without_kernels("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    a = inputs(2, 70, 24, 8, torch.float32, absent=("initial_state",))
    b = inputs(2, 70, 24, 8, torch.float32, absent=("initial_state",))
    got = selective_scan(**a, dt_softplus=True, return_last_state=True, backend=backend)
    turned = {k: v.transpose(1, 2) if v.dim() == 3 else v for k, v in b.items()}
    turned["delta"], turned["delta_bias"] = turned.pop("dt"), turned.pop("dt_bias")
    y, last = peer(**turned, delta_softplus=True, return_last_state=True)
    want = (y.transpose(1, 2), last)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients(a, got), gradients(b, want), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "chunks", "reference"])
def test_gradcheck(backend):
    """Analytic against numerical derivatives of all outputs in all arguments, across a chunk border."""
    arguments = inputs(1, 66, 3, 2)

    def scan(*values):
        return outputs(dict(zip(arguments, values, strict=True)), backend, [3, 65])

    assert torch.autograd.gradcheck(scan, list(arguments.values()), nondet_tol=0.0, fast_mode=True)
    assert torch.autograd.gradgradcheck(scan, list(arguments.values()), fast_mode=True)


def test_closed_form():
    """Constant inputs: h_t is a geometric series."""
    L, a, dt, b, u = 50, -0.7, 0.3, 1.3, 0.9
    full = torch.full
    y, h = selective_scan(
        full((1, L, 1), u, dtype=torch.float64),
        full((1, L, 1), dt, dtype=torch.float64),
        full((1, 1), a, dtype=torch.float64),
        full((1, L, 1), b, dtype=torch.float64),
        torch.ones(1, L, 1, dtype=torch.float64),
        return_last_state=True,
    )
    q = torch.tensor(dt * a, dtype=torch.float64).exp()
    series = dt * b * u * (1 - q ** torch.arange(1, L + 1)) / (1 - q)
    torch.testing.assert_close(y.flatten(), series)
    torch.testing.assert_close(h.flatten(), series[-1:])


@pytest.mark.parametrize("backend", ["cpu", "chunks", "reference"])
def test_a_scan_in_two_pieces(backend):
    """The last state of the first piece starts the second; gradients flow through it."""
    a, b = inputs(2, 100, 20, 4), inputs(2, 100, 20, 4)
    y, last = selective_scan(**a, dt_softplus=True, return_last_state=True, backend=backend)

    def piece(part, state):
        cut = {k: v[:, part] if k in ("u", "dt", "B", "C", "z") else v for k, v in b.items()}
        cut["initial_state"] = state
        return selective_scan(**cut, dt_softplus=True, return_last_state=True, backend=backend)

    y1, middle = piece(slice(0, 37), b["initial_state"])
    y2, end = piece(slice(37, 100), middle)
    torch.testing.assert_close((torch.cat([y1, y2], 1), end), (y, last), rtol=1e-10, atol=1e-10)
    want = gradients(a, (y, last))
    got = gradients(b, (torch.cat([y1, y2], 1), end))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype, backend):
    """Float32 inside whatever comes in: close to float64 on the rounded inputs."""
    low = {k: v.detach().to(dtype) for k, v in inputs(2, 300, 32, 16).items()}
    y, last, states = outputs(low, backend, [0, 299])
    exact = outputs({k: v.double() for k, v in low.items()}, "reference", [0, 299])
    assert y.dtype == dtype and last.dtype == states.dtype == torch.float32
    near = max(4 * torch.finfo(dtype).eps, 1e-5)  # sums over 300 steps and 16 states round in float32
    torch.testing.assert_close(y.double(), exact[0], rtol=near, atol=near)
    torch.testing.assert_close((last.double(), states.double()), exact[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "chunks", "reference"])
def test_length_zero(backend):
    a = inputs(2, 0, 5, 3)
    y, last, states = outputs(a, backend, [])
    assert y.shape == (2, 0, 5) and states.shape == (2, 0, 5, 3)
    assert torch.equal(last, a["initial_state"])
    (grad,) = torch.autograd.grad(last.sum(), [a["initial_state"]])
    assert torch.equal(grad, torch.ones_like(last))


def test_views_and_strides():
    """Transposed, sliced and expanded arguments give what their copies give."""
    a = {k: v.detach() for k, v in inputs(2, 30, 20, 4).items()}
    odd = dict(a)
    odd["u"] = a["u"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["z"] = torch.cat([a["z"], a["z"]], dim=-1)[..., :20]
    odd["A"] = a["A"].t().contiguous().t()
    odd["D"] = a["D"][:1].expand(20)
    a["D"] = odd["D"].clone()
    assert not any(odd[name].is_contiguous() for name in ("u", "z", "A", "D"))
    torch.testing.assert_close(outputs(odd, "cpu", [7]), outputs(a, "cpu", [7]), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "chunks"])
def test_no_state_for_every_position_is_kept(backend):
    """The graph between forward and backward holds far less than (batch, length, d_inner, d_state)."""
    a = inputs(1, 1024, 32, 64, torch.float32)
    saved: list[int] = []

    def pack(t):
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(**a, dt_softplus=True, backend=backend)
    assert 0 < sum(saved) < 0.5 * 1024 * 32 * 64


def test_result_does_not_depend_on_threads(monkeypatch):
    """Bit for bit: one thread, several, and the pool that replaces OpenMP where it is not found."""
    from ssm_retrieval.ops import _scan_cpu as module

    def everything():
        a = inputs(3, 200, 48, 16, torch.float32)
        results = outputs(a, "cpu", [5, 100])
        return [*results, *gradients(a, results)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        assert all(torch.equal(x, y) for x, y in zip(alone, everything(), strict=True))
        halves = [(0, 1), (1, 2)]
        real = module.run_tasks

        def pooled(kernel, tasks):
            if tasks < 2:
                return real(kernel, tasks)
            return _with_pool(kernel, [(tasks * i // 2, tasks * j // 2) for i, j in halves])

        monkeypatch.setattr(module, "run_tasks", pooled)
        assert all(torch.equal(x, y) for x, y in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_every_core_has_its_share_of_one_wide_sequence():
    """Of the backward pass's tasks: at batch 1 and width 2,560 thirty-two cores have two each."""
    for batch, blocks, cores in ((1, 320, 32), (1, 320, 16), (8, 16, 32), (8, 16, 16), (1, 48, 16)):
        tasks = batch * -(-blocks // scan_group(batch, blocks))
        busiest = max(tasks * (i + 1) // cores - tasks * i // cores for i in range(cores))
        assert tasks >= cores and busiest <= 1.25 * tasks / cores, (batch, blocks, cores)
    for batch, blocks in ((1, 1), (1, 3), (2, 7), (3, 100), (64, 320)):
        size = scan_group(batch, blocks)
        assert 1 <= size <= GROUP and -(-blocks // size) * size - blocks < size


def test_chunks_never_hold_the_states_of_a_whole_sequence():
    """No tensor on the way is larger than the states of 64 tokens, however long the sequence."""
    a = {k: v.detach() for k, v in inputs(1, 640, 8, 16, torch.float32).items()}
    with Largest() as largest:
        outputs(a, "chunks", [3, 639])
    assert 640 * 8 <= largest.numel <= 65 * 8 * 16


@pytest.mark.parametrize("backend", ["cpu", "chunks"])
def test_decays_near_zero_leave_the_latest_write(backend):
    """exp(dt A) underflows at every token: h_t = dt_t B_t u_t, and no gradient is lost or infinite."""
    a = inputs(1, 150, 4, 3, torch.float32, absent=("D", "z", "dt_bias", "initial_state"))
    a["A"] = torch.full((4, 3), -1e4).requires_grad_()
    a["dt"] = (1 + a["dt"].detach().abs()).requires_grad_()
    y = selective_scan(**a, backend=backend)
    want = a["dt"] * a["u"] * (a["B"] * a["C"]).sum(-1, keepdim=True)
    torch.testing.assert_close(y, want)
    names = ("u", "dt", "B", "C")
    got, exact = (torch.autograd.grad(r.square().sum(), [a[n] for n in names]) for r in (y, want))
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "chunks"])
def test_extreme_values(backend):
    """Large steps forget, large negative ones do nothing, NaN stays visible."""
    a = {k: v.detach().float() for k, v in inputs(1, 8, 16, 4, absent=("initial_state",)).items()}
    a["dt"] = torch.full_like(a["dt"], -1e4)
    y = selective_scan(**a, dt_softplus=True, backend=backend)
    torch.testing.assert_close(y, a["D"] * a["u"] * F.silu(a["z"]))  # no write, only the skip
    a["dt"] = torch.full_like(a["dt"], 1e4)
    assert selective_scan(**a, dt_softplus=True, backend=backend).isfinite().all()
    for name in ("u", "dt", "B"):
        broken = {**a, name: a[name].clone()}
        broken[name][0, 3, 0] = float("nan")
        y = selective_scan(**broken, dt_softplus=True, backend=backend)
        assert y[0, 3].isnan().any() and not y[0, :3].isnan().any(), name


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(backend="gpu"), "backend='gpu' is unknown"),
        (dict(A=torch.ones(4, 257)), "d_state=257 is not supported; use 1 to 256"),
        (dict(A=torch.ones(4, 0)), "d_state=0"),
        (dict(B=torch.ones(1, 3, 3)), r"B has shape \(1, 3, 3\)"),
        (dict(initial_state=torch.ones(1, 4)), "initial_state has shape"),
        (dict(states_at=[3]), r"states_at must lie in \[0, length=3\)"),
        (dict(u=torch.ones(3, 4)), "u must be"),
    ],
)
def test_bad_arguments(change, said):
    good = dict(u=torch.ones(1, 3, 4), dt=torch.ones(1, 3, 4), A=torch.ones(4, 2))
    good |= dict(B=torch.ones(1, 3, 2), C=torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match=said):
        selective_scan(**{**good, **change})


def test_cuda_backend_says_what_it_needs(monkeypatch):
    a = {k: v.detach() for k, v in inputs(1, 3, 4, 2, torch.float32, absent=("initial_state",)).items()}
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation 'mamba-ssm"):
        selective_scan(**a, backend="cuda")
    with pytest.raises(ValueError, match="use backend='auto'"):
        selective_scan(**a, states_at=[1], backend="cuda")


@pytest.mark.parametrize("absent", [(), ("D", "z", "dt_bias")])
def test_arguments_reach_mamba_ssm_as_it_wants_them(absent):
    """What the cuda backend does around mamba-ssm's kernel, with its reference in the kernel's place."""
    kernel = import_without_kernels("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    from ssm_retrieval.ops.selective_scan import ScanArguments, in_mamba_ssm_layout

    a = {k: v.detach() for k, v in inputs(2, 20, 8, 4, torch.float32, absent=("initial_state",)).items()}
    a |= dict.fromkeys(absent)
    ordered = [a[name] for name in NAMES[:-1]]
    given = ScanArguments(*ordered, dt_softplus=True, initial_state=None)
    got = in_mamba_ssm_layout(kernel, given, True)
    want = selective_scan(*ordered, dt_softplus=True, return_last_state=True, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_mamba_ssm_layout(kernel, given, False), got[0])


def test_gpu_packages_are_not_imported_on_a_cpu():
    code = (
        "import sys, torch, synthetic.run\nfrom ssm_retrieval import models\n"
        "models.build('mamba-tiny', vocab_size=16, n_layer=1)(torch.zeros(1, 3, dtype=torch.long))\n"
        "bad = [m for m in ('mamba_ssm', 'causal_conv1d', 'triton', 'transformers') if m in sys.modules]\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
