"""DeltaNet: linear attention that overwrites (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024,
arXiv 2406.06484).

One layer, per token t and head (letters as in `ssm_retrieval.models.swiglu_block`):

    q, k, v = silu(conv1d(W residual_t))                    causal, depthwise, one convolution for each
    q, k    = q / |q| / sqrt(N), k / |k|
    beta    = sigmoid(w residual_t)                         one number, how much is overwritten
    h_t     = h_{t-1} + beta (v - h_{t-1} k) k^T            h_t: (P, N); h_{t-1} k is what the key held
    y_t     = h_t q
    out     = o_proj(rms_norm(y_t))                         per head

The update is a step of gradient descent on |h k - v|^2 / 2, of size beta. With beta = 1 the state then holds
v under k, and a second write of the same key replaces the first, where Mamba adds them. `gate` multiplies
the normalised y by silu(g_proj(residual)), and `negative_eigenvalues` doubles beta (arXiv 2411.12537).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import block_memory, hub_fla
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import Context, LayerCache
from ssm_retrieval.models.layers import RMSNorm, widen
from ssm_retrieval.models.padding import fill_padding
from ssm_retrieval.models.swiglu_block import (
    DeltaInputs,
    KeysConfig,
    KeyValueMixer,
    SwiGLUBlock,
    SwiGLUForCausalLM,
    state_size,
)
from ssm_retrieval.ops.linear import Linear


@dataclass(frozen=True)
class DeltaNetConfig(KeysConfig):
    """Shape of a DeltaNet language model; the defaults are fla's, the 1.3 B of the paper.

    A state never decays, so that `ssm_init` "long" changes nothing.
    """

    gate: bool = False
    negative_eigenvalues: bool = False


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis, in float32 or wider; 1e-6 is added to |x|^2."""
    x = widen(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class DeltaNetMixer(KeyValueMixer):
    """The layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = dict(
        hook_in="B L J", hook_q="B L H N", hook_k="B L H N", hook_v="B L H P", hook_beta="B L H",
        hook_A_bar="B L H", hook_ssm_state="B L H P N", hook_ssm_readout="B L H P N", hook_y="B L H P",
        hook_gate="B L H P",
    )  # fmt: skip
    decays = False

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        D, E, H, keys = config.d_model, config.d_inner, config.n_head, config.n_head * config.d_state
        self.q_proj, self.k_proj = Linear(D, keys, bias=False), Linear(D, keys, bias=False)
        self.v_proj, self.b_proj = Linear(D, E, bias=False), Linear(D, H, bias=False)
        self.add_convs()
        if config.gate:
            self.g_proj = self.make_gate()
        self.o_norm = RMSNorm(config.headdim, config.norm_eps)
        self.o_proj = Linear(E, D, bias=False)
        self.draw()
        self.recall_init(self.make_decay())

    def make_gate(self) -> nn.Module:
        """The projection (B, L, D) -> (B, L, E) that the gate is made of."""
        return Linear(self.config.d_model, self.config.d_inner, bias=False)

    def make_decay(self) -> tuple[Tensor, ...]:
        """Make what the decay is computed from, and return it as `recall_init` wants it; nothing here."""
        return ()

    def inputs(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> DeltaInputs:
        config, mask = self.config, context.mask
        q, k, v = self.project(hidden, context, cache)
        if not self.convs:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = self.tap("hook_q", unit(q) * config.d_state**-0.5), self.tap("hook_k", unit(k))
        beta = torch.sigmoid(widen(self.b_proj(hidden))) * (2 if config.negative_eigenvalues else 1)
        beta = fill_padding(beta, mask)  # (B, L, H), 0 at padding: it does nothing
        beta = self.tap("hook_beta", beta, mask)
        return q, k, self.tap("hook_v", v), beta, self.log_decay(hidden, mask)

    def log_decay(self, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """Logarithm of the decay; None here, where nothing decays.

        Args:
            hidden: (B, L, D).
            mask: (B, L) bool, True = real token.

        Returns:
            (B, L, H), 0 at padding, or None.
        """
        return None

    def hook_points(self) -> list[str]:
        absent = {"hook_gate": not self.config.gate, "hook_A_bar": not self.decays}
        return [name for name in self.hook_axes if not absent.get(name, False)]


class DeltaNetForCausalLM(SwiGLUForCausalLM):
    """DeltaNet language model."""

    mixer = DeltaNetMixer


ARCHITECTURE = Architecture(
    name="deltanet", label="DeltaNet", color="#d55e00", marker="D", config=DeltaNetConfig,
    model=DeltaNetForCausalLM, positions=("none", "learned"), state_size=state_size,
    presets={
        "tiny": dict(TINY, n_layer=2, d_state=64, headdim=64, expand=2.0, d_mlp=256),
        "340m": dict(d_model=1024, n_layer=24), "1.3b": dict(d_model=2048, n_layer=24),
    },
    memory=block_memory.every_block(block_memory.delta),
    block=lambda config: SwiGLUBlock(config, DeltaNetMixer), hub=hub_fla.DELTANET,
)  # fmt: skip
