"""Writes in two parts: against the equations in other words, special cases, and itself in pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_retrieval.ops.ssd import ssd
from ssm_retrieval.ops.trapezoid import trapezoid

BACKENDS = ("reference", "chunks", "cpu")


def arguments(b, L, H, P, N, dtype=torch.float64, seed=0):
    """q, k, v, now, late, log_decay and a first state."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    weights = drawn(b, L, H).sigmoid(), drawn(b, L, H).sigmoid(), -drawn(b, L, H).abs()
    return drawn(b, L, H, N), drawn(b, L, H, N), drawn(b, L, H, P), *weights, drawn(b, H, P, N)


def summed(q, k, v, now, late, log_decay, h):
    """Every state as a sum over all writes, each with the product of the decays after it."""
    total = log_decay.cumsum(1)
    states = []
    for t in range(q.shape[1]):
        state = total[:, t].exp()[..., None, None] * h
        for s in range(t + 1):
            passed = (total[:, t] - total[:, s]).exp()  # a_{s+1} ... a_t
            strength = passed * (now[:, s] + (late[:, s] if s < t else 0))
            state = state + torch.einsum("bh,bhp,bhn->bhpn", strength, v[:, s], k[:, s])
        states.append(state)
    if not states:
        return torch.zeros_like(v), h.unsqueeze(1)[:, :0]
    states = torch.stack(states, 1)
    return torch.einsum("blhpn,blhn->blhp", states, q), states


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(0, 41), *(st.integers(1, top) for top in (3, 19, 17))),
    data=st.data(),
)
def test_every_backend_equals_the_sum_over_all_writes_and_its_gradients(shape, data):
    given = [x.requires_grad_() for x in arguments(*shape)]
    at = data.draw(st.lists(st.integers(0, shape[1] - 1), max_size=3)) if shape[1] else []
    y, states = summed(*given)
    results = [y, states[:, -1] if shape[1] else given[-1], states[:, at]]
    weights = [torch.randn(x.shape, dtype=x.dtype) for x in results]

    def gradients(out):
        loss = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
        return torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)

    wanted = gradients(results)
    for backend in BACKENDS:
        *first, h = given
        got = trapezoid(*first, initial_state=h, states_at=at, return_last_state=True, backend=backend)
        torch.testing.assert_close(got, tuple(results), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients(got), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_eulers_rule_is_mamba_2(backend):
    """lam = 1: dt x, B, C and exp(dt A) of `ssd`."""
    q, k, v, dt, _, _, h = arguments(2, 70, 3, 5, 4)
    A = torch.tensor([-0.3, -1.0, -2.0], dtype=q.dtype)
    want = ssd(v, dt, A, k[:, :, :1], q[:, :, :1], h, return_last_state=True, states_at=[3, 0])
    k, q = (x[:, :, :1].expand_as(x) for x in (k, q))
    got = trapezoid(
        q, k, v, dt, torch.zeros_like(dt), dt * A, initial_state=h, states_at=[3, 0], return_last_state=True,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got, want)


def test_the_rule_is_of_second_order():
    """On an integral known in closed form: half the step, a quarter of the error; Euler's only half."""

    def error(steps, lam):
        """Of h(1) for h' = -h + cos(3 t), h(0) = 0."""
        t = torch.arange(0, steps + 1, dtype=torch.float64) / steps
        shape, dt = (1, steps + 1, 1), 1 / steps
        one = torch.ones(*shape, 1, dtype=torch.float64)
        now, late = (torch.full(shape, w * dt, dtype=torch.float64) for w in (lam, 1 - lam))
        now[:, 0] = 0  # the first sample begins the first step
        log_decay = torch.full(shape, -dt, dtype=torch.float64)
        y = trapezoid(one, one, torch.cos(3 * t).view(*shape, 1), now, late, log_decay)
        exact = (
            torch.cos(torch.tensor(3.0)) + 3 * torch.sin(torch.tensor(3.0)) - torch.exp(-torch.tensor(1.0))
        ) / 10
        return float((y[0, -1, 0, 0] - exact.double()).abs())

    assert error(200, 0.5) / error(400, 0.5) == pytest.approx(4, rel=0.05)
    assert error(200, 1.0) / error(400, 1.0) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    given = [x.to(dtype) for x in arguments(2, 50, 2, 16, 8)]
    wide = [x.float() for x in given]
    for backend in BACKENDS:
        y, last = trapezoid(*given[:6], initial_state=given[6], return_last_state=True, backend=backend)
        want, state = trapezoid(*wide[:6], initial_state=wide[6], return_last_state=True, backend=backend)
        assert y.dtype == dtype and last.dtype == torch.float32
        torch.testing.assert_close((y, last), (want.to(dtype), state), rtol=1e-6, atol=1e-6)


def test_wrong_arguments_are_one_line():
    q, k, v, now, late, log_decay, h = arguments(2, 5, 3, 4, 6)
    for options, said in (
        (dict(now=now[:, :4]), "now has shape"),
        (dict(late=late.unsqueeze(-1)), "late must be"),
        (dict(log_decay=k), "log_decay must be"),
        (dict(now=None), "now must be a tensor"),
        (dict(k=None), "k must be a tensor"),
        (dict(return_last_state=1), "return_last_state must be True or False"),
        (dict(states_at=[5]), "states_at must lie in"),
        (dict(initial_state=h[:1]), "initial_state has shape"),
        (dict(backend="gpu"), "backend='gpu' is unknown"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            trapezoid(**(dict(q=q, k=k, v=v, now=now, late=late, log_decay=log_decay) | options))
        assert "\n" not in str(caught.value)
