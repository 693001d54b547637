"""Selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, equations 2 and 4), one function, five backends.

    delta_t = softplus(dt_t + dt_bias)                            both optional
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t            h_{-1} = initial_state or 0
    y_t     = (C_t . h_t + D u_t) * silu(z_t)                     D and z optional

`reference` is that loop. `chunks` goes by blocks of tokens in plain PyTorch (`_scan_chunks.py`). `cuda`
is mamba-ssm's kernel. `cpu` (`_scan_cpu.py`) and `triton`, for GPUs (`_scan_triton.py`), are ours: they never
store (batch, length, d_inner, d_state), return states at chosen positions from the same pass, start from any
state, and give gradients to and from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops import _cuda_kernels, _scan_triton, _triton
from ssm_retrieval.ops._checks import check_flags, check_positions, check_shapes, check_tensor
from ssm_retrieval.ops._route import asked, obstacle, refuse_tracing, require_cpu, warn_once
from ssm_retrieval.ops._scan_arguments import ScanArguments, skipped_and_gated, widened
from ssm_retrieval.ops._scan_chunks import scan_by_chunks
from ssm_retrieval.ops._scan_cpu import scan_on_cpu

MAX_D_STATE = 256

Output = Tensor | tuple[Tensor, ...]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    states_at: Sequence[int] | Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Run the recurrence above over every sequence and channel.

    Floating arguments are float32, bfloat16, float16 or float64, contiguous or not; computed in float32
    (float64 if u is float64), also under autocast. Where delta A is positive, `cpu` stops exp(delta A) at the
    type's largest power of two (1.7e38 in float32, from 88 on), where the other backends reach infinity.

    Args:
        u: The input, (batch, length, d_inner).
        dt: Step sizes, as u.
        A: (d_inner, d_state), usually negative.
        B: (batch, length, d_state).
        C: As B.
        D: (d_inner,).
        z: The gate, as u.
        dt_bias: (d_inner,).
        dt_softplus: Whether softplus makes the steps positive.
        initial_state: h before the first token, (batch, d_inner, d_state).
        states_at: Positions in [0, length), any order, the same for the whole batch.
        return_last_state: Whether to return h after the last token.
        backend: "auto" takes the one of the enclosing `ops.backend`, else `cpu` for CPU tensors; on a GPU
            (CUDA or ROCm) `cuda` if mamba-ssm is installed, can do what is asked and is not known to be
            slower, or `triton` if Triton is installed, which comes with torch there; else `chunks`, and it
            warns where that runs on a GPU. A gradient of the gradients of `cpu` and `triton` is computed by
            `chunks`, as is everything inside transforms of torch.func.

    Returns:
        y (batch, length, d_inner) in u's dtype; with return_last_state also h after the last token (batch,
        d_inner, d_state); with states_at also h_t (batch, positions, d_inner, d_state); in this order as a
        tuple. States are float32 (float64 for float64 inputs). All are differentiable any number of times,
        but for `cuda`.

    Raises:
        ValueError: For wrong shapes, dtypes, devices, positions, d_state or backend.
        ImportError: If mamba-ssm or Triton is asked for and missing.
        NotImplementedError: Under torch.jit.trace.
    """
    refuse_tracing("selective_scan")
    backend = asked(backend)
    given = ScanArguments(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state)
    _check(given)
    check_flags(dt_softplus=dt_softplus, return_last_state=return_last_state)
    positions = None if states_at is None else check_positions(states_at, u.shape[1])
    wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given.tensors)
    if backend == "auto":
        backend = _choose(given.tensors, positions, return_last_state and wants_grad)
    elif backend == "cpu":
        require_cpu(*given.tensors)
    elif backend == "triton":
        _triton.require(*given.tensors, dtypes=_scan_triton.DTYPES)
    if backend == "cuda":
        if not _cuda_kernels.takes(u):
            raise ValueError(
                f"backend='cuda' takes float32, bfloat16 or float16 and at least one token; got {u.dtype} "
                f"{tuple(u.shape)}; use backend='auto'"
            )
        if initial_state is not None or positions is not None or (return_last_state and wants_grad):
            raise ValueError(
                "backend='cuda' cannot start from initial_state, return states_at or differentiate the last "
                "state (mamba-ssm's kernel does not); use backend='auto'"
            )
        return _cuda(given, return_last_state)
    if backend in ("cpu", "triton") and u.numel() == 0:
        backend = "chunks"
    y, *more = _RUN[backend](given, positions, return_last_state)
    return (y, *more) if more else y


