"""Initial weights that depend on a seed alone: not on what was drawn before, the default dtype or the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU start from this seed; afterwards torch's generator goes on as if nothing had been drawn.

    Tensors made inside are on the CPU and float32 unless their maker says otherwise. Generators of GPUs are not
    touched: `torch.manual_seed` would seed every one of them, which `fork_rng(devices=[])` does not undo.
    """
    generator, dtype = torch.default_generator, torch.get_default_dtype()
    before = generator.get_state()
    generator.manual_seed(int(seed))
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        generator.set_state(before)
