"""Selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, equations 2 and 4), one function, three backends.

    delta_t = softplus(dt_t + dt_bias)                            both optional
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t            h_{-1} = initial_state or 0
    y_t     = (C_t . h_t + D u_t) * silu(z_t)                     D and z optional

`reference` is that loop. `cuda` is mamba-ssm's kernel. `cpu` is fused: it never stores (batch, length,
d_inner, d_state), returns states at chosen positions from the same pass, starts from any state, and gives
gradients to and from all of them.

Why numba for the CPU. Four routes were considered for forward + backward at batch 8, length 1024, d_inner
256, d_state 16, float32, 2 cores (`benchmarks/scan.py` prints today's numbers):
  - a parallel scan in PyTorch (mambapy's) takes more than a second, because it stores the whole trajectory;
  - C++ through torch's extension loader took 64 ms as a prototype, but needs a compiler, headers and a slow
    first build on every machine, and a second implementation where there is none;
  - loops left to numba's auto-vectoriser do not vectorise (the recurrence runs along the outer loop and the
    arrays might alias);
  - numba with explicit 16-lane vectors (`_simd.py`) is at least as fast as the C++ prototype, compiles itself
    in seconds, is cached on disk, and installs as a wheel on every platform: full speed without a compiler.
So there is one fast CPU path, and no fallback to maintain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops import LANES, _cuda_kernels
from ssm_retrieval.ops._arrays import flat
from ssm_retrieval.ops._checks import check_flags, check_name, check_positions, check_shapes, check_tensor
from ssm_retrieval.ops._route import obstacle, refuse_tracing, require_cpu, uncompiled, warn_once
from ssm_retrieval.ops._threads import run_tasks

BACKENDS = ("auto", "reference", "cpu", "cuda")
MAX_D_STATE = 256

Output = Tensor | tuple[Tensor, ...]


@uncompiled
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

    u, dt, z: (batch, length, d_inner). A: (d_inner, d_state), usually negative. B, C: (batch, length,
    d_state). D, dt_bias: (d_inner,). initial_state: (batch, d_inner, d_state). Float32, bfloat16, float16 or
    float64, contiguous or not; computed in float32 (float64 if u is float64), also under autocast.
    states_at: positions in [0, length), any order, the same for the whole batch.
    backend: "auto" takes `cpu` for CPU tensors, `cuda` for CUDA tensors if mamba-ssm is installed and can do
    what is asked, else `reference`; it warns where that loops over time on a GPU.
    Where delta A is positive, `cpu` stops exp(delta A) at the type's largest power of two (1.7e38 in float32,
    from 88 on), where the other backends reach infinity.

    Returns y (batch, length, d_inner) in u's dtype; with return_last_state also h after the last token
    (batch, d_inner, d_state); with states_at also h_t (batch, positions, d_inner, d_state); in this order as
    a tuple. States are float32 (float64 for float64 inputs) and differentiable.
    Raises ValueError for wrong shapes, dtypes, devices, positions, d_state or backend, ImportError if
    mamba-ssm is missing, NotImplementedError under torch.jit.trace.
    """
    refuse_tracing("selective_scan")
    _check(u, dt, A, B, C, D, z, dt_bias, initial_state, backend)
    check_flags(dt_softplus=dt_softplus, return_last_state=return_last_state)
    positions = None
    if states_at is not None:
        positions = torch.tensor(check_positions(states_at, u.shape[1]), dtype=torch.int64, device=u.device)
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if backend == "auto":
        backend = _choose(tensors, positions, return_last_state and wants_grad)
    elif backend == "cpu":
        require_cpu(*tensors)
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
        return _cuda(u, dt, A, B, C, D, z, dt_bias, dt_softplus, return_last_state)
    run = _cpu if backend == "cpu" and u.shape[1] > 0 and u.shape[0] > 0 else _reference
    y, *more = run(u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, positions, return_last_state)
    return (y, *more) if more else y


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
) -> None:
    check_name("backend", backend, BACKENDS)
    check_tensor("u", u, ("batch", "length", "d_inner"))
    check_tensor("A", A, ("d_inner", "d_state"))
    (b, L, E), N = u.shape, A.shape[1]
    if not 1 <= N <= MAX_D_STATE:
        raise ValueError(f"d_state={N} is not supported; use 1 to {MAX_D_STATE}")
    check_shapes(
        u,
        dt=(dt, (b, L, E)),
        A=(A, (E, N)),
        B=(B, (b, L, N)),
        C=(C, (b, L, N)),
        D=(D, (E,)),
        z=(z, (b, L, E)),
        dt_bias=(dt_bias, (E,)),
        initial_state=(initial_state, (b, E, N)),
    )


