"""Models with room for weights, and models of other libraries with the weights of ours."""

from __future__ import annotations

from typing import Any

import torch

from ssm_retrieval import models
from ssm_retrieval.models.hub_configs import write_config


def hollow(name: str) -> models.LanguageModel:
    """Return a preset in bfloat16 on the CPU whose weights are not set, made without a float32 copy."""
    model = models.build(name, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    if model.config.tie_word_embeddings:  # `to_empty` parts what was tied
        model.head.weight = model.embedding.weight
    return model


def library(model: models.LanguageModel, **options: Any) -> Any:
    """Return the same architecture in transformers, on the same storage.

    Args:
        model: A model that the hub has an architecture for, in one dtype.
        **options: Fields of its config, such as `use_mambapy`.

    Returns:
        transformers' model, in training mode.
    """
    import transformers

    (dtype,) = {parameter.dtype for parameter in model.parameters()}
    fields = write_config(model.config, str(dtype).removeprefix("torch."))
    (name,) = fields["architectures"]
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**fields | options)
    with torch.device("meta"):
        peer = getattr(transformers, name)(config).to(dtype)
    state = {
        key.replace("backbone.embedding.", "backbone.embeddings."): p for key, p in model.state_dict().items()
    }
    known = peer.state_dict()
    if "embed_out.weight" not in known and "embed_out.weight" in state:
        state["lm_head.weight"] = state.pop("embed_out.weight")
    peer.load_state_dict(state, strict=True, assign=True)
    for module in peer.modules():  # constants that no checkpoint has
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(config)
    return peer.train()
