"""Time, memory and bandwidth of a device, and what a JSON says about it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from ssm_retrieval.errors import UserError
from ssm_retrieval.ops import _cuda_kernels, _triton

PACKAGES = ("causal-conv1d", "mamba-ssm", "ssm-retrieval", "torch", "triton")
CANNOT = (ImportError, NotImplementedError, UserError, ValueError)  # what a route raises for what it has not


def wait(device: str) -> None:
    """Until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str, least: float, repeats: int) -> float:
    """The median time of a call.

    Args:
        call: What is timed; it need not wait for the device.
        device: Where it runs.
        least: Seconds that one measurement takes at least: as many calls as that needs run between two waits.
        repeats: Measurements.

    Returns:
        Seconds.
    """

    def run(times: int) -> float:
        wait(device)
        started = time.perf_counter()
        for _ in range(times):
            call()
        wait(device)
        return (time.perf_counter() - started) / times

    run(1)  # compiles
    times = max(1, round(least / max(run(1), 1e-9)))
    return sorted(run(times) for _ in range(repeats))[repeats // 2]


def peak_of(call: Callable[[], Any], device: str) -> int | None:
    """The most bytes that a call has allocated beside what was there; None on a CPU, which does not say."""
    if device != "cuda":
        call()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: str, size: int) -> float:
    """Bytes that move per second while `size` bytes are copied on the device, read and written."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, least=0.05, repeats=5)


def attempt(measure: Callable[[], dict[str, Any]], device: str) -> dict[str, Any]:
    """What `measure` finds; {"why": ...} where a route cannot do it, or memory does not suffice."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"why": "out of memory"}
    except CANNOT as error:
        return {"why": " ".join(str(error).split())}
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def missing(route: str, package: str | None) -> str | None:
    """Why a route cannot run on this machine.

    Args:
        route: "mamba-ssm", "triton" or "chunks".
        package: The one whose kernel "mamba-ssm" would take; None where there is none.

    Returns:
        The reason; None if it can.
    """
    if route == "mamba-ssm":
        if package is None:
            return "it has no such kernel"
        return None if _cuda_kernels.installed(package) else f"{package} is not installed"
    return "triton is not installed" if route == "triton" and not _triton.installed() else None


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware that the numbers belong to."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": name,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": driver() if device == "cuda" else None,
    }


def driver() -> str | None:
    """Version of NVIDIA's driver; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)
