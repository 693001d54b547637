"""Interleaved SSM / attention language model, in the manner of Jamba (arXiv 2403.19887) and Retrievit.

With `ssm_per_attention = 2` the blocks run S S A S S A ...: the last block of every group is attention.
Each block adds its result to the residual stream once. (The released Retrievit hybrids add the block's
input a second time, so that their skip path doubles at every block.)
Attention blocks are those of `models.transformer` with the SSM blocks' norm, SSM blocks those of
`models.mamba` / `models.mamba2`: a hybrid differs from its parents in the sequence mixer only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssm_retrieval.models.common import LanguageModel, add_learned_positions, init_normal, make_norm, part
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.mamba import MambaBlock, MambaConfig, MambaMixer
from ssm_retrieval.models.mamba2 import Mamba2Config, Mamba2Mixer
from ssm_retrieval.models.transformer import TransformerBlock, TransformerConfig, init_linear
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


class HybridForCausalLM(LanguageModel):
    """Interleaved hybrid language model."""

    embedding = part("backbone.embedding")
    blocks = part("backbone.layers")
    norm = part("backbone.norm_f")
    head = part("lm_head")
    backbone: Any

    def __init__(self, config: HybridConfig, dtype: torch.dtype | None = None):
        super().__init__(config)
        V, D, learned = config.vocab_size, config.d_model, config.position == "learned"
        self.backbone = nn.ModuleDict({"embedding": nn.Embedding(V, D).to(dtype)})
        if learned:
            self.backbone["embed_pos"] = nn.Embedding(config.max_position_embeddings, D).to(dtype)
        blocks = (make_block(config, i).to(dtype) for i in range(config.n_layer))
        self.backbone["layers"] = nn.ModuleList(blocks)
        self.backbone["norm_f"] = make_norm(config).to(dtype)
        self.lm_head = Linear(D, V, bias=False).to(dtype)
        init_normal(self.embedding.weight, std=config.embedding_std)
        init_normal(self.lm_head.weight, std=config.embedding_std)
        if learned:
            init_normal(self.backbone.embed_pos.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.config.position == "learned":
            x = add_learned_positions(x, positions, self.backbone.embed_pos)
        return x


def make_block(config: HybridConfig, layer: int) -> nn.Module:
    """A freshly initialised block, as in its parent."""
    if not config.is_attention(layer):
        return MambaBlock(config.ssm_config(), Mamba2Mixer if config.ssm == "mamba2" else MambaMixer)
    block = TransformerBlock(config.attention_config())
    init_linear(block, config.init_std)
    return block
