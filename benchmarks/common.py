"""Timing and memory that every benchmark measures in the same way."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch


def seconds(calls: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median wall time of each call. The calls take turns, so that a slow spell of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def peak() -> float:
    """MiB of memory this process has held at most. (On Linux ru_maxrss would count the parent's too.)"""
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _send(call: Callable[..., Any], pipe: Any, *arguments: Any) -> None:
    pipe.send(call(*arguments))


def fresh(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns when it is called in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(call, there, *arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"the process of {call.__name__} died") from None
    finally:
        process.join()


def _grown(make: Callable[..., Callable[[], Any]], small: tuple, large: tuple) -> float:
    make(*small)()  # compiles, starts threads, fills caches
    call = make(*large)
    before = peak()
    call()
    return peak() - before


def peak_memory(make: Callable[..., Callable[[], Any]], small: tuple, large: tuple) -> float:
    """MiB by which one call of make(*large) raises the peak of a fresh process, its inputs not counted.

    make(*small) runs there first, to have everything loaded. `make` must be a module's function.
    """
    return fresh(_grown, make, small, large)


def numpy_peak(call: Callable[[], Any]) -> float:
    """MiB that NumPy has allocated at most during a call, its result included.

    For calls so small that the peak of a process does not move: it has held more while it started.
    """
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def machine() -> str:
    """One line about where the numbers come from."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vectors}"
