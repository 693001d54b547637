"""Where activations are swapped, and what a swap does to the residual stream behind its layer.

Three sites, named as their hook points:

    residual  blocks.l.hook_resid_pre             x_l itself; l = n_layer is what the last norm reads
    state     blocks.l.mixer.hook_ssm_state       h_t replaced, the recurrence goes on from it
    head      blocks.l.attn.hook_z                what one head gives to one position, before W_O

Every block adds to the residual stream, so a swap inside block l is known from what it adds to x_{l+1}, and
blocks up to l never run again. `probes.patch_states` says what a replaced state adds.

Letters as in `ssm_retrieval.models.common`; c = patches side by side, T = tokens from `start` on.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from probes.patch_states import STATES, captured, context_of, through_mlp
from ssm_retrieval.models.common import Cache, Context, LanguageModel, LayerCache
from ssm_retrieval.models.hybrid import ParallelBlock
from ssm_retrieval.models.transformer import TransformerBlock
from ssm_retrieval.ops.linear import linear

SITES = ("residual", "state", "head")


def has_site(block: Any, site: str) -> bool:
    """Whether a block has states (SSM) or heads (attention) to swap; every block has a residual stream.

    A parallel block has only that: what a branch adds to it is scaled, which the shortcuts here do not do.
    """
    if isinstance(block, ParallelBlock):
        return site == "residual"
    if site == "state":
        return type(getattr(block, "mixer", None)) in STATES
    return site == "residual" or isinstance(block, TransformerBlock)


def residuals(model: LanguageModel, input_ids: Tensor) -> list[Tensor]:
    """x_0 .. x_n: the residual stream (B, L, D) before each block, and before the last norm."""
    context = context_of(input_ids)
    x = model.embed(input_ids, cast(Tensor, context.positions))
    x = x.to(torch.promote_types(x.dtype, torch.float32)) if model.config.residual_in_fp32 else x
    result = [x]
    for block in model.blocks:
        result.append(block(result[-1], context))
    return result


def advance(model: LanguageModel, input_ids: Tensor, cache: Cache, stop: int) -> None:
    """Let a cache of these sequences take in the tokens before `stop`.

    Args:
        model: The model.
        input_ids: (B, L) int64.
        cache: What has been taken in so far; changed in place.
        stop: The token after the last one.
    """
    if stop > cache.length:
        nothing = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        model.hidden(input_ids[:, cache.length : stop], at=nothing, cache=cache)


def run_from(model: LanguageModel, layer: int, x: Tensor, cache: Cache | None, at: int | Tensor) -> Tensor:
    """Logits when blocks from `layer` on run on a given residual stream.

    Args:
        model: The model.
        layer: The first block that runs; n_layer: only the last norm and the head.
        x: (c, B, T, D), the residual stream x_layer.
        cache: What the unpatched sequences (B) leave before x begins. None: x begins with the first token.
        at: Index in x of the token whose logits are wanted, or (A,) or (B, A) of them.

    Returns:
        (c, B, V), of several tokens (c, B, A, V).
    """
    blocks, norm, head = model.blocks, model.norm, model.head
    c, B, T, _ = x.shape
    start = 0 if cache is None else cache.length
    context = Context(positions=torch.arange(start, start + T, device=x.device))
    rows = x.flatten(0, 1)
    for block, past in zip(blocks[layer:], _layers(model, cache)[layer:], strict=True):
        rows = block(rows, context, None if past is None else repeated(past, c))
    if isinstance(at, Tensor) and at.dim() == 2:
        wanted = rows[torch.arange(c * B, device=x.device)[:, None], at.repeat(c, 1)]
    else:
        wanted = rows[:, at]
    return head(norm(wanted)).unflatten(0, (c, B))


def _layers(model: LanguageModel, cache: Cache | None) -> list[LayerCache | None]:
    return [None] * model.config.n_layer if cache is None or cache.length == 0 else list(cache.layers)


def repeated(cache: LayerCache, c: int) -> LayerCache:
    """A layer's cache c times below each other, (c B, ...)."""
    return {name: t.expand(c, *t.shape).flatten(0, 1) for name, t in cache.items()}


class Heads:
    """One attention block running on x (B, L, D): its heads' outputs, and what a change of one adds."""

    def __init__(self, block: TransformerBlock, x: Tensor):
        self.block = block
        self.dense = block.attention.dense
        with captured(dense=self.dense) as seen:
            block(x, context_of(x))
        self.z = seen["dense_in"].unflatten(-1, (block.attention.config.n_head, -1))  # (B, L, H, P)
        self.middle = x + seen["dense_out"]

    def added(self, delta: Tensor, head: int, start: int) -> Tensor:
        """What adding delta to the output of one head adds to the block's output.

        Args:
            delta: (c, B, T, P).
            head: Number of the head.
            start: The token from which delta begins.

        Returns:
            (c, B, T, D).
        """
        width = delta.shape[-1]
        weight = self.dense.weight[:, head * width : (head + 1) * width].contiguous()  # else oneDNN is slow
        return through_mlp(self.block, linear(delta, weight), self.middle[:, start:])