def _check(given: ScanArguments) -> None:
    u, A = given.u, given.A
    check_tensor("u", u, ("batch", "length", "d_inner"))
    check_tensor("A", A, ("d_inner", "d_state"))
    (b, L, E), N = u.shape, A.shape[1]
    if not 1 <= N <= MAX_D_STATE:
        raise ValueError(f"d_state={N} is not supported; use 1 to {MAX_D_STATE}")
    check_shapes(
        u,
        dt=(given.dt, (b, L, E)),
        A=(A, (E, N)),
        B=(given.B, (b, L, N)),
        C=(given.C, (b, L, N)),
        D=(given.D, (E,)),
        z=(given.z, (b, L, E)),
        dt_bias=(given.dt_bias, (E,)),
        initial_state=(given.initial_state, (b, E, N)),
    )


def _choose(tensors: tuple[Tensor | None, ...], positions: list[int] | None, needs_last_grad: bool) -> str:
    """The fastest backend that can do what is asked."""
    u, initial_state = tensors[0], tensors[-1]
    assert u is not None
    if _triton.on_gpu(u):
        able = initial_state is None and positions is None and not needs_last_grad and _cuda_kernels.takes(u)
        return _triton.choose("selective_scan", "mamba_ssm", able, *tensors, dtypes=_scan_triton.DTYPES)
    if obstacle(*tensors) is None:
        return "cpu"
    if u.device.type == "mps" and u.shape[1] > 1:
        warn_once("selective_scan runs in plain PyTorch on this GPU, by blocks of tokens, which is slow")
    return "chunks"


def _reference(given: ScanArguments, positions: list[int] | None, return_last_state: bool) -> list[Tensor]:
    """The equations as written, on any device."""
    u, delta, A, B, C, h = widened(given)
    hs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # (batch, d_inner, d_state)
        write = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        h = decay * h + write
        hs.append(h)
    trajectory = torch.stack(hs, dim=1) if hs else u.new_zeros(u.shape[0], 0, *A.shape)
    out = [skipped_and_gated((trajectory * C[:, :, None, :]).sum(-1), given)]
    if return_last_state:
        out.append(h)
    if positions is not None:
        out.append(trajectory[:, positions])
    return out


_RUN: dict[str, Callable[..., list[Tensor]]] = {
    "cpu": scan_on_cpu,
    "triton": _scan_triton.scan_on_gpu,
    "chunks": scan_by_chunks,
    "reference": _reference,
}


def _cuda(given: ScanArguments, return_last_state: bool) -> Output:
    """mamba-ssm's kernel, imported here and nowhere else."""
    takes = ("z", "delta_bias", "delta_softplus", "return_last_state")
    scan = _cuda_kernels.kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", *takes)
    _cuda_kernels.on_gpu(given.u)
    return in_mamba_ssm_layout(scan, given, return_last_state)


def in_mamba_ssm_layout(kernel: Callable[..., Any], given: ScanArguments, return_last_state: bool) -> Output:
    """Call a function of mamba-ssm's signature: channels before time, A, D and the bias in float32.

    Args:
        kernel: `selective_scan_fn`, or a function with its arguments.
        given: The arguments of `selective_scan`, with its shapes.
        return_last_state: Whether to return h after the last token.

    Returns:
        y (batch, length, d_inner); with return_last_state a tuple of y and h (batch, d_inner, d_state).
    """

    def turn(x: Tensor | None) -> Tensor | None:
        return None if x is None else _cuda_kernels.packed(x.to(given.u.dtype).transpose(1, 2))

    out = kernel(
        turn(given.u),
        turn(given.dt),
        given.A.float(),
        turn(given.B),
        turn(given.C),
        None if given.D is None else given.D.float(),
        z=turn(given.z),
        delta_bias=None if given.dt_bias is None else given.dt_bias.float(),
        delta_softplus=given.dt_softplus,
        return_last_state=return_last_state,
    )
    if return_last_state:
        return out[0].transpose(1, 2), out[1]
    return out.transpose(1, 2)
