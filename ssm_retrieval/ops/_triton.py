"""What our Triton kernels share: whether they can run, what they may be given, and where they are preferred.

Triton comes with torch's builds for NVIDIA (CUDA) and AMD (ROCm) GPUs, both of which torch calls "cuda". With
TRITON_INTERPRET=1 in the environment, before Triton is imported, its interpreter runs the kernels on CPU
tensors, slowly: for tests. Kernels live in modules that are imported on first use, and never by this one.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ssm_retrieval.errors import MissingPackage
from ssm_retrieval.ops import _cuda_kernels
from ssm_retrieval.ops._route import constant_for_compilers, is_fake, transformed, warn_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where a kernel of mamba-ssm or causal-conv1d and ours can both do what is asked: (tokens from which on, the
# faster one) by operator, as `python -m benchmarks.cuda` finds them. Without a row theirs is taken: theirs
# are known to be fast, ours are not measured yet.
MEASURED: dict[str, tuple[tuple[int, str], ...]] = {}


@constant_for_compilers
def installed() -> bool:
    """Whether Triton is there, without importing it."""
    return _find()


@lru_cache(maxsize=1)
def _find() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant_for_compilers
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a GPU that Triton has a compiler for."""
    return x.device.type == "cuda"


def obstacle(*tensors: Tensor | None, dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why Triton's kernels cannot take these tensors, as part of a line; None if they can.

    Args:
        tensors: What the operator was given. Integers, as labels, are not looked at.
        dtypes: The floating ones that its kernels compute with.
    """
    for x in tensors:
        if x is None:
            continue
        if not (on_gpu(x) or (interpreted() and x.device.type == "cpu")):
            return f"got tensors on {x.device}"
        if x.dtype.is_floating_point and x.dtype not in dtypes:
            return f"got {str(x.dtype).removeprefix('torch.')}"
        if type(x) not in (Tensor, Parameter) and not is_fake(x):  # subclasses hold other numbers than ours
            return f"got a {type(x).__name__}"
    return "cannot be mapped or differentiated by torch.func" if transformed() else None


def require(*tensors: Tensor | None, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise one line where backend='triton' was asked for and cannot be.

    Raises:
        MissingPackage: If Triton is not installed.
        ValueError: If the kernels cannot take these tensors.
    """
    if not installed():
        raise MissingPackage(
            "backend='triton' needs triton, which is not installed: pip install triton (torch's builds for "
            "GPUs bring it on Linux); elsewhere use backend='auto'"
        )
    found = obstacle(*tensors, dtypes=dtypes)
    if found is not None:
        raise ValueError(f"backend='triton' {found}; use backend='auto'")


def choose(
    operator: str,
    package: str | None,
    able: bool,
    *tensors: Tensor | None,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> str:
    """The backend that `auto` takes on a GPU.

    Args:
        operator: Its name, "selective_scan".
        package: The one with a compiled kernel for it, "mamba_ssm"; None where there is none.
        able: Whether that kernel can do what is asked.
        tensors: What the operator was given, (batch, length, ...) first.
        dtypes: As in `obstacle`.

    Returns:
        "cuda" for the package's kernel, "triton" for ours, or "chunks", with one line of warning unless there
        is one token or a transform of torch.func, which no kernel can follow.
    """
    first = tensors[0]
    assert first is not None
    tokens = first.shape[0] * first.shape[1]
    ours = installed() and obstacle(*tensors, dtypes=dtypes) is None
    theirs = package is not None and able and not transformed() and _cuda_kernels.installed(package)
    if theirs and not (ours and _faster(operator, tokens) == "triton"):
        return "cuda"
    if ours:
        return "triton"
    if first.shape[1] > 1 and not transformed():
        _warn(operator, obstacle(*tensors, dtypes=dtypes) if installed() else None)
    return "chunks"


def _warn(operator: str, why: str | None) -> None:
    """Warn, once, that the plain path runs on a GPU: `why` the kernels cannot, or that Triton is missing."""
    if why is None:  # the same line for all operators
        warn_once(
            "state space models run in plain PyTorch on this GPU, by blocks of tokens, which is slow; the "
            "fast way is triton, which is not installed: pip install triton"
        )
    else:
        warn_once(f"{operator} runs in plain PyTorch on this GPU, which is slow: Triton's kernels {why}")


def _faster(operator: str, tokens: int) -> str:
    rows = [name for least, name in sorted(MEASURED.get(operator, ())) if least <= tokens]
    return rows[-1] if rows else "cuda"


def launching(x: Tensor) -> AbstractContextManager[Any]:
    """The context in which kernels start on the GPU of x, which need not be the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """x, copied unless neighbours on its last axis are so in memory; its other strides kernels are given."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def packed(x: Tensor) -> Tensor:
    """x as a kernel reads it that is given no strides."""
    return x.resolve_neg().contiguous()
