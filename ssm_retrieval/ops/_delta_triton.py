"""The delta rule, linear attention and state space duality by our Triton kernels, forward and backward.

The kernels (`_delta_triton_kernels.py`, `_delta_triton_backward.py`) know the recurrence of `delta_rule` with
keys and queries that several heads may share; `ssd` is the case without erasure. Two things are done here:

* States at chosen positions. Chunks need not be equally long, so one is made to end at every position: its
  state is there anyway, and so is the gradient that comes back to it.
* Nothing but the arguments and the first state is kept for the backward pass, which computes the states
  before each chunk again: with headdim 64 and 128 columns they are twice as large as float32 inputs.

Sizes are fixed instead of found by triton.autotune, which would compile and time dozens of variants in the
first step of every run, let the choice and with it the rounding depend on what else the GPU does, and cannot
work in the interpreter. They keep shared memory, as the compiler reports it, within the 64 KiB that AMD's
GPUs and the smaller ones of NVIDIA have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssm_retrieval.ops import _triton
from ssm_retrieval.ops._arrays import at_positions
from ssm_retrieval.ops._delta_chunks import CHUNK, SMALL_CHUNK, DeltaArguments, delta_by_chunks
from ssm_retrieval.ops._kernel_autograd import differentiable

WIDEST = 256  # columns of a state; with erasure a program holds whole rows of it
SHARED = 8  # heads with the same q and k whose gradients one program adds up, at most
ROWS = 32  # of the state in one program that goes from chunk to chunk: many programs, for small batches


class Chunks(NamedTuple):
    """How a sequence is cut: into equal chunks, or so that chunks end at wanted positions."""

    number: int
    starts: Tensor | None  # int32, where each begins, and the end; None if they are equally long
    ends: list[int]  # for each wanted position the chunk that ends there

    @classmethod
    def cut(cls, length: int, size: int, positions: Sequence[int], device: torch.device) -> Chunks:
        """Chunks of at most `size` tokens. positions: in [0, length), sorted, none twice."""
        if not positions:
            return cls(-(-length // size), None, [])
        starts, ends = [0], []
        for stop in (*(t + 1 for t in positions), length):
            starts += [*range(starts[-1] + size, stop, size), stop] if stop > starts[-1] else []
            ends.append(len(starts) - 2)
        return cls(len(starts) - 1, torch.tensor(starts, dtype=torch.int32, device=device), ends[:-1])


def delta_on_triton(
    given: DeltaArguments, positions: Sequence[int] | None, return_last_state: bool
) -> list[Tensor]:
    """What `delta_rule` returns, in a list; q and k may have fewer heads than v, dividing its own.

    The operands of matrix products are rounded to bfloat16 if q, k and v all are; sums, states and everything
    else are float32. With float16 they are not: a state may pass its largest number, 65,504.
    """
    q, k, v, beta, log_decay, h = given.tensors
    assert q is not None and k is not None and v is not None
    shape = v.shape[:3]
    log = v.new_zeros(()).expand(shape) if log_decay is None else log_decay
    arguments = (
        *(_triton.unit_stride(x) for x in (q, k, v)),
        v.new_ones(()).expand(shape) if beta is None else beta,
        _triton.unit_stride(log) if log.dim() == 4 else log,
        h if h is None else _triton.packed(h),
    )
    wanted = None if positions is None else sorted(set(positions))
    y, last, states, _ = _run(*arguments, given.erase, wanted)
    out = [y]
    if return_last_state:
        out.append(last)
    if positions is not None and wanted is not None:
        out.append(at_positions(states, wanted, positions))
    return out


def _by_chunks(erase: bool, positions: list[int] | None, *arguments: Tensor | None) -> list[Tensor]:
    """What `_forward` returns to differentiate, by PyTorch's operations."""
    q, k, v, beta, log_decay, h = arguments
    assert q is not None and k is not None and v is not None
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    given = DeltaArguments(q, k, v, beta, log_decay, erase, h)
    return delta_by_chunks(given, positions or [], True)


