"""New tokens for a trained model."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ssm_retrieval.models.common import LanguageModel
from ssm_retrieval.models.configuration import require
from ssm_retrieval.models.quantized import is_quantized


@torch.no_grad()
def grow_vocabulary(model: LanguageModel, new_tokens: int, seed: int = 0) -> LanguageModel:
    """Append rows for new tokens to the embedding, and to the head if it has weights of its own.

    Their ids start at the old `config.vocab_size`, after all rows that the model has, including those that
    only pad its table (Mamba's 50,280 for 50,277 tokens), as in the paper's synthetic grounding experiment.
    They are drawn from normal(0, config.embedding_std), as `transformers` initialised rows at that time. Tied
    weights stay tied, frozen ones frozen, and old logits do not change.

    Args:
        model: The model, changed in place.
        new_tokens: How many rows to append.
        seed: Fixes the new rows.

    Returns:
        The model.

    Raises:
        UserError: Unless new_tokens is at least 1, and for a model in 8 bits.
    """
    require(not is_quantized(model), "a model in 8 bits cannot grow; grow it before models.quantize")
    require(new_tokens >= 1, f"new_tokens={new_tokens} must be at least 1")
    embedding, head = model.embedding, model.head
    tied = head.weight is embedding.weight
    generator = torch.Generator("cpu").manual_seed(seed)
    std = float(model.config.embedding_std)
    embedding.weight = _grown(embedding.weight, new_tokens, std, generator)
    head.weight = embedding.weight if tied else _grown(head.weight, new_tokens, std, generator)
    size = embedding.weight.shape[0]
    embedding.num_embeddings = head.out_features = size
    cast(Any, model).config = model.config.replace(vocab_size=size)
    return model


def _grown(table: Tensor, rows: int, std: float, generator: torch.Generator) -> nn.Parameter:
    """The table (V, D) with `rows` more, the same on every device and rounded to its dtype."""
    new = torch.empty(rows, table.shape[1], dtype=torch.float32, device="cpu")
    new.normal_(0.0, std, generator=generator)
    return nn.Parameter(torch.cat([table, new.to(table)]), requires_grad=table.requires_grad)
