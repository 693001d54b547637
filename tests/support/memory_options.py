"""Options of a run that decide its memory."""

from __future__ import annotations

import pytest

from ssm_retrieval import models

FAMILIES = (
    "transformer", "mamba", "mamba2", "mamba3", "hybrid", "linear", "deltanet", "gated-deltanet", "kda",
    "gla",
)  # fmt: skip
OPTIMIZERS = ("adamw", "adamw-8bit", "adafactor")


def needs(optimizer: str) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")


def small(family: str, **options) -> models.LanguageModel:
    delta = dict(headdim=16, d_state=24)
    shapes = {"mamba2": {"headdim": 16}, "mamba3": {"headdim": 16}, "mamba": {}, "linear": {}}
    shapes |= {name: delta for name in ("deltanet", "gated-deltanet", "kda", "gla")}
    shape = shapes.get(family, {"n_head": 2})
    layers = 3 if family == "hybrid" else 2
    return models.build(f"{family}-tiny", d_model=32, vocab_size=60, n_layer=layers, **(shape | options))