class _Call:
    """One call of the operator: its chunks, its blocks, and all that its kernels may be given, by name."""

    def __init__(self, arguments: Sequence[Any], erase: bool, positions: Sequence[int] | None):
        q, k, v, beta, log, h0 = arguments
        (B, L, H, P), (G, N) = v.shape, k.shape[2:]
        channel = log.dim() == 4
        rounding = precision(q, k, v)
        # what products have in shared memory must fit 64 KiB: with erasure whole rows of a chunk's keys
        large = (erase and N > 128) + (rounding["DOT"].primitive_bitwidth == 32)
        Q = SMALL_CHUNK if channel else max(SMALL_CHUNK, CHUNK >> large)
        self.chunks = Chunks.cut(L, Q, positions or (), v.device)
        # where every channel has its own decay, pairs of tokens times channels are in registers
        self.columns = SMALL_CHUNK if channel else min(64, power_of_2(N))
        self.values = min(64, power_of_2(P))
        # of a state that one program takes from chunk to chunk: with erasure a write depends on whole rows
        whole = power_of_2(N) if erase else self.columns
        self.state = min(ROWS if whole <= 128 else ROWS // 2, power_of_2(P)), whole
        self.shared = max(i for i in range(1, SHARED + 1) if (H // G) % i == 0)
        self.known: dict[str, Any] = dict(
            starts=self.chunks.starts, h0=h0, y_strides=(L * H * P, H * P, P),
            B=B, L=L, H=H, P=P, N=N, chunks=self.chunks.number,
            REP=H // G, Q=Q, CHANNEL=channel, ERASE=erase, SPLIT=self.chunks.starts is not None,
            STARTED=h0 is not None, **rounding,
        )  # fmt: skip
        self.give(q=q, k=k, v=v, beta=beta, log=log)

    def give(self, **tensors: Tensor) -> None:
        """Make tensors (batch, length, heads, ...) known, with their strides."""
        for name, x in tensors.items():
            if x.dim() == 4 and x.shape[-1] > 1 and x.stride(-1) != 1:
                raise ValueError(f"kernels want a contiguous last axis; {name} has the strides {x.stride()}")
            self.known |= {name: x, f"{name}_strides": x.stride()[:3]}

    def new(self, *shape: int) -> Tensor:
        """An empty float32 tensor."""
        return self.known["v"].new_empty(shape, dtype=torch.float32)

    def run(self, kernel: Any, grid: tuple[int, ...], **blocks: Any) -> None:
        """Run a kernel with what it names of all that is known."""
        known = self.known | blocks
        options = dict(num_warps=8 if known["Q"] * known["NB"] > 2048 else 4)
        if known["DOT"].primitive_bitwidth == 32 or known["NB"] > 128:
            options["num_stages"] = 1  # no room to load for the next round of a loop ahead
        with _triton.launching(known["v"]):
            kernel[grid](**{name: known[name] for name in kernel.arg_names}, **options)

    def states(self) -> Tensor:
        """The states before every chunk and after the last, (batch, chunks + 1, heads, P, N); also r."""
        from ssm_retrieval.ops import _delta_triton_kernels as kernels

        B, L, H, P, N, chunks = (self.known[name] for name in ("B", "L", "H", "P", "N", "chunks"))
        S, Q, r = self.new(B, chunks + 1, H, P, N), self.known["Q"], self.known["v"]
        self.known |= dict(S=S, K=None, R=None)
        if self.known["ERASE"]:
            r = self.new(B, L, H, P)
            self.known |= dict(K=self.new(B, H, chunks, Q, Q), R=r)
            self.run(kernels.overlaps, (B * H * chunks,), NB=self.columns)
        PB, NB = self.state
        self.run(kernels.states, (B * H, -(-P // PB), -(-N // NB)), PB=PB, NB=NB)
        self.give(r=r)
        return S

    def per_chunk(self, kernel: Any) -> None:
        """Run a kernel with a program for every head, chunk and block of values."""
        B, H, P, chunks = (self.known[name] for name in ("B", "H", "P", "chunks"))
        grid = (B * H * chunks, -(-P // self.values))
        self.run(kernel, grid, PB=self.values, NB=self.columns)


def power_of_2(size: int) -> int:
    """The least power of 2 that is not below size, and at least 16, the least that enters a product."""
    return max(16, 1 << (size - 1).bit_length())


def precision(*tensors: Tensor) -> dict[str, Any]:
    """DOT and PRECISION of matrix products whose operands come from these tensors.

    float32 stays float32: Triton's default on NVIDIA, TF32, rounds operands to 10 bits, and differences of
    near states, a delta rule's errors, then come out of noise; torch's matmul does not round so by default
    either. float16 is taken as TF32, which has its 10 bits and float32's range.
    """
    import triton.language as tl

    low = {x.dtype for x in tensors}
    exact = torch.float32 in low or torch.version.hip is not None  # where TF32 is not for all GPUs
    return dict(
        DOT=tl.bfloat16 if low == {torch.bfloat16} else tl.float32, PRECISION="ieee" if exact else "tf32"
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    h0: Tensor | None,
    erase: bool,
    positions: list[int] | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, states at sorted positions and, if `keep`, a copy of the first state."""
    from ssm_retrieval.ops import _delta_triton_kernels as kernels

    call = _Call((q, k, v, beta, log_decay, h0), erase, positions)
    y, _, _, first = _results(k, v, positions, keep)
    states = call.states()
    call.known["y"] = y
    call.per_chunk(kernels.outputs)
    if keep:
        first.copy_(states[:, 0])
    ends = torch.tensor(call.chunks.ends, dtype=torch.int64, device=v.device)
    return y, states[:, -1].clone(), states[:, ends + 1], first


def _results(
    k: Tensor, v: Tensor, positions: list[int] | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for what `_forward` returns."""
    (B, _, H, P), N = v.shape, k.shape[-1]
    last = v.new_empty(B, H, P, N, dtype=torch.float32)
    states = last.new_empty(B, len(positions or ()), H, P, N)
    return v.new_empty(v.shape), last, states, last.new_empty(last.shape if keep else (0,))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    first: Tensor,
    erase: bool,
    positions: list[int] | None,
    gy: Tensor | None,
    glast: Tensor | None,
    gstates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, beta, the decays and the first state."""
    from ssm_retrieval.ops import _delta_triton_backward as kernels

    call = _Call((q, k, v, beta, log_decay, first), erase, positions)
    (B, L, H, P), (G, N), chunks = v.shape, k.shape[2:], call.chunks.number
    call.states()
    call.known |= _given_gradients(call.chunks, v, gy, glast, gstates)
    lam, dh0 = call.new(B, L, H, P), call.new(B, H, P, N)
    call.known |= dict(lam=lam, dh0=dh0, D=call.new(B, chunks, H, P, N))
    if erase:
        call.per_chunk(kernels.write_gradients)
    PB, NB = call.state
    call.run(kernels.state_gradients, (B * H, -(-P // PB), -(-N // NB)), PB=PB, NB=NB)
    if not erase:
        call.per_chunk(kernels.write_gradients)
    columns = min(32, call.columns)  # of which it has more matrices at a time than the others
    heads, blocks = H // call.shared, -(-N // columns)
    dq, dk = call.new(B, L, heads, N), call.new(B, L, heads, N)
    dlog = call.new(B, L, H, N) if log_decay.dim() == 4 else call.new(blocks, B, L, H)
    call.known |= dict(dq=dq, dk=dk, dlog=dlog, SHARED=call.shared)
    grid = (B * heads * chunks, blocks)
    call.run(kernels.key_gradients, grid, PB=min(32, call.values), NB=columns)
    dq, dk = (x.view(B, L, G, heads // G, N).sum(3) if heads > G else x for x in (dq, dk))
    dlog = dlog if log_decay.dim() == 4 else dlog.sum(0)
    dbeta = (lam * call.known["r"]).sum(-1)
    found = (dq, dk, lam * beta.unsqueeze(-1), dbeta, dlog)
    given = (q, k, v, beta, log_decay)
    dq, dk, dv, dbeta, dlog = (x.to(like.dtype) for x, like in zip(found, given, strict=True))
    return dq, dk, dv, dbeta, dlog, dh0


def _given_gradients(
    chunks: Chunks, v: Tensor, gy: Tensor | None, glast: Tensor | None, gstates: Tensor | None
) -> dict[str, Any]:
    """The gradients of the results as the kernels take them."""
    slots = None
    if gstates is not None and chunks.ends:
        slots = [-1] * chunks.number
        for i, chunk in enumerate(chunks.ends):
            slots[chunk] = i
    stored = None if slots is None else gstates
    return dict(
        dy=v.new_zeros(v.shape) if gy is None else _triton.packed(gy),
        dlast=None if glast is None else _triton.packed(glast),
        LAST=glast is not None,
        dstates=None if stored is None else _triton.packed(stored),
        slots=None if slots is None else torch.tensor(slots, dtype=torch.int32, device=v.device),
        STORED=slots is not None,
        stored=len(chunks.ends),
    )


_run, delta_forward, delta_backward = differentiable("delta_rule_triton", _forward, _backward, _by_chunks)


@delta_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, positions, keep = rest
    return _results(k, v, positions, keep)


@delta_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, first: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return (*(x.new_empty(x.shape) for x in (q, k, v, beta, log_decay)), first.new_empty(first.shape))
