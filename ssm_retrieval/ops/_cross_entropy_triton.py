"""Rows of a cross-entropy on a GPU: loss, arg-max and, in place of the logits, their gradient.

A program takes a row, twice: once for its maximum, its sum of exponentials and its label's logit, all found
together (Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3), once for the gradient. Products with the
head stay with cuBLAS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_retrieval.ops import _triton

WIDTH = 2048  # logits that a program has in registers at a time, 16 for each thread of four warps


@triton.jit(do_not_specialize=["V"])
def softmax_rows(
    logits, labels, losses, top_ids, scale, V, IGNORE: tl.constexpr, KEEP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """`softmax_rows` of `_softmax_kernels.py`. With KEEP the logits become their gradient times *scale."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V  # beyond 2^31 with many rows of a large vocabulary
    label = tl.load(labels + row)
    columns = tl.arange(0, WIDTH)
    most = tl.full((WIDTH,), -float("inf"), tl.float32)
    total, chosen = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    where_most = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, V, WIDTH):
        at = start + columns
        x = tl.load(logits + at, mask=at < V, other=-float("inf")).to(tl.float32)
        where_most = tl.where(x > most, at, where_most)
        new = tl.maximum(most, x)
        base = tl.where(new == -float("inf"), 0.0, new)  # a lane without a logit adds exp(-inf) = 0
        total = total * tl.exp(most - base) + tl.exp(x - base)
        # not loaded on its own, which might come after another thread stored its gradient
        chosen += tl.where(at == label, x, 0.0)
        most = new
    top = tl.max(most, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
    first = tl.min(tl.where(most == top, where_most, V - 1), 0)
    real = label != IGNORE
    loss = tl.where((label >= 0) & (label < V), norm - tl.sum(chosen, 0), float("nan"))
    tl.store(losses + row, tl.where(real, loss, 0.0))
    tl.store(top_ids + row, first.to(tl.int64))
    if KEEP:
        factor = tl.where(real, tl.load(scale), 0.0)
        for start in range(0, V, WIDTH):
            at = start + columns
            x = tl.load(logits + at, mask=at < V, other=-float("inf")).to(tl.float32)
            grad = factor * (tl.exp(x - norm) - tl.where(at == label, 1.0, 0.0))
            tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=at < V)


def triton_rows(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """Loss and arg-max of each row of contiguous logits, which become scale * (softmax - onehot) if `keep`.

    logits: (M, V), float32, bfloat16 or float16; computed in float32. A label outside of the vocabulary makes
    the loss NaN: to look for it first would wait for the GPU.
    """
    M, V = logits.shape
    if not logits.is_contiguous():
        raise ValueError(
            f"the kernel wants contiguous logits; got {logits.stride()} of {tuple(logits.shape)}"
        )
    losses, predictions = logits.new_empty(M, dtype=torch.float32), torch.empty_like(labels)
    width = min(WIDTH, triton.next_power_of_2(V))
    with _triton.launching(logits):
        softmax_rows[(M,)](
            logits, labels.contiguous(), losses, predictions, scale, V, IGNORE=ignore, KEEP=keep, WIDTH=width
        )
    return losses, predictions
