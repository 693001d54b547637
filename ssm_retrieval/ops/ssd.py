"""State space duality: the recurrence of Mamba-2 by chunks (Dao & Gu 2024, arXiv 2405.21060, section 6).

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T              h_t: (P, N) per head
    y_t = h_t C_t

`ssd_reference` is the recurrence as written; `ssd` computes the same by chunks of Q tokens: inside a chunk as
masked attention, between chunks by passing on one state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops import _cuda_kernels, _triton
from ssm_retrieval.ops._checks import check_flags, check_positions, check_shapes, check_tensor
from ssm_retrieval.ops._delta_chunks import DeltaArguments
from ssm_retrieval.ops._delta_triton import delta_on_triton
from ssm_retrieval.ops._route import asked, refuse_tracing, without_autocast


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    Args:
        x: (b, L, H, P).
        dt: (b, L, H), positive.
        A: (H,), negative.
        B: (b, L, G, N), G dividing H.
        C: As B.
        initial_state: (b, H, P, N); None is zeros.

    Returns:
        y (b, L, H, P) and the last state (b, H, P, N).
    """
    y, last, _ = _recurrence(x, dt, A, B, C, initial_state, [])
    return y, last


def _recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    positions: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`ssd_reference` and the states after the tokens `positions`."""
    b, L, H, P = x.shape
    B, C = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(b, H, P, B.shape[-1]) if initial_state is None else initial_state
    ys, found = [], {}
    for t in range(L):
        decay = torch.exp(dt[:, t] * A)[..., None, None]  # (b, H, 1, 1)
        h = decay * h + (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        ys.append((h * C[:, t].unsqueeze(-2)).sum(-1))
        if t in positions:
            found[t] = h
    y = torch.stack(ys, dim=1).to(x.dtype) if ys else torch.zeros_like(x)
    states = h.new_empty(b, 0, *h.shape[1:])
    return y, h, torch.stack([found[t] for t in positions], dim=1) if positions else states


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    return_last_state: bool = False,
    states_at: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """State space duality by chunks (listing 1 of the paper), with matrix products only.

    Decays are exponentials of sums that are masked to -inf before the exponential, so neither the
    values nor the gradients overflow. Cost: L * chunk_size * (N + P) per head, linear in L.
    The sum of dt A from one token to another is the difference of two sums from the chunk's start, so in
    float32 its error grows with the chunk: up to 3e-5 relative at dt A = -80 and 256 tokens.

    Args:
        x: (b, L, H, P).
        dt: (b, L, H), positive.
        A: (H,), negative.
        B: (b, L, G, N), G dividing H.
        C: As B.
        initial_state: (b, H, P, N).
        chunk_size: Tokens per chunk: a choice of speed, not of function.
        return_last_state: Whether to return the state after the last token.
        states_at: Positions in [0, L), any order.
        backend: "chunks" computes here, "triton" by our kernels, whose chunks are 64 tokens and whose sums
            and states are float32, "cuda" by mamba-ssm's `mamba_chunk_scan_combined` (not with states_at),
            "reference" token by token, "cpu" is "chunks" for tensors on a CPU; "auto" takes the one of the
            enclosing `ops.backend`, else on a GPU "cuda" where that is installed, takes the input and is
            faster, then "triton" where that takes it, else "chunks".

    Returns:
        y (b, L, H, P), with return_last_state also the last state (b, H, P, N), with states_at also h_t (b,
        positions, H, P, N); in this order as a tuple.

    Raises:
        ValueError: For wrong shapes, dtypes, devices, positions or names.
        MissingPackage: If mamba-ssm or Triton is asked for and missing.
        NotImplementedError: Under torch.jit.trace.
    """
    refuse_tracing("ssd")
    backend = asked(backend)
    _check(x, dt, A, B, C, initial_state, chunk_size)
    check_flags(return_last_state=return_last_state)
    positions = None if states_at is None else check_positions(states_at, x.shape[1])
    if backend == "auto":
        backend = _choose(x, positions, dt, A, B, C, initial_state)
    elif backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f"backend='cpu' got tensors on {x.device}; use backend='chunks'")
    if backend == "cuda":
        if positions is not None:
            raise ValueError("backend='cuda' cannot return states_at; use backend='auto'")
        if not _cuda_kernels.takes(x):
            raise ValueError(
                f"backend='cuda' takes float32, bfloat16 or float16 and at least one token; got {x.dtype} "
                f"{tuple(x.shape)}; use backend='auto'"
            )
        return _given(*_cuda(x, dt, A, B, C, initial_state, return_last_state))
    if backend == "triton":
        _triton.require(x, dt, A, B, C, initial_state)
        if x.numel() > 0 and B.shape[-1] > 0:
            return _by_triton(x, dt, A, B, C, initial_state, return_last_state, positions)
    if backend == "reference":
        y, last, states = _recurrence(x, dt, A, B, C, initial_state, positions or ())
        return _given(y, last if return_last_state else None, None if positions is None else states)
    return _chunks(x, dt, A, B, C, initial_state, chunk_size, return_last_state, positions)


def _chunks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
    return_last_state: bool,
    positions: list[int] | None,
) -> Any:
    b, L, H, P = x.shape
    G, N = B.shape[2:]
    dtype, last = x.dtype, x.new_zeros(b, H, P, N) if initial_state is None else initial_state
    states = None if positions is None else x.new_empty(b, 0, H, P, N)
    if L == 0:
        return _given(torch.zeros_like(x), last if return_last_state else None, states)
    Q = min(chunk_size, L)
    pad = -L % Q
    if pad:  # dt = 0 makes the added tokens the identity on the state
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in (x, dt, B, C))
    c = (L + pad) // Q

    x = (x * dt.unsqueeze(-1)).to(dtype).view(b, c, Q, H, P).permute(0, 3, 1, 2, 4)  # (b, H, c, Q, P)
    B, C = (t.view(b, c, Q, G, N).permute(0, 3, 1, 2, 4) for t in (B, C))  # (b, G, c, Q, N)
    log_decay = (dt * A).view(b, c, Q, H).permute(0, 3, 1, 2).cumsum(-1)  # (b, H, c, Q)

    # inside a chunk: y_i = sum_{j <= i} (C_i . B_j) decay(j -> i) x_j
    causal = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    between = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)  # (b, H, c, Q, Q)
    decay = between.masked_fill(~causal, -torch.inf).exp()
    scores = C @ B.transpose(-1, -2)  # (b, G, c, Q, Q)
    weights = (decay.unflatten(1, (G, H // G)) * scores.unsqueeze(2)).flatten(1, 2)
    y = weights.to(dtype) @ x

    if c > 1 or initial_state is not None or return_last_state or positions is not None:
        # what each chunk adds to the state, then the state before each chunk
        to_end = (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)  # (b, H, c, Q, 1)
        Bh, Ch = (t.repeat_interleave(H // G, dim=1) for t in (B, C))
        added = ((x * to_end).transpose(-1, -2) @ Bh.to(to_end.dtype)).unbind(2)  # c times (b, H, P, N)
        whole = log_decay[..., -1].exp()[..., None, None].unbind(2)  # c times (b, H, 1, 1)
        before = []
        for i in range(c):
            before.append(last)
            last = whole[i] * last + added[i]
        if positions:
            states = _states(x, Bh, log_decay, before, positions)
        carried = torch.stack(before, dim=2)  # (b, H, c, P, N)
        from_start = log_decay.exp().unsqueeze(-1)
        y = y + from_start * (Ch.to(carried.dtype) @ carried.transpose(-1, -2))
    y = y.permute(0, 2, 3, 1, 4).reshape(b, L + pad, H, P)[:, :L].to(dtype)
    return _given(y, last if return_last_state else None, states)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        said = chunk_size if isinstance(chunk_size, (int, float)) else f"a {type(chunk_size).__name__}"
        raise ValueError(f"chunk_size must be an integer of at least 1, not {said}")
    check_tensor("x", x, ("batch", "length", "heads", "headdim"))
    check_tensor("B", B, ("batch", "length", "groups", "d_state"))
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    if G < 1 or H % G:
        raise ValueError(f"B has {G} groups, which do not divide the {H} heads of x")
    check_shapes(
        x,
        dt=(dt, (b, L, H)),
        A=(A, (H,)),
        B=(B, (b, L, G, N)),
        C=(C, (b, L, G, N)),
        initial_state=(initial_state, (b, H, P, N)),
    )


def _choose(x: Tensor, positions: list[int] | None, *others: Tensor | None) -> str:
    if not _triton.on_gpu(x):
        return "chunks"
    able = positions is None and _cuda_kernels.takes(x)
    return _triton.choose("ssd", "mamba_ssm", able, x, *others)


def _by_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    return_last_state: bool,
    positions: list[int] | None,
) -> Any:
    """Linear attention with decay: C, B, x as q, k, v, dt as strength and exp(dt A) as decay."""
    with without_autocast(x.device.type):
        decay = dt.float() * A.float()
        given = DeltaArguments(C, B, x, dt, decay, False, initial_state)
        return _given(*delta_on_triton(given, positions, return_last_state))


def _cuda(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    module, name = "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"
    scan = _cuda_kernels.kernel(module, name, "initial_states", "return_final_states")
    _cuda_kernels.on_gpu(x)
    return _cuda_kernels.in_chunk_scan_layout(scan, x, *rest)


def _given(*out: Tensor | None) -> Any:
    """Those that are not None, as a tuple if there are several."""
    given = tuple(x for x in out if x is not None)
    return given if len(given) > 1 else given[0]


def _states(
    x: Tensor, B: Tensor, log_decay: Tensor, before: list[Tensor], states_at: Sequence[int]
) -> Tensor:
    """States (b, positions, H, P, N) after chosen tokens, by chunks; tensors as inside `ssd`.

    Within a chunk each wanted state is made from the one wanted before it (at first from the state that the
    chunk began with), so that every token's write is computed once, whatever the number of positions.
    x: (b, H, c, Q, P), times dt already; B: (b, H, c, Q, N); log_decay: (b, H, c, Q); before: c states.
    """
    Q = x.shape[3]
    found: dict[int, Tensor] = {}
    chunk, start, h = -1, 0, before[0]
    for t in sorted(set(states_at)):
        if t // Q != chunk:
            chunk, start, h = t // Q, 0, before[t // Q]
        part, log = slice(start, t % Q + 1), log_decay[:, :, chunk]
        since = log[..., t % Q] - (log[..., start - 1] if start else 0.0)  # (b, H)
        weight = (log[..., t % Q, None] - log[..., part]).exp().unsqueeze(-1)
        write = (x[:, :, chunk, part] * weight).transpose(-1, -2) @ B[:, :, chunk, part].to(weight.dtype)
        h = since.exp()[..., None, None] * h + write
        found[t], start = h, t % Q + 1
    return torch.stack([found[t] for t in states_at], dim=1)
