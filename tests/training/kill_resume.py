"""Kill -9 a run at random moments, resume it each time, and compare with an uninterrupted run.

    python tests/training/kill_resume.py --kills 20

Prints one line per kill and ends with status 0 if every reported number and the final weights agree, and the
run was killed at least once. A fast machine may finish before the last kill; the last line counts.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from ssm_retrieval.training import store

OPTIONS = (
    "--seq-len 32 --num-symbols 64 --queries 16 --curriculum 4 --batch-tokens 1024 --eval-every 20 "
    "--eval-examples 32 --final-eval-examples 64 --threads 1 --d-state 4 --precision float32 --stop-at 1.01"
)
STARTUP = 4.0  # seconds in which a process imports and compiles, roughly


@dataclass
class Options:
    kills: int = 20
    """Number of kills."""
    steps: int = 0
    """Training steps of each model; 0 = 100 for each kill, so that there is work left to interrupt."""
    seed: int = 0
    """Of the random moments."""
    out: str = ""
    """Folder for the two runs; default: a temporary one."""


def command(out: Path, steps: int) -> list[str]:
    return [sys.executable, "-m", "synthetic.run", *OPTIONS.split(), "--steps", str(steps), "--out", str(out)]


def outcome(out: Path) -> dict[str, object]:
    """Everything in the folders of runs that must not depend on interruptions."""
    found: dict[str, object] = {}
    for folder in store.runs_in(out):
        name = folder.name
        for file in ("metrics.jsonl", "by_position.jsonl", "by_length.jsonl"):
            rows = store.read_rows(folder / file)
            found[f"{name} {file}"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        found[f"{name} weights"] = (folder / "model.safetensors").read_bytes()
        result = store.read_json(folder / "result.json")
        found[f"{name} result"] = {k: v for k, v in result.items() if k != "seconds"}
    return found


def main(options: Options) -> int:
    steps = options.steps or 100 * options.kills
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(options.out or temporary)
        started = time.monotonic()
        subprocess.run(command(base / "whole", steps), check=True, capture_output=True)
        kills = 0
        working = max(1.0, time.monotonic() - started - STARTUP)
        for kill in range(1, options.kills + 1):
            process = subprocess.Popen(command(base / "killed", steps), stdout=subprocess.DEVNULL)
            moment = rng.uniform(0.0, STARTUP + 1.5 * working / options.kills)
            try:
                process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode == 0 and kills:
                print(f"finished after {kills} kills, before the next")
                break
            if process.returncode != -signal.SIGKILL:
                print(f"ended by itself with status {process.returncode} before kill {kill}")
                return 1
            kills = kill
            saved = sorted(p.parent.name for p in (base / "killed").rglob("checkpoint.safetensors"))
            print(
                f"kill {kill:3} after {moment:5.2f} s; checkpoints: {', '.join(saved) or 'none'}", flush=True
            )
        subprocess.run(command(base / "killed", steps), check=True, capture_output=True)
        whole, killed = outcome(base / "whole"), outcome(base / "killed")
        differing = [name for name in whole if whole[name] != killed[name]]
        print("different: " + ", ".join(differing) if differing else f"same numbers after {kills} kills")
        return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
