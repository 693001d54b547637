"""The Triton kernels of the delta rule in the interpreter, against the equations token by token in float64.

The interpreter spends a second on a handful of programs, so chunks are 16 tokens here unless said otherwise.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssm_retrieval.ops import _delta_triton, _route, _triton
from ssm_retrieval.ops._delta_chunks import DeltaArguments
from ssm_retrieval.ops._delta_triton import Chunks, delta_on_triton
from ssm_retrieval.ops.delta_rule import _choose, delta_rule
from ssm_retrieval.ops.trapezoid import trapezoid

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(_delta_triton, "CHUNK", 16)


def arguments(b, L, H, P, N, decay="head", seed=0):
    """q, k, v, beta, log_decay and a first state in float64; keys of length 1, every third beta 0."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = {"none": None, "head": (b, L, H), "channel": (b, L, H, N)}[decay]
    log_decay = None if shape is None else -0.5 * drawn(*shape).abs()
    beta = 2 * drawn(b, L, H).sigmoid()
    beta[:, ::3] = 0.0
    k = F.normalize(drawn(b, L, H, N), dim=-1)
    return [drawn(b, L, H, N), k, drawn(b, L, H, P), beta, log_decay, drawn(b, H, P, N)]


def run(given, backend, dtype=None, **options):
    """The results, and the gradients of all arguments for weights drawn for the results."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
    *first, h = leaves
    out = delta_rule(*first, initial_state=h, backend=backend, **options)
    out = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator)).sum() for x in out)
    tensors = [x for x in leaves if x is not None]
    return out, torch.autograd.grad(loss, tensors, allow_unused=True)


def close(got, want, tolerance=2e-5):
    """Within `tolerance` of the largest number of what is wanted, or of 1."""
    for x, y in zip(got, want, strict=True):
        assert (x is None) == (y is None)
        if y is not None and y.numel():
            torch.testing.assert_close(
                x.double(), y.double(), rtol=0, atol=tolerance * max(1.0, y.abs().max().item())
            )


def compare(given, tolerance=2e-5, **options):
    got, want = run(given, "triton", torch.float32, **options), run(given, "reference", **options)
    close(got[0], want[0], tolerance)
    close(got[1], want[1], tolerance)


@settings(max_examples=8, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (2, 37, 2, 19, 19))),
    decay=st.sampled_from(["none", "head", "channel"]),
    erase=st.booleans(),
    absent=st.sets(st.sampled_from(["beta", "h"])),
    strided=st.booleans(),
    last=st.booleans(),
    data=st.data(),
)
def test_every_option_equals_the_equations_and_their_gradients(
    shape, decay, erase, absent, strided, last, data
):
    """states_at in any order and twice; arguments that are slices, and transposed in their last axes."""
    q, k, v, beta, log_decay, h = arguments(*shape, decay)
    if strided:
        q, v = q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([v, v], -1)[..., : v.shape[-1]]
        k, h = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (k, h))
    beta, h = (None if name in absent else x for name, x in (("beta", beta), ("h", h)))
    at = data.draw(st.none() | st.lists(st.integers(0, shape[1] - 1), max_size=3))
    compare([q, k, v, beta, log_decay, h], erase=erase, states_at=at, return_last_state=last)


@pytest.mark.parametrize("decay, erase", [("head", True), ("channel", True), ("head", False)])
def test_states_larger_than_a_block(decay, erase, monkeypatch):
    """Two blocks of values and of columns, four of rows for the kernels that go from chunk to chunk."""
    monkeypatch.setattr(_delta_triton, "ROWS", 32)
    P, N = (70, 70) if decay == "head" else (20, 35)
    compare(arguments(1, 20, 1, P, N, decay), erase=erase, states_at=[17], return_last_state=True)


def test_chunks_of_their_real_size(monkeypatch):
    """32 tokens in float32, by whose matrices erasure is solved."""
    monkeypatch.undo()
    compare(arguments(1, 70, 1, 5, 6), return_last_state=True)


def test_no_token_and_one_token():
    *first, h = (x.float() for x in arguments(1, 0, 2, 3, 4))
    y, last = delta_rule(*first, initial_state=h, return_last_state=True, backend="triton")
    assert y.shape == (1, 0, 2, 3) and last.equal(h)
    compare(arguments(2, 1, 1, 3, 4), states_at=[0, 0], return_last_state=True)


def test_repeated_keys_of_full_strength_stay_exact(monkeypatch):
    """The matrix of ones below the diagonal, whose powers grow as binomials do, to 3e8 of 32 tokens.

    What is read is the last value.
    """
    monkeypatch.undo()
    v = torch.randn(1, 40, 1, 16, generator=torch.Generator().manual_seed(0))
    k = torch.zeros(1, 40, 1, 16)
    k[..., 3] = 1.0
    arguments = DeltaArguments(k, k, v, None, None, True, None)
    (y,) = delta_on_triton(arguments, None, False)
    torch.testing.assert_close(y, v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_strong_decays_neither_overflow_nor_leak(decay):
    """exp(-300) for a token clears the state: later tokens are as if they stood alone, gradients too.

    A decay is the exponential of a difference of sums, of which float32 knows numbers near 300 to 3e-5.
    """
    given = [x.float() for x in arguments(1, 24, 1, 5, 4, decay)[:5]]
    given[4][:, 20] = -300.0
    leaves = [x.requires_grad_() for x in given]
    y = delta_rule(*leaves, backend="triton")
    alone = delta_rule(*(x.detach()[:, 20:] for x in given), backend="reference")
    torch.testing.assert_close(y[:, 20:], alone, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(y[:, 20:].sum(), leaves)
    assert all(g.isfinite().all() and (g[:, :19].abs() < 1e-6).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, monkeypatch):
    """Operands are rounded once more at bfloat16 only, whose chunks have 64 tokens; the rest is float32."""
    monkeypatch.undo()
    given = [x.to(dtype).double() for x in arguments(1, 70, 1, 16, 16)]
    options = dict(return_last_state=True, states_at=[4])
    (got, grads), (want, wanted) = run(given, "triton", dtype, **options), run(given, "reference", **options)
    assert [x.dtype for x in got] == [dtype, torch.float32, torch.float32]
    assert all(g.dtype == dtype for g in grads)
    step = torch.finfo(dtype).eps
    close(got[:1], want[:1], 2 * step)
    close(got[1:], want[1:], 2 * step if dtype == torch.bfloat16 else 2e-5)
    close(grads, wanted, 4 * step)


def test_float16_states_pass_its_largest_number():
    """70,000 and more in a state, read by small queries."""
    k = torch.full((1, 20, 1, 16), 0.5, dtype=torch.float16)
    v = torch.full((1, 20, 1, 16), 60000.0, dtype=torch.float16)
    q = torch.full_like(k, 2**-14)
    y, last = delta_rule(q, k, v, erase=False, return_last_state=True, backend="triton")
    torch.testing.assert_close(last, torch.full_like(last, 600000.0))
    assert y.isfinite().all()


def test_a_gradient_of_the_gradient():
    given = arguments(1, 18, 1, 3, 4, "head")

    def twice(backend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        y, last = delta_rule(*leaves[:5], initial_state=leaves[5], return_last_state=True, backend=backend)
        grads = torch.autograd.grad(y.sin().sum() + last.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)

    close(twice("triton", torch.float32), twice("reference", torch.float64), 1e-4)


def test_trapezoid_goes_this_way():
    q, k, v, now, log_decay, h = arguments(1, 18, 2, 3, 4)
    given = (q, k, v, now, now.flip(1), log_decay)
    options = dict(states_at=[2], return_last_state=True)
    want = trapezoid(*given, initial_state=h, backend="reference", **options)
    narrow = [x.float() for x in given]
    close(trapezoid(*narrow, initial_state=h.float(), backend="triton", **options), want)


def test_registered_operators_describe_their_results():
    """What torch.compile and torch.export are told of shapes and dtypes is what comes out."""
    q, k, v, beta, log_decay, h = (x.float() for x in arguments(1, 3, 2, 5, 4))
    forward = (q, k, v, beta, log_decay, h, True, [1], True)
    torch.library.opcheck(_delta_triton.delta_forward, forward, test_utils=("test_schema", "test_faketensor"))
    backward = (q, k, v, beta, log_decay, h, False, None, v, None, None)
    torch.library.opcheck(_delta_triton.delta_backward, backward, test_utils=("test_faketensor",))


@settings(deadline=None)
@given(length=st.integers(1, 200), size=st.integers(1, 64), data=st.data())
def test_chunks_cover_the_sequence_and_end_at_every_position(length, size, data):
    positions = sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=9)))
    chunks = Chunks.cut(length, size, positions, CPU)
    if not positions:
        assert chunks == (-(-length // size), None, [])
        return
    starts = chunks.starts.tolist()
    sizes = [stop - start for start, stop in itertools.pairwise(starts)]
    assert starts[0] == 0 and starts[-1] == length and len(sizes) == chunks.number
    assert all(0 < n <= size for n in sizes)
    assert [starts[i + 1] - 1 for i in chunks.ends] == positions


def test_what_the_kernels_cannot_take_is_one_line():
    q, k, v, beta, log_decay, _ = arguments(1, 3, 1, 2, 4)
    with pytest.raises(ValueError, match=r"^backend='triton' got float64; use backend='auto'$"):
        delta_rule(q, k, v, beta, log_decay, backend="triton")
    wide = torch.zeros(1, 2, 1, 257)
    with pytest.raises(ValueError, match=r"^backend='triton' erases in at most 256 columns, not 257; use"):
        delta_rule(wide, wide, wide, backend="triton")
    turned = torch.zeros(1, 4, 1, 3).transpose(1, 3)
    with pytest.raises(ValueError, match=r"want a contiguous last axis; q has the strides \(12, 1, 3, 3\)"):
        _delta_triton._forward(*[turned] * 3, beta.float(), log_decay.float(), None, True, None, False)


def test_what_a_gpu_takes(monkeypatch):
    """Triton, and where that cannot, chunks with one line of warning; never the loop over time."""
    monkeypatch.setattr(_triton, "on_gpu", lambda x: True)
    _route.warn_once.cache_clear()

    def chosen(erase=True, N=4, dtype=torch.float32):
        x = torch.zeros(1, 3, 1, N, dtype=dtype)
        return _choose("auto", DeltaArguments(x, x, x, None, None, erase, None))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [chosen(), chosen(N=256), chosen(N=300, erase=False)] == ["triton"] * 3
        assert torch.func.vmap(lambda x: x * (chosen() == "chunks"))(torch.ones(2)).tolist() == [1, 1]
    for line, options in (("256 columns", dict(N=257)), ("got float64", dict(dtype=torch.float64))):
        with pytest.warns(UserWarning, match=line):
            assert chosen(**options) == "chunks"
    monkeypatch.setattr(_triton, "installed", lambda: False)
    with pytest.warns(UserWarning, match="pip install triton"):
        assert chosen() == "chunks"
    _route.warn_once.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path, target):
    """For an A100 and an MI300, which need not be there: every choice of blocks, and the cross-entropy."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parents[1] / "support" / "triton_compile_delta.py"
    done = subprocess.run([sys.executable, script, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    kernels = {"overlaps", "states", "outputs", "write_gradients", "state_gradients", "key_gradients"}
    assert {row[0] for row in rows} == kernels | {"softmax_rows"}
    assert max(int(row[-1]) for row in rows) <= 64 * 1024
