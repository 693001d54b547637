"""Initial weights that depend on a seed alone, whatever torch's defaults and state are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws start from this seed; afterwards torch's CPU generator continues as if nothing had been drawn.

    Generators of GPUs are left alone: `torch.manual_seed` would seed them all, and `fork_rng(devices=[])`
    would not undo it.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(seed))
    try:
        yield
    finally:
        generator.set_state(before)


@contextmanager
def defaults(device: torch.device) -> Iterator[None]:
    """Tensors are float32 and on this device unless a call says otherwise."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(dtype)
