"""Run a kernel's tasks on torch.get_num_threads() threads (the kernels release the GIL).

Torch's CPU operations run on OpenMP threads that keep spinning for milliseconds after each operation, in case
another one follows. Threads of our own would fight with them for the cores, which halves the speed of a scan
between two matrix products. So the tasks go to those very threads, by calling the OpenMP runtime that torch
has loaded; where it cannot be found, to a pool of Python threads.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

Kernel = Callable[[tuple[int, int]], object]


def run_tasks(kernel: Kernel, tasks: int) -> None:
    """kernel((first, stop)) over equal consecutive shares of range(tasks), one per thread."""
    threads = max(1, min(torch.get_num_threads(), tasks))
    bounds = [tasks * i // threads for i in range(threads + 1)]
    shares = list(itertools.pairwise(bounds))
    kernel_on = _with_openmp if threads > 1 and _openmp() is not None else _with_pool
    kernel_on(kernel, shares)


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """The OpenMP runtime of torch, if this platform lets us find and call it."""
    try:
        with open("/proc/self/maps") as file:
            loaded = {line.split(maxsplit=5)[5].strip() for line in file if "libgomp" in line}
        # torch's wheels bring a renamed copy, a distribution's torch uses the system's: not another package's
        ours = os.path.realpath(os.path.dirname(torch.__file__)) + os.sep
        path = next(iter(sorted(loaded, key=lambda p: not os.path.realpath(p).startswith(ours))))
        library = ctypes.CDLL(path)
        library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads  # noqa: B018
    except (OSError, StopIteration, AttributeError, IndexError):
        return None
    return library


def _with_openmp(kernel: Kernel, shares: list[tuple[int, int]]) -> None:
    library, errors = _openmp(), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: Any) -> None:
        try:  # the runtime may give fewer threads than asked for
            for i in range(library.omp_get_thread_num(), len(shares), library.omp_get_num_threads()):
                kernel(shares[i])
        except BaseException as error:  # must not unwind through C
            errors.append(error)

    library.GOMP_parallel(body, None, len(shares), 0)
    if errors:
        raise errors[0]


@lru_cache(maxsize=1)
def _pool(pid: int, workers: int) -> ThreadPoolExecutor:
    """One pool per process: threads do not survive a fork, so the process id is part of the key."""
    return ThreadPoolExecutor(workers, thread_name_prefix="ssm_retrieval.ops")


def _with_pool(kernel: Kernel, shares: list[tuple[int, int]]) -> None:
    others = []
    if len(shares) > 1:
        pool = _pool(os.getpid(), max(len(shares), torch.get_num_threads()) - 1)
        others = [pool.submit(kernel, share) for share in shares[1:]]
    kernel(shares[0])
    for other in others:
        other.result()
