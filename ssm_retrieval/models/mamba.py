"""Mamba: linear-time sequence modelling with selective state spaces (Gu & Dao 2023, arXiv 2312.00752).

One block, per token t (letters as in `ssm_retrieval.models.common`, R = dt_rank):

    x, z   = in_proj(norm(residual_t))                      section 3.4, figure 3
    u      = silu(conv1d(x))                                causal, depthwise, d_conv taps
    r,B,C  = x_proj(u)                                      section 3.2: B, C, dt depend on the input
    dt     = softplus(dt_proj(r))
    h_t    = exp(dt A) h_{t-1} + dt B u_t                   equation 2a, discretised by equation 4
    y_t    = C h_t + D u_t                                  equation 2b, with a skip
    out    = out_proj(y_t * silu(z))

Parameter names are those of state-spaces/mamba; `backbone.embed_pos` exists only with learned positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm_retrieval.models import block_memory, hub_mamba, instrumented
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import WHOLE, Context, LanguageModel, LayerCache, part
from ssm_retrieval.models.configuration import Config, check_ssm
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import init_normal, learned_positions, make_norm, widen
from ssm_retrieval.models.padding import convolve, fill_padding
from ssm_retrieval.models.ssm_init import dt_bias, recall_init
from ssm_retrieval.ops._route import transformed
from ssm_retrieval.ops.linear import Linear, linear
from ssm_retrieval.ops.selective_scan import selective_scan


@dataclass(frozen=True)
class MambaConfig(Config):
    """Shape of a Mamba language model; the defaults are state-spaces/mamba-130m."""

    vocab_size: int = 50280
    d_model: int = 768
    n_layer: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0  # 0 = ceil(d_model / 16)
    dt_min: float = 0.001  # range of softplus(dt bias) at initialisation
    dt_max: float = 0.1
    ssm_init: str = "default"  # or "recall", or parts of it such as "identity+long" (models.ssm_init)
    position: str = "none"  # or "learned": a vector per position added to the embedding, as in GPT-2
    max_position_embeddings: int = 2048
    norm: str = "rms"  # or "layer", which the Mamba-VL checkpoints need
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ssm(self)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Rank of the projection to dt."""
        return self.dt_rank or math.ceil(self.d_model / 16)


