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

With `window`, a token attends to itself and to the `window` - 1 real tokens before it, so that decoding needs
constant memory: sliding-window attention, as in hybrids with a state for what is further away.

Parameter names are those of EleutherAI/pythia-*; `gpt_neox.embed_pos` exists only with "learned".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import block_memory, hub_neox, instrumented
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import Context, LanguageModel, LayerCache, part
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import init_normal, make_norm
from ssm_retrieval.models.padding import attention_mask
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
    window: int = 0  # tokens that a query may attend to, itself included (Longformer, 2004.05150); 0 = all
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
    """cos and sin of position * theta^(-2i/dims) (Su et al. 2021, equation 15).

    Args:
        positions: (..., L) int.
        dims: Rotated dimensions, even.
        theta: Base of the frequencies.

    Returns:
        Two tensors (..., L, dims) float32.
    """
    frequency = theta ** (-torch.arange(0, dims, 2, device=positions.device).float() / dims)
    angle = positions.float().unsqueeze(-1) * frequency
    angle = torch.cat([angle, angle], dim=-1)  # dimension i is paired with i + dims/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of x by the angles of its position.

    Args:
        x: (..., P).
        cos: (..., dims), as many of the P dimensions as are rotated.
        sin: As cos.

    Returns:
        (..., P).
    """
    dims = cos.shape[-1]
    rotated, rest = x[..., :dims], x[..., dims:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    rotated = (rotated * cos + turned * sin).to(x.dtype)
    return rotated if rest.shape[-1] == 0 else torch.cat([rotated, rest], dim=-1)


def recent(k: Tensor, v: Tensor, context: Context, window: int) -> tuple[Tensor, Tensor]:
    """What a cache keeps of keys and values (B, H, S, P).

    The next token sees `window` - 1 of them. With padding these are other places in every row: all stay then.

    Args:
        k: (B, H, S, P).
        v: As k.
        context: Which tokens are real.
        window: Tokens that a query may attend to; 0 = all.

    Returns:
        The last of each.
    """
    if window == 0 or context.key_mask is not None:
        return k, v
    first = max(0, k.shape[2] - (window - 1))
    return k[:, :, first:], v[:, :, first:]


class Attention(Hooked, nn.Module):
    """Multi-head causal self-attention: (B, L, D) -> (B, L, D)."""

    hook_prefix: ClassVar = "attn."
    hook_axes: ClassVar = dict(
        hook_q="B L H P", hook_k="B L H P", hook_v="B L H P", hook_rot_q="B L H P", hook_rot_k="B L H P",
        hook_attn_scores="B H L S", hook_pattern="B H L S", hook_z="B L H P",
    )  # fmt: skip

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.query_key_value = Linear(config.d_model, 3 * config.d_model)  # rows per head: q, k, v
        self.dense = Linear(config.d_model, config.d_model)

    def forward(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """The layer.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real, and where they are.
            cache: Its keys and values `k` and `v` stand before those of this call, which are appended. With a
                window, those that no later token can attend to are dropped, unless there is padding.

        Returns:
            (B, L, D).
        """
        config = self.config
        q, k, v = self.query_key_value(hidden).unflatten(-1, (config.n_head, -1)).chunk(3, dim=-1)
        q, k, v = self.tap("hook_q", q), self.tap("hook_k", k), self.tap("hook_v", v)  # (B, L, H, P) each
        if config.rotary_dims > 0:
            assert context.positions is not None
            cos, sin = rope_tables(context.positions, config.rotary_dims, config.rope_theta)
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for every head
            q, k = self.tap("hook_rot_q", rotate(q, cos, sin)), self.tap("hook_rot_k", rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, L, P)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = recent(k, v, context, config.window)
        L, S = q.shape[2], k.shape[2]
        key_mask = None if context.key_mask is None else context.key_mask[:, -S:]  # of those that are left
        within = config.window == 0 or config.window >= S
        if key_mask is None and within and (S == L or L == 1):  # nothing cached, or a single new token
            y = attention(q, k, v, causal=L > 1)
        else:
            y = attention(q, k, v, attention_mask(L, key_mask, S, q.device, config.window))
        if self.hook is not None:
            y = instrumented.attention(self.hook, y, q, k, v, key_mask, config.window)
        return self.dense(self.tap("hook_z", y.transpose(1, 2)).flatten(-2))

    def hook_points(self) -> list[str]:
        rotated = ("hook_rot_q", "hook_rot_k") if self.config.rotary_dims == 0 else ()
        return [name for name in self.hook_axes if name not in rotated]


class MLP(Hooked, nn.Module):
    """Two matrices around a GELU: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = {"hook_pre": "B L M", "hook_post": "B L M"}

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.dense_h_to_4h = Linear(config.d_model, config.mlp_width)
        self.dense_4h_to_h = Linear(config.mlp_width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap("hook_pre", self.dense_h_to_4h(x))
        return self.dense_4h_to_h(self.tap("hook_post", F.gelu(x)))


class TransformerBlock(Hooked, nn.Module):
    """Attention and an MLP, each behind its norm; side by side, or the MLP after the attention (GPT-2)."""

    hook_axes: ClassVar = dict(
        hook_resid_pre="B L D", hook_attn_out="B L D", hook_resid_mid="B L D", hook_mlp_out="B L D",
        hook_resid_post="B L D",
    )  # fmt: skip

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.parallel_residual = config.parallel_residual
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        attended = self.tap("hook_attn_out", self.attention(self.input_layernorm(x), context, cache))
        if self.parallel_residual:
            x = x + attended + self.tap("hook_mlp_out", self.mlp(self.post_attention_layernorm(x)))
        else:
            x = self.tap("hook_resid_mid", x + attended)
            x = x + self.tap("hook_mlp_out", self.mlp(self.post_attention_layernorm(x)))
        return self.tap("hook_resid_post", x)

    def hook_points(self) -> list[str]:
        return [name for name in self.hook_axes if name != "hook_resid_mid" or not self.parallel_residual]


def init_linear(module: nn.Module, std: float) -> None:
    """Hugging Face initialisation of GPT-NeoX: weights normal(0, std), biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            init_normal(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def hybrid_block(config: TransformerConfig) -> TransformerBlock:
    """A freshly initialised block for a hybrid."""
    block = TransformerBlock(config)
    init_linear(block, config.init_std)
    return block


class TransformerForCausalLM(LanguageModel):
    """GPT-NeoX language model (state_dict of EleutherAI/pythia-*)."""

    embedding = part("gpt_neox.embed_in")
    embed_pos = part("gpt_neox.embed_pos")
    blocks = part("gpt_neox.layers")
    norm = part("gpt_neox.final_layer_norm")
    head = part("embed_out")
    gpt_neox: Any

    def __init__(self, config: TransformerConfig, dtype: torch.dtype | None = None):
        super().__init__(config)
        V, D, learned = config.vocab_size, config.d_model, config.position == "learned"
        self.gpt_neox = nn.ModuleDict({"embed_in": nn.Embedding(V, D).to(dtype)})
        if learned:
            self.gpt_neox["embed_pos"] = nn.Embedding(config.max_position_embeddings, D).to(dtype)
        blocks = (TransformerBlock(config).to(dtype) for _ in range(config.n_layer))
        self.gpt_neox["layers"] = nn.ModuleList(blocks)
        self.gpt_neox["final_layer_norm"] = make_norm(config).to(dtype)
        self.embed_out = Linear(D, V, bias=False).to(dtype)
        init_linear(self, config.init_std)
        init_normal(self.embedding.weight, std=config.embedding_std)
        if learned:
            init_normal(self.embed_pos.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.embed_out.weight = self.embedding.weight

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """Drop constants (causal mask, rotary frequencies) that older checkpoints have among the weights,
        accept the head's name in recent `transformers`, and let a tied head be absent."""
        old = ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
        for key in [k for k in named if k.startswith(prefix) and k.endswith(old)]:
            del named[key]
        embedding, head = prefix + "gpt_neox.embed_in.weight", prefix + "embed_out.weight"
        if prefix + "lm_head.weight" in named:
            named[head] = named.pop(prefix + "lm_head.weight")
        if self.config.tie_word_embeddings and embedding in named:
            named.setdefault(head, named[embedding])


def state_size(config: TransformerConfig, seq_len: int) -> int:
    """A key and a value for every token, or for those that the next one can see in a window."""
    seen = seq_len if config.window == 0 else min(seq_len, config.window - 1)
    return config.n_layer * 2 * seen * config.d_model


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
    block=hybrid_block,
    hub=hub_neox.GPT_NEOX,
    aliases=("pythia",),
)
