"""Shared by the tests: peers that only import with a helping hand, seeds, threads."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch


def import_without_kernels(name: str) -> Any:
    """Import a module of mamba-ssm or causal-conv1d built without CUDA: its kernels are empty modules.

    Skips the test, with the reason, where the package is not installed (.ci/run installs it).
    """
    package = name.partition(".")[0]
    pytest.importorskip("triton", reason=f"{package} imports triton")
    for kernels in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules.setdefault(kernels, types.ModuleType(kernels))
    pytest.importorskip(package, reason=f"{package} is not installed; .ci/run says how", exc_type=ImportError)
    return importlib.import_module(name)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
