"""What every benchmark shares: its options, timing, memory, and the lines it ends with."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def command(doc: str | None) -> argparse.ArgumentParser:
    """A command line whose `--help` is the benchmark's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(
    parser: argparse.ArgumentParser,
    full: Mapping[str, Any],
    quick: Mapping[str, Any],
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Read the command line of a benchmark, to which this adds `--quick`.

    Args:
        parser: From `command`. An argument that is given wins over both sets of sizes.
        full: Sizes of a measurement, by name; a name need not be an argument.
        quick: What `--quick` has in place of some of them, so that everything runs within seconds.
        argv: Arguments; None for those of the process.

    Returns:
        The arguments and sizes.
    """
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? (not a measurement)")
    parser.set_defaults(**full)
    if parser.parse_args(argv).quick:
        parser.set_defaults(**quick)
    return parser.parse_args(argv)


def print_ratios(ratios: Mapping[str, float], form: str = ".2f") -> None:
    """Print the lines for machines that a benchmark ends with: `ratio NAME NUMBER`."""
    for name, ratio in ratios.items():
        print(f"ratio {name} {ratio:{form}}")


def seconds(calls: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Time calls. They take turns, so that a slow spell of the machine hits all of them.

    Args:
        calls: What to time, by name.
        repeats: Rounds that count.
        warmup: Rounds before those.

    Returns:
        The median wall time of each call, in seconds, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(time.perf_counter() - started)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def peak() -> float:
    """The most memory that this process has held, in MiB. (On Linux `ru_maxrss` counts the parent's too.)"""
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _send(call: Callable[..., Any], pipe: Any, *arguments: Any) -> None:
    pipe.send(call(*arguments))


def fresh(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a new process.

    Args:
        call: The function; both processes import its module.
        *arguments: What it is called with.

    Returns:
        What it returns.

    Raises:
        RuntimeError: If the process ends without an answer.
    """
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
    """Measure by how much a call raises the peak memory of a fresh process.

    Args:
        make: A module's function, which prepares the call. What it makes, such as inputs, is not counted.
        small: Its arguments for a first call, which loads and compiles everything.
        large: Its arguments for the call that is measured.

    Returns:
        MiB.
    """
    return fresh(_grown, make, small, large)


def numpy_peak(call: Callable[[], Any]) -> float:
    """The most that NumPy has allocated during a call, in MiB, its result included.

    This is for calls so small that they do not move the peak of a process, which was higher at its start.
    """
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def machine() -> str:
    """One line that says where the numbers come from."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vectors}"
