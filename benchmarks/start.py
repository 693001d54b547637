"""How soon work begins: from the shell to the first training step, and to a page of help.

    python -m benchmarks.start [--quick]

Every number is the wall time of a process of its own. "first step" ends when a Mamba of the default run's
shape has been updated once: with an empty NUMBA_CACHE_DIR, so that numba compiles the kernels, and again with
what the first process left there. "help" is `python -m synthetic.run --help`, beside a Python that does
nothing ("python") and one that imports torch. The last lines are seconds, and how many times as fast the help
is as that import.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

from benchmarks.common import ROOT, Ratio, command, finish, machine, paired, parse, spread

HELP = ("-m", "synthetic.run", "--help")


def first_step(seq_len: int) -> None:
    """Build the default run's Mamba for contexts of a length, and update it once."""
    from benchmarks.plan import updates
    from synthetic.config import RunConfig, plan

    updates(plan(RunConfig(seq_len=seq_len, curriculum=0, device="cpu"), "mamba"), steps=1)


def took(*arguments: str, environment: Mapping[str, str] | None = None) -> float:
    """Return the seconds of a Python process.

    Args:
        *arguments: Of Python.
        environment: Variables to add.

    Raises:
        RuntimeError: If it fails; the text is what it said.
    """
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)}: {done.stderr}")
    return seconds


def main() -> None:
    """Run the benchmark."""
    full, quick = dict(seq_len=1024, repeats=9, caches=3), dict(seq_len=16, repeats=1, caches=1)
    sizes = parse(command(__doc__), full, quick)
    print(machine())
    step = ("-c", f"from benchmarks.start import first_step; first_step({sizes.seq_len})")
    first, again = [], []
    for _ in range(sizes.caches):
        with tempfile.TemporaryDirectory() as folder:
            cache = {"NUMBA_CACHE_DIR": folder}
            first.append(took(*step, environment=cache))
            again.append(took(*step, environment=cache))
    bare, helped, imported = [], [], []
    for _ in range(sizes.repeats):
        bare.append(took("-c", "pass"))
        helped.append(took(*HELP))
        imported.append(took("-c", "import torch"))
    ratios: dict[str, float | Ratio] = {
        "first_step_compiling_seconds": spread(first),
        "first_step_cached_seconds": spread(again),
        "python_seconds": spread(bare),
        "help_seconds": spread(helped),
        "help_vs_import_torch": paired(imported, helped),
    }
    finish(sizes, ratios)


if __name__ == "__main__":
    main()
