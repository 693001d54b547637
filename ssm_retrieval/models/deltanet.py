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
from ssm_retrieval.models.layers import RMSNorm, init_normal, widen
from ssm_retrieval.models.padding import convolve, fill_padding
from ssm_retrieval.models.ssm_init import recall_init
from ssm_retrieval.models.swiglu_block import (
    DeltaInputs,
    HeadsConfig,
    KeyValueMixer,
    SwiGLUBlock,
    SwiGLUForCausalLM,
    state_size,
)
from ssm_retrieval.ops.linear import Linear


@dataclass(frozen=True)
class DeltaNetConfig(HeadsConfig):
    """Shape of a DeltaNet language model; the defaults are fla's, the 1.3 B of the paper."""

    vocab_size: int = 32000
    d_model: int = 2048
    n_layer: int = 24
    d_state: int = 128  # channels of a head's key
    headdim: int = 128  # channels of a head's value
    expand: float = 1.0
    short_conv: bool = True
    d_conv: int = 4
    gate: bool = False
    negative_eigenvalues: bool = False
    d_mlp: int = 0  # 0 = 8/3 * d_model, rounded up to a multiple of 256
    ssm_init: str = "default"  # as in MambaConfig; "long" changes nothing, since nothing decays
    position: str = "none"
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    embedding_std: float = 0.02
    init_std: float = 0.02


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
        D, E, H, J = config.d_model, config.d_inner, config.n_head, config.n_head * config.d_state
        self.q_proj, self.k_proj = Linear(D, J, bias=False), Linear(D, J, bias=False)
        self.v_proj, self.b_proj = Linear(D, E, bias=False), Linear(D, H, bias=False)
        self.convs = [f"{name}_conv1d" for name in "qkv"] if config.short_conv else []
        for name, width in zip(self.convs, (J, J, E), strict=False):
            self.add_module(name, nn.Conv1d(width, width, config.d_conv, groups=width, bias=False))
        if config.gate:
            self.g_proj = self.make_gate()
        self.o_norm = RMSNorm(config.headdim, config.norm_eps)
        self.o_proj = Linear(E, D, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                init_normal(module.weight, std=config.init_std)
        self.recall_init()

    def recall_init(self, dt: tuple[Tensor, ...] = ()) -> None:
        """`models.ssm_init.recall_init` for this layer; q = k at first if they are tied."""
        convs = [self.get_submodule(name) for name in self.convs]
        pairs: Any = [(self.k_proj, self.q_proj), *([(convs[1], convs[0])] if convs else [])]
        tied = [(of_k.weight.detach(), of_q.weight.detach()) for of_k, of_q in pairs]
        recall_init(self.config.ssm_init, convs, dt, tied)  # type: ignore[arg-type]

    def inputs(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> DeltaInputs:
        config, mask = self.config, context.mask
        E, H, N = config.d_inner, config.n_head, config.d_state
        qkv = torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], dim=-1)
        qkv = self.tap("hook_in", fill_padding(qkv, mask), mask)
        if self.convs:
            taps = torch.cat([getattr(self, name).weight for name in self.convs])
            qkv = convolve(qkv, taps, None, context, cache)
        else:
            qkv = F.silu(qkv)
        q, k, v = (x.unflatten(-1, (H, -1)) for x in qkv.split([H * N, H * N, E], dim=-1))
        q, k, v = self.tap("hook_q", unit(q) * N**-0.5), self.tap("hook_k", unit(k)), self.tap("hook_v", v)
        beta = torch.sigmoid(widen(self.b_proj(hidden))) * (2 if config.negative_eigenvalues else 1)
        beta = self.tap(
            "hook_beta", fill_padding(beta, mask), mask
        )  # (B, L, H), 0 at padding: it does nothing
        return q, k, v, beta, self.log_decay(hidden, mask)

    def output(self, y: Tensor, hidden: Tensor) -> Tensor:
        y, gate = self.o_norm(y), self.gate(hidden)
        y = y if gate is None else (y * self.tap("hook_gate", gate)).to(y.dtype)
        return self.o_proj(y.flatten(-2))

    def make_gate(self) -> nn.Module:
        """The projection (B, L, D) -> (B, L, E) that the gate is made of."""
        return Linear(self.config.d_model, self.config.d_inner, bias=False)

    def gate(self, hidden: Tensor) -> Tensor | None:
        """What multiplies the normalised output.

        Args:
            hidden: (B, L, D).

        Returns:
            (B, L, H, P), or None.
        """
        if not self.config.gate:
            return None
        return F.silu(widen(self.g_proj(hidden))).unflatten(-1, (self.config.n_head, -1))

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
