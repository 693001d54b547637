"""Which backend an operator takes, and what keeps it from the numba kernels."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

F = TypeVar("F", bound=Callable[..., Any])


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why numba's kernels cannot take these tensors, as part of a line; None if they can."""
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cpu":
            return f"got tensors on {x.device}"
        if type(x) not in (Tensor, Parameter):  # fake tensors have no numbers, subclasses others than ours
            return f"got a {type(x).__name__}"
    return "needs numba's compiler, which NUMBA_DISABLE_JIT turns off" if _numba_is_off() else None


@lru_cache(maxsize=1)
def _numba_is_off() -> bool:
    from numba import config  # the variable, or numba's own configuration file

    if config.DISABLE_JIT:
        warn_once(
            "NUMBA_DISABLE_JIT is set: ssm_retrieval.ops runs plain loops instead of kernels, which is slow"
        )
    return bool(config.DISABLE_JIT)


def require_cpu(*tensors: Tensor | None) -> None:
    """Raise ValueError, one line, where backend='cpu' was asked for and cannot be."""
    found = obstacle(*tensors)
    if found is not None:
        raise ValueError(f"backend='cpu' {found}; use backend='reference'")


def refuse_tracing(name: str) -> None:
    """Raise NotImplementedError under torch.jit.trace, which would record this length for every other one."""
    if torch.jit.is_tracing():
        raise NotImplementedError(
            f"torch.jit.trace cannot record {name}, whose steps depend on the length; use torch.compile"
        )


@lru_cache(maxsize=64)
def warn_once(line: str) -> None:
    """Warn with this line, once per process."""
    warnings.warn(line, stacklevel=3)


def uncompiled(function: F) -> F:
    """torch.compile breaks its graph at `function`, instead of tracing into NumPy and numba's compiler.

    `torch.compiler.disable` does this too, but imports torch._dynamo, which takes a second, wherever it is
    used. Nothing is being compiled before somebody else has imported that.
    """
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return cast(F, call)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off. Devices that know none, as meta, refuse even to have it turned off."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
