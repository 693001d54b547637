"""GPT-NeoX / Pythia Transformer (Black et al. 2022, arXiv 2204.06745; Biderman et al. 2023, 2304.01373).

One block (parallel residual: attention and MLP read the same residual stream, each through its norm):

    x = x + attention(norm_1(x)) + mlp(norm_2(x))
    attention(a) = W_o concat_heads( softmax(q k^T / sqrt(P) + causal) v )
    mlp(a)       = W_2 gelu(W_1 a)                          exact (erf) GELU

The position scheme is a choice:

    "rope"     q and k rotated by an angle that grows with the position (Su et al. 2021, arXiv 2104.09864),
               on the first `rotary_pct` of each head's dimensions; Pythia rotates 25 %
    "learned"  a vector per position added to the embedding (GPT-2)
    "none"     nothing: the causal mask is the only source of order (NoPE, arXiv 2305.19466)

Parameter names are those of EleutherAI/pythia-*; `gpt_neox.embed_pos` exists only with "learned".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import block_memory
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import (
    Block,
    Context,
    LanguageModel,
    LayerCache,
    init_normal,
    make_norm,
    respell,
)
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hooks import Hook, Hooked
from ssm_retrieval.ops._route import values_are_known
from ssm_retrieval.ops.attention import attention
from ssm_retrieval.ops.linear import Linear


@dataclass(frozen=True)
class TransformerConfig(Config):
    """Shape of a GPT-NeoX language model; the defaults are EleutherAI/pythia-160m."""

    vocab_size: int = 50304
    d_model: int = 768
    n_layer: int = 12
    n_head: int = 12
    d_mlp: int = 0  # 0 = 4 * d_model
    position: str = "rope"
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    parallel_residual: bool = True
    norm: str = "layer"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    embedding_std: float = 0.02
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.d_model % self.n_head == 0,
            f"d_model={self.d_model} is not a multiple of n_head={self.n_head}; change one of them",
        )
        require(
            self.position != "rope" or self.rotary_dims > 0,
            f"rotary_pct={self.rotary_pct} of heads with {self.d_head} dimensions rotates none of them; "
            "use more, wider heads or position='none'",
        )

    @property
    def mlp_width(self) -> int:
        return self.d_mlp or 4 * self.d_model

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head

    @property
    def rotary_dims(self) -> int:
        """Rotated dimensions per head; rotation works on pairs, so always even."""
        return 2 * (int(self.d_head * self.rotary_pct) // 2) if self.position == "rope" else 0


def rope_tables(positions: Tensor, dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/dims): (..., L) int -> two float32 (..., L, dims)."""
    frequency = theta ** (-torch.arange(0, dims, 2, device=positions.device).float() / dims)
    angle = positions.float().unsqueeze(-1) * frequency
    angle = torch.cat([angle, angle], dim=-1)  # dimension i is paired with i + dims/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `cos.shape[-1]` dimensions of x (B, H, L, P) by the angles of each position."""
    dims = cos.shape[-1]
    rotated, rest = x[..., :dims], x[..., dims:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = (rotated * cos + turned * sin).to(x.dtype)
    return rotated if rest.shape[-1] == 0 else torch.cat([rotated, rest], dim=-1)


def attention_mask(L: int, key_mask: Tensor | None, S: int, device: torch.device) -> Tensor:
    """(B or 1, 1, L, S) bool, True = may attend: causal, and real keys only.

    Every query may see itself even on padding, else its softmax would be over nothing (NaN).
    """
    causal = torch.ones(L, S, dtype=torch.bool, device=device).tril(S - L)
    if key_mask is None:
        return causal[None, None]
    itself = torch.eye(S, dtype=torch.bool, device=device)[S - L :]
    return (causal & key_mask[:, None, None, :]) | itself


class Attention(Hooked, nn.Module):
    """Multi-head causal self-attention: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = {
        "hook_q": "B L H P",
        "hook_k": "B L H P",
        "hook_v": "B L H P",
        "hook_rot_q": "B L H P",
        "hook_rot_k": "B L H P",
        "hook_attn_scores": "B H L S",
        "hook_pattern": "B H L S",
        "hook_z": "B L H P",
    }

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.query_key_value = Linear(config.d_model, 3 * config.d_model)  # rows per head: q, k, v
        self.dense = Linear(config.d_model, config.d_model)

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        config = self.config
        B, L, _ = hidden.shape
        qkv = self.query_key_value(hidden).view(B, L, config.n_head, 3 * config.d_head)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)  # (B, H, L, P) each
        if self.hook is not None:
            q, k = _by_token(self.hook, "hook_q", q), _by_token(self.hook, "hook_k", k)
            v = _by_token(self.hook, "hook_v", v)
        if config.rotary_dims > 0:
            assert context.positions is not None
            cos, sin = rope_tables(context.positions, config.rotary_dims, config.rope_theta)
            if cos.dim() == 3:  # one row of positions per sequence: broadcast over heads
                cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if self.hook is not None:
                q, k = _by_token(self.hook, "hook_rot_q", q), _by_token(self.hook, "hook_rot_k", k)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = k, v
        S = k.shape[2]
        if context.key_mask is None and (S == L or L == 1):  # nothing cached, or a single new token
            y = attention(q, k, v, causal=L > 1)
        else:
            mask = attention_mask(L, context.key_mask, S, q.device)
            y = attention(q, k, v, mask)
        if self.hook is not None:
            pattern = hooked_pattern(self.hook, q, k, context.key_mask)
            y = _by_token(self.hook, "hook_z", y if pattern is None else pattern @ v)
        return self.dense(y.transpose(1, 2).reshape(B, L, config.d_model))

    def hook_points(self) -> list[str]:
        rotated = ("hook_rot_q", "hook_rot_k") if self.config.rotary_dims == 0 else ()
        return [name for name in self.hook_axes if name not in rotated]

    def hook_sizes(self) -> dict[str, int]:
        return {"H": self.config.n_head, "P": self.config.d_head}


def _by_token(hook: Hook, name: str, x: Tensor) -> Tensor:
    """x (B, H, L, P) after a hook that sees (B, L, H, P), the order of TransformerLens."""
    seen = x.transpose(1, 2)
    new = hook(name, seen)
    return x if new is seen else new.transpose(1, 2)


def hooked_pattern(hook: Hook, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor | None:
    """The attention pattern (B, H, L, S) if an edit changes it; None leaves the fused kernel's output alone.

    Scores are masked with -inf and scaled, as in TransformerLens. What is only recorded is computed for the
    recorded queries alone.
    """
    L, S = q.shape[2], k.shape[2]
    names = ("hook_attn_scores", "hook_pattern")
    edited = any(hook.edits(name) for name in names)
    rows = list(range(L)) if edited else sorted({t for name in names for t in hook.records(name)})
    if not rows:
        return None
    allowed = attention_mask(L, key_mask, S, q.device)[:, :, rows]
    plain = (q[:, :, rows] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    scores = hook.edit("hook_attn_scores", plain, rows)
    hook.record("hook_attn_scores", scores, rows)
    weights = scores.softmax(dim=-1)
    pattern = hook.edit("hook_pattern", weights, rows)
    hook.record("hook_pattern", pattern, rows)
    return None if scores is plain and pattern is weights else pattern.to(q.dtype)


class MLP(Hooked, nn.Module):
    hook_axes: ClassVar = {"hook_pre": "B L M", "hook_post": "B L M"}

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(config.d_model, config.mlp_width)
        self.dense_4h_to_h = Linear(config.mlp_width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense_h_to_4h(x)
        if self.hook is not None:
            x = self.hook("hook_pre", x)
        x = F.gelu(x)
        if self.hook is not None:
            x = self.hook("hook_post", x)
        return self.dense_4h_to_h(x)

    def hook_sizes(self) -> dict[str, int]:
        return {"M": self.dense_h_to_4h.out_features}


class TransformerBlock(Hooked, nn.Module):
    hook_axes: ClassVar = {
        "hook_resid_pre": "B L D",
        "hook_attn_out": "B L D",
        "hook_resid_mid": "B L D",
        "hook_mlp_out": "B L D",
        "hook_resid_post": "B L D",
    }

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.post_attention_layernorm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        if self.hook is not None:
            x = self.hook("hook_resid_pre", x)
        attended = self.attention(self.input_layernorm(x), context, cache)
        if self.hook is not None:
            attended = self.hook("hook_attn_out", attended)
        if self.parallel_residual:
            mid = x
        else:
            mid = x + attended
            if self.hook is not None:
                mid = self.hook("hook_resid_mid", mid)
        mlp = self.mlp(self.post_attention_layernorm(mid))
        if self.hook is not None:
            mlp = self.hook("hook_mlp_out", mlp)
        x = x + attended + mlp if self.parallel_residual else mid + mlp
        if self.hook is not None:
            x = self.hook("hook_resid_post", x)
        return x

    def hook_points(self) -> list[str]:
        return [name for name in self.hook_axes if name != "hook_resid_mid" or not self.parallel_residual]

    def hook_sizes(self) -> dict[str, int]:
        return {"D": self.mlp.dense_h_to_4h.in_features}

    def hook_children(self) -> dict[str, Hooked]:
        return {"attn.": self.attention, "mlp.": self.mlp}


def init_linear(module: nn.Module, std: float) -> None:
    """Hugging Face initialisation of GPT-NeoX: weights normal(0, std), biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            init_normal(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class TransformerBackbone(nn.Module):
    def __init__(self, config: TransformerConfig, dtype: torch.dtype | None = None):
        super().__init__()
        self.embed_in = nn.Embedding(config.vocab_size, config.d_model).to(dtype)
        if config.position == "learned":
            self.embed_pos = nn.Embedding(config.max_position_embeddings, config.d_model).to(dtype)
        self.layers = nn.ModuleList(TransformerBlock(config).to(dtype) for _ in range(config.n_layer))
        self.final_layer_norm = make_norm(config.norm, config.d_model, config.norm_eps).to(dtype)


class TransformerForCausalLM(LanguageModel):
    """GPT-NeoX language model (state_dict of EleutherAI/pythia-*)."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.gpt_neox = TransformerBackbone(config, dtype)
        self.embed_out = Linear(config.d_model, config.vocab_size, bias=False).to(dtype)
        init_linear(self, config.init_std)
        init_normal(self.gpt_neox.embed_in.weight, std=config.embedding_std)
        if config.position == "learned":
            init_normal(self.gpt_neox.embed_pos.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.embed_out.weight = self.gpt_neox.embed_in.weight
        self.register_load_state_dict_pre_hook(respell)

    def parts(self) -> tuple[nn.Embedding, list[Block], nn.Module, nn.Linear]:
        neox = self.gpt_neox
        return neox.embed_in, cast(list[Block], list(neox.layers)), neox.final_layer_norm, self.embed_out

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """Drop the constants (causal mask, rotary frequencies) that older checkpoints carry among the
        weights; accept the head's name in recent `transformers`; let a tied head be absent."""
        old = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
        for key in [k for k in named if k.startswith(prefix) and k.endswith(old)]:
            del named[key]
        embedding, head = prefix + "gpt_neox.embed_in.weight", prefix + "embed_out.weight"
        if prefix + "lm_head.weight" in named:
            named[head] = named.pop(prefix + "lm_head.weight")
        if self.config.tie_word_embeddings and embedding in named:
            named.setdefault(head, named[embedding])

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.gpt_neox.embed_in(input_ids)
        return add_learned_positions(x, positions, self.gpt_neox.embed_pos) if self.learned else x

    @property
    def learned(self) -> bool:
        return self.config.position == "learned"


def add_learned_positions(x: Tensor, positions: Tensor, table: nn.Embedding) -> Tensor:
    """x (B, L, D) plus the vector of each position; one clear line when the sequence is too long."""
    if values_are_known(positions):
        limit = table.num_embeddings
        longest = int(positions.max()) + 1 if positions.numel() else 0
        require(
            longest <= limit,
            f"sequence of {longest} tokens exceeds max_position_embeddings={limit}; build a model with more",
        )
    return x + table(positions)


def state_size(config: TransformerConfig, seq_len: int) -> int:
    """A key and a value for every token."""
    return config.n_layer * 2 * seq_len * config.d_model


ARCHITECTURE = Architecture(
    name="transformer",
    label="Transformer",
    color="#0173b2",
    marker="T",
    config=TransformerConfig,
    model=TransformerForCausalLM,
    presets={
        "tiny": dict(TINY, n_layer=2, n_head=4, max_position_embeddings=2048),
        "14m": dict(d_model=128, n_layer=6, n_head=4),
        "31m": dict(d_model=256, n_layer=6, n_head=8),
        "70m": dict(d_model=512, n_layer=6, n_head=8),
        "150m": dict(d_model=1024, n_layer=12, n_head=16, vocab_size=50280),
        "160m": dict(d_model=768, n_layer=12, n_head=12),
        "410m": dict(d_model=1024, n_layer=24, n_head=16),
        "1b": dict(d_model=2048, n_layer=16, n_head=8),
        "1.4b": dict(d_model=2048, n_layer=24, n_head=16),
        "2.8b": dict(d_model=2560, n_layer=32, n_head=32),
    },
    positions=("learned", "rope", "none"),
    state_size=state_size,
    memory=block_memory.every_block(block_memory.attention),
    hub="gpt_neox",
    aliases=("pythia",),
)
