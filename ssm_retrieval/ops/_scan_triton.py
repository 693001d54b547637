"""The selective scan by our Triton kernels: what they are given, gradients, torch.compile's operators.

Nothing but its arguments is kept for the backward pass, which finds the states before each tile again: one
exponential more for each (token, channel, state), instead of N / 16 numbers for each (token, channel).

Why fixed tiles and no autotuning: registers leave little choice (16 tokens of a channel fill a thread's in
the backward pass), trying several costs a minute at the first call, and sums would round otherwise from one
machine to the next. One warp for each program: others would have to wait for it at every step of a scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.ops import _triton
from ssm_retrieval.ops._arrays import at_positions
from ssm_retrieval.ops._kernel_autograd import differentiable
from ssm_retrieval.ops._scan_arguments import ScanArguments
from ssm_retrieval.ops._scan_chunks import scan_by_chunks

DTYPES = (*_triton.DTYPES, torch.float64)
TILE = 16, 32  # tokens and channels of a tile on NVIDIA's GPUs


def scan_on_gpu(
    given: ScanArguments, positions: Sequence[int] | None, return_last_state: bool
) -> list[Tensor]:
    """Bring the arguments of `selective_scan` into the kernels' layout (differentiably) and back."""
    u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state = given

    def turned(x: Tensor) -> Tensor:  # (..., channels, N) to (..., N, channels): channels are what is loaded
        return x.to(given.wide).transpose(-1, -2)

    wanted = None if positions is None else sorted(set(positions))
    h0 = None if initial_state is None else turned(initial_state)
    arguments = (u, dt, turned(A), B, C, D, z, dt_bias, h0)
    y, last, states, _ = _run(*arguments, dt_softplus, wanted)
    out = [y]
    if return_last_state:
        out.append(last.transpose(-1, -2))
    if positions is not None and wanted is not None:
        out.append(at_positions(states.transpose(-1, -2), wanted, positions))
    return out


def _by_chunks(softplus: bool, positions: list[int] | None, *arguments: Tensor | None) -> list[Tensor]:
    """What `_forward` returns to differentiate, by PyTorch's operations."""
    u, dt, A, B, C, D, z, bias, h0 = arguments
    assert u is not None and dt is not None and A is not None and B is not None and C is not None
    h = None if h0 is None else h0.transpose(-1, -2)
    given = ScanArguments(u, dt, A.transpose(-1, -2), B, C, D, z, bias, softplus, h)
    y, last, states = scan_by_chunks(given, positions or [], True)
    return [y, last.transpose(-1, -2), states.transpose(-1, -2)]


