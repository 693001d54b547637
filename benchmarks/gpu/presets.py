"""Whole models as `benchmarks.cuda` runs them: a training step, and decoding, in one dtype throughout.

**Floors** are bytes that must move, with w, c and s the bytes of all weights, of AdamW's two moments, and
of the decoding state of all sequences:

    training step   6 w + 2 c     weights are read forward and backward, their gradients are written and
                                  read, and AdamW reads and writes weights and moments
    decoding        w + 2 s       for the next token of every sequence all weights are read, and the state is
                                  read and written

Activations are left out, because how many must move depends on what is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.measure import peak_of, seconds_of, wait
from ssm_retrieval import models


def training_floor(weights: int, moments: int) -> int:
    """Bytes that must move in a training step, given those of weights and moments."""
    return 6 * weights + 2 * moments


def decoding_floor(weights: int, state: int) -> int:
    """Bytes that must move for the next token of every sequence."""
    return weights + 2 * state


def training(
    model: models.LanguageModel, batch: int, length: int, device: str, repeats: int
) -> dict[str, Any]:
    """Time and memory of a training step: forward, loss, backward, AdamW.

    Args:
        model: On the device.
        batch: Sequences.
        length: Tokens of each.
        device: Where it runs.
        repeats: Measurements; the median counts.

    Returns:
        `seconds`, `tokens_per_second`, `peak_bytes` beside the weights, and `floor_bytes`.
    """
    ids = tokens(model, batch, length, device)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model.loss(ids, labels=labels)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_of(step, device)
    seconds = seconds_of(step, device, least=0.0, repeats=repeats)
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim() > 0]
    weights = sum(p.nbytes for p in model.parameters())
    return dict(
        seconds=seconds,
        tokens_per_second=batch * length / seconds,
        peak_bytes=peak,
        floor_bytes=training_floor(weights, sum(x.nbytes for x in moments)),
    )


def decoding(
    model: models.LanguageModel, batch: int, length: int, new: int, device: str, repeats: int
) -> dict[str, Any]:
    """Time of prefilling a prompt, and of the tokens after it, one at a time.

    Args:
        model: On the device.
        batch: Sequences.
        length: Tokens of the prompt.
        new: Tokens that are decoded.
        device: Where it runs.
        repeats: Measurements; the median counts.

    Returns:
        `prefill_seconds`; `seconds` and `tokens_per_second` of decoding, of all sequences together;
        `state_bytes`; and `floor_bytes` of a token.
    """
    ids, last = tokens(model, batch, length, device), torch.tensor([-1], device=device)
    with torch.no_grad():
        prefill = seconds_of(lambda: model(ids, logits_at=last), device, least=0.0, repeats=repeats)
        cache = model.init_cache()
        chosen = model(ids, logits_at=last, cache=cache).argmax(-1)[:, -1]
        state = sum(x.nbytes for layer in cache.layers for x in layer.values())

        def decode() -> None:
            token = chosen
            for _ in range(new):
                token = model.step(token, cache).argmax(-1)

        seconds = seconds_of(decode, device, least=0.0, repeats=repeats)
    wait(device)
    weights = sum(p.nbytes for p in model.parameters())
    return dict(
        prefill_seconds=prefill,
        seconds=seconds / new,
        tokens_per_second=batch * new / seconds,
        state_bytes=state,
        floor_bytes=decoding_floor(weights, state),
    )


def tokens(model: models.LanguageModel, batch: int, length: int, device: str) -> Tensor:
    """Random ids, the same for every route.

    Args:
        model: Whose vocabulary they are of.
        batch: Sequences.
        length: Tokens of each.
        device: Where they go.

    Returns:
        (batch, length) int64.
    """
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=g).to(device)
