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
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
) -> Tensor:
    """Greedy continuation of (B, L) int64 input_ids: (B, n) int64, n <= max_new_tokens.

    attention_mask: (B, L), non-zero = real token; padding stands on the left.
    eos_token_id: a sequence that has generated it goes on with it, and all stop when every one has.
    Raises ValueError for padding on the right, behind which nothing can be generated.
    """
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    if attention_mask is not None:
        require(bool(attention_mask[:, -1].bool().all()), "attention_mask pads on the right; pad on the left")
    cache, last = model.init_cache(), torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
    logits = model(input_ids, attention_mask=attention_mask, logits_at=last, cache=cache)[:, -1]
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens: list[Tensor] = []
    while True:
        token = logits.argmax(-1)
        if eos_token_id is not None:
            token = torch.where(ended, eos_token_id, token)
            ended |= token == eos_token_id
        tokens.append(token)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            return torch.stack(tokens, dim=1)
        logits = model.step(token, cache)
