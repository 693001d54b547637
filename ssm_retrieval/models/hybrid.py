"""Interleaved SSM / attention language model, in the manner of Jamba (arXiv 2403.19887) and Retrievit.

With `ssm_per_attention = 2` the blocks run S S A S S A ...: the last block of every group is attention.
Each block adds its result to the residual stream once. (The released Retrievit hybrids add the block's
input a second time, so that their skip path doubles at every block.)
Attention blocks are those of `models.transformer` with the SSM blocks' norm, SSM blocks those of
`models.mamba` / `models.mamba2`: a hybrid differs from its parents in the sequence mixer only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssm_retrieval.models import block_memory
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.block_memory import BlockMemory, Step
from ssm_retrieval.models.common import Block, LanguageModel, init_normal, make_norm
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.mamba import MambaBlock, MambaConfig, MambaMixer, rescale_out_proj
from ssm_retrieval.models.mamba import state_size as mamba_state
from ssm_retrieval.models.mamba2 import Mamba2Config, Mamba2Mixer
from ssm_retrieval.models.mamba2 import state_size as mamba2_state
from ssm_retrieval.models.transformer import (
    TransformerBlock,
    TransformerConfig,
    add_learned_positions,
    init_linear,
)
from ssm_retrieval.models.transformer import state_size as attention_state
from ssm_retrieval.ops.linear import Linear


@dataclass(frozen=True)
class HybridConfig(Config):
    """Shape of an interleaved hybrid; the defaults are Retrievit's hybrid_1M1T_state16."""

    vocab_size: int = 50280
    d_model: int = 1024
    n_layer: int = 16  # all blocks, SSM and attention
    ssm: str = "mamba"  # or "mamba2"
    ssm_per_attention: int = 1
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64  # Mamba-2 only
    n_head: int = 16
    d_mlp: int = 0  # 0 = 4 * d_model
    position: str = "rope"
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    norm: str = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embedding_std: float = 0.02
    init_std: float = 0.02
    scan_backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.ssm_per_attention + 1
        require(
            self.n_layer % group == 0,
            f"n_layer={self.n_layer} is not a multiple of ssm_per_attention + 1 = {group}; change one",
        )
        self.ssm_config(), self.attention_config()  # their checks apply here too

    def ssm_config(self) -> Any:
        return self._part(Mamba2Config if self.ssm == "mamba2" else MambaConfig)

    def attention_config(self) -> TransformerConfig:
        return self._part(TransformerConfig)

    def _part(self, kind: Any) -> Any:
        """The config of one kind of block: every option that the two have in common."""
        mine = self.to_dict()
        return kind(**{key: mine[key] for key in kind.__dataclass_fields__ if key in mine})

    def is_attention(self, layer: int) -> bool:
        return layer % (self.ssm_per_attention + 1) == self.ssm_per_attention


class HybridBackbone(nn.Module):
    def __init__(self, config: HybridConfig, dtype: torch.dtype | None = None):
        super().__init__()
        mixer = Mamba2Mixer if config.ssm == "mamba2" else MambaMixer
        self.embedding = nn.Embedding(config.vocab_size, config.d_model).to(dtype)
        if config.position == "learned":
            self.embed_pos = nn.Embedding(config.max_position_embeddings, config.d_model).to(dtype)
        blocks: list[nn.Module] = []
        for layer in range(config.n_layer):
            if config.is_attention(layer):
                block: nn.Module = TransformerBlock(config.attention_config())
                init_linear(block, config.init_std)
            else:
                block = MambaBlock(config.ssm_config(), mixer)
                rescale_out_proj(block, config.n_layer)
            blocks.append(block.to(dtype))
        self.layers = nn.ModuleList(blocks)
        self.norm_f = make_norm(config.norm, config.d_model, config.norm_eps).to(dtype)


class HybridForCausalLM(LanguageModel):
    """Interleaved hybrid language model."""

    def __init__(self, config: HybridConfig, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.backbone = HybridBackbone(config, dtype)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False).to(dtype)
        init_normal(self.backbone.embedding.weight, std=config.embedding_std)
        init_normal(self.lm_head.weight, std=config.embedding_std)
        if config.position == "learned":
            init_normal(self.backbone.embed_pos.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def parts(self) -> tuple[nn.Embedding, list[Block], nn.Module, nn.Linear]:
        backbone = self.backbone
        return backbone.embedding, cast(list[Block], list(backbone.layers)), backbone.norm_f, self.lm_head

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.backbone.embedding(input_ids)
        if self.config.position == "learned":
            x = add_learned_positions(x, positions, self.backbone.embed_pos)
        return x


def state_size(config: HybridConfig, seq_len: int) -> int:
    """What each block keeps."""
    attention, ssm = config.attention_config().replace(n_layer=1), config.ssm_config().replace(n_layer=1)
    sizes = {True: attention_state(attention, seq_len), False: SSM[config.ssm][1](ssm, seq_len)}
    return sum(sizes[config.is_attention(layer)] for layer in range(config.n_layer))


def memory(config: HybridConfig, step: Step) -> list[BlockMemory]:
    parts = {
        True: block_memory.attention(config.attention_config(), step),
        False: SSM[config.ssm][0](config.ssm_config(), step),
    }
    return [parts[config.is_attention(layer)] for layer in range(config.n_layer)]


SSM: dict[str, tuple[Any, Any]] = {
    "mamba": (block_memory.mamba, mamba_state),
    "mamba2": (block_memory.mamba2, mamba2_state),
}
ARCHITECTURE = Architecture(
    name="hybrid",
    label="Hybrid",
    color="#cc78bc",
    marker="H",
    config=HybridConfig,
    model=HybridForCausalLM,
    presets={
        "tiny": dict(TINY, n_layer=3, ssm_per_attention=2, n_head=4),
        "130m": dict(d_model=768, n_layer=16, n_head=12),
        "150m": dict(d_model=1024, n_layer=16, n_head=16),
        "370m": dict(d_model=1024, n_layer=32, n_head=16),
        "790m": dict(d_model=1536, n_layer=34, n_head=12),
        "1.4b": dict(d_model=2048, n_layer=34, n_head=16),
        "2.8b": dict(d_model=2560, n_layer=44, n_head=20),
    },
    positions=("learned", "rope", "none"),
    state_size=state_size,
    memory=memory,
)
