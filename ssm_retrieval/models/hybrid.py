"""Hybrids of SSM and attention, in the manner of Jamba (arXiv 2403.19887) and Retrievit (arXiv 2603.02874).

`pattern` names the blocks, and is repeated until there are `n_layer`:

    "M M A"    two Mamba blocks, then an attention block
    "M2 A"     Mamba-2 and attention in turns
    "M+A"      parallel: each block is x + mamba(norm(x)) + tanh(beta) * (attention(norm(x)) + mlp(norm(x)))
    "A+M"      the reverse: attention counts fully, and Mamba by tanh(beta)

beta is a number per block that begins at 0, so the second branch starts switched off. Words may replace the
letters, "mamba mamba2 attention", and the name of a user's registered architecture stands for its block: "M
linear-attention A", "linear-attention+A".

Attention blocks are those of `models.transformer` with the norm of the SSM blocks, which are those of
`models.mamba` and `models.mamba2`: a hybrid differs from its parents in the mixers only, and has all of their
options. Each block adds its result to the residual stream once. (The released Retrievit hybrids add the
block's input a second time, so their skip path doubles at every block.)

`position` is a matter of the attention blocks, with one exception: the vectors of position="learned" are
added to the embedding, so the SSM blocks see them, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ssm_retrieval.models import block_memory, registry
from ssm_retrieval.models.architecture import TINY, Architecture
from ssm_retrieval.models.block_memory import BlockMemory, Step
from ssm_retrieval.models.common import Context, LanguageModel, LayerCache, part
from ssm_retrieval.models.configuration import Config, derived, require
from ssm_retrieval.models.hooks import Hooked
from ssm_retrieval.models.layers import init_normal, make_norm
from ssm_retrieval.ops.linear import Linear
from ssm_retrieval.registry import ARCHITECTURES

LETTERS = {"M": "mamba", "M2": "mamba2", "A": "transformer"}
WORDS = {**LETTERS, "ATTENTION": "transformer"}


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
    headdim: int = 64  # of every block whose heads have states, such as Mamba-2
    ngroups: int = 1  # Mamba-2 and Mamba-3
    chunk_size: int = 64  # Mamba-2 only
    dt_min: float = 0.001
    dt_max: float = 0.1
    ssm_init: str = "default"  # of the SSM blocks (models.ssm_init)
    n_head: int = 16
    d_mlp: int = 0  # 0 = 4 * d_model
    window: int = 0  # of attention, as in TransformerConfig
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
        plain = " ".join("+".join(letters.get(name, name) for name in block) for block in unit)
        object.__setattr__(self, "pattern", plain)
        require(
            self.n_layer % len(unit) == 0,
            f"n_layer={self.n_layer} is not a multiple of the {len(unit)} blocks of pattern={plain!r}; "
            "change one",
        )
        for name in {name for block in unit for name in block}:
            self.parent_config(name)  # its checks apply here too

    def layout(self) -> list[tuple[str, ...]]:
        """For each block the names of its mixers: ("mamba",), or ("mamba", "transformer") if parallel."""
        unit = read_pattern(self.pattern)
        return unit * (self.n_layer // len(unit))

    def parent_config(self, name: str) -> Any:
        """The config of an architecture's blocks: options of the hybrid, and defaults for those it lacks."""
        record = ARCHITECTURES[name]
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = {key: mine[key] for key in record.config.__dataclass_fields__ if key in mine}
        if options.get("position") not in record.positions:  # the hybrid's own concern
            options.pop("position", None)
        return record.config(**options)

    def attention_config(self) -> Any:
        """The config of its attention blocks, whose heads a position scheme must suit."""
        return self.parent_config("transformer")


def read_pattern(pattern: str) -> list[tuple[str, ...]]:
    """The blocks of a pattern, each the names of its mixers.

    Raises:
        UserError: If it is not a pattern, or has a block that cannot stand in one.
    """
    blocks: list[tuple[str, ...]] = []
    ours = f"{', '.join(LETTERS)} (mamba, mamba2, attention)"
    known = f"blocks are {ours}, a model of your own (with --import), or two of them such as M+A"
    for word in pattern.split():
        said = f"pattern={pattern[:60]!r}"
        names = tuple(WORDS.get(name.upper(), name.lower()) for name in word.split("+"))
        wrong = [name for name in names if name not in ARCHITECTURES]
        require(not wrong, f"{said} has the unknown block {word[:20]!r}; {known}")
        alone = [name for name in names if ARCHITECTURES[name].block is None]
        require(not alone, f"{said}: model {', '.join(alone)} has no block for a pattern; {known}")
        one_of_each = len(names) == 2 and names.count("transformer") == 1
        require(
            len(names) == 1 or one_of_each,
            f"{said}: {word[:20]!r} must be one SSM and attention, such as M+A or A+M2",
        )
        blocks.append(names)
    require(len(blocks) > 0, f"pattern={pattern!r} is empty; {known}")
    return blocks


