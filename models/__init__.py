"""Mamba, Mamba-2, Transformer (GPT-NeoX / Pythia) and hybrids, each in one file, behind one signature."""

from models.checkpoints import load, save
from models.common import Cache, LanguageModel
from models.decoding import generate
from models.registry import FAMILIES, build, config, from_config, presets, resolve
from models.vocabulary import grow_vocabulary

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
]
