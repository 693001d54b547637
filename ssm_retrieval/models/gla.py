"""Gated linear attention: linear attention whose state fades (Yang et al. 2023, arXiv 2312.06635).

One layer, per token t and head (letters as in `ssm_retrieval.models.swiglu_block`):

    q, k, v = W residual_t                                  q is divided by sqrt(N)
    a_t     = sigmoid(W_2 W_1 residual_t + b)^(1/16)        N numbers; W_1 goes down to 16 channels
    h_t     = h_{t-1} a_t + v k^T                           h_t: (P, N), its columns times a_t
    y_t     = h_t q
    out     = o_proj(rms_norm(y_t) * silu(g_proj(residual_t)))

Nothing is erased: what a key holds is added to, as in Mamba, and fades channel by channel. `short_conv` puts
a causal convolution and a SiLU behind W; the published models have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import block_memory, hub_fla
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import Context, LayerCache
from ssm_retrieval.models.layers import RMSNorm, widen
from ssm_retrieval.models.padding import fill_padding
from ssm_retrieval.models.ssm_init import parts_of
from ssm_retrieval.models.swiglu_block import (
    DeltaInputs,
    KeysConfig,
    KeyValueMixer,
    SwiGLUBlock,
    SwiGLUForCausalLM,
    state_size,
)
from ssm_retrieval.ops.linear import Linear

RANK = 16  # channels between the two projections to the decay
SLOWER = 16  # the decay is the 16th root of a sigmoid
LONG_BIAS = 8.0  # of the decay: sigmoid(8)^(1/16) = 0.99998


@dataclass(frozen=True)
class GLAConfig(KeysConfig):
    """Shape of a gated linear attention language model; the defaults are fla's, the 1.3 B of the paper.

    `ssm_init` "long" is a large bias of the decay.
    """

    d_state: int = 256  # channels of a head's key
    headdim: int = 512  # channels of a head's value
    short_conv: bool = False
    gate: bool = True


class GLAMixer(KeyValueMixer):
    """The layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = dict(
        hook_in="B L J", hook_q="B L H N", hook_k="B L H N", hook_v="B L H P", hook_A_bar="B L H N",
        hook_ssm_state="B L H P N", hook_ssm_readout="B L H P N", hook_y="B L H P", hook_gate="B L H P",
    )  # fmt: skip
    erase = False

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        D, E, J = config.d_model, config.d_inner, config.n_head * config.d_state
        self.q_proj, self.k_proj, self.v_proj = (Linear(D, width, bias=False) for width in (J, J, E))
        self.add_convs()
        up = Linear(RANK, J)
        self.gk_proj = nn.Sequential(Linear(D, RANK, bias=False), up)
        if config.gate:
            self.g_proj = Linear(D, E, bias=False)
        self.norm_name = "g_norm_swish_gate" if config.gate else "g_norm"
        self.add_module(self.norm_name, RMSNorm(config.headdim, config.norm_eps))
        self.o_proj = Linear(E, D, bias=False)
        self.draw()
        nn.init.zeros_(up.bias)
        self.recall_init(())
        if "long" in parts_of(config.ssm_init):
            nn.init.zeros_(up.weight)
            nn.init.constant_(up.bias, LONG_BIAS)

    @property
    def o_norm(self) -> nn.Module:  # type: ignore[override]
        """The norm of the output, under the name that it has in other mixers."""
        return self.get_submodule(self.norm_name)

    def inputs(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> DeltaInputs:
        config, mask = self.config, context.mask
        q, k, v = self.project(hidden, context, cache)
        q, k = self.tap("hook_q", q * config.d_state**-0.5), self.tap("hook_k", k)
        v = fill_padding(v.flatten(2), mask).unflatten(2, (config.n_head, -1))  # which writes nothing
        log_decay = fill_padding(F.logsigmoid(widen(self.gk_proj(hidden))) / SLOWER, mask)
        return q, k, self.tap("hook_v", v, mask), None, log_decay.unflatten(-1, (config.n_head, -1))

    def hook_points(self) -> list[str]:
        return [name for name in self.hook_axes if name != "hook_gate" or self.config.gate]


class GLAForCausalLM(SwiGLUForCausalLM):
    """Gated linear attention language model."""

    mixer = GLAMixer

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """fla's name of the norm of the output also depends on whether its kernel is fused with the gate."""
        super().accept_hub_spellings(named, prefix)
        theirs = "g_norm" if self.config.gate else "g_norm_swish_gate"
        for i, block in enumerate(self.blocks):
            at, mixer = f"{prefix}model.layers.{i}.attn.", cast(Any, block).mixer
            if f"{at}{theirs}.weight" in named:
                named[f"{at}{mixer.norm_name}.weight"] = named.pop(f"{at}{theirs}.weight")


ARCHITECTURE = Architecture(
    name="gla", label="GLA", color="#fbafe4", marker="l", config=GLAConfig, model=GLAForCausalLM,
    positions=("none", "learned"), state_size=state_size,
    presets={
        "tiny": dict(TINY, n_layer=2, d_state=64, headdim=64, expand=2.0, d_mlp=256),
        "340m": dict(d_model=1024, n_layer=24, d_state=128, headdim=256),
        "1.3b": dict(d_model=2048, n_layer=24),
    },
    memory=block_memory.every_block(partial(block_memory.gla, rank=RANK)),
    block=lambda config: SwiGLUBlock(config, GLAMixer),
    hub=hub_fla.GLA,
)  # fmt: skip