def _choose(tensors: tuple[Tensor | None, ...], positions: Tensor | None, needs_last_grad: bool) -> str:
    u, initial_state = tensors[0], tensors[-1]
    assert u is not None
    if u.device.type == "cuda":
        able = initial_state is None and positions is None and not needs_last_grad and _cuda_kernels.takes(u)
        installed = _cuda_kernels.installed("mamba_ssm")
        if able and installed:
            return "cuda"
        if u.shape[1] > 1:
            why = "whose kernel cannot do what is asked here" if installed else _cuda_kernels.how("mamba_ssm")
            warn_once(
                "selective_scan loops over the tokens in Python on this GPU, which is slow and keeps every "
                f"state; the fast way is mamba-ssm, {why}"
            )
    return "cpu" if obstacle(*tensors) is None else "reference"


def _wide(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    positions: Tensor | None,
    return_last_state: bool,
) -> list[Tensor]:
    """The equations as written, on any device."""
    dtype, wide = u.dtype, _wide(u)
    u, dt, A, B, C = (t.to(wide) for t in (u, dt, A, B, C))
    delta = dt if dt_bias is None else dt + dt_bias.to(wide)
    delta = F.softplus(delta) if dt_softplus else delta
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(wide)
    hs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # (batch, d_inner, d_state)
        write = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        h = decay * h + write
        hs.append(h)
    trajectory = torch.stack(hs, dim=1) if hs else u.new_zeros(u.shape[0], 0, *A.shape)
    y = (trajectory * C[:, :, None, :]).sum(-1)
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    out = [y.to(dtype)]
    if return_last_state:
        out.append(h)
    if positions is not None:
        out.append(trajectory[:, positions])
    return out


def pad_channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, contiguous, zeros added to its last axis up to a multiple of 16; x itself if it is so."""
    missing = -x.shape[-1] % LANES
    x = x.to(dtype)  # F.pad copies even where it adds nothing
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def _blocked(x: Tensor) -> Tensor:
    """(..., channels, N) -> (..., blocks, N, 16), the missing channels of the last block zero."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % LANES))
    return x.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def _unblocked(x: Tensor, channels: int) -> Tensor:
    """Inverse of `_blocked`."""
    return x.transpose(-1, -2).flatten(-3, -2)[..., :channels, :]


