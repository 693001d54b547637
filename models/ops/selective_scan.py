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

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from models.ops import LANES, _cuda_kernels
from models.ops._threads import run_tasks

BACKENDS = ("auto", "reference", "cpu", "cuda")
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

    u, dt, z: (batch, length, d_inner). A: (d_inner, d_state), usually negative. B, C: (batch, length,
    d_state). D, dt_bias: (d_inner,). initial_state: (batch, d_inner, d_state). Float32, bfloat16, float16 or
    float64, contiguous or not; computed in float32 (float64 if u is float64), also under autocast.
    states_at: positions in [0, length), any order, the same for the whole batch.
    backend: "auto" takes `cpu` for CPU tensors, `cuda` for CUDA tensors if mamba-ssm is installed and can do
    what is asked, else `reference`.

    Returns y (batch, length, d_inner) in u's dtype; with return_last_state also h after the last token
    (batch, d_inner, d_state); with states_at also h_t (batch, positions, d_inner, d_state); in this order as
    a tuple. States are float32 (float64 for float64 inputs) and differentiable.
    Raises ValueError for wrong shapes, positions, d_state or backend, ImportError if mamba-ssm is missing.
    """
    _check(u, dt, A, B, C, D, z, dt_bias, initial_state, backend)
    positions = None if states_at is None else _positions(states_at, u)
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if backend == "auto":
        backend = _choose(u, initial_state, positions, return_last_state and wants_grad)
    if backend == "cuda":
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
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"u must be (batch, length, d_inner) and A (d_inner, d_state); got {tuple(u.shape)} "
            f"and {tuple(A.shape)}"
        )
    (b, L, E), N = u.shape, A.shape[1]
    if not 1 <= N <= MAX_D_STATE:
        raise ValueError(f"d_state={N} is not supported; use 1 to {MAX_D_STATE}")
    expected = {
        "dt": (dt, (b, L, E)),
        "A": (A, (E, N)),
        "B": (B, (b, L, N)),
        "C": (C, (b, L, N)),
        "D": (D, (E,)),
        "z": (z, (b, L, E)),
        "dt_bias": (dt_bias, (E,)),
        "initial_state": (initial_state, (b, E, N)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; with this u and A it must be {shape}")


def _positions(states_at: Sequence[int] | Tensor, u: Tensor) -> Tensor:
    positions = torch.as_tensor(states_at, dtype=torch.int64, device=u.device).flatten()
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= u.shape[1]):
        raise ValueError(f"states_at must lie in [0, length={u.shape[1]}); got {positions.tolist()}")
    return positions


def _choose(u: Tensor, initial_state: Tensor | None, positions: Tensor | None, needs_last_grad: bool) -> str:
    if u.device.type == "cpu":
        return "cpu"
    able = initial_state is None and positions is None and not needs_last_grad
    cuda = u.device.type == "cuda" and able and _cuda_kernels.installed("mamba_ssm")
    return "cuda" if cuda else "reference"


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


_NONE: dict[torch.dtype, np.ndarray] = {
    torch.float32: np.zeros(0, np.float32),
    torch.float64: np.zeros(0, np.float64),
}
_NO_POSITIONS = np.zeros(0, np.int64)


def _flat(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """The numbers of a contiguous tensor as a 1-D array; an absent argument as an empty one.

    Parameters are copied (they are small): NumPy pins the storage of what it has seen, which FSDP resizes.
    """
    if x is None:
        return _NONE[dtype]
    x = x.detach().clone() if isinstance(x, Parameter) else x.detach()
    return x.numpy().reshape(-1)


def _scaled(arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The arguments with A times log2(e), as the kernels want it: exp(dt A) = 2^(dt A log2(e))."""
    u, dt, A, *rest = arguments
    assert A is not None
    return u, dt, A.detach() * math.log2(math.e), *rest


def _forward(
    arguments: tuple[Tensor | None, ...], softplus: bool, positions: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernel on arguments in its layout: y, last state, states, checkpoints."""
    from models.ops._scan_kernels import CHUNK, scan_forward  # numba: imported on first use only

    u, _, A, _, _, D, z, _, h0 = arguments
    assert u is not None and A is not None
    (b, L, _), (blocks, N, _) = u.shape, A.shape
    P = 0 if positions is None else positions.numel()
    y, last = torch.empty_like(u), u.new_empty(b, blocks, N, LANES)
    states = u.new_empty(b, P, blocks, N, LANES)
    checkpoints = u.new_empty(b, -(-L // CHUNK) if keep else 0, blocks, N, LANES)
    flat = [_flat(x, u.dtype) for x in _scaled(arguments)]
    out = [_flat(x, u.dtype) for x in (y, checkpoints, states, last)]
    where = _NO_POSITIONS if positions is None else positions.numpy()
    sizes, flags = (L, blocks, N, P), (softplus, D is not None, z is not None, h0 is not None, keep)
    run_tasks(lambda tasks: scan_forward(tasks, sizes, flags, *flat, where, *out), b * blocks)
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
        from models.ops._scan_kernels import GROUP, scan_backward

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
        flat = [_flat(x, u.dtype) for x in _scaled((u, dt, A, B, C, D, z, bias, checkpoints))]
        grads = [_flat(x, u.dtype) for x in (gy, gstates, glast)]
        out = [_flat(x, u.dtype) for x in (du, ddt, dA, dB, dC, dD, dz, dbias, dh0)]
        where = _NO_POSITIONS if positions is None else positions.numpy()
        flags = (ctx.softplus, D is not None, z is not None, gstates is not None, glast is not None)
        sizes = (L, blocks, N, P)
        run_tasks(lambda tasks: scan_backward(tasks, sizes, flags, *flat, where, *grads, *out), b * groups)
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
        return None if x is None else x.to(u.dtype).transpose(1, 2).contiguous()

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
