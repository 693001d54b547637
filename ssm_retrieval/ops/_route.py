"""Which backend an operator takes, and what keeps it from the kernels."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from ssm_retrieval.ops._checks import check_name

BACKENDS = ("auto", "reference", "chunks", "cpu", "cuda", "triton")


class _Switch(threading.local):  # not a ContextVar, which torch.compile can neither read nor guard
    name = "auto"


_switch = _Switch()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let every operator of this thread use one backend, where a call does not name another.

    Args:
        name: "auto" is the fastest that can take the input, and the default; "reference" the equations as
            written, token by token, in plain PyTorch; "chunks" plain PyTorch, recurrences by blocks of
            tokens; "cpu" our kernels; "triton" ours for GPUs; "cuda" those of mamba-ssm and causal-conv1d. An
            operator without such a kernel runs its PyTorch form.

    Raises:
        ValueError: For another name; later, by the operator, for an input that the backend cannot take.
    """
    check_name("backend", name, BACKENDS)
    before, _switch.name = _switch.name, name
    try:
        yield
    finally:
        _switch.name = before


def asked(name: str) -> str:
    """The backend that a call asks for: its own, else the one of the enclosing `backend`."""
    check_name("backend", name, BACKENDS)
    return _switch.name if name == "auto" else name


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work.

    They differentiate and map PyTorch's own operations, and no kernel: a custom operator has no tangent, and
    to give it a formula for every mix of mapped arguments is a second implementation.
    """
    # of a forward-mode level nothing public tells whether it is open
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def traced(*tensors: Tensor | None) -> bool:
    """Whether the operator is being recorded, by torch.compile or torch.export, or run on fake tensors."""
    return torch.compiler.is_compiling() or any(is_fake(x) for x in tensors)


def is_fake(x: Tensor | None) -> bool:
    """Whether x is one of the tensors without numbers that stand for real ones while a graph is recorded."""
    if x is None or type(x) in (Tensor, Parameter):
        return False
    return type(x) in _fake_types()


def _fake_types() -> tuple[type, ...]:
    """The tensors without numbers that stand for a CPU tensor while a graph is recorded."""
    names = (("fake_tensor", "FakeTensor"), ("functional_tensor", "FunctionalTensor"))
    modules = ((sys.modules.get(f"torch._subclasses.{module}"), name) for module, name in names)
    return tuple(getattr(module, name) for module, name in modules if module is not None)


def values_are_known(x: Tensor) -> bool:
    """Whether Python may read the numbers of x: not on the meta device, in a recorded graph, a transform."""
    return not (x.is_meta or traced(x) or transformed())


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why numba's kernels cannot take these tensors, as part of a line; None if they can."""
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cpu":
            return f"got tensors on {x.device}"
        if type(x) not in (Tensor, Parameter) and not is_fake(x):  # subclasses hold other numbers than ours
            return f"got a {type(x).__name__}"
    if transformed():
        return "cannot be mapped or differentiated by torch.func"
    return "needs numba's compiler, which NUMBA_DISABLE_JIT turns off" if _numba_is_off() else None


def constant_for_compilers(function: Callable[[], bool]) -> Callable[[], bool]:
    """torch.compile calls `function` instead of tracing it, and takes what it returns as a constant.

    `torch._dynamo.assume_constant_result` sets this attribute too, but takes a second to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_for_compilers
def _numba_is_off() -> bool:
    return _read_numba_is_off()


@lru_cache(maxsize=1)
def _read_numba_is_off() -> bool:
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


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off. Devices that know none, as meta, refuse even to have it turned off."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of `function` at `inputs`, given those of its results, as part of the graph.

    What the backward pass of a kernel returns where it is differentiated itself: `function` computes the
    same as the kernel by PyTorch's operations.
    """
    # views, because one input may have been computed from another, whose gradient is not to hold its part
    own = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
    results = function(*own)
    given = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
    wanted = [x for x in own if x is not None and x.requires_grad]
    outputs, weights = [y for y, _ in given], [g for _, g in given]
    found = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in own]
