"""Mamba-3, single input and output: no convolution, writes by the trapezoidal rule, B and C that rotate
(Lahoti et al. 2026, arXiv 2603.15569).

One layer, per token t; heads share B, C and the angles before each adds its bias (letters as in
`ssm_retrieval.models.common`, S angles, N even):

    z, x, B, C, dt, A, lam, angle = in_proj(norm(residual_t))
    dt      = softplus(dt + dt_bias)                         one number per head
    a       = exp(-dt max(softplus(A), A_floor))             the decay, which depends on the token
    lam     = sigmoid(lam)                                   how much of a write comes at once
    phase_t = phase_{t-1} + dt pi tanh(angle)                S numbers per head
    k, q    = R(phase_t) (rms_norm(B) + B_bias), R(phase_t) (rms_norm(C) + C_bias)
    h_t     = a (h_{t-1} + (1 - lam) dt x_{t-1} k_{t-1}^T) + lam dt x_t k_t^T      h_t: (P, N) per head
    y_t     = h_t q_t + D x_t
    out     = out_proj(y_t * silu(z))

R turns channels 2i and 2i + 1 by the i-th phase, and leaves the others. Since k and q of two tokens meet in a
product, only the turn between them counts: positions that the model chooses itself, from what it reads. It is
what a complex A does to a state (section 3.2). `ops.trapezoid` has the recurrence.

Parameter names are those of flash-linear-attention and of mamba_ssm. Since its commit c69aaab mamba_ssm makes
A by another function (1 + A where A is positive, else 1 / (1 - A)); here it is softplus, as in its releases
and in fla.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import block_memory, hub_fla, instrumented
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import WHOLE, Context, LayerCache
from ssm_retrieval.models.configuration import HeadsConfig, require
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import RMSNorm, widen
from ssm_retrieval.models.mamba import MambaBlock, MambaForCausalLM
from ssm_retrieval.models.padding import fill_padding
from ssm_retrieval.models.ssm_init import dt_bias, parts_of
from ssm_retrieval.ops.linear import Linear, dtype_of
from ssm_retrieval.ops.trapezoid import rank_one, trapezoid

LONG_DT = 0.001  # with A = softplus(0) = ln 2 a state keeps 0.9993 of itself


@dataclass(frozen=True)
class Mamba3Config(HeadsConfig):
    """Shape of a Mamba-3 language model; the defaults are fla's.

    `ssm_init` "long" is a small step, dt = 0.001 and no weight to dt and A; "identity" changes nothing.
    """

    vocab_size: int = 32000
    d_model: int = 2048
    n_layer: int = 48
    d_state: int = 128
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    rope_fraction: float = 0.5  # of the channels of B and C that rotate
    A_floor: float = 1e-4
    dt_min: float = 0.001
    dt_max: float = 0.1
    ssm_init: str = "default"  # this and the next two: as in MambaConfig
    position: str = "none"
    max_position_embeddings: int = 2048
    norm: str = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        said = f"rope_fraction={self.rope_fraction} of d_state={self.d_state}"
        require(self.n_angle > 0, f"{said} leaves no pair of channels to rotate; raise one")

    @property
    def n_angle(self) -> int:
        """S, the pairs of channels that rotate."""
        return int(self.d_state * self.rope_fraction) // 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channels 2i and 2i + 1 of x by the i-th angle; channels beyond the last pair stay.

    Args:
        x: (..., N).
        cos: (..., S), S <= N / 2, cosines of the angles.
        sin: Their sines.

    Returns:
        (..., N).
    """
    turning, still = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([turned.flatten(-2), still], dim=-1)


def accumulate(turns: Tensor, before: Tensor | None) -> Tensor:
    """The phase after each token, in (-2 pi, 2 pi).

    Long sums lose digits in float32, and a phase needs those behind the point: they are added in float64
    where the device has it.

    Args:
        turns: (B, L, H, S), each token's turn in radians.
        before: (B, H, S), the phase before the first. None: 0.

    Returns:
        (B, L, H, S).
    """
    wide = turns if turns.device.type == "mps" else turns.double()
    total = wide.cumsum(1)
    total = total if before is None else total + before.unsqueeze(1)
    return torch.fmod(total, 2 * math.pi).to(turns.dtype)


