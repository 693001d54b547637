"""Mamba-2: Transformers are SSMs (Dao & Gu 2024, arXiv 2405.21060), in chunked matrix form.

One block, per token t. A is one number per head h, B and C are shared by the heads of a group:

    z, x, B, C, dt = in_proj(norm(residual_t))              one projection, section 7.1
    x, B, C = silu(conv1d([x, B, C]))
    dt      = softplus(dt + dt_bias)                        one step size per head
    h_t     = exp(dt A) h_{t-1} + dt x_t B_t^T              h_t: (P, N) per head
    y_t     = h_t C_t + D x_t
    out     = out_proj(rms_norm(y_t * silu(z)))             gated norm

`ssm_retrieval.ops.ssd` computes the recurrence by chunks of Q tokens (section 6).
Parameter names are those of state-spaces/mamba2-* and `transformers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.block_memory import every_block, mamba2
from ssm_retrieval.models.common import LayerCache
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hooks import STATE_NAMES, Hook, Hooked, hooked_scan, masked_hook
from ssm_retrieval.models.mamba import MambaForCausalLM, require_dt
from ssm_retrieval.models.padding import convolve
from ssm_retrieval.ops.linear import Linear
from ssm_retrieval.ops.ssd import ssd


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
        `ssm_retrieval.models.padding`, whose rule the two masks below follow."""
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


def state_size(config: Mamba2Config, seq_len: int) -> int:
    """h and the convolution's window, whatever seq_len is."""
    window = (config.d_conv - 1) * (config.d_inner + 2 * config.ngroups * config.d_state)
    return config.n_layer * (config.d_inner * config.d_state + window)


ARCHITECTURE = Architecture(
    name="mamba2",
    label="Mamba-2",
    color="#029e73",
    marker="2",
    config=Mamba2Config,
    model=Mamba2ForCausalLM,
    presets={
        "tiny": dict(TINY, n_layer=4, d_state=64),
        "130m": dict(d_model=768, n_layer=24),
        "150m": dict(d_model=1024, n_layer=24, d_state=16),
        "370m": dict(d_model=1024, n_layer=48),
        "780m": dict(d_model=1536, n_layer=48),
        "1.3b": dict(d_model=2048, n_layer=48),
        "2.7b": dict(d_model=2560, n_layer=64),
    },
    state_size=state_size,
    memory=every_block(mamba2),
    hub="mamba2",
)
