"""What every architecture here shares: the call signature, padding, packing, the cache.

Glossary (one letter per axis, used in every shape comment of this package)

    B  batch            L  length of this call         S  keys visible (cached + this call)
    D  d_model          E  d_inner = expand * d_model  N  d_state
    H  heads            P  width of one head           V  vocab_size

A model is an `embedding`, a list of `blocks` mapping (B, L, D) to (B, L, D), a final `norm` and a `head`;
`LanguageModel` runs them. An architecture file defines its config, its block, and the names of its
parameters, which are the names the published checkpoints use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm_retrieval.models.configuration import Config as Config
from ssm_retrieval.models.configuration import require as require
from ssm_retrieval.models.decoding import generate, stream
from ssm_retrieval.models.hooks import Hooked, points
from ssm_retrieval.models.layers import add_learned_positions
from ssm_retrieval.models.layers import widen as widen
from ssm_retrieval.models.packing import Packing
from ssm_retrieval.models.padding import real_first
from ssm_retrieval.ops._route import refuse_tracing
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy

LayerCache = dict[str, Tensor]
INTEGERS = (torch.int64, torch.int32)


@dataclass
class Cache:
    """What the model remembers between calls.

    Attributes:
        layers: One dictionary of tensors per layer. SSM layers keep `conv` (B, d_conv-1, E) and `ssm`
            (B, E, N), whose size is constant; attention layers keep `k` and `v` (B, H, S, P), which grow.
        length: Tokens seen so far, padding included.
        mask: (B, length) bool, True = real token; None = no padding so far.
    """

    layers: list[LayerCache]
    length: int = 0
    mask: Tensor | None = None

    def num_elements(self) -> int:
        """Numbers held in memory: the state size, counted, not derived from a formula."""
        return sum(t.numel() for layer in self.layers for t in layer.values())


@dataclass
class Context:
    """What a block must know about the tokens besides their vectors.

    Attributes:
        mask: (B, L) bool, True = real token of this call; None = all are real.
        key_mask: (B, S) bool, the same with the cached tokens in front.
        positions: (L,) or (B, L) int64, index of each token in its sequence.
        cached: Whether tokens came before this call.
        kept: Whether tokens may come after this call.
        again: Whether the block keeps only its input, and runs again for its gradients.
    """

    mask: Tensor | None = None
    key_mask: Tensor | None = None
    positions: Tensor | None = None
    cached: bool = False
    kept: bool = False
    again: bool = False
    _order: list[Tensor | None] = field(default_factory=list)  # torch.compile knows no cached_property

    @property
    def order(self) -> Tensor | None:
        """`models.padding.real_first` for this call, computed on first use, once for all layers."""
        if self.mask is None:
            return None
        if not self._order:
            self._order.append(real_first(self.mask, self.cached, self.kept))
        return self._order[0]


WHOLE = Context()  # whole sequences without padding, the default of mixers that need no positions


def shape_of(x: Any) -> str:
    """Shape and dtype of an argument, for an error message."""
    return f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def part(path: str) -> Any:
    """A property that reads the module at `path`, its name in checkpoints, such as "backbone.embedding"."""
    names = path.split(".")

    def get(model: Any) -> Any:  # not operator.attrgetter, which torch.compile cannot trace
        for name in names:
            model = getattr(model, name)
        return model

    return property(get)


def _rename_before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before `load_state_dict`: `LanguageModel.accept_hub_spellings`."""
    cast(LanguageModel, module).accept_hub_spellings(state_dict, prefix)


def select_positions(x: Tensor, at: Tensor | None) -> Tensor:
    """x (B, L, D) at the indices `at`, (A,) or (B, A); x itself if `at` is None."""
    if at is None:
        return x
    return x[:, at] if at.dim() == 1 else x.take_along_dim(at[..., None], dim=1)