class Mamba3Mixer(Hooked, nn.Module):
    """The layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = dict(
        hook_q="B L H N", hook_k="B L H N", hook_v="B L H P", hook_now="B L H", hook_before="B L H",
        hook_A_bar="B L H", hook_ssm_state="B L H P N", hook_ssm_readout="B L H P N", hook_y="B L H P",
        hook_gate="B L H P",
    )  # fmt: skip
    erase: ClassVar = False  # a write takes nothing away

    def __init__(self, config: Mamba3Config):
        super().__init__()
        self.config = config
        D, E, H, N = config.d_model, config.d_inner, config.n_head, config.d_state
        self.sizes = [E, E, config.ngroups * N, config.ngroups * N, H, H, H, config.n_angle]
        self.in_proj = Linear(D, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(dt_bias(config, H))
        self.B_bias = nn.Parameter(torch.ones(H, 1, N))
        self.C_bias = nn.Parameter(torch.ones(H, 1, N))
        self.B_norm, self.C_norm = RMSNorm(N, config.norm_eps), RMSNorm(N, config.norm_eps)
        self.D = nn.Parameter(torch.ones(H))
        self.out_proj = Linear(E, D, bias=False)
        self.recall_init(parts_of(config.ssm_init))

    @torch.no_grad()
    def recall_init(self, parts: str) -> None:
        """Give the layer the parts of `models.ssm_init` that `parts` names: "long", "tied"."""
        _, _, of_B, of_C, of_dt, of_A, _, _ = self.in_proj.weight.split(self.sizes)
        if "long" in parts:
            of_dt.zero_()
            of_A.zero_()
            self.dt_bias.fill_(math.log(math.expm1(LONG_DT)))
        if "tied" in parts:
            of_C.copy_(of_B)

    def forward(self, hidden: Tensor, context: Context = WHOLE, cache: LayerCache | None = None) -> Tensor:
        """The layer.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real.
            cache: The call continues from its state `ssm`, the last write `last_k` and `last_v` and the
                `phase`, and replaces them.

        Returns:
            (B, L, D).
        """
        z, rest = self.split(hidden)
        *inputs, first = self.inputs(rest, context, cache)
        start = None if cache is None else cache.get("ssm")
        if cache is not None:
            if start is not None:  # with the second part of the last write
                start = start + rank_one(first.unsqueeze(-1) * cache["last_v"], cache["last_k"])
            for name, each in (("last_k", inputs[1]), ("last_v", inputs[2])):
                cache[name] = last_real(each, context, cache.get(name))
        rule: Any = trapezoid if self.hook is None else partial(instrumented.trapezoid, self.hook)
        y = rule(*inputs, initial_state=start, return_last_state=cache is not None)
        if cache is not None:
            y, cache["ssm"] = y
        return self.output(self.tap("hook_y", self.skip(y, inputs[2])), z)

    def split(self, hidden: Tensor) -> Sequence[Tensor]:
        """z (B, L, E), and what the recurrence is made of, from hidden (B, L, D)."""
        return self.in_proj(hidden).split([self.sizes[0], sum(self.sizes[1:])], dim=-1)

    def inputs(self, rest: Tensor, context: Context, cache: LayerCache | None = None) -> Sequence[Tensor]:
        """What the recurrence takes in.

        Args:
            rest: Of `split`.
            context: Which tokens are real.
            cache: Its `phase` is read, and replaced.

        Returns:
            The arguments of `ops.trapezoid`: q and k (B, L, H, N), v (B, L, H, P), now, late and log_decay
            (B, L, H); and the weight (B, H) with which the first token adds the write before it.
        """
        config, mask = self.config, context.mask
        x, B, C, dt, A, lam, angle = rest.split(self.sizes[1:], dim=-1)
        # (B, L, H), 0 at padding: it neither fades, writes nor turns
        dt = fill_padding(F.softplus(widen(dt) + self.dt_bias), mask)
        log_decay = -dt * F.softplus(widen(A)).clamp(min=config.A_floor)
        lam = torch.sigmoid(widen(lam))
        turns = dt.unsqueeze(-1) * (math.pi * torch.tanh(widen(angle))).unsqueeze(-2)  # (B, L, H, S)
        phase = accumulate(turns, None if cache is None else cache.get("phase"))
        if cache is not None:
            cache["phase"] = last_real(phase, WHOLE, cache.get("phase"))  # padding does not turn it
        cos, sin = phase.cos(), phase.sin()
        q = self.tap("hook_q", rotate(self.by_head(C, self.C_norm, self.C_bias), cos, sin))
        k = self.tap("hook_k", rotate(self.by_head(B, self.B_norm, self.B_bias), cos, sin))
        v = self.tap("hook_v", fill_padding(x, mask).unflatten(-1, (config.n_head, -1)), mask)
        now = self.tap("hook_now", lam * dt, mask)
        before = self.tap("hook_before", (1 - lam) * dt, mask)
        order = context.order
        before = before if order is None else before.take_along_dim(order.unsqueeze(-1), dim=1)
        first, late = before[:, :1].sum(1), F.pad(before, (0, 0, 0, 1))[:, 1:]
        if order is not None:  # the next real token need not be the neighbour
            late = late.take_along_dim(order.argsort(dim=1).unsqueeze(-1), dim=1)
        return q, k, v, now, late, log_decay, first

    def by_head(self, shared: Tensor, norm: nn.Module, bias: Tensor) -> Tensor:
        """B or C as each head has it before the turn.

        Args:
            shared: (B, L, G * N), of each group of heads.
            norm: Of the N channels.
            bias: (H, 1, N).

        Returns:
            (B, L, H, N).
        """
        groups = norm(shared.unflatten(-1, (self.config.ngroups, -1)))
        return widen(groups).repeat_interleave(self.config.n_head // self.config.ngroups, dim=-2) + bias[:, 0]

    def skip(self, y: Tensor, v: Tensor) -> Tensor:
        """y + D v, (B, L, H, P)."""
        return y + self.D[:, None] * v

    def output(self, y: Tensor, z: Tensor) -> Tensor:
        """The layer's output.

        Args:
            y: (..., L, H, P), what the recurrence and the skip give.
            z: (B, L, E), which makes the gate.

        Returns:
            (..., L, D).
        """
        gate = self.tap("hook_gate", F.silu(widen(z)).unflatten(-1, (self.config.n_head, -1)))
        return self.out_proj((y * gate).flatten(-2).to(dtype_of(self.out_proj)))


def last_real(x: Tensor, context: Context, before: Tensor | None) -> Tensor:
    """What the last real token of each row has.

    Args:
        x: (B, L, ...), of this call.
        context: Which tokens are real.
        before: (B, ...), of the call before. None: 0.

    Returns:
        (B, ...); of rows of padding alone that of the call before.
    """
    if context.order is None and x.shape[1]:
        return x[:, -1]
    before = x.new_zeros(len(x), *x.shape[2:]) if before is None else before
    if context.mask is None or not x.shape[1]:
        return before
    real = context.mask.any(dim=1)
    last = context.mask.shape[1] - 1 - context.mask.flip(1).byte().argmax(dim=1)
    rows = torch.arange(len(x), device=x.device)
    return torch.where(real.view(-1, *[1] * (x.dim() - 2)), x[rows, last], before)


class Mamba3ForCausalLM(MambaForCausalLM):
    """Mamba-3 language model."""

    mixer = Mamba3Mixer


def state_size(config: Mamba3Config, seq_len: int) -> int:
    """h, the last write and the phases, whatever seq_len is."""
    E, H = config.d_inner, config.n_head
    return config.n_layer * (E * config.d_state + H * config.d_state + E + H * config.n_angle)


ARCHITECTURE = Architecture(
    name="mamba3", label="Mamba-3", color="#6b4c9a", marker="3", config=Mamba3Config,
    model=Mamba3ForCausalLM, positions=("none", "learned"), state_size=state_size,
    presets={
        "tiny": dict(TINY, n_layer=4, d_state=64),
        "1.3b": dict(d_model=2048, n_layer=48),
    },
    memory=block_memory.every_block(block_memory.mamba3),
    block=lambda config: MambaBlock(config, Mamba3Mixer), hub=hub_fla.MAMBA3,
)  # fmt: skip
