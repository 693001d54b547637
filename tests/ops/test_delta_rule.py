"""The delta rule against its equations in other words, against transformers, and what it does to a state."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssm_retrieval.ops import DELTA_CHUNK, LANES, padded_values, value_lanes
from ssm_retrieval.ops._delta_chunks import CHUNK
from ssm_retrieval.ops.delta_rule import delta_rule

BACKENDS = ("reference", "chunks", "cpu")


def arguments(b, L, H, P, N, decay="head", dtype=torch.float64, seed=0):
    """q, k, v, beta, log_decay and a first state; keys of length 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    shape = {"none": None, "head": (b, L, H), "channel": (b, L, H, N)}[decay]
    log_decay = None if shape is None else -0.5 * drawn(*shape).abs()
    k = F.normalize(drawn(b, L, H, N), dim=-1)
    return drawn(b, L, H, N), k, drawn(b, L, H, P), drawn(b, L, H).sigmoid(), log_decay, drawn(b, H, P, N)


def by_matrices(q, k, v, beta, log_decay, h, erase):
    """h <- h a (1 - beta k k^T) + beta v k^T, with the matrix of each token written out; y and all states."""
    ys, hs = [], []
    for t in range(q.shape[1]):
        if log_decay is not None:
            a = log_decay[:, t].exp()
            h = h * (a[..., None, None] if a.dim() == 2 else a.unsqueeze(-2))
        keep = torch.eye(k.shape[-1], dtype=k.dtype).expand(*k.shape[:1], k.shape[2], -1, -1)
        if erase:
            keep = keep - torch.einsum("bh,bhm,bhn->bhmn", beta[:, t], k[:, t], k[:, t])
        h = h @ keep + torch.einsum("bh,bhp,bhn->bhpn", beta[:, t], v[:, t], k[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", h, q[:, t]))
        hs.append(h)
    return torch.stack(ys, 1), torch.stack(hs, 1)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (2, 2 * CHUNK + 9, 3, 35, 19))),
    decay=st.sampled_from(["none", "head", "channel"]),
    erase=st.booleans(),
    data=st.data(),
)
def test_every_backend_equals_the_equations_and_their_gradients(shape, decay, erase, data):
    given = arguments(*shape, decay)
    at = data.draw(st.lists(st.integers(0, shape[1] - 1), max_size=3))
    tensors = [x.requires_grad_() for x in given if x is not None]
    y, hs = by_matrices(*given, erase)
    results = [y, hs[:, -1], hs[:, at]]
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in results]

    def gradients(out):
        loss = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
        return torch.autograd.grad(loss, tensors, allow_unused=True)

    wanted = gradients(results)
    for backend in BACKENDS:
        *first, h = given
        got = delta_rule(*first, erase=erase, initial_state=h, states_at=at, return_last_state=True,
                         backend=backend)  # fmt: skip
        torch.testing.assert_close(got, tuple(results), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients(got), wanted, rtol=1e-8, atol=1e-9)


