"""Recurrent decoding: prefill once, then a token at a time through the cache.

An SSM's cache has a fixed size, so its decoding needs constant memory and time a token; an attention layer's
grows with the sequence. Both functions are methods of every model too: `model.generate(input_ids, 20)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssm_retrieval.models.configuration import require

if TYPE_CHECKING:
    from ssm_retrieval.models.common import LanguageModel


def generate(
    model: LanguageModel, input_ids: Tensor | None = None, max_new_tokens: int = 20, **options: Any
) -> Tensor:
    """Continuation of (B, L) int64 input_ids, greedy unless a temperature is given.

    Args:
        model: Any `LanguageModel`.
        input_ids: (B, L) int64; None with `inputs_embeds`.
        max_new_tokens: The most tokens to generate.
        **options: Those of `stream`: `inputs_embeds`, `attention_mask`, `eos_token_id`, `temperature`,
            `top_k`, `top_p` and `generator`.

    Returns:
        (B, n) int64, n <= max_new_tokens.

    Raises:
        UserError: As `stream`.
    """
    return torch.stack(list(stream(model, input_ids, max_new_tokens, **options)), dim=1)


def stream(
    model: LanguageModel,
    input_ids: Tensor | None = None,
    max_new_tokens: int = 20,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens of `generate`, each as soon as it is known: `for token in model.stream(input_ids): ...`.

    Args:
        model: Any `LanguageModel`.
        input_ids: (B, L) int64; None with `inputs_embeds`.
        max_new_tokens: The most tokens to generate.
        inputs_embeds: (B, L, D) instead of input_ids, for inputs that are not tokens alone.
        attention_mask: (B, L), non-zero = real token; padding may stand on either side.
        eos_token_id: One id or several. A sequence that has generated one repeats it; generation stops when
            every sequence has.
        temperature: 0 takes the likeliest token; above 0, tokens come from softmax(logits / temperature).
        top_k: Draw from the k likeliest tokens only, and from all that tie with the k-th.
        top_p: Draw from the likeliest tokens that together reach this probability, after `top_k`
            (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751).
        generator: Source of random numbers, on the model's device. Default: torch's global one.

    Returns:
        An iterator over (B,) int64.

    Raises:
        UserError: For an empty prompt, alone or in a batch, and for values of the wrong kind. It comes at
            once, not at the first token.
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
    _check_sampling(temperature, top_k, top_p)
    ends = _ends(eos_token_id).to(given.device)
    prompt = dict(inputs_embeds=inputs_embeds, attention_mask=attention_mask, logits_at=last)
    sampling = (temperature, top_k, top_p, generator)
    return _tokens(model, input_ids, prompt, max_new_tokens, ends, sampling)


@torch.no_grad()
def _tokens(
    model: LanguageModel,
    input_ids: Tensor | None,
    prompt: dict[str, Tensor | None],
    max_new_tokens: int,
    ends: Tensor,
    sampling: tuple[Any, ...],
) -> Iterator[Tensor]:
    cache = model.init_cache()
    logits = model(input_ids, cache=cache, **prompt)[:, -1]  # (B, V)
    token = pick(logits, *sampling)
    ended = torch.isin(token, ends)
    yield token
    for _ in range(max_new_tokens - 1):
        if bool(ended.all()):
            return
        new = pick(model.step(token, cache), *sampling)
        token = torch.where(ended, token, new)
        ended = torch.isin(token, ends)  # those that had ended have their end token again
        yield token


def pick(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token for each row of logits.

    Args:
        logits: (B, V).
        temperature: As in `stream`, like the others.
        top_k: How many tokens to draw from.
        top_p: Their joint probability.
        generator: Source of random numbers.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # of likelier tokens; 0 for the first, which always stays
        out = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        probabilities = probabilities.masked_fill(out, 0.0)  # multinomial takes weights of any sum
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _check_sampling(temperature: Any, top_k: Any, top_p: Any) -> None:
    number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    require(
        number and math.isfinite(temperature) and temperature >= 0,
        f"temperature={temperature!r} must be a number, 0 (greedy) or more",
    )
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        require(
            value is None or temperature > 0,
            f"{name}={value!r} has no effect on greedy decoding; give a temperature above 0, such as 1",
        )
    whole = isinstance(top_k, Integral) and not isinstance(top_k, bool) and int(top_k) >= 1
    require(top_k is None or whole, f"top_k={top_k!r} must be a whole number, 1 or more")
    share = isinstance(top_p, Real) and not isinstance(top_p, bool) and 0 < float(top_p) <= 1
    require(top_p is None or share, f"top_p={top_p!r} must be above 0 and at most 1")


def _ends(eos_token_id: int | Sequence[int] | None) -> Tensor:
    """The ids as a tensor (n,), n = 0 for None."""
    ids: Any = [] if eos_token_id is None else eos_token_id
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    several = list(ids) if isinstance(ids, Sequence) else [ids]
    whole = all(isinstance(i, Integral) and not isinstance(i, bool) for i in several)
    require(whole, f"eos_token_id={eos_token_id!r} must be a token's id or a list of them")
    return torch.tensor(several, dtype=torch.int64)
