"""Mamba-2: Transformers are SSMs (Dao & Gu 2024, arXiv 2405.21060), in chunked matrix form.

One block, per token t. A is one number per head h, B and C are shared by the heads of a group:

    z, x, B, C, dt = in_proj(norm(residual_t))              one projection, section 7.1
    x, B, C = silu(conv1d([x, B, C]))
    dt      = softplus(dt + dt_bias)                        one step size per head
    h_t     = exp(dt A) h_{t-1} + dt x_t B_t^T              h_t: (P, N) per head
    y_t     = h_t C_t + D x_t
    out     = out_proj(rms_norm(y_t * silu(z)))             gated norm

`ssd_reference` is the recurrence as written; `ssd` computes the same by chunks of Q tokens (section 6):
inside a chunk as masked attention, between chunks by passing on one state.
Parameter names are those of state-spaces/mamba2-* and `transformers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.common import LayerCache
from models.configuration import Config, require
from models.hooks import STATE_NAMES, Hook, Hooked, hooked_scan, masked_hook
from models.mamba import MambaForCausalLM, require_dt
from models.ops import _cuda_kernels
from models.ops.linear import Linear
from models.padding import convolve

BACKENDS = ("auto", "chunks", "cuda")


@dataclass(frozen=True)
class Mamba2Config(Config):
    """Shape of a Mamba-2 language model; the defaults are state-spaces/mamba2-130m."""

    vocab_size: int = 50288
    d_model: int = 768
    n_layer: int = 24
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64  # a choice of speed, not of function: the CPU's best, GPUs like 256
    dt_min: float = 0.001
    dt_max: float = 0.1
    norm: str = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_dt(self.dt_min, self.dt_max)
        require(
            self.d_inner % self.headdim == 0,
            f"headdim={self.headdim} does not divide d_inner={self.d_inner}; use a divisor",
        )
        require(
            self.n_head % self.ngroups == 0,
            f"ngroups={self.ngroups} does not divide the {self.n_head} heads; use a divisor",
        )

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_head(self) -> int:
        return self.d_inner // self.headdim


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after the other; shapes as in `ssd`, returns y and the last state."""
    b, L, H, P = x.shape
    B, C = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(b, H, P, B.shape[-1]) if initial_state is None else initial_state
    ys = []
    for t in range(L):
        decay = torch.exp(dt[:, t] * A)[..., None, None]  # (b, H, 1, 1)
        h = decay * h + (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        ys.append((h @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, dim=1) if ys else torch.zeros_like(x), h


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    return_last_state: bool = False,
    states_at: Sequence[int] | None = None,
    backend: str = "auto",
) -> Any:
    """State space duality by chunks (listing 1 of the paper), with matrix products only.

    x: (b, L, H, P); dt: (b, L, H) positive; A: (H,) negative; B, C: (b, L, G, N), G dividing H;
    initial_state: (b, H, P, N); states_at: positions in [0, L), any order. Returns y (b, L, H, P), with
    return_last_state also the last state (b, H, P, N), with states_at also h_t (b, positions, H, P, N); in
    this order as a tuple.
    backend: "chunks" computes here, "cuda" by mamba-ssm's `mamba_chunk_scan_combined` (not with states_at),
    "auto" takes "cuda" for CUDA tensors where that is installed. Raises ValueError for other names.
    Decays are exponentials of sums that are masked to -inf before the exponential, so neither the
    values nor the gradients overflow. Cost: L * chunk_size * (N + P) per head, linear in L.
    """
    require(backend in BACKENDS, f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = _choose(x, states_at)
    if backend == "cuda":
        require(states_at is None, "backend='cuda' cannot return states_at; use backend='auto'")
        return _given(*_cuda(x, dt, A, B, C, initial_state, return_last_state))
    b, L, H, P = x.shape
    G, N = B.shape[2:]
    dtype, last = x.dtype, x.new_zeros(b, H, P, N) if initial_state is None else initial_state
    states = None if states_at is None else x.new_empty(b, 0, H, P, N)
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

    if c > 1 or initial_state is not None or return_last_state or states_at is not None:
        # what each chunk adds to the state, then the state before each chunk
        to_end = (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)  # (b, H, c, Q, 1)
        Bh, Ch = (t.repeat_interleave(H // G, dim=1) for t in (B, C))
        added = ((x * to_end).transpose(-1, -2) @ Bh.to(to_end.dtype)).unbind(2)  # c times (b, H, P, N)
        whole = log_decay[..., -1].exp()[..., None, None].unbind(2)  # c times (b, H, 1, 1)
        before = []
        for i in range(c):
            before.append(last)
            last = whole[i] * last + added[i]
        if states_at:
            states = _states(x, Bh, log_decay, before, states_at)
        carried = torch.stack(before, dim=2)  # (b, H, c, P, N)
        from_start = log_decay.exp().unsqueeze(-1)
        y = y + from_start * (Ch.to(carried.dtype) @ carried.transpose(-1, -2))
    y = y.permute(0, 2, 3, 1, 4).reshape(b, L + pad, H, P)[:, :L].to(dtype)
    return _given(y, last if return_last_state else None, states)


def _choose(x: Tensor, states_at: Sequence[int] | None) -> str:
    able = states_at is None and x.shape[1] > 0 and x.dtype != torch.float64
    cuda = x.device.type == "cuda" and able and _cuda_kernels.installed("mamba_ssm")
    return "cuda" if cuda else "chunks"


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


class GatedRMSNorm(nn.Module):
    """rms_norm(y * silu(z)) * weight, each of `ngroups` groups of channels normalised by itself."""

    def __init__(self, d: int, ngroups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.ngroups, self.eps = ngroups, eps

    def forward(self, y: Tensor, z: Tensor, gate: Tensor | None = None) -> Tensor:
        """y, z: (B, L, E); gate: silu(z) if the caller has it."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        gate = F.silu(z.to(dtype)) if gate is None else gate
        gated = (y.to(dtype) * gate).unflatten(-1, (self.ngroups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return normed.to(self.weight.dtype) * self.weight


@dataclass(frozen=True)
class DualRecurrence:
    """The arguments of one `ssd` and its skip D, as a `models.hooks.Recurrence`: states (B, H, P, N),
    y (B, L, H, P)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    chunk_size: int

    @property
    def length(self) -> int:
        return self.x.shape[1]

    def scan(self, start: int, stop: int, h: Tensor | None, at: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        x, dt, B, C = (t[:, start:stop] for t in (self.x, self.dt, self.B, self.C))
        y, last, states = ssd(x, dt, self.A, B, C, h, self.chunk_size, return_last_state=True, states_at=at)
        return y + self.D[:, None] * x, last, states

    def decay(self, positions: list[int]) -> Tensor:
        return torch.exp(self.dt[:, positions] * self.A)  # (B, positions, H)

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, G, N) -> (B, H, N)"""
        return x.repeat_interleave(self.x.shape[2] // x.shape[1], dim=1)

    def step(self, t: int, h: Tensor | None, decay: Tensor) -> Tensor:
        scaled = self.dt[:, t].unsqueeze(-1) * self.x[:, t]  # (B, H, P)
        write = scaled.unsqueeze(-1) * self._by_head(self.B[:, t]).unsqueeze(-2)
        return write if h is None else decay[..., None, None] * h + write

    def read(self, t: int, h: Tensor) -> Tensor:
        y = (h @ self._by_head(self.C[:, t]).to(h.dtype).unsqueeze(-1)).squeeze(-1)
        return (y.to(self.x.dtype) + self.D[:, None] * self.x[:, t]).unsqueeze(1)


class Mamba2Mixer(Hooked, nn.Module):
    """The state space dual layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = {
        "hook_in": "B L J",
        "hook_conv": "B L H P",
        "hook_dt": "B L H",
        "hook_B": "B L G N",
        "hook_C": "B L G N",
        "hook_A_bar": "B L H",
        "hook_ssm_state": "B L H P N",
        "hook_ssm_readout": "B L H P N",
        "hook_y": "B L H P",
        "hook_gate": "B L H P",
    }

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        E, H, GN = config.d_inner, config.n_head, config.ngroups * config.d_state
        self.in_proj = Linear(config.d_model, 2 * E + 2 * GN + H, bias=False)
        conv_dim = E + 2 * GN
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, config.d_conv, groups=conv_dim, padding=config.d_conv - 1)
        low, high = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(H) * (high - low) + low).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(E, config.ngroups, config.norm_eps)
        self.out_proj = Linear(E, config.d_model, bias=False)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """hidden: (B, L, D); mask: (B, L) bool, True = real token; cache: `conv` and `ssm` states; order: of
        `models.padding`, whose rule the two masks below follow."""
        config = self.config
        E, H, G, N = config.d_inner, config.n_head, config.ngroups, config.d_state
        z, xBC, dt = self.in_proj(hidden).split([E, E + 2 * G * N, H], dim=-1)
        if mask is not None:
            xBC = xBC * mask.unsqueeze(-1)
        if self.hook is not None:
            xBC = masked_hook(self.hook, "hook_in", xBC, mask)
        xBC = convolve(xBC, self.conv1d, mask, order, cache)
        x, B, C = xBC.split([E, G * N, G * N], dim=-1)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)  # (B, L, H)
        if mask is not None:
            dt = dt * mask.unsqueeze(-1)
        x = x.unflatten(-1, (H, config.headdim))
        A, B, C = -torch.exp(self.A_log.to(wide)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        gate: Tensor | None = None
        h = None if cache is None else cache.get("ssm")
        if self.hook is not None:
            x, dt = self.hook("hook_conv", x), masked_hook(self.hook, "hook_dt", dt, mask)
            B, C = self.hook("hook_B", B), self.hook("hook_C", C)
            recurrence = DualRecurrence(x, dt, A, B, C, self.D, config.chunk_size)
            y, last = run_hooked(self.hook, recurrence, h)
            gate = hooked_gate(self.hook, z, H)
        else:
            y = ssd(
                x,
                dt,
                A,
                B,
                C,
                initial_state=h,
                chunk_size=config.chunk_size,
                return_last_state=cache is not None,
            )
            if cache is not None:
                y, last = y
            y = y + self.D[:, None] * x
        if cache is not None:
            cache["ssm"] = last
        return self.out_proj(self.norm(y.flatten(-2), z, gate))

    def hook_sizes(self) -> dict[str, int]:
        config = self.config
        own = {"H": config.n_head, "P": config.headdim, "G": config.ngroups, "N": config.d_state}
        return {"J": self.conv1d.in_channels, **own}


def run_hooked(hook: Hook, recurrence: DualRecurrence, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """y = C h + D x (B, L, H, P) and the last state, with the hooks from A_bar to y."""
    if any(hook.wants(name) for name in STATE_NAMES):
        y, last = hooked_scan(hook, recurrence, h)
    else:
        y, last, _ = recurrence.scan(0, recurrence.length, h, [])
    return hook("hook_y", y), last


def hooked_gate(hook: Hook, z: Tensor, n_head: int) -> Tensor | None:
    """silu(z) (B, L, E) after the hook, which sees it by head; None if nobody asks."""
    if not hook.wants("hook_gate"):
        return None
    gate = F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))
    return hook("hook_gate", gate.unflatten(-1, (n_head, -1))).flatten(-2)


class Mamba2ForCausalLM(MambaForCausalLM):
    """Mamba-2 language model with a tied head (state_dict of state-spaces/mamba2-*)."""

    mixer = Mamba2Mixer
