"""Where and how precisely a run computes: what `auto` stands for on this machine."""

from __future__ import annotations

import torch

from synthetic.checks import check


def resolve_device(device: str, elsewhere: bool = False) -> str:
    """auto -> cuda if there is one, else cpu (mps has no fast scan, so it must be asked for).

    Raises:
        UserError: If the device is not here, unless the run is for another machine.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if present["cuda"] else "cpu"
    check(elsewhere or present[device], f"--device {device} is not available here; use --device cpu")
    return device


def resolve_precision(precision: str, device: str) -> str:
    """auto -> bfloat16 where the hardware multiplies it natively, else float32.

    A GPU of another machine cannot be asked; it is taken to have bfloat16.
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        present = torch.cuda.is_available()
        return "float32" if present and not torch.cuda.is_bf16_supported() else "bfloat16"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every release of torch
    native = device == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return "bfloat16" if native else "float32"