def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    h0: Tensor | None,
    softplus: bool,
    positions: list[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward kernels: y, last state, states, and a copy of the first (if `keep`)."""
    from ssm_retrieval.ops import _scan_triton_kernels as kernels  # Triton: imported on first use only

    b, L, E, N, P, tiles = _sizes(u, A, positions)
    u, dt, B, C = (_triton.unit_stride(x) for x in (u, dt, B, C))
    z, D, bias = _unit_stride(z), _packed(D), _packed(bias)
    y, last, states = u.new_empty(b, L, E), A.new_empty(b, N, E), A.new_empty(b, P, N, E)
    rate, flags = _scaled(A), _flags(A, softplus, bias)
    grid = (b * tiles * -(-E // _tile()[1]),)
    with _triton.launching(u):
        starts = _starts(u, dt, rate, B, bias, h0, flags)
        given = (u, dt, rate, B, C, _some(D, u), _some(z, u), _some(bias, u), starts, _slots(u, positions))
        strides = _strides(u, dt, B, C, u if z is None else z)
        has = dict(HAS_D=D is not None, HAS_Z=z is not None, HAS_STATES=P > 0)
        kernels.scan_forward[grid](*given, y, states, last, L, E, P, *strides, **has, **flags)
    first = A.new_empty(0) if h0 is None or not keep else h0.clone(memory_format=torch.contiguous_format)
    return y, last, states, first


def _starts(
    u: Tensor,
    dt: Tensor,
    rate: Tensor,
    B: Tensor,
    bias: Tensor | None,
    h0: Tensor | None,
    flags: dict[str, Any],
) -> Tensor:
    """The states before each tile, (batch, tiles, N, channels)."""
    from ssm_retrieval.ops import _scan_triton_kernels as kernels

    b, L, E, N, _, tiles = _sizes(u, rate, None)
    starts, sums = rate.new_empty(b, tiles, N, E), rate.new_empty(b, tiles, E)
    if tiles == 1:
        return _only(starts, h0)
    given = (u, dt, rate, B, _some(bias, u), starts, sums, L, E, *_strides(u, dt, B))
    kernels.tile_ends[(b * tiles * -(-E // flags["BE"]),)](*given, **flags)
    _carry(rate, h0, starts, sums, False)
    return starts


def _only(states: Tensor, first: Tensor | None) -> Tensor:
    """`states` (batch, 1, N, channels) of the only tile there is: `first`, or zeros."""
    return states.zero_() if first is None else states.copy_(first.unsqueeze(1))


def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    h0: Tensor,
    softplus: bool,
    positions: list[int] | None,
    gy: Tensor | None,
    glast: Tensor | None,
    gstates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels: the gradients of u, dt, A, B, C, D, z, bias and h0."""
    from ssm_retrieval.ops import _scan_triton_kernels as kernels

    b, L, E, N, P, tiles = _sizes(u, A, positions)
    u, dt, B, C = (_triton.unit_stride(x) for x in (u, dt, B, C))
    gstates = _packed(gstates) if P > 0 else None  # of no positions there is a gradient, too, an empty one
    z, D, bias = _unit_stride(z), _packed(D), _packed(bias)
    gy = u.new_zeros(1, 1, E).expand(b, L, E) if gy is None else _triton.unit_stride(gy)
    du, ddt, dz = (x.new_empty(b, L, E) for x in (u, dt, u if z is None else z))
    blocks = -(-E // _tile()[1])
    dB, dC = A.new_empty(2, b, blocks, L, N)
    dh0, ends, sums = A.new_empty(b, N, E), A.new_empty(b, tiles, N, E), A.new_empty(b, tiles, E)
    dD, dbias = A.new_zeros(2, b, tiles, E)
    rate, flags = _scaled(A), _flags(A, softplus, bias)
    has = dict(HAS_Z=z is not None, HAS_STATES=gstates is not None)
    slots = _slots(u, positions if gstates is not None else None)
    grid, some_z, some_states = (b * tiles * blocks,), _some(z, u), _some(gstates, u)
    with _triton.launching(u):
        starts = _starts(u, dt, rate, B, bias, h0 if h0.numel() else None, flags)
        if tiles > 1:
            read = (gy, dt, rate, C, some_z, _some(bias, u), some_states, slots)
            kernels.tile_starts[grid](
                *read, ends, sums, L, E, P, *_strides(gy, dt, C, some_z), **has, **flags
            )
            _carry(rate, glast, ends, sums, True)
        else:
            _only(ends, glast)
        given = (u, dt, rate, B, C, _some(D, u), some_z, _some(bias, u), starts, ends, gy, some_states, slots)
        made = (du, ddt, dB, dC, dD, dz, dbias, dh0)
        strides = _strides(u, dt, B, C, some_z, gy)
        kernels.scan_backward[grid](*given, *made, L, E, P, *strides, HAS_D=D is not None, **has, **flags)
    dA, dD, dbias = ends.sum((0, 1)), dD.sum((0, 1)), dbias.sum((0, 1))
    return du, ddt, dA, dB.sum(1).to(B.dtype), dC.sum(1).to(C.dtype), dD, dz, dbias, dh0


def _carry(rate: Tensor, first: Tensor | None, parts: Tensor, sums: Tensor, reverse: bool) -> None:
    """Run `carry`, which turns `parts` (batch, tiles, N, channels) into the states before each tile."""
    from ssm_retrieval.ops import _scan_triton_kernels as kernels

    b, tiles, N, E = parts.shape
    size = 16 if _triton.interpreted() else 128
    grid, has = (b * N * -(-E // size),), dict(HAS_FIRST=first is not None, REVERSE=reverse)
    first = parts if first is None else _triton.packed(first)
    kernels.carry[grid](rate, first, parts, sums, tiles, E, N=N, BE=size, WIDE=_wide(rate), **has)


def _tile() -> tuple[int, int]:
    """Tokens and channels of a tile: a thread for every channel of a warp, a tile's tokens in its registers.

    The interpreter scans element by element, so that it gets tiles that it has some of even in small tests.
    """
    if _triton.interpreted():
        return 8, 4
    return TILE if torch.version.hip is None else (16, 64)


def _sizes(u: Tensor, A: Tensor, positions: list[int] | None) -> tuple[int, ...]:
    """Batch, length, channels, d_state, stored positions, tiles."""
    return *u.shape, A.shape[0], len(positions or ()), -(-u.shape[1] // _tile()[0])


def _flags(A: Tensor, softplus: bool, bias: Tensor | None) -> dict[str, Any]:
    """The options that every kernel over tiles takes."""
    BT, BE = _tile()
    sizes = dict(N=A.shape[0], BT=BT, BE=BE, WIDE=_wide(A), num_warps=1)
    return dict(sizes, SOFTPLUS=softplus, HAS_BIAS=bias is not None)


def _wide(x: Tensor) -> Any:
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _scaled(A: Tensor) -> Tensor:
    """A times log2(e), as the kernels want it: exp(dt A) = 2^(dt A log2(e))."""
    return _triton.packed(A.detach() * math.log2(math.e))


def _slots(u: Tensor, positions: list[int] | None) -> Tensor:
    """(length,) int32: a token's place among the stored states, -1 if it has none; not read without any."""
    if not positions:
        return u
    slots = torch.full((u.shape[1],), -1, dtype=torch.int32)
    slots[positions] = torch.arange(len(positions), dtype=torch.int32)
    return slots.to(u.device)


def _strides(*tensors: Tensor) -> list[int]:
    """Those of sequences and of tokens, which is all that the kernels take: channels are neighbours."""
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in tensors)
    return [x.stride(axis) for x in tensors for axis in (0, 1)]


def _some(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer in any case: that of an absent argument is not read."""
    return other if x is None else x


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return None if x is None else _triton.unit_stride(x)


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else _triton.packed(x)


_run, scan_forward, scan_backward = differentiable("selective_scan_triton", _forward, _backward, _by_chunks)


@scan_forward.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, positions, keep = rest
    b, L, E, N, P, _ = _sizes(u, A, positions)
    h0, kept = rest[-4], (b, N, E)
    first = A.new_empty(0) if h0 is None or not keep else A.new_empty(kept)
    return u.new_empty(b, L, E), A.new_empty(kept), A.new_empty(b, P, N, E), first


@scan_backward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    like_u = (x.new_empty(u.shape) for x in (u, dt, u if z is None else z))
    du, ddt, dz = like_u
    E, (N, _) = u.shape[-1], A.shape
    dA, dB, dC = A.new_empty(N, E), B.new_empty(B.shape), C.new_empty(C.shape)
    return du, ddt, dA, dB, dC, A.new_empty(E), dz, A.new_empty(E), A.new_empty(u.shape[0], N, E)
