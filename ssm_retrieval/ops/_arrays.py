"""Tensors in the layout of the kernels: vectors of 16 channels, and the 1-D NumPy arrays that numba takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssm_retrieval.ops import LANES

_TYPES: dict[torch.dtype, str] = {torch.float32: "f4", torch.float64: "f8", torch.int64: "i8"}
_NONE = {dtype: np.zeros(0, code) for dtype, code in _TYPES.items()}


class _Memory:
    """What NumPy needs to see a tensor's numbers; it keeps the tensor alive as long as the array lives.

    Not `tensor.numpy()`: that forbids ever resizing the storage, and FSDP resizes the storages of weights.
    A kernel may be handed a weight itself, or, from the backward pass of a checkpointed block, a plain
    tensor on the weight's storage, which nothing tells from any other tensor.
    """

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, x: Tensor):
        self.tensor = x
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (x.numel(),),
            "typestr": np.dtype(_TYPES[x.dtype]).str,
            "data": (x.data_ptr(), False),
        }


def flat(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """The numbers of a contiguous CPU tensor, shared, as a 1-D array; an absent argument is an empty array.

    Raises:
        ValueError: For another dtype or layout, because kernels trust what they get.
    """
    if x is None:
        return _NONE[dtype]
    x = x.detach().resolve_neg()
    if x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
        raise ValueError(
            f"a kernel wants contiguous {dtype} on a CPU; got {x.dtype} {x.stride()} on {x.device}"
        )
    return np.asarray(_Memory(x)) if x.numel() else _NONE[dtype]


def pad_channels(x: Tensor, dtype: torch.dtype, lanes: int = LANES) -> Tensor:
    """x in `dtype`, contiguous, zeros added to its last axis up to whole vectors; x itself if it is so."""
    missing = -x.shape[-1] % lanes
    x = x.to(dtype)  # F.pad copies even where it adds nothing
    return (F.pad(x, (0, missing)) if missing else x).contiguous()


def blocked(x: Tensor, lanes: int = LANES) -> Tensor:
    """(..., channels, N) -> (..., blocks, N, lanes), the missing channels of the last block zero."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % lanes))
    return x.unflatten(-2, (-1, lanes)).transpose(-1, -2).contiguous()


def unblocked(x: Tensor, channels: int) -> Tensor:
    """Inverse of `blocked`."""
    return x.transpose(-1, -2).flatten(-3, -2)[..., :channels, :]


def at_positions(states: Tensor, stored: Sequence[int], positions: Sequence[int]) -> Tensor:
    """States (B, S, ...) of the `stored` positions -> those of `positions`, in their order and as often."""
    place = {t: i for i, t in enumerate(stored)}
    return states[:, torch.tensor([place[t] for t in positions], dtype=torch.int64, device=states.device)]
