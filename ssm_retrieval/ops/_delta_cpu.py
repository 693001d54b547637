"""The delta rule by our CPU kernels: their layout, their gradients, and what torch.compile sees of them.

Why a recurrence and not matrix products. Forward and backward at batch 8, length 1,024, 4 heads of 64 x 64,
float32, on one thread of a Zen 5 take 35 ms here and 289 ms by the chunks of transformers, which are matrix
products: the state of a head stays in the first cache, and nothing but the inputs and a state for every
DELTA_CHUNK tokens is kept, a sixth of what they need (`benchmarks/delta.py` prints today's numbers).

What made the kernels fast: 64 channels at a time, which share what is loaded of q and k and leave their sums
in registers, and asking for the rows of later tokens in time. Each alone gains little, both halve the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssm_retrieval.ops import DELTA_CHUNK, LANES, value_lanes
from ssm_retrieval.ops._arrays import at_positions, blocked, flat, pad_channels, unblocked
from ssm_retrieval.ops._delta_chunks import DeltaArguments, delta_by_chunks
from ssm_retrieval.ops._kernel_autograd import differentiable
from ssm_retrieval.ops._threads import run_tasks


def delta_on_cpu(
    given: DeltaArguments, positions: Sequence[int] | None, return_last_state: bool
) -> list[Tensor]:
    """Bring the arguments of `delta_rule` into the kernels' layout (differentiably) and back."""
    q, k, v, beta, log_decay, h = given.widened()
    P, wanted = v.shape[-1], None if positions is None else sorted(set(positions))
    lanes = value_lanes(P)
    arguments = (
        q.contiguous(),
        k.contiguous(),
        pad_channels(v, given.wide, lanes),
        beta.contiguous(),
        log_decay.exp().contiguous(),
        None if given.initial_state is None else blocked(h, lanes),
    )
    y, last, states, _ = _run(*arguments, given.erase, wanted)
    out = [(y if y.shape[-1] == P else y[..., :P]).to(given.v.dtype)]
    if return_last_state:
        out.append(unblocked(last, P))
    if positions is not None and wanted is not None:
        out.append(at_positions(unblocked(states, P), wanted, positions))
    return out


def _by_chunks(erase: bool, positions: list[int] | None, *arguments: Tensor | None) -> list[Tensor]:
    """What `_forward` returns to differentiate, by PyTorch's operations."""
    q, k, v, beta, decay, h0 = arguments
    assert q is not None and k is not None and v is not None and decay is not None
    h = None if h0 is None else unblocked(h0, v.shape[-1])
    given = DeltaArguments(q, k, v, beta, decay.log(), erase, h)
    y, last, states = delta_by_chunks(given, positions or [], True)
    lanes = value_lanes(v.shape[-1])
    return [y, blocked(last, lanes), blocked(states, lanes)]


def _sizes(v: Tensor, k: Tensor, decay: Tensor, positions: list[int] | None) -> tuple[int, ...]:
    """Tokens, heads, blocks, N, width of the decay, stored positions."""
    _, L, H, P = v.shape
    return L, H, P // value_lanes(P), k.shape[-1], decay.shape[-1], len(positions or ())


def _vectors(v: Tensor) -> tuple[int, ...]:
    """A tuple as long as a kernel's vectors are wide, in units of LANES: numba compiles for each length."""
    return (0,) * (value_lanes(v.shape[-1]) // LANES)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    h0: Tensor | None,
    erase: bool,
    positions: list[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel on arguments in its layout: y, last state, states, checkpoints (if `keep`)."""
    from ssm_retrieval.ops import _delta_kernels  # numba: imported on first use only

    y, last, states, checkpoints = _results(k, v, decay, positions, keep)
    given = [flat(x, v.dtype) for x in (q, k, v, beta, decay, h0)]
    out = [flat(x, v.dtype) for x in (y, checkpoints, states, last)]
    where, sizes = np.array(positions or (), np.int64), _sizes(v, k, decay, positions)
    flags = (erase, h0 is not None, keep)
    run_tasks(
        lambda tasks: _delta_kernels.delta_forward(tasks, sizes, flags, *given, where, *out, _vectors(v)),
        len(v) * v.shape[2],
    )
    return y, last, states, checkpoints


def _results(
    k: Tensor, v: Tensor, decay: Tensor, positions: list[int] | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for what `_forward` returns."""
    L, H, blocks, N, _, S = _sizes(v, k, decay, positions)
    state, chunks = (H, blocks, N, value_lanes(v.shape[-1])), -(-L // DELTA_CHUNK) if keep else 0
    shapes = ((len(v), *state), (len(v), S, *state), (len(v), chunks, *state))
    last, states, checkpoints = (v.new_empty(shape) for shape in shapes)
    return torch.empty_like(v), last, states, checkpoints


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor,
    checkpoints: Tensor,
    erase: bool,
    positions: list[int] | None,
    gy: Tensor | None,
    glast: Tensor | None,
    gstates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernel: the gradients of q, k, v, beta, the decay and h0."""
    from ssm_retrieval.ops import _delta_kernels

    gy = torch.zeros_like(v) if gy is None else gy.contiguous()
    glast = None if glast is None else glast.contiguous()
    gstates = None if gstates is None else gstates.contiguous()
    dh0 = v.new_empty(len(v), *checkpoints.shape[2:])
    like_q, like_k, like_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grads = (like_q, like_k, like_v, torch.empty_like(beta), torch.empty_like(decay), dh0)
    given = [flat(x, v.dtype) for x in (q, k, v, beta, decay, checkpoints)]
    of_results = [flat(x, v.dtype) for x in (gy, gstates, glast)]
    out = [flat(x, v.dtype) for x in grads]
    where, sizes = np.array(positions or (), np.int64), _sizes(v, k, decay, positions)
    flags = (erase, gstates is not None, glast is not None)
    run_tasks(
        lambda tasks: _delta_kernels.delta_backward(
            tasks, sizes, flags, *given, where, *of_results, *out, _vectors(v)
        ),
        len(v) * v.shape[2],
    )
    return grads


_run, delta_forward, delta_backward = differentiable("delta_rule", _forward, _backward, _by_chunks)


@delta_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, positions, keep = rest
    return _results(k, v, decay, positions, keep)


@delta_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, checkpoints: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    dh0 = v.new_empty(len(v), *checkpoints.shape[2:])
    return (*(torch.empty_like(x) for x in (q, k, v, beta, decay)), dh0)
