"""State space duality by Triton kernels in the interpreter, against its equations in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_retrieval.ops import _cuda_kernels, _delta_triton, _triton
from ssm_retrieval.ops.ssd import _choose, ssd

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def small_kernels(monkeypatch):
    """Chunks of 16 tokens, and gradients of B and C for at most two heads in one program."""
    monkeypatch.setattr(_delta_triton, "CHUNK", 16)
    monkeypatch.setattr(_delta_triton, "SHARED", 2)


def arguments(b, L, G, heads, P, N):
    """Those of `ssd` by name in float64; `heads` of each group."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    H = G * heads
    return dict(
        x=drawn(b, L, H, P), dt=drawn(b, L, H).sigmoid(), A=-drawn(H).exp(), B=drawn(b, L, G, N),
        C=drawn(b, L, G, N), initial_state=drawn(b, H, P, N),
    )  # fmt: skip


def run(given, backend, dtype=torch.float64, **options):
    """The results, and the gradients of all arguments for weights drawn for the results."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
    out = ssd(**leaves, backend=backend, **options)
    out = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator)).sum() for x in out)
    return out, torch.autograd.grad(loss, list(leaves.values()))


def close(got, want, tolerance=2e-5):
    """Within `tolerance` of the largest number of what is wanted, or of 1."""
    for x, y in zip(got, want, strict=True):
        if y.numel():
            atol = tolerance * max(1.0, y.abs().max().item())
            torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=atol)


def compare(given, **options):
    got, want = run(given, "triton", torch.float32, **options), run(given, "reference", **options)
    close(got[0], want[0])
    close(got[1], want[1])


@settings(max_examples=5, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (2, 35, 2, 3, 18, 18))),
    started=st.booleans(),
    strided=st.booleans(),
    last=st.booleans(),
    data=st.data(),
)
def test_every_option_equals_the_equations_and_their_gradients(shape, started, strided, last, data):
    """x, B and C also as the layer gives them, slices of one projection; states_at in any order, twice."""
    given = arguments(*shape)
    if strided:
        width = given["B"].shape[-1]
        both = torch.cat([given["B"], given["C"]], dim=-1)
        given |= dict(B=both[..., :width], C=both[..., width:], x=given["x"].mT.contiguous().mT)
    if not started:
        del given["initial_state"]
    at = data.draw(st.none() | st.lists(st.integers(0, shape[1] - 1), max_size=3))
    compare(given, states_at=at, return_last_state=last)


def test_blocks_of_heads_values_and_columns():
    """Four heads of one group by two programs, two blocks of values and two of columns."""
    compare(arguments(1, 18, 1, 4, 66, 66), return_last_state=True)


def test_chunks_of_their_real_size(monkeypatch):
    monkeypatch.undo()
    compare(arguments(1, 70, 1, 2, 3, 5), states_at=[50])


def test_no_token_and_one_token():
    given = {name: x.float() for name, x in arguments(1, 0, 1, 2, 3, 4).items()}
    y, last, states = ssd(**given, return_last_state=True, states_at=[], backend="triton")
    assert y.shape == (1, 0, 2, 3) and last.equal(given["initial_state"]) and states.shape[1] == 0
    compare(arguments(2, 1, 1, 1, 3, 4), states_at=[0], return_last_state=True)


def test_bfloat16_has_float32_states():
    given = {name: x.bfloat16().double() for name, x in arguments(1, 20, 1, 2, 16, 16).items()}
    (got, grads), (want, wanted) = (
        run(given, backend, dtype, return_last_state=True)
        for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64))
    )
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32]
    close(got, want, 0.02)
    close(grads, wanted, 0.03)


def test_decay_of_80_a_token():
    """exp(-80 dt) within a chunk: nothing overflows, and the last token stands almost alone."""
    given = arguments(1, 20, 1, 1, 3, 4)
    given["A"] = torch.full_like(given["A"], -80.0)
    compare(given, return_last_state=True)


def test_a_gradient_of_the_gradient():
    given = arguments(1, 18, 2, 2, 3, 4)

    def twice(backend, dtype):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in given.items()}
        y = ssd(**leaves, backend=backend)
        grads = torch.autograd.grad(y.sin().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), list(leaves.values()))

    close(twice("triton", torch.float32), twice("reference", torch.float64), 1e-4)


def test_float64_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^backend='triton' got float64; use backend='auto'$"):
        ssd(**arguments(1, 2, 1, 1, 3, 4), backend="triton")


def test_what_a_gpu_takes(monkeypatch):
    """mamba-ssm's kernel where it is installed and can, unless ours was measured to be faster; else ours."""
    x = torch.zeros(1, 3, 2, 4)
    assert _choose(x, None) == "chunks"
    monkeypatch.setattr(_triton, "on_gpu", lambda x: True)
    monkeypatch.setattr(_cuda_kernels, "installed", lambda package: False)
    assert _choose(x, None) == "triton"
    monkeypatch.setattr(_cuda_kernels, "installed", lambda package: True)
    assert (_choose(x, None), _choose(x, [1]), _choose(x[:, :0], None)) == ("cuda", "triton", "triton")
    monkeypatch.setitem(_triton.MEASURED, "ssd", ((3, "triton"),))
    assert (_choose(x, None), _choose(x[:, 1:], None)) == ("triton", "cuda")
