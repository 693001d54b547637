"""The read-out by the model's own path: read a context once, then put every question to a copy of its cache.

A linear probe finds less in a state than the model itself does, so the model is asked. The cache is all that
it knows of what it has read. A question that continues from a copy of the cache gets the same answer as one
at the end of the whole sequence, and costs one token instead of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssm_retrieval.models.common import Cache, LanguageModel

BUDGET = 192 * 2**20  # bytes of the caches that are asked at once, about
WIDE = 16  # numbers that a token takes on its way through the model, per channel, about


@dataclass(frozen=True)
class Readout:
    """The answers after one prompt.

    Attributes:
        predicted: (B, Q) int64, the likeliest token after each question.
        numbers: Numbers in the cache that one sequence's questions continue from.
        cache: This cache, of B sequences, for further questions; None if each question has its own.
    """

    predicted: Tensor
    numbers: int
    cache: Cache | None = None


def fork(cache: Cache, rows: Tensor) -> Cache:
    """A cache for further calls, which leave the given one as it is.

    Args:
        cache: Of B sequences.
        rows: (R,) int64, the sequence that each row of the new cache continues.

    Returns:
        The cache of R sequences, in memory of its own.
    """
    layers = [{name: x.index_select(0, rows) for name, x in layer.items()} for layer in cache.layers]
    mask = None if cache.mask is None else cache.mask.index_select(0, rows)
    return Cache(layers, cache.length, mask)


@torch.no_grad()
def ask(
    model: LanguageModel,
    cache: Cache,
    questions: Tensor,
    budget: int = BUDGET,
    position: int | None = None,
) -> Tensor:
    """Put questions of one token each to sequences that have been read, none of which sees another.

    Args:
        model: What answers.
        cache: What it remembers of B sequences; left as it is.
        questions: (B, Q) int64.
        budget: Bytes that may be used at once, about.
        position: Of every question. None: behind what was read.

    Returns:
        (B, Q) int64, the likeliest token after each question.
    """
    B, Q = questions.shape
    config = model.config
    each = 4 * (2 * cache.num_elements() // B + 2 * config.vocab_size + WIDE * config.d_model)
    owner = torch.arange(B).repeat_interleave(Q)
    size = max(1, budget // each)
    asked = zip(questions.flatten().split(size), owner.split(size), strict=True)
    at = torch.tensor([cache.length if position is None else position])
    found = [
        model(tokens[:, None], cache=fork(cache, rows), position_ids=at)[:, -1].argmax(-1)
        for tokens, rows in asked
    ]
    return torch.cat(found).view(B, Q)


@torch.no_grad()
def read_out(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    questions: Sequence[Tensor],
    budget: int = BUDGET,
    positions: Sequence[Tensor] | None = None,
) -> Iterator[Readout]:
    """Ask after each of several prompts, which are longer and longer views of the same sequences.

    What a prompt shares with the last one is read once for all; the rest of it, such as the marker before a
    question, is read by a copy of the cache.

    Args:
        model: What reads and answers.
        prompts: (B, T) int64 each, from the shortest to the longest.
        questions: (B, Q) int64 for each prompt.
        budget: Bytes of the questions that are asked at once, about.
        positions: (T + 1,) int64 for each prompt, the positions of its tokens and of the question. None: they
            are counted from 0.

    Yields:
        The answers after each prompt.
    """
    if positions is None:
        positions = [torch.arange(prompt.shape[1] + 1) for prompt in prompts]
    whole, cache, read = prompts[-1], model.init_cache(), 0
    everyone, last = torch.arange(len(whole)), torch.tensor([-1])
    for prompt, asked, at in zip(prompts, questions, positions, strict=True):
        same = (prompt == whole[:, : prompt.shape[1]]).all(0) & (at[:-1] == positions[-1][: len(at) - 1])
        until = min(int(same.cumprod(0).sum()), prompt.shape[1] - 1)
        if until > read:
            model(whole[:, read:until], cache=cache, logits_at=last, position_ids=at[read:until])
            read = until
        ready = fork(cache, everyone)
        model(prompt[:, read:], cache=ready, logits_at=last, position_ids=at[read:-1])
        answers = ask(model, ready, asked, budget, int(at[-1]))
        yield Readout(answers, ready.num_elements() // len(whole), ready)