class LanguageModel(Hooked, nn.Module):
    """Causal language model: tokens or embeddings in, next-token logits out.

    Subclasses have the four parts below, either as attributes or under the names of checkpoints (`part`).
    Their config has `vocab_size`, `d_model`, `n_layer` and `residual_in_fp32`.
    """

    embedding: nn.Embedding
    blocks: nn.ModuleList  # each called as block(x, context, cache) -> x, (B, L, D)
    norm: nn.Module
    head: nn.Linear
    embed_pos: nn.Embedding  # a vector per position, of models whose config says position="learned"
    # Training keeps only each block's input and runs the block again for its gradients (Chen et al. 2016,
    # arXiv 1604.06174): same numbers, less memory, about a third more time. No effect with a cache or hooks.
    checkpointing: bool = False
    hook_axes: ClassVar = {"hook_embed": "B L D", "ln_final.hook_normalized": "B L D"}

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.register_load_state_dict_pre_hook(_rename_before_load)

    def accept_hub_spellings(self, named: dict[str, Any], prefix: str = "") -> None:
        """Rename the keys of `named` to the names used here, in place.

        Architectures that other code publishes under other names override this.
        """

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D): the embedding, plus `embed_pos` of the position if that is learned."""
        x = self.embedding(input_ids)
        learned = getattr(self.config, "position", "none") == "learned"
        return add_learned_positions(x, positions, self.embed_pos) if learned else x

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Next-token logits.

        Args:
            input_ids: (B, L) int64.
            inputs_embeds: (B, L, D) floating, instead of input_ids.
            attention_mask: (B, L), non-zero = real token, for the tokens of this call only. Padding may stand
                anywhere, with a cache too (`models.padding`); logits at padding are meaningless.
            seq_ids: (B, L) int, several sequences packed into one row (`models.packing`); not with a cache or
                mask.
            position_ids: (L,) or (B, L) int, the position of each token. Default: its index among the real
                tokens, those in the cache included. Not with seq_ids.
            logits_at: Indices whose logits are wanted, (A,) int64, or (B, A) with others for every row.
                Default: all.
            cache: From `init_cache`; the call continues from it and updates it in place.

        Returns:
            (B, L or A, V), in the dtype of the head's weights, or autocast's.

        Raises:
            UserError: For arguments that do not fit each other or the model.
        """
        x = self.hidden(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            seq_ids=seq_ids,
            position_ids=position_ids,
            at=logits_at,
            cache=cache,
        )
        return self.head(x)

    def loss(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor,
        logits_at: Tensor | None = None,
        label_smoothing: float = 0.0,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats, and the arg-max predictions, without the logits in memory.

        Args:
            input_ids: As in `forward`.
            labels: (B, L or A) int64, what the logits at index j (at logits_at[j]) should predict in
                labels[:, j]; -100 = nothing.
            logits_at: As in `forward`.
            label_smoothing: As in `F.cross_entropy`.
            **inputs: Other arguments of `forward`.

        Returns:
            A scalar, and (B, L or A) int64.

        Raises:
            UserError: As `forward`.
        """
        x = self.hidden(input_ids, at=logits_at, **inputs)
        return linear_cross_entropy(x, self.head.weight, labels, label_smoothing)

    def hidden(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seq_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head reads: `forward` without the head.

        Args:
            input_ids: As in `forward`, like all others.
            inputs_embeds: (B, L, D).
            attention_mask: (B, L).
            seq_ids: (B, L).
            position_ids: (L,) or (B, L).
            at: `logits_at` of `forward`.
            cache: From `init_cache`.

        Returns:
            (B, L or A, D).
        """
        refuse_tracing(type(self).__name__)
        tokens = self._checked(input_ids, inputs_embeds, attention_mask, seq_ids, position_ids, at, cache)
        if seq_ids is None or seq_ids.numel() == 0:
            packing, batches = None, [self._stream(tokens, attention_mask, position_ids, cache)]
        else:
            packing = Packing(seq_ids, one_batch=self.hook is not None)  # a name fires once per call
            batches = [self._stream(rows, None, None, None) for rows in packing.unpack(tokens)]
        if self.hook is not None:  # normalise all, so that the hook sees the axes of every other name
            batches = [self.tap("ln_final.hook_normalized", self.norm(x)) for x in batches]
        x = select_positions(batches[0] if packing is None else packing.pack(batches), at)
        return self.norm(x) if self.hook is None else x

    def _checked(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mask: Tensor | None,
        seq_ids: Tensor | None,
        position_ids: Tensor | None,
        at: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Whichever of input_ids and inputs_embeds is given, after every argument has been checked.

        Looks at shapes and dtypes only: values may be on a GPU, and reading them would wait for it.
        """
        require((input_ids is None) != (inputs_embeds is None), "give input_ids or inputs_embeds, not both")
        require(
            seq_ids is None or (mask is None and cache is None),
            "seq_ids cannot be combined with attention_mask or cache: pack sequences without padding",
        )
        D = self.config.d_model
        if inputs_embeds is None:
            tokens, name, wanted = input_ids, "input_ids", "an integer tensor (batch, length)"
            fits = isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.dtype in INTEGERS
        else:
            tokens, name, wanted = inputs_embeds, "inputs_embeds", f"a floating (batch, length, d_model={D})"
            fits = isinstance(tokens, Tensor) and tokens.shape[2:] == (D,) and tokens.is_floating_point()
        require(fits, f"{name} must be {wanted}; got {shape_of(tokens)}")
        tokens = cast(Tensor, tokens)
        B, L = tokens.shape[:2]
        for name, given in (("attention_mask", mask), ("seq_ids", seq_ids)):
            fits = given is None or (isinstance(given, Tensor) and given.shape == (B, L))
            require(fits, f"{name} must be {(B, L)}, for the tokens of this call; got {shape_of(given)}")
        if position_ids is not None:
            fits = isinstance(position_ids, Tensor) and position_ids.dtype in INTEGERS
            fits = fits and position_ids.shape in ((L,), (B, L)) and seq_ids is None
            wanted = f"an integer tensor {(L,)} or {(B, L)}, without seq_ids"
            require(fits, f"position_ids must be {wanted}; got {shape_of(position_ids)}")
        if at is not None:
            fits = isinstance(at, Tensor) and at.dtype in INTEGERS and at.dim() in (1, 2)
            fits = fits and at.shape[:-1] in ((), (B,))
            wanted = f"an integer tensor (A,) or (batch={B}, A)"
            require(fits, f"logits_at must be {wanted}; got {shape_of(at)}")
        if cache is not None:
            rows = {len(t) for layer in cache.layers for t in layer.values()} or {B}
            require(
                len(cache.layers) == self.config.n_layer and rows == {B},
                f"the cache is of {len(cache.layers)} layers and {max(rows)} sequences, this call of "
                f"{self.config.n_layer} and {B}; begin each batch with a new init_cache()",
            )
        return tokens

    def _stream(
        self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """The residual stream after the last block (B, L, D), for ids (B, L) or embeddings (B, L, D)."""
        if self.hook is not None:
            B, L = tokens.shape[:2]
            self.hook.begin(B, L, L if cache is None else L + cache.length)
        context = self._context(tokens, mask, position_ids, cache)
        embedded = tokens.dim() == 3
        x = tokens if embedded else self.embed(tokens, cast(Tensor, context.positions))
        if self.hook is not None and embedded:
            x = x.clone()  # the caller owns it: a recording must not change with it
        x = self.tap("hook_embed", x)
        x = widen(x) if self.config.residual_in_fp32 else x
        # a block that records or updates something must not run twice
        context.again = self.checkpointing and torch.is_grad_enabled() and cache is None and self.hook is None
        for i, block in enumerate(self.blocks):
            if context.again:
                x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, context, None if cache is None else cache.layers[i])
        return x

    def _context(
        self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Context:
        B, L = tokens.shape[:2]
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + L, device=tokens.device)
        if mask is not None:
            mask = mask.bool()
        key_mask = mask
        if cache is not None:
            if mask is not None or cache.mask is not None:
                seen = tokens.new_ones(B, past, dtype=torch.bool) if cache.mask is None else cache.mask
                new = tokens.new_ones(B, L, dtype=torch.bool) if mask is None else mask
                key_mask = cache.mask = torch.cat([seen, new], dim=1)
            cache.length = past + L
        if key_mask is not None:  # positions count real tokens only, so padding shifts nothing
            positions = (key_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        if position_ids is not None:
            positions = position_ids
        return Context(mask, key_mask, positions, cached=past > 0, kept=cache is not None)

    def hook_children(self) -> dict[str, Hooked]:
        return {f"blocks.{i}.": cast(Hooked, block) for i, block in enumerate(self.blocks)}

    def hook_names(self) -> list[str]:
        """Every name that `probes.record` and `probes.intervene` accept (`probes.NAMES` describes them)."""
        return list(points(self))

    generate = generate
    stream = stream

    def init_cache(self) -> Cache:
        """An empty cache; the first call that uses it makes its tensors."""
        return Cache(layers=[{} for _ in range(self.config.n_layer)])

    def step(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """One token of recurrent decoding. input_ids: (B,) int64 -> logits (B, V); updates the cache."""
        return self(input_ids[:, None], cache=cache)[:, -1]

    def num_parameters(self, embeddings: bool = True) -> int:
        """How many numbers the weights have, tied ones counted once.

        Args:
            embeddings: Whether to count the embedding and the head.

        Returns:
            The count.
        """
        tables = () if embeddings else (self.embedding, self.head)
        skip = {id(p) for table in tables for p in table.parameters()}
        return sum(p.numel() for p in self.parameters() if id(p) not in skip)
