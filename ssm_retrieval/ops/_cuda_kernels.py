"""The functions of mamba-ssm and causal-conv1d, imported when first chosen and never before.

Both packages hold extensions compiled against one torch, so that they fail in three ways: they are absent,
they are there but do not load (another torch, CUDA or driver than they were built for), or they are too old.
Each becomes one line that says which, and the pip command that mends it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval.errors import MissingPackage
from ssm_retrieval.ops._route import constant_for_compilers

OLDEST = {"mamba_ssm": "mamba-ssm>=2.2", "causal_conv1d": "causal-conv1d>=1.4"}
INSTALL = "pip install --no-build-isolation"
GPU_CHUNK = 256  # of the kernel for Mamba-2, its authors' choice on GPUs; the result does not depend on it


@constant_for_compilers
def installed(package: str) -> bool:
    """Whether the package is there, without importing it."""
    return importlib.util.find_spec(package) is not None


def how(package: str) -> str:
    """The end of a line that names a package which is not installed."""
    return f"which is not installed: {INSTALL} '{OLDEST[package]}'"


@lru_cache(maxsize=8)
def kernel(module: str, name: str, *arguments: str) -> Callable[..., Any]:
    """The function `name` of a module of one of the two packages, which must take these arguments.

    Raises:
        MissingPackage: If it is missing, does not load or is too old; the line has the pip command.
    """
    package = module.partition(".")[0]
    wanted, where = OLDEST[package], "it builds only where torch is a CUDA build; elsewhere use backend='cpu'"
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        missing = error.name or package
        if missing.partition(".")[0] != package:
            help_ = f"{package} needs {missing}, which is missing: {INSTALL} --force-reinstall '{wanted}'"
        elif "." in missing and installed(package):
            help_ = f"{package} is too old, it has no {missing}: {INSTALL} -U '{wanted}'"
        else:
            help_ = f"backend='cuda' needs {package}, {how(package)} ({where})"
        raise MissingPackage(help_) from error
    except (ImportError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise MissingPackage(
            f"{package} is installed but does not load ({said}); build it against this torch: {INSTALL} "
            f"--force-reinstall --no-deps --no-cache-dir --no-binary :all: '{wanted}'"
        ) from error
    if found is None:
        raise MissingPackage(f"{package} is too old, it has no {module}.{name}: {INSTALL} -U '{wanted}'")
    takes = inspect.signature(found).parameters
    lacking = [argument for argument in arguments if argument not in takes]
    if lacking:
        raise MissingPackage(
            f"{package} is too old, its {name} does not take {', '.join(lacking)}: {INSTALL} -U '{wanted}'"
        )
    return found


def takes(x: Tensor) -> bool:
    """Whether the kernels of both packages take an x of this dtype and size."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0


def packed(x: Tensor) -> Tensor:
    """x with the strides of a fresh tensor.

    `contiguous` returns a slice of one token as it is, with the strides of what it was cut from, because no
    stride of an axis of size 1 matters to torch. It does to the kernels, which want multiples of 8.
    """
    fresh = [math.prod(x.shape[i + 1 :]) for i in range(x.dim())]
    return x if list(x.stride()) == fresh else x.clone(memory_format=torch.contiguous_format)


def on_gpu(x: Tensor) -> None:
    """Raise ValueError, one line, unless x is on a GPU."""
    if x.device.type != "cuda":
        raise ValueError(f"backend='cuda' got tensors on {x.device}; move them to a GPU or use backend='cpu'")


def in_chunk_scan_layout(
    kernel: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    return_last_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Call a function of the signature of mamba-ssm's `mamba_chunk_scan_combined`: arguments of `ssd`.

    Returns y in x's dtype and the last state, or None.
    """
    B, C = (packed(t.to(x.dtype)) for t in (B, C))
    optional: dict[str, Any] = {}
    if initial_state is not None:
        optional["initial_states"] = packed(initial_state)
    if return_last_state:
        optional["return_final_states"] = True
    out = kernel(packed(x), packed(dt.float()), A.float(), B, C, GPU_CHUNK, **optional)
    y, last = out if return_last_state else (out, None)
    return y.to(x.dtype), last
