"""Kimi delta attention: gated DeltaNet with a decay for every channel of the key (arXiv 2510.26692).

`models.deltanet` with another factor, per token t and head:

    a_t = exp(-exp(A_log) softplus(W_2 W_1 residual_t + dt_bias))   N numbers in (0, 1)
    h_t = h_{t-1} a_t + beta (v - h_{t-1} a_t k) k^T                h_t: (P, N), its columns times a_t

where W_1 goes down to P channels, and a gate of low rank: out = o_proj(rms_norm(y_t) * sigmoid(U_2 U_1
residual_t + b)). In the published models every fourth layer is attention, as in the pattern "kda kda kda A"
of a hybrid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

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
class KDAConfig(KeysConfig):
    """Shape of a language model with Kimi delta attention; the defaults are fla's."""

    negative_eigenvalues: bool = False
    dt_min: float = 0.001
    dt_max: float = 0.1

    @property
    def gate(self) -> bool:
        """Whether the output is multiplied by a gate: always."""
        return True


class KDAMixer(DeltaNetMixer):
    """The layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = {**DeltaNetMixer.hook_axes, "hook_A_bar": "B L H N"}
    decays = True

    def make_decay(self) -> tuple[Tensor, ...]:
        config, keys = self.config, self.config.n_head * self.config.d_state
        down = Linear(config.d_model, config.headdim, bias=False)
        up = Linear(config.headdim, keys, bias=False)
        self.f_proj = nn.Sequential(down, up)
        self.A_log = nn.Parameter(torch.empty(config.n_head).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(dt_bias(config, keys))
        for weight in self.f_proj.parameters():
            init_normal(weight, std=config.init_std)
        return self.A_log.detach(), up.weight.detach(), self.dt_bias.detach()

    def make_gate(self) -> nn.Module:
        config = self.config
        up = Linear(config.headdim, config.d_inner)
        nn.init.zeros_(up.bias)
        return nn.Sequential(Linear(config.d_model, config.headdim, bias=False), up)

    def gate(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(widen(self.g_proj(hidden))).unflatten(-1, (self.config.n_head, -1))

    def log_decay(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        dt = fill_padding(F.softplus(widen(self.f_proj(hidden)) + self.dt_bias), mask)
        return -torch.exp(widen(self.A_log)).unsqueeze(-1) * dt.unflatten(-1, (self.config.n_head, -1))


class KDAForCausalLM(SwiGLUForCausalLM):
    """Language model with Kimi delta attention."""

    mixer = KDAMixer


ARCHITECTURE = Architecture(
    name="kda", label="KDA", color="#ece133", marker="K", config=KDAConfig, model=KDAForCausalLM,
    positions=("none", "learned"), state_size=state_size,
    presets={
        "tiny": dict(TINY, n_layer=2, d_state=64, headdim=64, expand=2.0, d_mlp=256),
        "1.3b": dict(d_model=2048, n_layer=24),
    },
    memory=block_memory.every_block(partial(block_memory.delta, decay="channel")),
    block=lambda config: SwiGLUBlock(config, KDAMixer), hub=hub_fla.KDA,
)  # fmt: skip
