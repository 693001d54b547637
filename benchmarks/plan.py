"""What `synthetic.run --plan` predicts of a training step's memory against what a process takes.

    python -m benchmarks.plan [--quick] [--family mamba]

Each row is a fresh process on one thread. It makes one update, so that everything is compiled and loaded
(this leaves some 9 MiB that are not counted), and notes how much memory it has. Then it builds the model and
its optimizer anew and makes three updates by `synthetic.trainer.update`, on the run's own batches at full
length. The measured number is how far the process grew at most. Freed memory is returned, as in a run with
--checkpointing or --accumulate; rows marked "kept" keep it, as other runs do, and show what fragments cost.
This works on Linux only: the peak is reset through /proc.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import command, finish, fresh, machine, parse, peak, spread
from ssm_retrieval.ops.memory import keep_freed_memory, return_freed_memory
from ssm_retrieval.registry import ARCHITECTURES
from synthetic.config import Plan, RunConfig, plan

LENGTHS = (256, 1024)
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
    """Settle the run of a row.

    Args:
        family: The architecture.
        size: A key of `SIZES`.
        seq_len: Context symbols.
        precision: "float32" or "bfloat16".
        **options: Other fields of `RunConfig`.

    Returns:
        The run's plan.
    """
    config = RunConfig(seq_len=seq_len, curriculum=0, device="cpu", precision=precision, **options)  # type: ignore[arg-type]
    settled = plan(config, family)
    return replace(settled, model_overrides=settled.model_overrides | SIZES[size])


def updates(settled: Plan, steps: int) -> None:
    """Make optimizer steps of a run at full length."""
    from ssm_retrieval import models
    from ssm_retrieval.training.optimizers import make_optimizer
    from synthetic import curricula, tasks, trainer

    model = models.build(settled.model, **settled.model_overrides)
    model.checkpointing = settled.checkpointing
    optimizer = make_optimizer(model, settled)
    task = tasks.build(settled.task, **settled.task_options)
    for i in range(steps):
        batch = curricula.next_batch(task, settled, trainer.Progress(step=i, length=settled.seq_len))
        trainer.update(model, optimizer, batch, settled)


def _resident() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def _grown(settled: Plan, keep: bool) -> float:
    torch.set_num_threads(1)
    keep_freed_memory() if keep else return_freed_memory()
    updates(settled, steps=1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    updates(settled, steps=3)
    return peak() - before


def measured(settled: Plan, keep: bool = False) -> float:
    """By how many MiB `updates` makes a process grow at most."""
    return fresh(_grown, settled, keep)


def predicted(settled: Plan) -> float:
    """How many MiB `--plan` says, at the peak of a step at full length."""
    from ssm_retrieval.models.planning import step_memory
    from synthetic.memory import meta_model, training_steps

    return step_memory(meta_model(settled), training_steps(settled)[-1]).peak / 2**20


def cases(families: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """Arguments of `make_plan` for every row; one small row per family if it must be quick."""
    if quick:
        return [dict(family=name, size="tiny", seq_len=LENGTHS[0], precision="float32") for name in families]
    every: list[dict[str, Any]] = []
    for family in families:
        for size, n in itertools.product(list(SIZES)[:2], LENGTHS):
            for precision, checkpointing in itertools.product(("float32", "bfloat16"), (False, True)):
                row = dict(family=family, size=size, seq_len=n, precision=precision)
                every.append(row | ({"checkpointing": True} if checkpointing else {}))
        large = dict(family=family, size=list(SIZES)[2], seq_len=1024, precision="float32")
        every += [large, *(large | variant for variant in VARIANTS)]
    return every


def compare(case: dict[str, Any], keep: bool = False) -> float:
    """Print a row, and return predicted over measured. With `keep` freed memory is kept."""
    settled = make_plan(**case)
    guess, found = predicted(settled), measured(settled, keep)
    chosen = {name: value for name, value in case.items() if name in RunConfig.__dataclass_fields__}
    words = [name if value is True else f"{name} {value}" for name, value in chosen.items()][2:]
    print(
        f"{case['family']:<12} {case['size']:<24} {case['seq_len']:>5} {case['precision']:<9} "
        f"{' '.join(words + ['kept'] * keep):<27} {guess:>9.1f} {found:>9.1f} {guess / found:>6.2f}",
        flush=True,
    )
    return guess / found


def main() -> None:
    """Run the benchmark."""
    parser = command(__doc__)
    parser.add_argument("--family", nargs="+", choices=list(ARCHITECTURES), help="default: all")
    asked = parse(parser, dict(family=list(ARCHITECTURES)), quick=dict(family=["mamba"]))
    print(machine())
    print(f"{'family':<12} {'size':<24} length precision {'options':<27} predicted  measured MiB ratio")
    rows = cases(asked.family, asked.quick)
    ratios = [compare(case) for case in rows]
    off = sum(abs(ratio - 1) > 0.15 for ratio in ratios)
    print(f"{off} of {len(ratios)} are off by more than 15 %")
    longest = rows[-1]["seq_len"]
    kept = [compare(case, keep=True) for case in rows if len(case) == 4 and case["seq_len"] == longest]
    found = {"plan_memory": ratios, "plan_memory_kept": kept}
    finish(asked, {name: spread(r) for name, r in found.items() if r})


if __name__ == "__main__":
    main()
