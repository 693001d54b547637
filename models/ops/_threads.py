"""Run a kernel's tasks on torch.get_num_threads() threads (the kernels release the GIL)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def _pool(pid: int, workers: int) -> ThreadPoolExecutor:
    """One pool per process: threads do not survive a fork, so the process id is part of the key."""
    return ThreadPoolExecutor(workers, thread_name_prefix="models.ops")


def run_tasks(kernel: Callable[[tuple[int, int]], object], tasks: int) -> None:
    """kernel((first, stop)) over equal consecutive shares of range(tasks), one per thread."""
    threads = max(1, min(torch.get_num_threads(), tasks))
    bounds = [tasks * i // threads for i in range(threads + 1)]
    shares = list(itertools.pairwise(bounds))
    if threads == 1:
        kernel(shares[0])
        return
    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    others = [pool.submit(kernel, share) for share in shares[1:]]
    kernel(shares[0])
    for other in others:
        other.result()