def _cpu(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    positions: Tensor | None,
    return_last_state: bool,
) -> list[Tensor]:
    """Bring the arguments into the kernels' layout (differentiably) and back."""
    dtype, wide, E = u.dtype, _wide(u), u.shape[-1]

    def channels(x: Tensor | None) -> Tensor | None:
        return None if x is None else pad_channels(x, wide)

    wanted, inverse = (None, None) if positions is None else positions.unique(return_inverse=True)
    arguments = (
        channels(u),
        channels(dt),
        _blocked(A.to(wide)),
        B.to(wide).contiguous(),
        C.to(wide).contiguous(),
        channels(D),
        channels(z),
        channels(u.new_zeros(E) if dt_bias is None else dt_bias),
        None if initial_state is None else _blocked(initial_state.to(wide)),
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        y, last, states = _Scan.apply(*arguments, dt_softplus, wanted)
    else:
        y, last, states, _ = _forward(arguments, dt_softplus, wanted, keep=False)
    out = [(y if y.shape[-1] == E else y[..., :E]).to(dtype)]
    if return_last_state:
        out.append(_unblocked(last, E))
    if inverse is not None:
        out.append(_unblocked(states, E)[:, inverse])
    return out


def _scaled(arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The arguments with A times log2(e), as the kernels want it: exp(dt A) = 2^(dt A log2(e))."""
    u, dt, A, *rest = arguments
    assert A is not None
    return u, dt, A.detach() * math.log2(math.e), *rest


def _forward(
    arguments: tuple[Tensor | None, ...], softplus: bool, positions: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel on arguments in its layout: y, last state, states, checkpoints."""
    from ssm_retrieval.ops._scan_kernels import CHUNK, scan_forward  # numba: imported on first use only

    u, _, A, _, _, D, z, _, h0 = arguments
    assert u is not None and A is not None
    (b, L, _), (blocks, N, _) = u.shape, A.shape
    P = 0 if positions is None else positions.numel()
    y, last = torch.empty_like(u), u.new_empty(b, blocks, N, LANES)
    states = u.new_empty(b, P, blocks, N, LANES)
    checkpoints = u.new_empty(b, -(-L // CHUNK) if keep else 0, blocks, N, LANES)
    given = [flat(x, u.dtype) for x in _scaled(arguments)]
    out = [flat(x, u.dtype) for x in (y, checkpoints, states, last)]
    where = flat(positions, torch.int64)
    sizes, flags = (L, blocks, N, P), (softplus, D is not None, z is not None, h0 is not None, keep)
    run_tasks(lambda tasks: scan_forward(tasks, sizes, flags, *given, where, *out), b * blocks)
    return y, last, states, checkpoints


class _Scan(torch.autograd.Function):
    """The two kernels as one differentiable function of blocked arguments."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, softplus, positions = inputs
        y, last, states, checkpoints = _forward(tuple(arguments), softplus, positions, keep=True)
        ctx.save_for_backward(*arguments[:8], checkpoints, positions)
        ctx.softplus, ctx.has_h0 = softplus, arguments[8] is not None
        ctx.set_materialize_grads(False)
        return y, last, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gy: Tensor | None, glast: Tensor | None, gstates: Tensor | None) -> Any:
        from ssm_retrieval.ops._scan_kernels import GROUP, scan_backward

        u, dt, A, B, C, D, z, bias, checkpoints, positions = ctx.saved_tensors
        (b, L, E), (blocks, N, _) = u.shape, A.shape
        gy = torch.zeros_like(u) if gy is None else gy.contiguous()
        glast = None if glast is None else glast.contiguous()
        gstates = None if gstates is None else gstates.contiguous()
        P, groups = 0 if positions is None else positions.numel(), -(-blocks // GROUP)
        du, ddt = torch.empty_like(u), torch.empty_like(u)
        dz = None if z is None else torch.empty_like(u)
        dA, dh0 = u.new_empty(b, blocks, N, LANES), u.new_empty(b, blocks, N, LANES)
        dB, dC = u.new_empty(groups, b, L, N), u.new_empty(groups, b, L, N)
        dD, dbias = u.new_empty(b, E), u.new_empty(b, E)
        given = [flat(x, u.dtype) for x in _scaled((u, dt, A, B, C, D, z, bias, checkpoints))]
        grads = [flat(x, u.dtype) for x in (gy, gstates, glast)]
        out = [flat(x, u.dtype) for x in (du, ddt, dA, dB, dC, dD, dz, dbias, dh0)]
        where = flat(positions, torch.int64)
        flags = (ctx.softplus, D is not None, z is not None, gstates is not None, glast is not None)
        sizes = (L, blocks, N, P)
        run_tasks(lambda tasks: scan_backward(tasks, sizes, flags, *given, where, *grads, *out), b * groups)
        return (
            du,
            ddt,
            dA.sum(0),
            dB.sum(0),
            dC.sum(0),
            None if D is None else dD.sum(0),
            dz,
            dbias.sum(0),
            dh0 if ctx.has_h0 else None,
            None,
            None,
        )


def _cuda(u: Tensor, *rest: Any) -> Output:
    """mamba-ssm's kernel, imported here and nowhere else."""
    takes = ("z", "delta_bias", "delta_softplus", "return_last_state")
    scan = _cuda_kernels.kernel("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", *takes)
    _cuda_kernels.on_gpu(u)
    return in_mamba_ssm_layout(scan, u, *rest)


def in_mamba_ssm_layout(
    kernel: Callable[..., Any],
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    return_last_state: bool,
) -> Output:
    """Call a function of mamba-ssm's signature: channels before time, A, D and the bias in float32."""

    def turn(x: Tensor | None) -> Tensor | None:
        return None if x is None else _cuda_kernels.packed(x.to(u.dtype).transpose(1, 2))

    out = kernel(
        turn(u),
        turn(dt),
        A.float(),
        turn(B),
        turn(C),
        None if D is None else D.float(),
        z=turn(z),
        delta_bias=None if dt_bias is None else dt_bias.float(),
        delta_softplus=dt_softplus,
        return_last_state=return_last_state,
    )
    if return_last_state:
        return out[0].transpose(1, 2), out[1]
    return out.transpose(1, 2)
