"""Cross-entropy of a linear head without its logits in memory.

    loss = mean_i ( logsumexp(W x_i) - (W x_i)[label_i] )            over the labels that are not ignored

Logits are the largest tensor of a small model's training step (batch x length x vocabulary), and torch's
cross-entropy walks through them several times, forward and backward. Here a block of rows at a time is
multiplied, reduced, turned into its gradient softmax(W x) - onehot(label) in place and multiplied back,
all while it is in the cache: the gradients of x and W are ready when the forward pass ends (the method of
Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops import linear as ops
from ssm_retrieval.ops._arrays import flat
from ssm_retrieval.ops._checks import check_tensor
from ssm_retrieval.ops._route import obstacle, refuse_tracing, without_autocast
from ssm_retrieval.ops._threads import run_tasks

BLOCK_LOGITS = 2**21  # logits per block: 8 MiB in float32, within the last level of a laptop's cache
IGNORE = -100


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats of the logits x weight^T, and what they predict.

    x: (..., D) floating; weight: (V, D); labels: (...) int64, -100 = no label here.
    Returns the loss, a float32 scalar (float64 for float64 x), and the arg-max of each row's logits,
    (...) int64, without gradient. Products are made in autocast's dtype where it is on, sums in float32.
    The loss is NaN if no position has a label, as with `F.cross_entropy`.
    Raises ValueError for other shapes, dtypes or devices and, on a CPU, for a label outside of the
    vocabulary; NotImplementedError under torch.jit.trace.
    """
    refuse_tracing("linear_cross_entropy")
    _check(x, weight, labels)
    device = x.device.type
    dtype = weight.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows, target = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    fused = obstacle(x, weight, labels) is None
    if fused:
        wrong = ((target < 0) & (target != IGNORE)) | (target >= weight.shape[0])
        if wrong.any():  # the kernel would write beside the row
            raise ValueError(f"label {int(target[wrong][0])} is outside of 0 .. {weight.shape[0] - 1}")
    keep = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, predictions = _LinearCrossEntropy.apply(rows, weight, target, dtype, keep, fused)
    return loss, predictions.view(labels.shape)


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
    check_tensor("labels", labels, [str(size) for size in x.shape[:-1]], (torch.int64,))
    for name, other in (("weight", weight), ("labels", labels)):
        if other.device != x.device:
            raise ValueError(f"{name} is on {other.device}, x on {x.device}; move it there")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        keep: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        W, M, V = weight.to(dtype), x.shape[0], weight.shape[0]
        onednn = dtype == torch.float32 and x.device.type == "cpu" and ops.onednn_is_faster()
        losses, predictions = x.new_zeros(M, dtype=wide), torch.empty_like(labels)
        dx = torch.empty_like(x) if keep else None
        dW = torch.zeros_like(weight, dtype=wide) if keep else None
        scale = 1.0 / (labels != IGNORE).sum().to(wide)
        rows = max(1, BLOCK_LOGITS // V)
        with without_autocast(x.device.type):
            for start in range(0, M, rows):
                part = slice(start, start + rows)
                xs = x[part].to(dtype)
                logits = (ops.matmul(xs, W) if onednn else xs @ W.t()).to(wide)
                kernel = _cpu_rows if fused else _reference_rows
                losses[part], predictions[part] = kernel(logits, labels[part], scale)
                if dx is None or dW is None:
                    continue
                g = logits.to(dtype)
                dx[part] = ops.matmul(g, W.t()) if onednn else g @ W
                dW += ops.outer(g, xs) if onednn else g.t() @ xs
        ctx.save_for_backward(dx, dW)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(predictions)
        return losses.sum() * scale, predictions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        dx, dW = ctx.saved_tensors
        return dx * grad.to(dx.dtype), (dW * grad).to(ctx.weight_dtype), None, None, None, None


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
