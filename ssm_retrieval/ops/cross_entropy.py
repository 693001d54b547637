"""Cross-entropy of a linear head without its logits in memory.

    loss = mean_i ( logsumexp(W x_i) - (W x_i)[label_i] )            over the labels that are not ignored

Logits are the largest tensor of a small model's training step (batch x length x vocabulary), and torch's
cross-entropy walks through them several times, forward and backward. Here a block of rows at a time is
multiplied, reduced, turned into its gradient softmax(W x) - onehot(label) in place and multiplied back,
all while it is in the cache: the gradients of x and W are ready when the forward pass ends (the method of
Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3).

Label smoothing takes a share s of the target off the label and spreads it over all V symbols (Szegedy et al.
2016, arXiv 1512.00567, section 7). That adds a term which is linear in x_i and so needs no logits either:

    s * mean_i ( (W x_i)[label_i] - mean_v (W x_i)[v] )  =  s * mean_i x_i . ( W[label_i] - mean_v W[v] )
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops import _triton
from ssm_retrieval.ops import linear as ops
from ssm_retrieval.ops._arrays import flat
from ssm_retrieval.ops._checks import check_tensor
from ssm_retrieval.ops._route import (
    asked,
    differentiable_gradients,
    obstacle,
    refuse_tracing,
    traced,
    transformed,
    without_autocast,
)
from ssm_retrieval.ops._threads import run_tasks

BLOCK_LOGITS = 2**21  # logits per block: 8 MiB in float32, within the last level of a laptop's cache
GPU_LOGITS = 2**25  # on a GPU 64 MiB in bfloat16: enough rows to fill it, 667 with a vocabulary of 50,280
IGNORE = -100


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats of the logits x weight^T, and what they predict.

    Products are made in autocast's dtype where it is on, sums in float32. The loss is NaN if no position has
    a label, as with `F.cross_entropy`. Under `ops.backend("reference")` and inside transforms of torch.func
    all logits exist at once; so they do for a gradient of the gradients. On a GPU our Triton kernel takes a
    block of rows at a time where it can, PyTorch's operations elsewhere.

    Args:
        x: (..., D), floating.
        weight: (V, D).
        labels: (...) int64, -100 = no label here.
        label_smoothing: Share of each target that is spread over all V symbols, 0 to 1, as in
            `F.cross_entropy`.

    Returns:
        The loss, a float32 scalar (float64 for float64 x), and the arg-max of each row's logits, (...)
        int64, without gradient.

    Raises:
        ValueError: For other shapes, dtypes or devices, for a label_smoothing outside of 0 .. 1 and, on a
            CPU, for a label outside of the vocabulary (with Triton the loss is NaN then).
        MissingPackage: If Triton is asked for by `ops.backend` and missing.
        NotImplementedError: Under torch.jit.trace.
    """
    refuse_tracing("linear_cross_entropy")
    _check(x, weight, labels)
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing!r} must be a number from 0 to 1")
    device, backend = x.device.type, asked("auto")
    dtype = weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows, target = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    recorded = traced(x, weight, labels)
    if device == "cpu" and not recorded and not transformed():
        _check_labels(target, weight.shape[0])
    if backend == "reference" or transformed():
        loss, predictions = _reference(rows, weight, target, dtype)
    else:
        kernel = _choose(backend, x, weight, labels)
        keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        run: Any = fused_cross_entropy if recorded else _LinearCrossEntropy.apply
        loss, predictions, _, _ = run(rows, weight, target, dtype, keep, kernel)
    if label_smoothing > 0:
        loss = loss + label_smoothing * _label_above_mean(rows, weight, target)
    return loss, predictions.view(labels.shape)


def _choose(backend: str, x: Tensor, weight: Tensor, labels: Tensor) -> str:
    """What turns a block of logits into their gradient: "cpu", "triton" or PyTorch's operations, "chunks"."""
    if backend == "triton":
        _triton.require(x, weight)
    elif backend == "auto" and _triton.on_gpu(x):
        return _triton.choose("linear_cross_entropy", None, False, x, weight)
    elif backend in ("auto", "cpu"):
        return "cpu" if obstacle(x, weight, labels) is None else "chunks"
    return "triton" if backend == "triton" else "chunks"


