"""Hybrids of SSM and attention, in the manner of Jamba (arXiv 2403.19887) and Retrievit (arXiv 2603.02874).

`pattern` says what the blocks are, and is repeated until there are `n_layer`:

    "M M A"    two Mamba blocks, then an attention block
    "M2 A"     Mamba-2 and attention in turns
    "M+A"      parallel: each block is x + mamba(norm(x)) + tanh(beta) * (attention(norm(x)) + mlp(norm(x)))
    "A+M"      the reverse: attention counts fully, and Mamba by tanh(beta)

beta is a number per block that begins at 0, so the second branch starts switched off. Words may stand for the
letters: "mamba mamba2 attention". Attention blocks are those of `models.transformer` with the norm of the SSM
blocks, which are those of `models.mamba` and `models.mamba2`: a hybrid differs from its parents in the mixers
only, and has all of their options. Each block adds its result to the residual stream once. (The released
Retrievit hybrids add the block's input a second time, so that their skip path doubles at every block.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ssm_retrieval.models import block_memory
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.block_memory import BlockMemory, Step
from ssm_retrieval.models.common import Context, LanguageModel, LayerCache, part
from ssm_retrieval.models.configuration import Config, require
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import add_learned_positions, init_normal, make_norm
from ssm_retrieval.models.mamba import MambaBlock, MambaConfig, MambaMixer
from ssm_retrieval.models.mamba import state_size as mamba_state
from ssm_retrieval.models.mamba2 import Mamba2Config, Mamba2Mixer
from ssm_retrieval.models.mamba2 import state_size as mamba2_state
from ssm_retrieval.models.transformer import TransformerBlock, TransformerConfig, init_linear
from ssm_retrieval.models.transformer import state_size as attention_state
from ssm_retrieval.ops.linear import Linear

LETTERS = {"M": "mamba", "M2": "mamba2", "A": "attention"}
PARENTS: dict[str, type[Config]] = {
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "attention": TransformerConfig,
}


@dataclass(frozen=True)
class HybridConfig(Config):
    """Shape of a hybrid; the defaults are Retrievit's hybrid_1M1T_state16."""

    vocab_size: int = 50280
    d_model: int = 1024
    n_layer: int = 16  # all blocks; a parallel one counts once
    pattern: str = "M A"
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0  # Mamba only; 0 = ceil(d_model / 16)
    headdim: int = 64  # this and the next two: Mamba-2 only
    ngroups: int = 1
    chunk_size: int = 64
    dt_min: float = 0.001
    dt_max: float = 0.1
    n_head: int = 16
    d_mlp: int = 0  # 0 = 4 * d_model
    position: str = "rope"
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    parallel_residual: bool = True  # of attention and MLP; parallel blocks have it always
    norm: str = "rms"
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embedding_std: float = 0.02
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = read_pattern(self.pattern)
        letters = {name: letter for letter, name in LETTERS.items()}
        # one spelling for one model
        plain = " ".join("+".join(letters[name] for name in block) for block in unit)
        object.__setattr__(self, "pattern", plain)
        require(
            self.n_layer % len(unit) == 0,
            f"n_layer={self.n_layer} is not a multiple of the {len(unit)} blocks of pattern={plain!r}; "
            "change one",
        )
        for name in {name for block in unit for name in block}:
            self.parent_config(name)  # its checks apply here too

    def layout(self) -> list[tuple[str, ...]]:
        """For each block the names of its mixers: ("mamba",), or ("mamba", "attention") if parallel."""
        unit = read_pattern(self.pattern)
        return unit * (self.n_layer // len(unit))

    def parent_config(self, name: str) -> Any:
        """The config of "mamba", "mamba2" or "attention" blocks: the fields that it has of these."""
        kind: Any = PARENTS[name]
        return kind(**{key: getattr(self, key) for key in kind.__dataclass_fields__})

    def attention_config(self) -> TransformerConfig:
        return cast(TransformerConfig, self.parent_config("attention"))


def read_pattern(pattern: str) -> list[tuple[str, ...]]:
    """The blocks of a pattern, each the names of its mixers. Raises UserError for what is not a pattern."""
    blocks: list[tuple[str, ...]] = []
    known = f"blocks are {', '.join(LETTERS)} ({', '.join(PARENTS)}), or two of them such as M+A"
    for word in pattern.split():
        names = tuple(LETTERS.get(name.upper(), name.lower()) for name in word.split("+"))
        wrong = [name for name in names if name not in PARENTS]
        require(not wrong, f"pattern={pattern[:60]!r} has the unknown block {word[:20]!r}; {known}")
        one_of_each = len(names) == 2 and names.count("attention") == 1
        require(
            len(names) == 1 or one_of_each,
            f"pattern={pattern[:60]!r}: {word[:20]!r} must be one SSM and attention, such as M+A or A+M2",
        )
        blocks.append(names)
    require(len(blocks) > 0, f"pattern={pattern!r} is empty; {known}")
    return blocks


def make_block(config: HybridConfig, mixers: tuple[str, ...]) -> nn.Module:
    """A freshly initialised block, as in its parents."""
    if len(mixers) == 2:
        return ParallelBlock(config, mixers)
    parent = config.parent_config(mixers[0])
    if mixers[0] != "attention":
        return MambaBlock(parent, Mamba2Mixer if mixers[0] == "mamba2" else MambaMixer)
    block = TransformerBlock(parent)
    init_linear(block, config.init_std)
    return block


class ParallelBlock(Hooked, nn.Module):
    """x + first(x) + tanh(beta) * second(x): an SSM and attention with its MLP read the same x, each
    through the norms of its own block."""

    hook_axes: ClassVar = dict(
        hook_resid_pre="B L D", hook_mixer_out="B L D", hook_attn_out="B L D", hook_mlp_out="B L D",
        hook_resid_post="B L D",
    )  # fmt: skip

    def __init__(self, config: HybridConfig, mixers: tuple[str, ...]):
        super().__init__()
        self.config = config
        self.ssm_first = mixers[0] != "attention"
        self.ssm: Any = make_block(config, mixers[:1] if self.ssm_first else mixers[1:])
        self.attention: Any = make_block(config, ("attention",))
        self.beta = nn.Parameter(torch.zeros(1))  # one axis: FSDP cannot share out a scalar

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        ssm, attention = self.ssm, self.attention
        mixed = self.tap("hook_mixer_out", ssm.mixer(ssm.norm(x), context, cache))
        attended = attention.attention(attention.input_layernorm(x), context, cache)
        attended = self.tap("hook_attn_out", attended)
        attended = attended + self.tap("hook_mlp_out", attention.mlp(attention.post_attention_layernorm(x)))
        first, second = (mixed, attended) if self.ssm_first else (attended, mixed)
        return self.tap("hook_resid_post", x + first + torch.tanh(self.beta) * second)

    @property
    def mixer(self) -> Any:
        """The SSM layer, where every block with one has it."""
        return self.ssm.mixer

    def hook_children(self) -> dict[str, Hooked]:
        return self.ssm.hook_children() | self.attention.hook_children()


class HybridForCausalLM(LanguageModel):
    """Hybrid language model: the blocks of `HybridConfig.pattern`."""

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
        blocks = (make_block(config, mixers).to(dtype) for mixers in config.layout())
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


STATE_SIZE: dict[str, Callable[[Any, int], int]] = {
    "mamba": mamba_state,
    "mamba2": mamba2_state,
    "attention": attention_state,
}
MEMORY: dict[str, Callable[[Any, Step], BlockMemory]] = {
    "mamba": block_memory.mamba,
    "mamba2": block_memory.mamba2,
    "attention": block_memory.attention,
}


def state_size(config: HybridConfig, seq_len: int) -> int:
    """What each block keeps, both branches of a parallel one."""
    names = (name for mixers in config.layout() for name in mixers)
    return sum(STATE_SIZE[name](config.parent_config(name).replace(n_layer=1), seq_len) for name in names)


def memory(config: HybridConfig, step: Step) -> list[BlockMemory]:
    """Of each block, by the formulas of its mixers."""
    found = []
    for mixers in config.layout():
        first, *second = [MEMORY[name](config.parent_config(name), step) for name in mixers]
        found.append(block_memory.parallel(first, second[0], config, step) if second else first)
    return found


ARCHITECTURE = Architecture(
    name="hybrid",
    label="Hybrid",
    color="#cc78bc",
    marker="H",
    config=HybridConfig,
    model=HybridForCausalLM,
    presets={
        "tiny": dict(TINY, n_layer=3, pattern="M M A", n_head=4),
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
