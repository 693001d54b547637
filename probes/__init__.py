"""Probes of hidden states, step sizes, attention and causal paths.

    record(model, names)        named tensors of every forward pass inside a `with` statement
    intervene(model, changes)   replace named tensors, everywhere or `at` chosen positions
    NAMES                       what each name is, and its axes

Names are those of `model.hook_names()`: TransformerLens' where the quantity exists there, `mixer.` for the
parts of a Mamba layer.
"""

from probes.cache import Recording, record
from probes.hooks import At, at, intervene
from probes.names import NAMES

__all__ = ["NAMES", "At", "Recording", "at", "intervene", "record"]