def _label_above_mean(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The label's logit minus the mean logit, averaged over the rows; x (M, D), labels (M,)."""
    real, wide = labels != IGNORE, torch.promote_types(x.dtype, torch.float32)
    W = weight.to(wide)
    # F.embedding, because its gradient has one order of summation, unlike that of an index
    direction = F.embedding(labels.masked_fill(~real, 0), W) - W.mean(0)
    return (x.to(wide) * direction).sum(-1).masked_fill(~real, 0.0).sum() / real.sum()


def _check_labels(labels: Tensor, V: int) -> None:
    """A kernel would write beside the row."""
    wrong = ((labels < 0) & (labels != IGNORE)) | (labels >= V)
    if wrong.any():
        raise ValueError(f"label {int(labels[wrong][0])} is outside of 0 .. {V - 1}")


def _reference(x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The equation as written, differentiable any number of times; x (M, D), labels (M,)."""
    real = labels != IGNORE
    with without_autocast(x.device.type):
        logits = (x.to(dtype) @ weight.to(dtype).t()).to(torch.promote_types(x.dtype, torch.float32))
    chosen = logits.gather(-1, labels.masked_fill(~real, 0).unsqueeze(-1)).squeeze(-1)
    losses = (logits.logsumexp(-1) - chosen).masked_fill(~real, 0.0)
    return losses.sum() / real.sum(), logits.argmax(-1)


def _check(x: Tensor, weight: Tensor, labels: Tensor) -> None:
    dim = x.dim() if isinstance(x, Tensor) and not x.is_nested else 2
    check_tensor("x", x, ["..."] * (max(dim, 1) - 1) + ["d_model"])
    check_tensor("weight", weight, ("vocab_size", "d_model"))
    if weight.shape[0] < 1 or weight.shape[1] < 1 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; with x {tuple(x.shape)} it must be (vocab_size, "
            f"{x.shape[-1]}), none of them 0"
        )
    if isinstance(labels, Tensor) and not labels.is_nested and labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; with x {tuple(x.shape)} they must be "
            f"{tuple(x.shape[:-1])}, a label for every row"
        )
    check_tensor("labels", labels, x.shape[:-1], (torch.int64,))
    for name, other in (("weight", weight), ("labels", labels)):
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, x on {x.device}; move it there")


def _forward(
    x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, keep: bool, kernel: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the predictions and, if `keep`, the gradients of x and of weight (else empty)."""
    if x.device.type == "cpu":
        _check_labels(labels, weight.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    W, M, V = weight.to(dtype), x.shape[0], weight.shape[0]
    onednn = ops.by_onednn(dtype, x.device)
    losses, predictions = x.new_zeros(M, dtype=wide), torch.empty_like(labels)
    dx = torch.empty_like(x) if keep else x.new_empty(0)
    dW = torch.zeros_like(weight, dtype=wide) if keep else weight.new_empty(0, dtype=wide)
    scale = 1.0 / (labels != IGNORE).sum().to(wide)
    rows = max(1, (GPU_LOGITS if _triton.on_gpu(x) else BLOCK_LOGITS) // V)
    with without_autocast(x.device.type):
        for start in range(0, M, rows):
            part = slice(start, start + rows)
            xs = x[part].to(dtype)
            logits = ops.matmul(xs, W) if onednn else xs @ W.t()
            if kernel == "triton":
                losses[part], predictions[part] = _triton_rows(logits, labels[part], scale, keep)
            else:
                logits = logits.to(wide)
                each = _cpu_rows if kernel == "cpu" else _reference_rows
                losses[part], predictions[part] = each(logits, labels[part], scale)
            if keep:
                g = logits.to(dtype)
                dx[part] = ops.matmul(g, W.t()) if onednn else g @ W
                dW += ops.outer(g, xs) if onednn else g.t() @ xs
    return losses.sum() * scale, predictions, dx, dW


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, labels, ctx.dtype, *_ = inputs
    ctx.save_for_backward(x, weight, labels, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, labels, dx, dW = ctx.saved_tensors
    nothing = (None,) * 4
    if grad is None:
        return None, None, *nothing
    if torch.is_grad_enabled():  # of the backward pass itself, whose own gradient somebody will want

        def again(x: Tensor, weight: Tensor) -> list[Tensor]:
            return [_reference(x, weight, labels, ctx.dtype)[0]]

        return *differentiable_gradients(again, (x, weight), [grad]), *nothing
    return dx * grad.to(dx.dtype), (dW * grad).to(weight.dtype), *nothing


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


# One node of the graphs of torch.compile and torch.export; a call that none records goes past it
fused_cross_entropy = torch.library.custom_op(
    "ssm_retrieval::linear_cross_entropy", _forward, mutates_args=()
)
fused_cross_entropy.register_autograd(_gradients, setup_context=_save)


@fused_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, keep: bool, kernel: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x) if keep else x.new_empty(0)
    dW = torch.empty_like(weight, dtype=wide) if keep else weight.new_empty(0, dtype=wide)
    return x.new_empty((), dtype=wide), torch.empty_like(labels), dx, dW


def _reference_rows(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and arg-max of each row; the logits become scale * (softmax - onehot). Any device and dtype."""
    predictions, real = logits.argmax(-1), labels != IGNORE
    at = labels.clamp(min=0).unsqueeze(-1)
    norm = logits.logsumexp(-1, keepdim=True)
    losses = (norm - logits.gather(-1, at)).squeeze(-1).masked_fill(~real, 0.0)
    logits.sub_(norm).exp_().scatter_add_(-1, at, logits.new_full((1, 1), -1.0).expand_as(at))
    logits.mul_((scale * real).unsqueeze(-1))
    return losses, predictions


def _cpu_rows(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one fused loop per row."""
    from ssm_retrieval.ops._softmax_kernels import softmax_rows  # numba: imported on first use only

    M, V = logits.shape
    labels = labels.contiguous()
    losses, predictions = logits.new_empty(M), torch.empty_like(labels)
    arrays = [flat(t, t.dtype) for t in (logits, labels, losses, predictions)]
    run_tasks(lambda rows: softmax_rows(rows, V, IGNORE, float(scale), *arrays), M)
    return losses, predictions


def _triton_rows(logits: Tensor, labels: Tensor, scale: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The same by a Triton kernel, which reads logits of any dtype and changes them only if `keep`."""
    from ssm_retrieval.ops._cross_entropy_triton import triton_rows  # Triton: imported on first use only

    return triton_rows(logits, labels, scale, IGNORE, keep)
