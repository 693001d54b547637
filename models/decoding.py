"""Recurrent decoding: prefill once, then a token at a time through the cache.

An SSM's cache has a fixed size, so its decoding needs constant memory and time a token; an attention layer's
grows with the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.common import LanguageModel, require


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor | None,
    max_new_tokens: int,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
) -> Tensor:
    """Greedy continuation of (B, L) int64 input_ids: (B, n) int64, n <= max_new_tokens.

    inputs_embeds: (B, L, D) instead of input_ids, for what is not tokens alone.
    attention_mask: (B, L), non-zero = real token; padding stands on the left.
    eos_token_id: a sequence that has generated it goes on with it, and all stop when every one has.
    Raises ValueError for padding on the right, behind which nothing can be generated.
    """
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    if attention_mask is not None:
        require(bool(attention_mask[:, -1].bool().all()), "attention_mask pads on the right; pad on the left")
    given = input_ids if inputs_embeds is None else inputs_embeds
    require(given is not None, "give input_ids or inputs_embeds")
    assert given is not None
    cache, last = model.init_cache(), torch.tensor([given.shape[1] - 1], device=given.device)
    logits = model(
        input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, logits_at=last, cache=cache
    )[:, -1]
    ended = torch.zeros(len(given), dtype=torch.bool, device=given.device)
    tokens: list[Tensor] = []
    while True:
        token = logits.argmax(-1)
        if eos_token_id is not None:
            token = torch.where(ended, eos_token_id, token)
            ended = token == eos_token_id  # those that had ended have it again
        tokens.append(token)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            return torch.stack(tokens, dim=1)
        logits = model.step(token, cache)
