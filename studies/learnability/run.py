"""The grid behind docs/learnability.md: which ingredient does each architecture need?

    python -m studies.learnability.run [--what grid|tuning] [--workers 2] [--out runs/learnability]

Every model learns to say at which of up to 256 positions a symbol stands (256 symbols, suffix layout, 800
steps of about 2,048 tokens at most, evaluation on held-out sequences with a single query). Two things vary:
the architecture with its position scheme, and the diet (queries per sequence, curriculum). Learning rates
are compared on a seed that is not reported (`--what tuning`). Runs go one seed after the other, resume, and
end in grid.csv or tuning.csv beside this file; `report.py` makes the tables from them.
About an hour and ten minutes on 2 cores.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro

from ssm_retrieval.training.store import METRICS, read_rows
from synthetic.config import RunConfig, plan, run_id

HERE = Path(__file__).parent
BASE = RunConfig(
    seq_len=256,
    steps=800,
    eval_every=100,
    eval_examples=64,
    final_eval_examples=512,
    device="cpu",
    precision="bfloat16",
    schedule="constant",
    growth="prefix",
)

# name: (family, options)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Transformer, learned positions": ("transformer", dict(position="learned")),
    "Transformer, full RoPE": ("transformer", dict(position="rope", rotary_pct=1.0)),
    "Transformer, RoPE 25 %": ("transformer", dict(position="rope", rotary_pct=0.25)),
    "Transformer, no positions": ("transformer", dict(position="none")),
    "Transformer, RoPE 25 %, 4 layers": ("transformer", dict(position="rope", rotary_pct=0.25, layers=4)),
    "Transformer, no positions, 4 layers": ("transformer", dict(position="none", layers=4)),
    "Mamba": ("mamba", dict(position="none")),
    "Mamba-2": ("mamba2", dict(position="none")),
    "Hybrid, learned positions": ("hybrid", dict(position="learned", ssm_init="default")),
}
DIETS: dict[str, dict[str, Any]] = {
    "K=64, curriculum from 2": dict(queries=64, curriculum=2),
    "K=64, curriculum from 16": dict(queries=64, curriculum=16),
    "K=64, no curriculum": dict(queries=64, curriculum=0),
    "K=1, curriculum from 2": dict(queries=1, curriculum=2),
}
SEEDS, TUNING_SEED = (0, 1, 2), 100
TUNING_LR = (1e-3, 2e-3, 4e-3)
TUNED = ("Transformer, learned positions", "Mamba", "Mamba-2", "Hybrid, learned positions")
DEEP_DIETS = ("K=64, curriculum from 2", "K=1, curriculum from 2")  # of the deeper Transformers


def grid() -> list[tuple[str, str, RunConfig]]:
    """(variant, diet, config) of every run, all of the first seed first."""
    rows = []
    for seed, (diet, d), (variant, (family, v)) in itertools.product(SEEDS, DIETS.items(), VARIANTS.items()):
        if "layers" in v and diet not in DEEP_DIETS:
            continue
        options: dict[str, Any] = dict(model=(family,), seed=seed, **d, **v)
        rows.append((variant, diet, dataclasses.replace(BASE, **options)))
    return rows


def tuning() -> list[tuple[str, str, RunConfig]]:
    """One run per family and learning rate, on the diet that serves all families."""
    diet, seed = "K=64, curriculum from 2", TUNING_SEED
    rows = []
    for variant, lr in itertools.product(TUNED, TUNING_LR):
        family, v = VARIANTS[variant]
        options: dict[str, Any] = dict(model=(family,), seed=seed, lr=lr, **DIETS[diet], **v)
        rows.append((variant, diet, dataclasses.replace(BASE, **options)))
    return rows


def one(variant: str, diet: str, config: RunConfig, out: str) -> dict[str, Any]:
    """Train one model on one thread.

    Args:
        variant: Name of the model in the table of results.
        diet: Name of what it is trained on.
        config: Its options.
        out: Folder of the runs.

    Returns:
        A row of the results.
    """
    import torch

    from ssm_retrieval.ops.memory import keep_freed_memory
    from synthetic.trainer import train

    torch.set_num_threads(1)
    keep_freed_memory()
    p = plan(config, config.model[0])
    folder = Path(out) / run_id(p)
    result = train(p, folder)
    last = [r for r in read_rows(folder / METRICS) if r["length"] == r["train_length"]][-1]
    return dict(
        variant=variant,
        diet=diet,
        seed=config.seed,
        parameters=result["parameters"],
        lr=p.lr,
        steps=result["step"],
        tokens=result["tokens"],
        seconds=round(result["seconds"], 1),
        longest_learned=result["longest_length"],
        train_length=result["train_length"],
        accuracy_at_train_length=last["accuracy"],
        accuracy_at_256=result["accuracy"],
        ci_low=result["ci_low"],
        ci_high=result["ci_high"],
    )


@dataclass
class Options:
    """Train the models of this study, several at a time, and write their results as CSV."""

    what: Literal["grid", "tuning"] = "grid"
    """The comparison, or the choice of learning rates before it."""
    workers: int = 2
    """Processes, each with one thread."""
    out: str = "runs/learnability"
    """Folder of the runs; finished ones are not repeated."""


def main(options: Options) -> None:
    """Train everything that the options ask for; writes grid.csv or tuning.csv beside this file."""
    jobs = grid() if options.what == "grid" else tuning()
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        futures = [pool.submit(one, *job, options.out) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            row = future.result()
            rows.append(row)
            name = f"{done:3}/{len(jobs)}  {row['variant']:35} {row['diet']:25} seed {row['seed']}"
            outcome = f"learned up to {row['longest_learned']:>3}, {row['accuracy_at_256']:.2f} at 256"
            print(f"{name}  {outcome}, {row['seconds']:.0f} s", flush=True)
    order = {variant: i for i, variant in enumerate(VARIANTS)}
    rows.sort(key=lambda r: (order[r["variant"]], list(DIETS).index(r["diet"]), r["lr"], r["seed"]))
    pd.DataFrame(rows).to_csv(HERE / f"{options.what}.csv", index=False)


if __name__ == "__main__":
    main(tyro.cli(Options))
