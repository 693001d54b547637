"""The language model around the mixers of flash-linear-attention: DeltaNet and its kin, GLA.

    x = x + mixer(rms_norm(x))
    x = x + W_down (silu(W_gate r) * W_up r),  r = rms_norm(x)         SwiGLU (Shazeer 2020, arXiv 2002.05202)

Letters as in `ssm_retrieval.models.common`; H heads have keys of N and values of P channels, and E = H P.
Parameter names are those of fla-hub's checkpoints; `model.embed_pos` exists only with learned positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_retrieval.models import instrumented
from ssm_retrieval.models.common import WHOLE, Context, LanguageModel, LayerCache, part
from ssm_retrieval.models.configuration import HeadsConfig
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import RMSNorm, init_normal, learned_positions, widen
from ssm_retrieval.models.padding import convolve, fill_padding
from ssm_retrieval.models.ssm_init import recall_init
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.linear import Linear, dtype_of

DeltaInputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class KeysConfig(HeadsConfig):
    """What the configs of these models have in common; each adds its own fields, and its own defaults."""

    vocab_size: int = 32000
    d_model: int = 2048
    n_layer: int = 24
    d_state: int = 128  # channels of a head's key
    headdim: int = 128  # channels of a head's value
    expand: float = 1.0
    short_conv: bool = True
    d_conv: int = 4
    d_mlp: int = 0  # 0 = 8/3 * d_model, rounded up to a multiple of 256
    ssm_init: str = "default"  # as in MambaConfig
    position: str = "none"
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    embedding_std: float = 0.02
    init_std: float = 0.02

    @property
    def norm(self) -> str:
        """Which norm the residual stream has."""
        return "rms"

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.n_head * self.d_state + self.d_inner

    @property
    def mlp_width(self) -> int:
        """d_mlp, or as fla rounds 8/3 d_model: up, to a multiple of 256."""
        return self.d_mlp or -(-int(self.d_model * 8 / 3) // 256) * 256


class KeyValueMixer(Hooked, nn.Module):
    """A layer around `ops.delta_rule`: (B, L, D) -> (B, L, D). Subclasses say what goes in and comes out.

    Attributes:
        erase: Whether a write takes away what its key holds: the delta rule, or linear attention.
    """

    hook_prefix: ClassVar = "mixer."
    erase: ClassVar = True
    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    g_proj: nn.Module  # if the config says so
    o_norm: nn.Module
    o_proj: Linear
    convs: tuple[str, ...]

    @property
    def out_proj(self) -> Linear:
        """o_proj, under the name that it has in other mixers."""
        return self.o_proj

    def forward(self, hidden: Tensor, context: Context = WHOLE, cache: LayerCache | None = None) -> Tensor:
        """The layer.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real.
            cache: The call continues from its `conv` and `ssm` states, and replaces them.

        Returns:
            (B, L, D).
        """
        hidden = hidden.to(dtype_of(self.o_proj))  # a hybrid's stream may be wider
        rule: Any = delta_rule if self.hook is None else partial(instrumented.delta_rule, self.hook)
        y = rule(
            *self.inputs(hidden, context, cache), erase=self.erase,
            initial_state=None if cache is None else cache.get("ssm"), return_last_state=cache is not None,
        )  # fmt: skip
        if cache is not None:
            y, cache["ssm"] = y
        return self.output(self.tap("hook_y", y), hidden)

    def add_convs(self) -> None:
        """Make the convolutions of queries, keys and values, if the config has them."""
        config, keys = self.config, self.config.n_head * self.config.d_state
        self.convs = ("q_conv1d", "k_conv1d", "v_conv1d") if config.short_conv else ()
        for name, width in zip(self.convs, (keys, keys, config.d_inner), strict=False):
            self.add_module(name, nn.Conv1d(width, width, config.d_conv, groups=width, bias=False))

    def draw(self) -> None:
        """Draw the weights of all projections and convolutions."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)):
                init_normal(module.weight, std=self.config.init_std)

    def recall_init(self, dt: Sequence[Tensor]) -> None:
        """`models.ssm_init.recall_init` for this layer; queries equal keys at first if they are tied.

        Args:
            dt: As there.
        """
        convs: Any = [self.get_submodule(name) for name in self.convs]
        pairs = [(self.k_proj, self.q_proj), *([(convs[1], convs[0])] if convs else [])]
        recall_init(
            self.config.ssm_init, convs, dt, [(k.weight.detach(), q.weight.detach()) for k, q in pairs]
        )

    def project(self, hidden: Tensor, context: Context, cache: LayerCache | None) -> Sequence[Tensor]:
        """Queries and keys (B, L, H, N) and values (B, L, H, P), after the convolutions if there are any.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real.
            cache: Its `conv` state is read, and replaced.

        Returns:
            The three.
        """
        keys = self.config.n_head * self.config.d_state
        qkv = torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], dim=-1)
        qkv = self.tap("hook_in", fill_padding(qkv, context.mask), context.mask)
        if self.convs:
            taps = torch.cat([getattr(self, name).weight for name in self.convs])
            qkv = convolve(qkv, taps, None, context, cache)
        each = qkv.split([keys, keys, self.config.d_inner], dim=-1)
        return [x.unflatten(-1, (self.config.n_head, -1)) for x in each]

    def inputs(self, hidden: Tensor, context: Context, cache: LayerCache | None = None) -> DeltaInputs:
        """What the recurrence takes in.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real.
            cache: Its `conv` state is read, and replaced.

        Returns:
            q and k (B, L, H, N), v (B, L, H, P), beta (B, L, H) or None, and log_decay (B, L, H),
            (B, L, H, N) or None.
        """
        raise NotImplementedError

    def output(self, y: Tensor, hidden: Tensor) -> Tensor:
        """The layer's output.

        Args:
            y: (..., L, H, P), what the recurrence gives.
            hidden: (B, L, D), the layer's input, which makes the gate.

        Returns:
            (..., L, D).
        """
        y = self.o_norm(y)
        if self.config.gate:
            y = (y * self.tap("hook_gate", self.gate(hidden))).to(y.dtype)
        return self.o_proj(y.flatten(-2))

    def gate(self, hidden: Tensor) -> Tensor:
        """What multiplies the normalised output: silu of a projection.

        Args:
            hidden: (B, L, D).

        Returns:
            (B, L, H, P).
        """
        return F.silu(widen(self.g_proj(hidden))).unflatten(-1, (self.config.n_head, -1))


