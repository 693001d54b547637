"""Mamba, Mamba-2, Transformer (GPT-NeoX / Pythia) and hybrids, each in one file, behind one signature."""

from ssm_retrieval.models.architecture import Architecture, Hub
from ssm_retrieval.models.checkpoints import load, save
from ssm_retrieval.models.common import Cache, LanguageModel
from ssm_retrieval.models.decoding import generate, stream
from ssm_retrieval.models.hybrid import from_pattern
from ssm_retrieval.models.mixer import from_mixer
from ssm_retrieval.models.quantized import quantize
from ssm_retrieval.models.registry import (
    ARCHITECTURES,
    architecture_of,
    build,
    config,
    from_config,
    presets,
    register,
    resolve,
    state_size,
)
from ssm_retrieval.models.vocabulary import grow_vocabulary

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Cache",
    "Hub",
    "LanguageModel",
    "architecture_of",
    "build",
    "config",
    "from_config",
    "from_mixer",
    "from_pattern",
    "generate",
    "grow_vocabulary",
    "load",
    "presets",
    "quantize",
    "register",
    "resolve",
    "save",
    "state_size",
    "stream",
]
