"""What every architecture here shares: the call signature, norms, padding, packing, the cache.

Glossary (one letter per axis, used in every shape comment of this package)

    B  batch            L  length of this call         S  keys visible (cached + this call)
    D  d_model          E  d_inner = expand * d_model  N  d_state
    H  heads            P  width of one head           V  vocab_size

A model is an embedding, a list of blocks mapping (B, L, D) to (B, L, D), a final norm and a head;
`LanguageModel` runs that list. An architecture file defines its config, its block, and the names of
its parameters, which are the names the published checkpoints use.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.hooks import Hooked, points
from models.ops._route import refuse_tracing
from models.ops.cross_entropy import linear_cross_entropy

LayerCache = dict[str, Tensor]


@dataclass
class Cache:
    """What the model remembers between calls: one dictionary of tensors per layer.

    SSM layers keep `conv` (B, d_conv-1, E) and `ssm` (B, E, N): constant in the number of tokens.
    Attention layers keep `k` and `v` (B, H, S, P), which grow with it.
    """

    layers: list[LayerCache]
    length: int = 0  # tokens seen so far, padding included
    mask: Tensor | None = None  # (B, length) bool, True = real token; None = no padding so far

    def num_elements(self) -> int:
        """Numbers held in memory: the state size, counted rather than derived from a formula."""
        return sum(t.numel() for layer in self.layers for t in layer.values())


@dataclass
class Context:
    """What a block must know about the tokens besides their vectors."""

    mask: Tensor | None = None  # (B, L) bool, True = real token of this call
    key_mask: Tensor | None = None  # (B, S) bool, the same including cached tokens
    positions: Tensor | None = None  # (L,) or (B, L) int64, index of each token in its sequence


class Block(Protocol):
    def __call__(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor: ...


class Config:
    """Base of the frozen dataclass configs: dictionaries in and out, unknown keys refused."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(cast(Any, self))

    def replace(self, **overrides: Any) -> Any:
        """A copy with fields changed. Raises ValueError for a field this config does not have."""
        known = [f.name for f in dataclasses.fields(cast(Any, self))]
        for key in overrides:
            if key not in known:
                raise ValueError(f"{type(self).__name__} has no option {key!r}; it has {', '.join(known)}")
        return dataclasses.replace(cast(Any, self), **overrides)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with a one-line message unless the condition holds (configs use this)."""
    if not condition:
        raise ValueError(message)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019).

    Computed in float32 at least and returned in the dtype of `weight`, so that a residual stream kept
    in float32 meets the projections of a bfloat16 model in bfloat16.
    """

    def __init__(self, d: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), x.shape[-1:], eps=self.eps)
        return y.to(self.weight.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """LayerNorm that also accepts a float32 residual stream in a model of lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def respell(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before `load_state_dict`: `LanguageModel.accept_hub_spellings`."""
    cast(LanguageModel, module).accept_hub_spellings(state_dict, prefix)


def init_normal(weight: Tensor, std: float) -> None:
    """Fill with normal(0, std) drawn in float32, whatever the dtype: the same weights at every precision."""
    with torch.no_grad():
        drawn = torch.empty(weight.shape, device=weight.device)
        weight.copy_(drawn.normal_(std=std))


def make_norm(kind: str, d: int, eps: float) -> nn.Module:
    """`kind` is "rms" or "layer"."""
    return {"rms": RMSNorm, "layer": LayerNorm}[kind](d, eps=eps)


def unpack(x: Tensor, seq_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every sequence of a packed batch a row of its own.

    x: (B, L, D); seq_ids: (B, L) int, neighbours with equal ids belong to one sequence.
    Returns rows (S, longest, D), right-padded with zeros, and the two (B, L) index tensors `row`,
    `column` with rows[row, column] == x. Causal models ignore what stands to the right, so running them
    on these rows is exactly running them on each sequence alone: no state, no convolution window and
    no attention crosses a boundary, and positions restart, for every architecture by one rule.
    """
    B, L = seq_ids.shape
    starts = torch.ones_like(seq_ids, dtype=torch.bool)
    starts[:, 1:] = seq_ids[:, 1:] != seq_ids[:, :-1]
    row = starts.flatten().cumsum(0).view(B, L) - 1
    index = torch.arange(L, device=x.device).expand(B, L)
    column = index - torch.where(starts, index, 0).cummax(dim=1).values
    rows = x.new_zeros(int(row[-1, -1]) + 1, int(column.max()) + 1, x.shape[-1])
    return rows.index_put((row, column), x), row, column


def chosen(x: Tensor, packing: list[Tensor], at: Tensor | None) -> Tensor:
    """x (B, L, D) with rows packed again as `unpack` found them, then the indices `at`: (A,) or (B, A)."""
    if packing:
        row, column = packing
        x = x[row, column]
    if at is None:
        return x
    return x[:, at] if at.dim() == 1 else x.take_along_dim(at[..., None], dim=1)


class LanguageModel(Hooked, nn.Module):
    """Causal language model: tokens or embeddings in, next-token logits out.

    Subclasses set `config` (with `vocab_size`, `d_model`, `n_layer`) and implement `parts()`.
    """

    config: Any
    # Training keeps each block's input only and runs the block again for its gradients (Chen et al. 2016,
    # arXiv 1604.06174): same numbers, less memory, about a third more time. Not with a cache or hooks.
    checkpointing: bool = False
    hook_axes: ClassVar = {"hook_embed": "B L D", "ln_final.hook_normalized": "B L D"}

    def parts(self) -> tuple[nn.Embedding, list[Block], nn.Module, nn.Linear]:
        """The embedding, the blocks in order, the final norm, the head."""
        raise NotImplementedError

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """Give tensors, or whatever stands for them in `named`, the names they have here, in place.

        Families that other code publishes under other names override this.
        """

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D). Position schemes that add to the embedding override this."""
        return self.parts()[0](input_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_ids: Tensor | None = None,
        logits_at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Next-token logits.

        input_ids: (B, L) int64, or inputs_embeds: (B, L, D) floating; exactly one of them.
        attention_mask: (B, L), non-zero = real token. Padding may stand on either side; logits at padded
            positions are meaningless. With a cache pad on the left, so that the last token is real.
        seq_ids: (B, L) int, several sequences packed into one row (see `unpack`); without cache or mask.
        logits_at: (A,) int64 sequence indices whose logits are wanted, or (B, A), others for every row;
            default all.
        cache: from `init_cache`; continues from it and updates it in place.

        Returns (B, L or A, V) logits, in the dtype of the head's weights (autocast's dtype under it).
        Raises ValueError for contradictory arguments.
        """
        x = self.hidden(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            seq_ids=seq_ids,
            at=logits_at,
            cache=cache,
        )
        return self.parts()[3](x)

    def loss(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor,
        logits_at: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats, and the arg-max predictions, without the logits in memory.

        labels: (B, L or A) int64; labels[:, j] is what the logits at index j (logits_at[j]) should
        predict, -100 = nothing. Other arguments as `forward`. Returns a scalar and (B, L or A) int64.
        """
        x = self.hidden(input_ids, at=logits_at, **inputs)
        return linear_cross_entropy(x, self.parts()[3].weight, labels)

    def hidden(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_ids: Tensor | None = None,
        at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head reads, (B, L or A, D): `forward` without the head; `at` is its `logits_at`."""
        refuse_tracing(type(self).__name__)
        require((input_ids is None) != (inputs_embeds is None), "give input_ids or inputs_embeds, not both")
        require(
            seq_ids is None or (attention_mask is None and cache is None),
            "seq_ids cannot be combined with attention_mask or cache: pack sequences without padding",
        )
        tokens = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        _, blocks, norm, _ = self.parts()
        packing: list[Tensor] = []
        if seq_ids is not None:  # embed rows, so that learned positions restart with each sequence
            vectors = tokens if inputs_embeds is not None else tokens.unsqueeze(-1)
            vectors, *packing = unpack(vectors, seq_ids)
            tokens = vectors if inputs_embeds is not None else vectors.squeeze(-1)
        if self.hook is not None:
            B, L = tokens.shape[:2]
            self.hook.begin(B, L, L if cache is None else L + cache.length)
        context = self._context(tokens, attention_mask, cache)
        x = tokens if inputs_embeds is not None else self.embed(tokens, cast(Tensor, context.positions))
        if self.hook is not None:
            # a copy of what the caller owns: a recording must not change with it
            x = self.hook("hook_embed", x if inputs_embeds is None else x.clone())
        x = x.to(torch.promote_types(x.dtype, torch.float32)) if self.config.residual_in_fp32 else x
        # a block that records or updates something must not run twice
        again = self.checkpointing and torch.is_grad_enabled() and cache is None and self.hook is None
        for i, block in enumerate(blocks):
            if again:
                x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, context, None if cache is None else cache.layers[i])
        if self.hook is not None:  # normalise all, so that the hook sees the axes of every other name
            return chosen(self.hook("ln_final.hook_normalized", norm(x)), packing, at)
        return norm(chosen(x, packing, at))

    def _context(self, tokens: Tensor, mask: Tensor | None, cache: Cache | None) -> Context:
        B, L = tokens.shape[:2]
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + L, device=tokens.device)
        if mask is not None:
            mask = mask.bool()
        key_mask = mask
        if cache is not None:
            if mask is not None or cache.mask is not None:
                seen = tokens.new_ones(B, past, dtype=torch.bool) if cache.mask is None else cache.mask
                mask = tokens.new_ones(B, L, dtype=torch.bool) if mask is None else mask
                key_mask = cache.mask = torch.cat([seen, mask], dim=1)
            cache.length = past + L
        if key_mask is not None:  # positions count real tokens only, so left padding shifts nothing
            positions = (key_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        return Context(mask=mask, key_mask=key_mask, positions=positions)

    def hook_children(self) -> dict[str, Hooked]:
        return {f"blocks.{i}.": cast(Hooked, block) for i, block in enumerate(self.parts()[1])}

    def hook_sizes(self) -> dict[str, int]:
        return {"D": self.config.d_model}

    def hook_names(self) -> list[str]:
        """Every name that `probes.record` and `probes.intervene` take (`probes.NAMES` describes them)."""
        return list(points(self))

    def init_cache(self) -> Cache:
        """An empty cache; its tensors are made by the first call that uses it."""
        return Cache(layers=[{} for _ in range(self.config.n_layer)])

    def step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """One token of recurrent decoding. input_ids: (B,) int64 -> logits (B, V); updates the cache."""
        return self(input_ids[:, None], cache=cache)[:, -1]

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of trainable numbers, tied weights counted once; without the tables on request."""
        skip = (
            [] if embeddings else [id(p) for m in (self.parts()[0], self.parts()[3]) for p in m.parameters()]
        )
        return sum(p.numel() for p in self.parameters() if id(p) not in skip)
