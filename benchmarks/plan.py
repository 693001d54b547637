"""What `synthetic.run --plan` predicts of a training step's memory against what a process takes.

    python -m benchmarks.plan [--quick]

Each row is a fresh process with the allocator as in `synthetic.run`. It compiles and loads everything on a
smaller run, notes the memory it has, then builds the model, its optimizer and makes three updates:
`synthetic.train.update` on the run's own batches at full length. Measured is how far the process grew at most.
Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import multiprocessing
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import machine, peak
from models.ops.memory import keep_freed_memory
from synthetic.config import FAMILIES, Plan, RunConfig, plan

SIZES: dict[str, dict[str, int]] = {  # without and with a language model's vocabulary
    "tiny": {},
    "256 wide": {"d_model": 256, "n_layer": 6},
    "256 wide, 50,280 tokens": {"d_model": 256, "n_layer": 6, "vocab_size": 50280},
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"accumulate": 4},
    {"accumulate": 4, "checkpointing": True},
    {"optimizer": "adafactor"},
    {"optimizer": "adamw-8bit"},
)


def make_plan(family: str, size: str, seq_len: int, precision: str, **options: Any) -> Plan:
    config = RunConfig(seq_len=seq_len, curriculum=0, device="cpu", precision=precision, **options)  # type: ignore[arg-type]
    settled = plan(config, family)
    return replace(settled, model_overrides=settled.model_overrides | SIZES[size])


def updates(settled: Plan) -> None:
    """Three optimizer steps of a run at full length."""
    import models
    from synthetic import tasks, train
    from synthetic.optimizers import make_optimizer

    model = models.build(settled.model, **settled.model_overrides)
    model.checkpointing = settled.checkpointing
    optimizer = make_optimizer(model, settled)
    task = tasks.build(settled.task, **settled.task_options)
    for i in range(3):
        batch = train.next_batch(task, settled, train.Progress(step=i, length=settled.seq_len))
        train.update(model, optimizer, batch, settled)


def _resident() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def _measure(small: Plan, large: Plan, pipe: Any) -> None:
    torch.set_num_threads(1)
    updates(small)
    keep_freed_memory()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    updates(large)
    pipe.send(peak() - before)


def measured(small: Plan, large: Plan) -> float:
    """MiB by which `updates(large)` makes a process grow at most."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(small, large, there))
    process.start()
    there.close()
    try:
        grown = here.recv()
    except EOFError:
        raise RuntimeError(f"the process measuring {large.model} died") from None
    process.join()
    return float(grown)


def predicted(settled: Plan) -> float:
    """MiB."""
    from models.planning import step_memory
    from synthetic.memory import meta_model, training_steps

    return step_memory(meta_model(settled), training_steps(settled)[-1]).peak / 2**20


def cases(quick: bool) -> list[dict[str, Any]]:
    sizes, lengths = list(SIZES), (256, 1024, 4096)
    every: list[dict[str, Any]] = []
    for family in FAMILIES:
        for size, n in itertools.product(sizes[:2], lengths[:1] if quick else lengths):
            for precision, checkpointing in itertools.product(("float32", "bfloat16"), (False, True)):
                row = dict(family=family, size=size, seq_len=n, precision=precision)
                every.append(row | ({"checkpointing": True} if checkpointing else {}))
        if not quick:
            large = dict(family=family, size=sizes[2], seq_len=1024, precision="float32")
            every += [large, *(large | variant for variant in VARIANTS)]
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one length, no other optimizers")
    rows, ratios = cases(parser.parse_args().quick), []
    print(machine())
    print("family       size                     length precision  options  predicted  measured MiB  ratio")
    for case in rows:
        large = make_plan(**case)
        small = make_plan(**(case | {"size": "tiny", "seq_len": 64}))
        guess, found = predicted(large), measured(small, large)
        ratios.append(guess / found)
        options = " ".join(str(k) if v is True else str(v) for k, v in case.items() if k in VARIANTS[1] or k == "optimizer")
        print(
            f"{case['family']:<12} {case['size']:<24} {case['seq_len']:>5} {case['precision']:<9} {options:<16}"
            f" {guess:>9.1f} {found:>9.1f} {ratios[-1]:>7.3f}",
            flush=True,
        )
    off = sum(abs(ratio - 1) > 0.15 for ratio in ratios)
    print(f"ratio plan_memory_worst {min(ratios):.3f} to {max(ratios):.3f}; {off} of {len(ratios)} off by > 15 %")


if __name__ == "__main__":
    main()
