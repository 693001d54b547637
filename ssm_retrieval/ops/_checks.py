"""What an operator checks once, at its public entry, before a kernel gets pointers.

Kernels are compiled without bounds checks: a wrong shape would read and write behind the arrays. Every
function here raises ValueError, one line that names the argument.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_name(option: str, value: Any, known: Sequence[str | None]) -> None:
    """`value` must be one of `known`."""
    if not (value is None or isinstance(value, str)) or value not in known:
        names = ", ".join(str(name) for name in known)
        raise ValueError(f"{option}={value!r} is unknown; use one of {names}".replace("\n", " "))


def check_flags(**flags: Any) -> None:
    """Each must be True or False: a tensor here is an argument in the wrong place."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not a {type(value).__name__}")


def check_tensor(name: str, x: Any, axes: Sequence[Any], dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """x must be a dense tensor with these axes and one of these dtypes."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, not a {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, not a {'nested' if x.is_nested else x.layout} one")
    if x.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(x.dtype).removeprefix('torch.')}; use {known}")
    if x.dim() != len(axes):
        raise ValueError(f"{name} must be ({', '.join(map(str, axes))}); got {tuple(x.shape)}")


def check_shapes(like: Tensor, **expected: tuple[Any, tuple[int, ...]]) -> None:
    """Each must be None or a floating tensor of the given shape, on the device of `like`."""
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        if isinstance(x, Tensor) and not x.is_nested and tuple(x.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; with the other arguments it must be {shape}"
            )
        check_tensor(name, x, shape)
        if x.device != like.device:
            raise ValueError(
                f"{name} is on {x.device}, the other arguments are on {like.device}; move it there"
            )


def check_positions(states_at: Any, length: int) -> list[int]:
    """states_at as a list: integers in [0, length), in any order."""
    if isinstance(states_at, Tensor) and not states_at.dtype.is_floating_point and states_at.dim() == 1:
        states_at = states_at.tolist()
    try:
        if isinstance(states_at, (Tensor, str, bytes)) or not isinstance(states_at, Iterable):
            raise TypeError
        given = list(states_at)
        positions = [operator.index(t) for t in given]
        if any(isinstance(t, bool) for t in given):
            raise TypeError
    except TypeError:
        said = " ".join(repr(states_at).split())[:80]
        raise ValueError(f"states_at must be a sequence of integers; got {said}") from None
    wrong = [t for t in positions if not 0 <= t < length]
    if wrong:
        raise ValueError(f"states_at must lie in [0, length={length}); got {wrong[0]}")
    return positions
