"""The delta rule and linear attention with decay: one recurrence, four ways to compute it.

    u_t = beta_t (v_t - h_{t-1} a_t k_t)         erase=True: what the key holds already is taken away first
        = beta_t v_t                             erase=False
    h_t = h_{t-1} a_t + u_t k_t^T                h_t: (P, N) per head, a_t = exp(log_decay_t)
    y_t = h_t q_t

a_t multiplies the N columns of h, all by the same number or each by its own. The published layers:

    DeltaNet (arXiv 2406.06484)            erase, no decay
    gated DeltaNet (arXiv 2412.06464)      erase, one decay for a head
    Kimi delta attention (arXiv 2510.26692)    erase, a decay for each channel of the key
    gated linear attention (arXiv 2312.06635)  no erasure, a decay for each channel of the key

They want keys of length 1 and scale q by N^-1/2; that is up to the caller. `reference` is the recurrence as
written, `chunks` solves it by blocks of tokens (`_delta_chunks.py`), `cpu` and `triton` are our kernels for
CPUs (`_delta_cpu.py`) and for GPUs (`_delta_triton.py`), of which the latter do the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops import _triton
from ssm_retrieval.ops._checks import check_flags, check_positions, check_shapes, check_tensor
from ssm_retrieval.ops._delta_chunks import DeltaArguments, delta_by_chunks
from ssm_retrieval.ops._delta_cpu import delta_on_cpu
from ssm_retrieval.ops._delta_triton import WIDEST, delta_on_triton
from ssm_retrieval.ops._route import (
    asked,
    obstacle,
    refuse_tracing,
    require_cpu,
    warn_once,
    without_autocast,
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    erase: bool = True,
    initial_state: Tensor | None = None,
    states_at: Sequence[int] | Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Run the recurrence above over every sequence and head.

    Floating arguments are float32, bfloat16, float16 or float64; computed in float32 (float64 if v is
    float64), also under autocast.

    Args:
        q: What is read, (batch, length, heads, N).
        k: Where it is written, as q.
        v: What is written, (batch, length, heads, P).
        beta: How strongly, (batch, length, heads), usually in (0, 1); up to 2 where a write may turn the sign
            of what it erases (arXiv 2411.12537). None: 1.
        log_decay: Logarithm of the decay, at most 0, (batch, length, heads) or (batch, length, heads, N).
            None: nothing decays.
        erase: Whether a write takes away what the key holds already.
        initial_state: h before the first token, (batch, heads, P, N).
        states_at: Positions in [0, length), any order, the same for the whole batch.
        return_last_state: Whether to return h after the last token.
        backend: "auto" takes the one of the enclosing `ops.backend`, else `cpu` for CPU tensors, `triton` for
            those on a GPU, not in float64 and with erasure up to N = 256, and `chunks` for others, which
            "cuda" is too. A gradient of the kernels' gradients is computed by `chunks`, as is everything
            inside transforms of torch.func. `triton` rounds the operands of matrix products to bfloat16 if
            q, k and v are all bfloat16.

    Returns:
        y (batch, length, heads, P) in v's dtype; with return_last_state also the last state (batch, heads, P,
        N); with states_at also h_t (batch, positions, heads, P, N); in this order as a tuple. States are
        float32 (float64 for float64 inputs). All are differentiable any number of times.

    Raises:
        ValueError: For wrong shapes, dtypes, devices, positions or backend.
        MissingPackage: If Triton is asked for and missing.
        NotImplementedError: Under torch.jit.trace.
    """
    refuse_tracing("delta_rule")
    backend = asked(backend)
    given = DeltaArguments(q, k, v, beta, log_decay, erase, initial_state)
    _check(given)
    check_flags(erase=erase, return_last_state=return_last_state)
    positions = None if states_at is None else check_positions(states_at, q.shape[1])
    run = _RUN[_choose(backend, given)]
    with without_autocast(v.device.type):
        y, *more = run(given, positions, return_last_state)
    return (y, *more) if more else y


def _choose(backend: str, given: DeltaArguments) -> str:
    """The form that a backend means for these arguments, a name of _RUN."""
    wide = given.erase and given.k.shape[-1] > WIDEST
    if backend == "auto" and _triton.on_gpu(given.v) and wide:
        why = f"Triton's kernels erase in at most {WIDEST} columns"
        warn_once(f"delta_rule runs in plain PyTorch on this GPU, which is slow: {why}")
        backend = "chunks"
    elif backend == "auto" and _triton.on_gpu(given.v):
        backend = _triton.choose("delta_rule", None, False, *given.tensors)
    elif backend == "auto":
        backend = "cpu" if obstacle(*given.tensors) is None else "chunks"
    elif backend == "cpu":
        require_cpu(*given.tensors)
    elif backend == "triton":
        _triton.require(*given.tensors)
        if wide:
            N = given.k.shape[-1]
            raise ValueError(
                f"backend='triton' erases in at most {WIDEST} columns, not {N}; use backend='auto'"
            )
    empty = backend in ("cpu", "triton") and given.v.numel() == 0
    return "chunks" if backend == "cuda" or empty else backend


def _check(given: DeltaArguments) -> None:
    check_tensor("q", given.q, ("batch", "length", "heads", "d_state"))
    check_tensor("k", given.k, ("batch", "length", "heads", "d_state"))
    check_tensor("v", given.v, ("batch", "length", "heads", "headdim"))
    (b, L, H, N), P = given.q.shape, given.v.shape[-1]
    for name, size in (("d_state", N), ("headdim", P)):
        if size < 1:
            raise ValueError(f"{name}={size} is not supported; use 1 or more")
    whole = given.log_decay is None or (isinstance(given.log_decay, Tensor) and given.log_decay.dim() == 3)
    check_shapes(
        given.q,
        k=(given.k, (b, L, H, N)),
        v=(given.v, (b, L, H, P)),
        beta=(given.beta, (b, L, H)),
        log_decay=(given.log_decay, (b, L, H) if whole else (b, L, H, N)),
        initial_state=(given.initial_state, (b, H, P, N)),
    )


def _reference(
    given: DeltaArguments, positions: Sequence[int] | None, return_last_state: bool
) -> list[Tensor]:
    """The equations as written, on any device."""
    q, k, v, beta, log_decay, h = given.widened()
    ys, found = [], {}
    for t in range(q.shape[1]):
        h = h * log_decay[:, t].exp().unsqueeze(-2)  # (b, H, P, N)
        key = k[:, t].unsqueeze(-2)
        u = v[:, t] - (h * key).sum(-1) if given.erase else v[:, t]
        h = h + (beta[:, t].unsqueeze(-1) * u).unsqueeze(-1) * key
        ys.append((h * q[:, t].unsqueeze(-2)).sum(-1))
        if t in (positions or ()):
            found[t] = h
    out = [torch.stack(ys, dim=1).to(given.v.dtype) if ys else torch.zeros_like(given.v)]
    if return_last_state:
        out.append(h)
    if positions is not None:
        none = h.new_empty(len(h), 0, *h.shape[1:])
        out.append(torch.stack([found[t] for t in positions], dim=1) if positions else none)
    return out


_RUN = {
    "cpu": delta_on_cpu, "triton": delta_on_triton, "chunks": delta_by_chunks, "reference": _reference,
}  # fmt: skip
