"""What every benchmark shares: its options, timing, memory, and the lines it ends with."""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("transformers", "mambapy", "llama-cpp-python", "transformer-lens")
WRITTEN = ("README.md", "docs/speed.md", "benchmarks/results")  # what results are written into


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
        The arguments and sizes; and `given`, those arguments that are not as in `full` or `quick`, as text.
    """
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? (not a measurement)")
    parser.add_argument("--json", type=Path, help="file to write the ratios to as well")
    parser.set_defaults(**full)
    if parser.parse_args(argv).quick:
        parser.set_defaults(**quick)
    options = parser.parse_args(argv)
    options.given = {
        name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in vars(options).items()
        if name not in ("quick", "json") and value != parser.get_default(name)
    }
    return options


class Ratio(NamedTuple):
    """The median of paired ratios, and the lowest and highest of them.

    That range of n pairs holds the true median with a probability of 1 - 2^(1 - n).
    """

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Ratio:
    """Return the median of some numbers, and the lowest and highest of them."""
    return Ratio(median(values), min(values), max(values))


def paired(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Return how many times as fast ours is.

    Args:
        theirs: Seconds of a peer in each pair.
        ours: Our seconds in the same pairs.

    Returns:
        The ratio of times.
    """
    return spread([other / mine for other, mine in zip(theirs, ours, strict=True)])


def finish(options: argparse.Namespace, ratios: Mapping[str, float | Ratio], **more: Any) -> None:
    """End a benchmark: print its ratios and, with `--json`, write them to a file.

    A line is `ratio NAME NUMBER`, with the range of the pairs behind it where there are pairs.

    Args:
        options: From `parse`.
        ratios: By name.
        **more: What else to write, as JSON values.
    """
    for name, ratio in ratios.items():
        if isinstance(ratio, Ratio):
            print(f"ratio {name} {ratio.median:.4g} [{ratio.low:.4g}, {ratio.high:.4g}]")
        else:
            print(f"ratio {name} {ratio:.4g}")
    if options.json is not None:
        from ssm_retrieval.training import store

        asked = {"machine": where(), "quick": options.quick, "given": options.given}
        store.write_json(options.json, asked | {"ratios": ratios} | more)


def take_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Time calls. They take turns, so that a slow spell of the machine hits all of them.

    Every other round goes backwards, so that no call is always the first.

    Args:
        calls: What to time, by name.
        repeats: Rounds that count.
        warmup: Rounds before those.

    Returns:
        The wall times of each call in every round, in seconds, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-warmup, repeats):
        for name, call in list(calls.items())[:: 1 if i % 2 == 0 else -1]:
            started = time.perf_counter()
            call()
            if i >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def seconds(calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Return the median of `take_turns` by name."""
    return {name: median(took) for name, took in take_turns(calls, repeats, warmup).items()}


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
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vectors}, {processor()}"


def where() -> dict[str, Any]:
    """Where the numbers come from: what runs note of a machine, the processor, peers' versions, the day."""
    from ssm_retrieval.training import store

    versions = {}
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    about = store.environment(torch.get_num_threads())
    return about | {
        "commit": about["commit"] if changed() else (about["commit"] or "").removesuffix("+") or None,
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "peers": versions,
        "day": time.strftime("%Y-%m-%d"),
    }


def changed() -> bool:
    """Whether the working tree differs from its commit in more than results and the pages made of them."""
    but = [f":!{path}" for path in WRITTEN]
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", *but]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return True
    return bool(done.stdout.strip())


def processor() -> str:
    """The processor's name and, where Linux tells them, its family and model, and whether it has AMX."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in path.read_text().splitlines())
    said = {key.strip(): value.strip() for key, _, value in lines}
    name = said.get("model name", platform.machine())
    kind = f" (family {said['cpu family']}, model {said['model']})" if "cpu family" in said else ""
    return name + kind + (", AMX" if "amx_tile" in said.get("flags", "").split() else "")