def make_block(config: HybridConfig, mixers: tuple[str, ...]) -> nn.Module:
    """A freshly initialised block, as in its parents."""
    if len(mixers) == 2:
        return ParallelBlock(config, mixers)
    return cast(nn.Module, ARCHITECTURES[mixers[0]].block(config.parent_config(mixers[0])))


class ParallelBlock(Hooked, nn.Module):
    """x + first(x) + tanh(beta) * second(x): one branch is an SSM, the other is attention with its MLP.

    Both read the same x, each through the norms of its own block. The SSM may be any mixer but attention.
    """

    hook_axes: ClassVar = dict(
        hook_resid_pre="B L D", hook_mixer_out="B L D", hook_attn_out="B L D", hook_mlp_out="B L D",
        hook_resid_post="B L D",
    )  # fmt: skip

    def __init__(self, config: HybridConfig, mixers: tuple[str, ...]):
        super().__init__()
        self.config = config
        self.ssm_first = mixers[0] != "transformer"
        self.ssm: Any = make_block(config, mixers[:1] if self.ssm_first else mixers[1:])
        self.attention: Any = make_block(config, ("transformer",))
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
        """The SSM layer, under the name that it has in other blocks."""
        return self.ssm.mixer

    def hook_children(self) -> dict[str, Hooked]:
        return self.ssm.hook_children() | self.attention.hook_children()


class HybridForCausalLM(LanguageModel):
    """Hybrid language model: the blocks of `HybridConfig.pattern`."""

    embedding = part("backbone.embedding")
    embed_pos = part("backbone.embed_pos")
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
            init_normal(self.embed_pos.weight, std=config.embedding_std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight


def state_size(config: HybridConfig, seq_len: int) -> int:
    """Numbers that each block keeps, both branches of a parallel one."""
    names = (name for mixers in config.layout() for name in mixers)
    return sum(registry.state_size(config.parent_config(name).replace(n_layer=1), seq_len) for name in names)


def memory(config: HybridConfig, step: Step) -> list[BlockMemory]:
    """The memory of each block, by the formulas of its mixers.

    Raises:
        UserError: If a mixer has none.
    """

    def of(name: str) -> BlockMemory:
        formula = ARCHITECTURES[name].memory
        said = f"pattern={config.pattern!r}: model {name} has no formula of its memory"
        require(formula is not None, f"{said}; give its Architecture one (memory=...)")
        return formula(config.parent_config(name), step)[0]

    found = []
    for mixers in config.layout():
        first, *second = (of(name) for name in mixers)
        found.append(block_memory.parallel(first, second[0], config, step) if second else first)
    return found


def from_pattern(
    name: str, pattern: str, *, presets: Mapping[str, Mapping[str, Any]] | None = None, **looks: Any
) -> Architecture:
    """The architecture of hybrids with this pattern, for `models.register`.

    Its config has the options of `HybridConfig`, and those that its blocks have beside them.

    Args:
        name: Its name for `--model`.
        pattern: The blocks; users' architectures among them must be registered.
        presets: Maps a size to fields of the config. Default: "tiny", with 128 channels and the pattern once.
        **looks: `label`, `color`, `marker` and other fields of `Architecture`.

    Returns:
        The record.

    Raises:
        UserError: If it is not a pattern.
    """
    unit = read_pattern(pattern)
    records = [ARCHITECTURES[mixer] for mixers in unit for mixer in mixers]
    options = {field.name: field for record in records for field in dataclasses.fields(record.config)}
    more = [option for option in options.values() if option.name not in HybridConfig.__dataclass_fields__]
    fields = [
        ("n_layer", "int", len(unit)),
        ("pattern", "str", pattern),
        *((option.name, option.type, option.default) for option in more),
    ]
    formulas = {"memory": memory if all(record.memory for record in records) else None}
    return Architecture(
        name=name,
        config=derived(name, HybridConfig, fields),
        model=HybridForCausalLM,
        presets={"tiny": dict(TINY, n_layer=len(unit), n_head=4)} if presets is None else presets,
        positions=("learned", "rope", "none"),
        **{"state_size": state_size, **formulas, **looks},
    )


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
