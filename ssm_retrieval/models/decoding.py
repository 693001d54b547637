"""Recurrent decoding: prefill once, then a token at a time through the cache.

An SSM's cache has a fixed size, so its decoding needs constant memory and time a token; an attention layer's
grows with the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.configuration import require


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor | None,
    max_new_tokens: int,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Tensor:
    """Greedy continuation of (B, L) int64 input_ids: (B, n) int64, n <= max_new_tokens.

    inputs_embeds: (B, L, D) instead of input_ids, for what is not tokens alone.
    attention_mask: (B, L), non-zero = real token; padding stands on either side.
    eos_token_id: one id or several; a sequence that has generated one goes on with it, and all stop when
        every one has.
    Raises UserError for an empty prompt, alone or among others, and for values of the wrong kind.
    """
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    given = input_ids if inputs_embeds is None else inputs_embeds
    require(
        isinstance(given, Tensor) and given.dim() >= 2, "give input_ids (B, L) or inputs_embeds (B, L, D)"
    )
    assert given is not None
    require(given.shape[1] >= 1, "the prompt is empty; begin with one token at least, such as a <bos>")
    last = torch.tensor([given.shape[1] - 1], device=given.device)
    if attention_mask is not None:
        real = attention_mask.bool()
        require(bool(real.any(dim=1).all()), "attention_mask has rows of padding alone; leave them out")
        last = given.shape[1] - 1 - real.flip(1).byte().argmax(dim=1, keepdim=True)  # (B, 1)
    ends = _ends(eos_token_id).to(given.device)
    cache = model.init_cache()
    logits = model(
        input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, logits_at=last, cache=cache
    )[:, -1]
    ended = torch.zeros(len(given), dtype=torch.bool, device=given.device)
    tokens: list[Tensor] = []
    while True:
        token = logits.argmax(-1)
        if len(ends) > 0:
            token = torch.where(ended, tokens[-1] if tokens else token, token)
            ended = torch.isin(token, ends)  # those that had ended have it again
        tokens.append(token)
        if len(tokens) == max_new_tokens or bool(ended.all()):
            return torch.stack(tokens, dim=1)
        logits = model.step(token, cache)


def _ends(eos_token_id: int | Sequence[int] | None) -> Tensor:
    """The ids as a tensor (n,), n = 0 for None."""
    ids: Any = [] if eos_token_id is None else eos_token_id
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    several = list(ids) if isinstance(ids, Sequence) else [ids]
    whole = all(isinstance(i, Integral) and not isinstance(i, bool) for i in several)
    require(whole, f"eos_token_id={eos_token_id!r} must be a token's id or a list of them")
    return torch.tensor(several, dtype=torch.int64)
