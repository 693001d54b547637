"""Keep freed memory in the process, or do not.

glibc returns every large block to the kernel as soon as it is freed and gets fresh, zeroed pages for the next
one. A training step frees and takes hundreds of megabytes, so a large part of its time on a CPU can go into
page faults (a third of a Mamba step where pages come slowly, as on many virtual machines).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names and values of <malloc.h>


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large freed blocks instead of returning them. False where there is no glibc.

    For programs to call once at their start; libraries should not decide this for their users.
    The process keeps its peak memory until it ends, and fragments of freed blocks add to that: a step takes
    1.2 to 2.15 times what it has allocated at once (`benchmarks/plan.py`).
    """
    return _mallopt(mmap=2**30, trim=2**31 - 1)


def return_freed_memory() -> bool:
    """Tell glibc to return every freed block of 128 KiB or more. False where there is no glibc.

    The process then takes no more than it has allocated, and is slower.
    """
    return _mallopt(mmap=2**17, trim=2**17)


def _mallopt(mmap: int, trim: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap) and mallopt(_M_TRIM_THRESHOLD, trim))
