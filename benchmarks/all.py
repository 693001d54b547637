"""Every benchmark, one after the other; their results as JSON, and the page that is made of them.

    python -m benchmarks.all [--quick] [--only scan train_step] [--again]

Each runs in a process of its own and writes benchmarks/results/MACHINE/NAME.json; MACHINE is the processor
and the number of threads. What is there already, of this commit and with no options of its own, is not run
again without --again, so the command resumes. A peer that is not installed is left out by its benchmark,
which says so. `benchmarks.probes` needs transformer-lens, which wants an environment of its own (its
docstring says which): run it there with `--json benchmarks/results/MACHINE/probes.json`. At the end
docs/speed.md and README's table are made anew (`python -m benchmarks.page` does only that). With --quick
every benchmark shows within minutes that it runs; nothing is kept. Exit status 1 if one failed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, command, where

NAMES = (
    "start", "scan", "limits", "delta", "train_step", "inference", "probes", "hooks", "data", "scenes",
    "checkpoint_memory", "plan",
)  # fmt: skip


def slug(machine: dict[str, Any]) -> str:
    """Return a folder's name for a machine, such as "amd-epyc-family-25-model-1-avx2-2-threads".

    Args:
        machine: From `benchmarks.common.where`.
    """
    words = f"{machine['processor']} {machine['vectors']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def current(path: Path, commit: str | None) -> bool:
    """Whether a file has the results of a commit, measured in full: not --quick, nor with other options."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return not found["quick"] and found.get("given") == {} and found["machine"]["commit"] == commit


def run(name: str, path: Path, quick: bool) -> int:
    """Run a benchmark, which writes its results to `path`; returns its exit status."""
    words = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
    return subprocess.run(words + ["--quick"] * quick).returncode


def main() -> int:
    """Run the benchmarks of the command line; returns the exit status."""
    parser = command(__doc__)
    parser.add_argument("--quick", action="store_true", help="does each run? (not a measurement)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these alone")
    parser.add_argument("--again", action="store_true", help="measure what is there already as well")
    options = parser.parse_args()
    machine, failed = where(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.quick else RESULTS / slug(machine)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            path = folder / f"{name}.json"
            if not options.again and current(path, machine["commit"]):
                print(f"{name}: measured before, at commit {machine['commit']}", flush=True)
                continue
            print(f"{name}:", flush=True)
            started = time.perf_counter()
            status = run(name, path, options.quick)
            failed += [name] * (status not in (0, 2))  # 2: what it needs is not there, as it has said
            print(f"{name}: status {status} after {time.perf_counter() - started:.0f} s", flush=True)
    if not options.quick:
        from benchmarks import page

        page.main()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
