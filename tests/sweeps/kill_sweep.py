"""Kill -9 a sweep of 12 runs at random moments, repeat it each time, and compare with an undisturbed one.

    python tests/sweeps/kill_sweep.py --kills 10

Every third time one of the sweep's workers is killed first, which the sweep has to survive. Ends with
status 0 if both results stores agree in every column but the time. Also prints how busy the undisturbed sweep
kept the cores.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro

import analysis

CONFIG = """
from synthetic.config import RunConfig
from synthetic.grid import Sweep, grid
BASE = RunConfig(seq_len=32, queries=16, curriculum=4, batch_tokens=1024, eval_every=20, eval_examples=32,
                 final_eval_examples=64, device="cpu", precision="float32", stop_at=1.01, steps={steps})
def get_config():
    runs = grid(BASE, model="transformer", seed=range(4))
    return Sweep([*runs, *grid(BASE, model=("mamba", "mamba2"), d_state=4, seed=range(4))])
"""
STARTUP = 6.0  # seconds in which a sweep imports, roughly


@dataclass
class Options:
    kills: int = 10
    """Number of kills."""
    steps: int = 0
    """Training steps of each run; 0 = 10 for each kill."""
    seed: int = 0
    """Of the random moments."""
    out: str = ""
    """Folder for the two sweeps; default: a temporary one."""


def command(base: Path, name: str) -> list[str]:
    words = ["-m", "synthetic.sweep", str(base / "twelve.py"), "--out", str(base / name), "--workers", "2"]
    return [sys.executable, *words]


def rows(folder: Path) -> pd.DataFrame:
    """Everything in the store that must not depend on interruptions."""
    tables = [analysis.load(folder, name) for name in ("results", "targets")]
    return pd.concat(tables).drop(columns=["seconds", "commit"]).reset_index(drop=True)


def workers(parent: int) -> list[int]:
    """Process ids of a process's children that run training (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{parent}\n" in (folder / "status").read_text():
                found += [int(folder.name)] if b"spawn_main" in (folder / "cmdline").read_bytes() else []
        except OSError:  # it ended while we looked
            continue
    return found


def main(options: Options) -> int:
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(options.out or temporary)
        (base / "twelve.py").write_text(CONFIG.format(steps=options.steps or 10 * options.kills))
        started = time.monotonic()
        subprocess.run(command(base, "whole"), check=True, stdout=subprocess.DEVNULL)
        wall, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = (used.ru_utime + used.ru_stime) / wall
        print(f"undisturbed: {wall:.0f} s, {busy:.2f} cores busy on average", flush=True)
        kills = 0
        while True:
            process = subprocess.Popen(command(base, "killed"), stdout=subprocess.DEVNULL)
            moment = rng.uniform(1.0, STARTUP + 1.5 * wall / max(1, options.kills))
            try:
                process.wait(timeout=moment if kills < options.kills else None)
                break
            except subprocess.TimeoutExpired:
                kills += 1
            children = workers(process.pid)
            if kills % 3 == 0 and children:
                os.kill(rng.choice(children), signal.SIGKILL)
                print(f"kill {kills:3}: a worker after {moment:5.2f} s", flush=True)
                time.sleep(1.0)
            process.kill()
            process.wait()
            done = len(list((base / "killed").rglob("result.json")))
            print(f"kill {kills:3}: the sweep after {moment:5.2f} s; {done} of 12 runs finished", flush=True)
        if process.returncode:
            print(f"ended with status {process.returncode} after {kills} kills")
            return 1
        whole, killed = rows(base / "whole"), rows(base / "killed")
        equal = whole.equals(killed)
        count = whole["run"].nunique()
        print(f"{count} runs, {len(whole)} rows: {'the same' if equal else 'DIFFERENT'} after {kills} kills")
        return 0 if equal and count == 12 and kills else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
