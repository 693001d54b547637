"""Probes of hidden states, step sizes, attention and causal paths.

    record(model, names)        named tensors of every forward pass inside a `with` statement
    intervene(model, changes)   replaces named tensors, everywhere or `at` chosen positions
    NAMES                       what each name is, and its axes

`model.hook_names()` lists the names of a model. They are TransformerLens' where the quantity exists there;
the parts of a Mamba layer begin with `mixer.`.
"""

from probes.cache import Recording, record
from probes.hooks import At, at, intervene
from probes.names import NAMES

__all__ = ["NAMES", "At", "Recording", "at", "intervene", "record"]