class SwiGLU(Hooked, nn.Module):
    """(B, L, D) -> (B, L, D)."""

    hook_prefix: ClassVar = "mlp."
    hook_axes: ClassVar = {"hook_pre": "B L M", "hook_post": "B L M"}

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.gate_proj = Linear(config.d_model, config.mlp_width, bias=False)
        self.up_proj = Linear(config.d_model, config.mlp_width, bias=False)
        self.down_proj = Linear(config.mlp_width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.tap("hook_pre", self.gate_proj(x))
        return self.down_proj(self.tap("hook_post", F.silu(gate) * self.up_proj(x)))


class SwiGLUBlock(Hooked, nn.Module):
    """A mixer and a SwiGLU, one after the other, each behind its norm."""

    hook_axes: ClassVar = dict(
        hook_resid_pre="B L D", hook_mixer_out="B L D", hook_resid_mid="B L D", hook_mlp_out="B L D",
        hook_resid_post="B L D",
    )  # fmt: skip

    def __init__(self, config: Any, mixer: type[nn.Module]):
        super().__init__()
        self.config = config
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn: Any = mixer(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        for weight in self.mlp.parameters():
            init_normal(weight, std=config.init_std)

    @property
    def norm(self) -> nn.Module:
        """The mixer's norm, under the name that it has in other blocks."""
        return self.attn_norm

    @property
    def mixer(self) -> Any:
        """The mixer, under the name that it has in other blocks."""
        return self.attn

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        x = self.tap(
            "hook_resid_mid", x + self.tap("hook_mixer_out", self.mixer(self.norm(x), context, cache))
        )
        x = x + self.tap("hook_mlp_out", self.mlp(self.mlp_norm(x)))
        return self.tap("hook_resid_post", x)


class SwiGLUForCausalLM(LanguageModel):
    """Language model of `SwiGLUBlock`s (state_dict of fla-hub's checkpoints). Subclasses name the mixer."""

    mixer: type[nn.Module]
    embedding = part("model.embeddings")
    embed_pos = part("model.embed_pos")
    blocks = part("model.layers")
    norm = part("model.norm")
    head = part("lm_head")

    def __init__(self, config: Any, dtype: torch.dtype | None = None):
        super().__init__(config)
        V, D = config.vocab_size, config.d_model
        blocks = (SwiGLUBlock(config, self.mixer).to(dtype) for _ in range(config.n_layer))
        self.model = nn.ModuleDict({"embeddings": nn.Embedding(V, D).to(dtype)})
        self.model.update({"layers": nn.ModuleList(blocks), "norm": RMSNorm(D, config.norm_eps).to(dtype)})
        self.lm_head = Linear(D, V, bias=False).to(dtype)
        init_normal(self.embedding.weight, std=config.embedding_std)
        init_normal(self.head.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        if config.position == "learned":
            self.model["embed_pos"] = learned_positions(config).to(dtype)

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """Let a tied head be absent."""
        embedding = prefix + "model.embeddings.weight"
        if self.config.tie_word_embeddings and embedding in named:
            named.setdefault(prefix + "lm_head.weight", named[embedding])


def state_size(config: Any, seq_len: int) -> int:
    """h and the convolution's window, whatever seq_len is."""
    window = (config.d_conv - 1) * config.conv_dim if config.short_conv else 0
    return config.n_layer * (config.d_inner * config.d_state + window)
