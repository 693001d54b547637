"""The linear state space model of the recall scaling laws (Koren et al. 2026, arXiv 2609.07681).

Mamba without everything that recall can do without: no norm, gate, SiLU, bias, decay, step size or skip. One
block, per token t (letters as in `ssm_retrieval.models.common`):

    x    = in_proj(residual_t)                 D -> E
    u    = conv1d(x)                           causal, depthwise, d_conv taps: mixes a key with its value
    B, C = x_proj(u)                           E -> 2 N: where to write, where to read
    h_t  = h_{t-1} + u_t B_t^T                 h_t: (E, N); Mamba's recurrence with A = 0 and dt = 1
    y_t  = h_t C_t                             so y_t = sum_{s <= t} u_s (B_s . C_t), linear attention
    out  = out_proj(y_t)                       E -> D

A state holds the facts of a context as a sum, so they disturb each other; the law says how many can be told
apart. As in the paper's experiments a single block passes on what it has read and nothing else, and several
add theirs to the residual stream.

The paper's code freezes A at 1, which is what its recurrence multiplies h by; here, as in Mamba, that is
exp(dt A) with A = 0. B and C are two matrices there and the halves of one here, with the same distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssm_retrieval.models import block_memory, instrumented
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.common import WHOLE, Context, LanguageModel, LayerCache
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import init_normal, learned_positions
from ssm_retrieval.models.padding import convolve, fill_padding
from ssm_retrieval.ops.linear import Linear, dtype_of
from ssm_retrieval.ops.selective_scan import selective_scan

POSITIONS = ("none", "learned")


@dataclass(frozen=True)
class LinearSSMConfig(Config):
    """Shape of a linear SSM; the defaults are a cell of the paper's grids."""

    vocab_size: int = 512
    d_model: int = 64
    n_layer: int = 1
    d_state: int = 16
    d_conv: int = 2
    expand: int = 2
    position: str = "none"  # or "learned"
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        said = f"position={self.position!r} is not a linear SSM's; use {POSITIONS}"
        require(self.position in POSITIONS, said)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def embedding_std(self) -> float:
        """Always nn.Embedding's, as in the paper's code.

        No norm makes up for a smaller one: with the 0.1 of other architectures' runs, a cubic layer of 16
        channels stays at chance.
        """
        return 1.0

    @property
    def norm(self) -> str:
        return "none"

    @property
    def residual_in_fp32(self) -> bool:
        """Never: there is no last norm to bring the stream back to the dtype of the head."""
        return False

    @property
    def residual(self) -> bool:
        """Whether blocks add to the residual stream."""
        return self.n_layer > 1


class LinearSSMMixer(Hooked, nn.Module):
    """The linear state space layer: (B, L, D) -> (B, L, D)."""

    hook_axes: ClassVar = dict(
        hook_in="B L E", hook_conv="B L E", hook_dt="B L E", hook_B="B L N", hook_C="B L N",
        hook_A_bar="B L E N", hook_ssm_state="B L E N", hook_ssm_readout="B L E N", hook_y="B L E",
    )  # fmt: skip

    def __init__(self, config: LinearSSMConfig):
        super().__init__()
        self.config = config
        D, E, N = config.d_model, config.d_inner, config.d_state
        self.in_proj = Linear(D, E, bias=False)
        self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E, padding=config.d_conv - 1, bias=False)
        self.x_proj = Linear(E, 2 * N, bias=False)
        self.out_proj = Linear(E, D, bias=False)

    @property
    def A_log(self) -> Tensor:
        """(E, N) log(0): what Mamba's A_log would have to be. Probes read it, and `D`."""
        return self.out_proj.weight.new_full((self.config.d_inner, self.config.d_state), -torch.inf)

    @property
    def D(self) -> Tensor:
        """(E,) zeros: Mamba's skip."""
        return self.out_proj.weight.new_zeros(self.config.d_inner)

    def forward(self, hidden: Tensor, context: Context = WHOLE, cache: LayerCache | None = None) -> Tensor:
        """The layer.

        Args:
            hidden: (B, L, D).
            context: Which tokens are real.
            cache: The call continues from its `conv` and `ssm` states, and replaces them.

        Returns:
            (B, L, D).
        """
        N, mask = self.config.d_state, context.mask
        hidden = hidden.to(dtype_of(self.in_proj))  # a hybrid's stream may be wider
        x = self.tap("hook_in", fill_padding(self.in_proj(hidden), mask), mask)  # (B, L, E)
        u = self.tap("hook_conv", convolve(x, self.conv1d.weight, None, context, cache, activation=None))
        B, C = self.x_proj(u).split([N, N], dim=-1)
        B, C = self.tap("hook_B", B), self.tap("hook_C", C)  # (B, L, N) each
        dt = fill_padding(torch.ones_like(u), mask)  # 0 at padding, which does nothing
        A = u.new_zeros(self.config.d_inner, N)
        scan: Any = selective_scan
        if self.hook is not None:
            scan = partial(instrumented.selective_scan, self.hook, mask)
        y = scan(
            u, dt, A, B, C,
            initial_state=None if cache is None else cache.get("ssm"),
            return_last_state=cache is not None,
        )  # fmt: skip
        if cache is not None:
            y, cache["ssm"] = y
        return self.out_proj(self.tap("hook_y", y))


class LinearSSMBlock(Hooked, nn.Module):
    """The mixer, added to the residual stream if there are several blocks."""

    hook_axes: ClassVar = {"hook_resid_pre": "B L D", "hook_mixer_out": "B L D", "hook_resid_post": "B L D"}

    def __init__(self, config: LinearSSMConfig):
        super().__init__()
        self.config = config
        self.norm = nn.Identity()  # under the name that it has in other blocks
        self.mixer = LinearSSMMixer(config)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        out = self.tap("hook_mixer_out", self.mixer(self.norm(x), context, cache))
        return self.tap("hook_resid_post", x + out if self.config.residual else out)


class LinearSSMForCausalLM(LanguageModel):
    """Language model of `LinearSSMBlock`s with a tied head."""

    def __init__(self, config: LinearSSMConfig, dtype: torch.dtype | None = None):
        super().__init__(config)
        V, D = config.vocab_size, config.d_model
        self.embedding = nn.Embedding(V, D).to(dtype)
        if config.position == "learned":
            self.embed_pos = learned_positions(config).to(dtype)
        self.blocks = nn.ModuleList(LinearSSMBlock(config).to(dtype) for _ in range(config.n_layer))
        self.norm = nn.Identity()
        self.head = Linear(D, V, bias=False).to(dtype)
        init_normal(self.embedding.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight


def state_size(config: LinearSSMConfig, seq_len: int) -> int:
    """h and the convolution's window, whatever seq_len is.

    The law counts n_layer * d_state * d_model: not the window, and half of h where expand is 2, because in
    the circuit that it describes half of the channels hold values and the other half is never read.
    """
    return config.n_layer * config.d_inner * (config.d_state + config.d_conv - 1)


ARCHITECTURE = Architecture(
    name="linear", label="Linear SSM", color="#ca9161", marker="L", config=LinearSSMConfig,
    model=LinearSSMForCausalLM, positions=POSITIONS, state_size=state_size, block=LinearSSMBlock,
    memory=block_memory.every_block(block_memory.linear_ssm),
    presets={"tiny": dict(TINY, d_model=256, d_state=64)},
)  # fmt: skip