def test_padded_values_are_taken_as_wide_as_they_were_padded_for():
    """The kernels see the padded width only, and at most a third of it is padding beyond whole vectors."""
    for headdim in range(1, 300):
        padded, lanes = padded_values(headdim), value_lanes(headdim)
        assert value_lanes(padded) == lanes and padded % lanes == 0 and padded >= headdim
        assert 3 * padded <= 4 * (-(-headdim // LANES) * LANES)


@pytest.mark.parametrize("L", [1, DELTA_CHUNK, DELTA_CHUNK + 1, 200])
def test_equals_transformers(L):
    """Qwen3-Next's torch functions, which return the state with its axes exchanged."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, beta, log_decay, h = arguments(2, L, 3, 16, 16, dtype=torch.float32)
    given = [x.requires_grad_() for x in (q, k, v, beta, log_decay, h)]
    y, last = delta_rule(q / 4, k, v, beta, log_decay, initial_state=h, return_last_state=True)
    got = torch.autograd.grad(y.sin().sum() + last.sin().sum(), given)
    for theirs in (qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule):
        want, state = inspect.unwrap(theirs)(  # without the kernels of fla, where that is installed
            q, k, v, log_decay, beta, initial_state=h.transpose(-1, -2), output_final_state=True
        )
        torch.testing.assert_close((y, last), (want, state.transpose(-1, -2)), rtol=1e-5, atol=1e-5)
        wanted = torch.autograd.grad(want.sin().sum() + state.sin().sum(), given)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("L", [1, 64, 150])
def test_equals_kimi_linear(L):
    """transformers' `chunk_kimi_delta_attention`: a decay for each channel of the key."""
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    q, k, v, beta, log_decay, h = arguments(2, L, 3, 16, 16, "channel", dtype=torch.float32)
    given = [x.requires_grad_() for x in (q, k, v, beta, log_decay, h)]
    y, last = delta_rule(q / 4, k, v, beta, log_decay, initial_state=h, return_last_state=True)
    want, state = inspect.unwrap(kimi.chunk_kimi_delta_attention)(
        q, k, v, log_decay, beta, initial_state=h.transpose(-1, -2), output_final_state=True
    )
    torch.testing.assert_close((y, last), (want, state.transpose(-1, -2)), rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y.sin().sum() + last.sin().sum(), given)
    wanted = torch.autograd.grad(want.sin().sum() + state.sin().sum(), given)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_of_full_strength_replaces_what_its_key_held(backend):
    """What a key reads afterwards is its last value; without erasure it is the sum of all."""
    _, k, v, _, _, h = arguments(2, 40, 2, 5, 6, "none")
    read, last = delta_rule(k, k, v, initial_state=h, return_last_state=True, backend=backend)
    torch.testing.assert_close(read, v)
    keys = torch.eye(6, dtype=k.dtype)[torch.arange(40) % 6][None, :, None].expand(2, 40, 2, 6)
    _, last = delta_rule(keys, keys, v, return_last_state=True, backend=backend)
    newest = [max(t for t in range(40) if t % 6 == n) for n in range(6)]
    torch.testing.assert_close(last, v[:, newest].permute(0, 2, 3, 1))
    _, last = delta_rule(keys, keys, v, erase=False, return_last_state=True, backend=backend)
    sums = torch.stack([v[:, n::6].sum(1) for n in range(6)], dim=-1)
    torch.testing.assert_close(last, sums)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_erasure_it_is_mamba_2(backend):
    """dt x, B, C and exp(dt A) of `ssd` in the places of v, k, q and the decay."""
    from ssm_retrieval.ops.ssd import ssd

    q, k, v, dt, _, h = arguments(2, 70, 3, 5, 4)
    A = torch.tensor([-0.3, -1.0, -2.0], dtype=q.dtype)
    want = ssd(v, dt, A, k[:, :, :1], q[:, :, :1], h, return_last_state=True, states_at=[3, 0])
    k, q = (x[:, :, :1].expand_as(x) for x in (k, q))
    got = delta_rule(
        q, k, v, dt, dt * A, erase=False, initial_state=h, states_at=[3, 0], return_last_state=True,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got, want)


def test_strong_decays_neither_overflow_nor_leak():
    """exp(-300) for a token clears the state: later tokens are as if they stood alone, gradients too."""
    for decay in ("head", "channel"):
        q, k, v, beta, log_decay, _ = arguments(1, 90, 2, 5, 4, decay)
        log_decay[:, 60] = -300.0
        for backend in BACKENDS:
            given = [x.clone().requires_grad_() for x in (q, k, v, beta, log_decay)]
            y = delta_rule(*given, backend=backend)
            alone = delta_rule(*(x[:, 60:] for x in (q, k, v, beta, log_decay)), backend=backend)
            torch.testing.assert_close(y[:, 60:], alone)
            grads = torch.autograd.grad(y[:, 60:].sum(), given)
            assert all(g.isfinite().all() and (g[:, :59].abs() < 1e-12).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    q, k, v, beta, log_decay, h = (x.to(dtype) for x in arguments(2, 50, 2, 16, 8))
    wide = [x.float() for x in (q, k, v, beta, log_decay, h)]
    for backend in BACKENDS:
        y, last = delta_rule(
            q, k, v, beta, log_decay, initial_state=h, return_last_state=True, backend=backend
        )
        want, state = delta_rule(*wide[:5], initial_state=wide[5], return_last_state=True, backend=backend)
        assert y.dtype == dtype and last.dtype == torch.float32
        torch.testing.assert_close((y, last), (want.to(dtype), state), rtol=1e-6, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads():
    given = [x.requires_grad_() for x in arguments(3, 100, 2, 20, 7, dtype=torch.float32)[:5]]
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            y = delta_rule(*given)
            found.append([y, *torch.autograd.grad(y.sin().sum(), given)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
