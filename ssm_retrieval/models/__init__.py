"""Mamba, Mamba-2, Transformer (GPT-NeoX / Pythia) and hybrids, each in one file, behind one signature."""

from ssm_retrieval.models.checkpoints import load, save
from ssm_retrieval.models.common import Cache, LanguageModel
from ssm_retrieval.models.decoding import generate, stream
from ssm_retrieval.models.registry import FAMILIES, build, config, from_config, presets, resolve
from ssm_retrieval.models.vocabulary import grow_vocabulary

__all__ = [
    "FAMILIES",
    "Cache",
    "LanguageModel",
    "build",
    "config",
    "from_config",
    "generate",
    "grow_vocabulary",
    "load",
    "presets",
    "resolve",
    "save",
    "stream",
]
