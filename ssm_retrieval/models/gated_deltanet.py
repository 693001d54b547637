"""Gated DeltaNet: the delta rule with Mamba-2's decay (Yang et al. 2024, arXiv 2412.06464).

`models.deltanet` with one more factor, per token t and head:

    a_t = exp(-exp(A_log) softplus(w residual_t + dt_bias))         in (0, 1)
    h_t = a_t h_{t-1} + beta (v - a_t h_{t-1} k) k^T                h_t: (P, N)

The decay clears the state at once, the delta rule one key at a time. Values are twice as wide as keys, and
the output is gated: out = o_proj(rms_norm(y_t) * silu(g_proj(residual_t))).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import block_memory, hub_fla
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.deltanet import DeltaNetMixer
from ssm_retrieval.models.layers import init_normal, widen
from ssm_retrieval.models.padding import fill_padding
from ssm_retrieval.models.ssm_init import dt_bias
from ssm_retrieval.models.swiglu_block import KeysConfig, SwiGLUBlock, SwiGLUForCausalLM, state_size
from ssm_retrieval.ops.linear import Linear


@dataclass(frozen=True)
class GatedDeltaNetConfig(KeysConfig):
    """Shape of a gated DeltaNet language model; the defaults are fla's, the 1.3 B of the paper."""

    n_layer: int = 21
    d_state: int = 256  # channels of a head's key
    headdim: int = 512  # channels of a head's value
    expand: float = 1.5
    gate: bool = True
    negative_eigenvalues: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1


class GatedDeltaNetMixer(DeltaNetMixer):
    """The layer: (B, L, D) -> (B, L, D)."""

    decays = True

    def make_decay(self) -> tuple[Tensor, ...]:
        config, H = self.config, self.config.n_head
        self.a_proj = Linear(config.d_model, H, bias=False)
        # Published from 0, whose log is -inf
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1e-4, 16).log())
        self.dt_bias = nn.Parameter(dt_bias(config, H))
        init_normal(self.a_proj.weight, std=config.init_std)
        return self.A_log.detach(), self.a_proj.weight.detach(), self.dt_bias.detach()

    def log_decay(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        dt = F.softplus(widen(self.a_proj(hidden)) + self.dt_bias)
        return fill_padding(-torch.exp(widen(self.A_log)) * dt, mask)


class GatedDeltaNetForCausalLM(SwiGLUForCausalLM):
    """Gated DeltaNet language model."""

    mixer = GatedDeltaNetMixer


ARCHITECTURE = Architecture(
    name="gated-deltanet", label="Gated DeltaNet", color="#56b4e9", marker="G", config=GatedDeltaNetConfig,
    model=GatedDeltaNetForCausalLM, positions=("none", "learned"), state_size=state_size,
    presets={
        "tiny": dict(TINY, n_layer=2, d_state=64, headdim=64, expand=2.0, d_mlp=256),
        "1.3b": dict(d_model=2048, n_layer=21),
    },
    memory=block_memory.every_block(partial(block_memory.delta, decay="head")),
    block=lambda config: SwiGLUBlock(config, GatedDeltaNetMixer), hub=hub_fla.GATED_DELTANET,
)  # fmt: skip