class MambaMixer(Hooked, nn.Module):
    """The selective state space layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = dict(
        hook_in="B L E", hook_conv="B L E", hook_dt="B L E", hook_B="B L N", hook_C="B L N",
        hook_A_bar="B L E N", hook_ssm_state="B L E N", hook_ssm_readout="B L E N",
        hook_gate="B L E", hook_y="B L E",
    )  # fmt: skip

    def __init__(self, config: MambaConfig):
        super().__init__()
        D, E, N, R = config.d_model, config.d_inner, config.d_state, config.rank
        self.config = config
        self.in_proj = Linear(D, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E, padding=config.d_conv - 1)
        self.x_proj = Linear(E, R + 2 * N, bias=False)
        self.dt_proj = Linear(R, E)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))  # S4D-real, section 3.6
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = Linear(E, D, bias=False)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt_bias(config, E))
            self.dt_proj.weight.uniform_(-(R**-0.5), R**-0.5)
        _, of_B, of_C = self.x_proj.weight.detach().split([R, N, N])
        dt = (self.A_log, *self.dt_proj.parameters())
        recall_init(config.ssm_init, [self.conv1d], dt, [(of_B, of_C)])

    def forward(self, hidden: Tensor, context: Context = WHOLE, cache: LayerCache | None = None) -> Tensor:
        """The layer.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real.
            cache: The call continues from its `conv` and `ssm` states, and replaces them.

        Returns:
            (B, L, D).
        """
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # (B, L, E) each
        if cache is None and self.hook is None and not context.again and runs_twice(x):
            y = checkpoint(self.mix, x, z, context, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self.mix(x, z, context, cache)
        return self.out_proj(y)

    def mix(self, x: Tensor, z: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """What lies between the two projections.

        Args:
            x: The half of in_proj's output that is convolved and scanned, (B, L, E).
            z: The gate, as x.
            context: As in `forward`.
            cache: As in `forward`.

        Returns:
            What out_proj reads, (B, L, E).
        """
        config, mask = self.config, context.mask
        x = self.tap("hook_in", fill_padding(x, mask), mask)
        u = convolve(x, self.conv1d.weight, self.conv1d.bias, context, cache)
        u = self.tap("hook_conv", u)  # (B, L, E), after silu
        r, B, C = self.x_proj(u).split([config.rank, config.d_state, config.d_state], dim=-1)
        B, C = self.tap("hook_B", B), self.tap("hook_C", C)  # (B, L, N) each
        # (B, L, E); the scan adds the bias and takes the softplus, which of -1e4 is 0: padding does nothing
        dt = fill_padding(linear(r, self.dt_proj.weight), mask, -1e4)
        A = -torch.exp(widen(self.A_log))  # (E, N)
        scan: Any = selective_scan
        if self.hook is not None:
            scan = partial(instrumented.selective_scan, self.hook, mask)
        y = scan(
            u, dt, A, B, C, self.D, z=z, dt_bias=self.dt_proj.bias, dt_softplus=True,
            initial_state=None if cache is None else cache.get("ssm"), return_last_state=cache is not None,
        )  # fmt: skip
        if cache is not None:
            y, cache["ssm"] = y
        return y


def runs_twice(x: Tensor) -> bool:
    """Whether convolution, step sizes and scan keep nothing and run again for their gradients.

    They do on a GPU, as in mamba-ssm's own block: what they make is as large as the activations of all other
    parts of a block together, and a few per cent of its arithmetic.
    """
    return x.is_cuda and torch.is_grad_enabled() and not (transformed() or torch.compiler.is_compiling())


class MambaBlock(Hooked, nn.Module):
    """Norm -> mixer -> add. (state-spaces/mamba fuses this as add -> norm -> mixer; same function.)"""

    hook_axes: ClassVar = {"hook_resid_pre": "B L D", "hook_mixer_out": "B L D", "hook_resid_post": "B L D"}
    mixer: Any

    def __init__(self, config: Any, mixer: type[nn.Module] = MambaMixer):
        super().__init__()
        self.config = config
        self.norm = make_norm(config)
        self.mixer = mixer(config)
        with torch.no_grad():  # n_layer outputs add up in the residual stream, as in GPT-2
            self.mixer.out_proj.weight.div_(math.sqrt(config.n_layer))

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        x = x + self.tap("hook_mixer_out", self.mixer(self.norm(x), context, cache))
        return self.tap("hook_resid_post", x)


class MambaForCausalLM(LanguageModel):
    """Mamba language model with a tied head (state_dict of state-spaces/mamba-*)."""

    mixer: type[nn.Module] = MambaMixer
    embedding = part("backbone.embedding")
    embed_pos = part("backbone.embed_pos")
    blocks = part("backbone.layers")
    norm = part("backbone.norm_f")
    head = part("lm_head")
    backbone: Any

    def __init__(self, config: Any, dtype: torch.dtype | None = None):
        super().__init__(config)
        blocks = (MambaBlock(config, self.mixer).to(dtype) for _ in range(config.n_layer))
        V, D = config.vocab_size, config.d_model
        self.backbone = nn.ModuleDict({"embedding": nn.Embedding(V, D).to(dtype)})
        self.backbone.update({"layers": nn.ModuleList(blocks), "norm_f": make_norm(config).to(dtype)})
        self.lm_head = Linear(D, V, bias=False).to(dtype)
        init_normal(self.embedding.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        if config.position == "learned":  # drawn last: the other weights are those of "none"
            self.backbone["embed_pos"] = learned_positions(config).to(dtype)

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """`transformers` says `embeddings`; both it and the originals may leave a tied head out."""
        ours, theirs = (f"{prefix}backbone.{name}.weight" for name in ("embedding", "embeddings"))
        if theirs in named:
            named[ours] = named.pop(theirs)
        if self.config.tie_word_embeddings and ours in named:
            named.setdefault(prefix + "lm_head.weight", named[ours])


def state_size(config: MambaConfig, seq_len: int) -> int:
    """h and the convolution's window, whatever seq_len is."""
    return config.n_layer * config.d_inner * (config.d_state + config.d_conv - 1)


ARCHITECTURE = Architecture(
    name="mamba", label="Mamba", color="#de8f05", marker="M", config=MambaConfig, model=MambaForCausalLM,
    presets={
        "tiny": dict(TINY, n_layer=4), "130m": dict(d_model=768, n_layer=24),
        "150m": dict(d_model=1024, n_layer=24), "370m": dict(d_model=1024, n_layer=48),
        "790m": dict(d_model=1536, n_layer=48), "1.4b": dict(d_model=2048, n_layer=48),
        "2.8b": dict(d_model=2560, n_layer=64),
    }, positions=("none", "learned"), state_size=state_size, block=MambaBlock,
    memory=block_memory.every_block(block_memory.mamba), hub=hub_mamba.MAMBA,
)  # fmt: skip
