"""The Triton kernel of the head's cross-entropy in the interpreter, against F.cross_entropy in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssm_retrieval import ops
from ssm_retrieval.ops import _route, _triton, cross_entropy
from ssm_retrieval.ops.cross_entropy import IGNORE, linear_cross_entropy

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two rows at a time, 16 logits of each."""
    from ssm_retrieval.ops import _cross_entropy_triton

    monkeypatch.setattr(_cross_entropy_triton, "WIDTH", 16)
    monkeypatch.setattr(cross_entropy, "BLOCK_LOGITS", 80)


def arguments(M, V, D, dtype=torch.float32, seed=0):
    """x, weight, labels of which the second is ignored, and a weight for the loss."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (2 * torch.randn(n, D, generator=generator) for n in (M, V))
    labels = torch.randint(0, V, (M,), generator=generator)
    labels[1:2] = IGNORE
    return x.to(dtype), weight.to(dtype), labels


def expected(x, weight, labels, smoothing):
    """F.cross_entropy, the arg-max and the gradients of 3 times the loss, in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = x @ weight.t()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=smoothing)
    return loss, logits.argmax(-1), torch.autograd.grad(3 * loss, (x, weight))


def by_triton(x, weight, labels, smoothing=0.0):
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with ops.backend("triton"):
        loss, predictions = linear_cross_entropy(x, weight, labels, smoothing)
    return loss, predictions, torch.autograd.grad(3 * loss, (x, weight))


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6)),
    smoothing=st.sampled_from([0.0, 0.2]),
    strided=st.booleans(),
)
def test_loss_predictions_and_gradients_equal_float64(sizes, smoothing, strided):
    M, V, D = sizes
    x, weight, labels = arguments(*sizes)
    if strided:
        x, weight = x.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :D]
        labels = torch.stack([labels, labels], 1)[:, 0]
    if M == 2:
        labels[0] = V - 1
    if M == 1:
        labels[0] = 0
    loss, predictions, grads = by_triton(x, weight, labels, smoothing)
    want, chosen, wanted = expected(x, weight, labels, smoothing)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([g.double() for g in grads], list(wanted), rtol=1e-4, atol=1e-5)
    assert predictions.equal(chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype):
    """Only the logits and their gradient are rounded: 37 logits of about 5, whose sum would lose digits."""
    x, weight, labels = arguments(4, 37, 6, dtype)
    loss, predictions, grads = by_triton(x, weight, labels)
    logits = (x @ weight.t()).double().detach()
    assert loss.dtype == torch.float32 and predictions.equal(logits.argmax(-1))
    want = F.cross_entropy(logits, labels, ignore_index=IGNORE)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    _, _, wanted = expected(x, weight, labels, 0.0)
    assert all(g.dtype == dtype for g in grads)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close([g.double() for g in grads], list(wanted), rtol=4 * step, atol=4 * step)


def test_extreme_logits_neither_overflow_nor_vanish():
    """Logits of 300 and -inf, and equal ones, of which the first is predicted as by argmax."""
    from ssm_retrieval.ops._cross_entropy_triton import triton_rows

    logits = torch.full((3, 20), -torch.inf)
    logits[0, 3], logits[0, 18] = 300.0, 299.0
    logits[1, 5:] = -300.0
    logits[2, [1, 17]] = 0.0  # by the same thread, one block after the other
    labels, scale = torch.tensor([18, 5, 17]), torch.tensor(0.5)
    want = F.cross_entropy(logits.double(), labels, reduction="none")
    grad = 0.5 * (logits.double().softmax(-1) - F.one_hot(labels, 20))
    losses, predictions = triton_rows(logits, labels, scale, IGNORE, True)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=3e-5)  # a float32 near 300 has 5 digits
    torch.testing.assert_close(logits.double(), grad, rtol=1e-6, atol=3e-5)
    assert predictions.tolist() == [3, 5, 1]


def test_logits_stay_where_no_gradient_is_wanted_and_wrong_labels_show():
    from ssm_retrieval.ops._cross_entropy_triton import triton_rows

    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    losses, _ = triton_rows(logits, torch.tensor([20, -1, IGNORE]), torch.tensor(1.0), IGNORE, False)
    assert logits.equal(before) and losses.isnan().tolist() == [True, True, False] and losses[2] == 0
    with pytest.raises(ValueError, match=r"wants contiguous logits; got \(1, 3\) of \(3, 20\)"):
        triton_rows(logits.t().contiguous().t(), torch.zeros(3).long(), torch.tensor(1.0), IGNORE, False)


def test_no_rows_no_labels_and_batches():
    x, weight, labels = arguments(4, 9, 3)
    assert by_triton(x[:0], weight, labels[:0])[0].isnan()
    assert by_triton(x, weight, torch.full_like(labels, IGNORE))[0].isnan()
    loss, predictions, _ = by_triton(x.detach().view(2, 2, 3), weight, labels.view(2, 2))
    torch.testing.assert_close(loss.double(), expected(x, weight, labels, 0.0)[0], rtol=1e-5, atol=1e-6)
    assert predictions.shape == (2, 2)


def test_gradient_of_the_gradient_equals_float64():
    x, weight, labels = arguments(3, 20, 4)

    def twice(x, weight, backend):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        with ops.backend(backend):
            loss = linear_cross_entropy(x, weight, labels)[0]
        grads = torch.autograd.grad(loss, (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight))

    got, want = twice(x, weight, "triton"), twice(x.double(), weight.double(), "reference")
    torch.testing.assert_close([g.double() for g in got], list(want), rtol=1e-4, atol=1e-5)


def test_float64_is_refused_in_one_line():
    x, weight, labels = arguments(2, 5, 3, torch.float64)
    with pytest.raises(ValueError, match=r"^backend='triton' got float64; use backend='auto'$"):
        by_triton(x, weight, labels)


def test_what_a_gpu_takes(monkeypatch):
    x, weight, labels = arguments(2, 5, 3)
    assert cross_entropy._choose("auto", x, weight, labels) == "cpu"
    monkeypatch.setattr(_triton, "on_gpu", lambda x: True)
    assert cross_entropy._choose("auto", x, weight, labels) == "triton"
    assert cross_entropy._choose("chunks", x, weight, labels) == "chunks"
    monkeypatch.setattr(_triton, "installed", lambda: False)
    _route.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert cross_entropy._choose("auto", x, weight, labels) == "chunks"
