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

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import block_memory, hub_mamba, instrumented
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import WHOLE, Context, LayerCache
from ssm_retrieval.models.configuration import HeadsConfig
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import widen
from ssm_retrieval.models.mamba import MambaBlock, MambaForCausalLM
from ssm_retrieval.models.padding import convolve, fill_padding
from ssm_retrieval.models.ssm_init import dt_bias, recall_init
from ssm_retrieval.ops.linear import Linear
from ssm_retrieval.ops.ssd import ssd


@dataclass(frozen=True)
class Mamba2Config(HeadsConfig):
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
    ssm_init: str = "default"  # this and the next two: as in MambaConfig
    position: str = "none"
    max_position_embeddings: int = 2048
    norm: str = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embedding_std: float = 0.02

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.ngroups * self.d_state


class GatedRMSNorm(nn.Module):
    """rms_norm(y * gate) * weight, each of `ngroups` groups of channels normalised by itself."""

    def __init__(self, d: int, ngroups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.ngroups, self.eps = ngroups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y and gate = silu(z), (B, L, E) each -> (B, L, E). Computed in float32 or wider."""
        gated = (widen(y) * gate).unflatten(-1, (self.ngroups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return normed.to(self.weight.dtype) * self.weight


class Mamba2Mixer(Hooked, nn.Module):
    """The state space dual layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = dict(
        hook_in="B L J", hook_conv="B L H P", hook_dt="B L H", hook_B="B L G N", hook_C="B L G N",
        hook_A_bar="B L H", hook_ssm_state="B L H P N", hook_ssm_readout="B L H P N",
        hook_y="B L H P", hook_gate="B L H P",
    )  # fmt: skip

    def __init__(self, config: Mamba2Config):
        super().__init__()
        self.config = config
        D, E, H, J = config.d_model, config.d_inner, config.n_head, config.conv_dim
        self.in_proj = Linear(D, E + J + H, bias=False)
        self.conv1d = nn.Conv1d(J, J, config.d_conv, groups=J, padding=config.d_conv - 1)
        self.dt_bias = nn.Parameter(dt_bias(config, H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(E, config.ngroups, config.norm_eps)
        self.out_proj = Linear(E, D, bias=False)
        rows, GN = self.in_proj.weight.detach(), config.ngroups * config.d_state
        made = rows[E : E + J], *(p.detach() for p in self.conv1d.parameters())  # each of x, B and C
        tied = [(of_B, of_C) for _, of_B, of_C in (each.split([E, GN, GN]) for each in made)]
        recall_init(config.ssm_init, [self.conv1d], (self.A_log, rows[-H:], self.dt_bias), tied)

    def forward(self, hidden: Tensor, context: Context = WHOLE, cache: LayerCache | None = None) -> Tensor:
        """The layer.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real, and where they are.
            cache: The call continues from its `conv` and `ssm` states, and replaces them.

        Returns:
            (B, L, D).
        """
        config, mask = self.config, context.mask
        E, H, G, N = config.d_inner, config.n_head, config.ngroups, config.d_state
        z, xBC, dt = self.in_proj(hidden).split([E, config.conv_dim, H], dim=-1)
        xBC = self.tap("hook_in", fill_padding(xBC, mask), mask)
        xBC = convolve(xBC, self.conv1d.weight, self.conv1d.bias, context, cache)
        x, B, C = xBC.split([E, G * N, G * N], dim=-1)
        x = self.tap("hook_conv", x.unflatten(-1, (H, -1)))  # (B, L, H, P)
        B = self.tap("hook_B", B.unflatten(-1, (G, N)))  # (B, L, G, N)
        C = self.tap("hook_C", C.unflatten(-1, (G, N)))
        dt = F.softplus(widen(dt) + self.dt_bias)
        dt = self.tap("hook_dt", fill_padding(dt, mask), mask)  # (B, L, H), 0 at padding: it does nothing
        A = -torch.exp(widen(self.A_log))  # (H,)
        scan: Any = ssd if self.hook is None else partial(instrumented.ssd, self.hook)
        y = scan(
            x, dt, A, B, C,
            initial_state=None if cache is None else cache.get("ssm"),
            chunk_size=config.chunk_size, return_last_state=cache is not None,
        )  # fmt: skip
        if cache is not None:
            y, cache["ssm"] = y
        y = self.tap("hook_y", y + self.D[:, None] * x)  # (B, L, H, P)
        gate = self.tap("hook_gate", F.silu(widen(z)).unflatten(-1, (H, -1)))
        return self.out_proj(self.norm(y.flatten(-2), gate.flatten(-2)))


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
    positions=("none", "learned"),
    state_size=state_size,
    memory=block_memory.every_block(block_memory.mamba2),
    block=lambda config: MambaBlock(config, Mamba2Mixer),
    hub=hub_mamba.MAMBA2,
)
