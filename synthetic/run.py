"""`python -m synthetic.run`: train models on a retrieval task, compare them, resume what was interrupted."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_retrieval.cli import INTERRUPTED, StopSignals, fail, guarded, parse, use_threads
from synthetic.config import FAMILIES, Plan, RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from ssm_retrieval.training.distributed import World

LOST = 1
CURVE = "learning_curve.png"
BEFORE = "finished before; its numbers are reported again"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input gives one line and status 2."""
    config = parse(RunConfig, argv, "python -m synthetic.run")
    return guarded(lambda: run(config), out=config.out)


def run(config: RunConfig) -> int:
    """Train every model of the config in runs/<id>/ and show the comparison."""
    import torch
    from filelock import FileLock, Timeout

    from ssm_retrieval.ops.memory import keep_freed_memory, return_freed_memory
    from ssm_retrieval.training import store
    from ssm_retrieval.training.distributed import Lost, joined
    from synthetic import memory, reuse
    from synthetic.config import plan, run_id

    save_memory = config.checkpointing or config.accumulate > 1
    return_freed_memory() if save_memory else keep_freed_memory()  # numbers are the same either way
    use_threads(config.threads)
    if not config.model:
        return fail("--model needs at least one of " + ", ".join(FAMILIES))
    plans = [plan(config, family, elsewhere=config.plan) for family in config.model]
    if config.plan:
        return _show_memory(plans)
    folder = Path(config.out) / run_id(plans)
    if _complete(plans, folder):  # read-only for everybody: no lock is taken, nothing is written
        if int(os.environ.get("RANK", "0")) == 0:
            _show_finished(plans, folder)
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for p in plans:
            memory.require(p)
    try:
        with joined(config.parallel, plans[0]) as world:
            if not world.main:
                world.barrier()  # until the folder is there
                return _follow(plans, folder, world)
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock", timeout=0):
                store.prepare(folder, vars(config), [p.to_dict() for p in plans], torch.get_num_threads())
                taken = {p.family: reuse.take(p, folder) for p in plans}
                world.barrier()
                return _train_all(plans, folder, world, taken)
    except Timeout:
        return fail(f"--out {config.out}: another process is working in {folder}; wait for it or stop it")
    except Lost as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST


def _complete(plans: list[Plan], folder: Path) -> bool:
    """Whether a run has everything that it ever will, and its tables too."""
    from synthetic import results

    trained = all((folder / p.family / "result.json").exists() for p in plans)
    whole = trained and (folder / CURVE).exists() and (folder / "environment.json").exists()
    return whole and not any(results.behind(folder, p.family) for p in plans)


def _show_finished(plans: list[Plan], folder: Path) -> None:
    from ssm_retrieval.terminal import plain_console
    from ssm_retrieval.training import records

    console = plain_console()
    console.print(str(folder), style="bold", soft_wrap=True)
    for p in plans:
        console.print(f"{p.family}: {BEFORE}", soft_wrap=True)
    _report([records.result(folder / p.family) for p in plans], folder, console, draw=False)


def _show_memory(plans: list[Plan]) -> int:
    from ssm_retrieval.terminal import plain_console
    from synthetic.memory import table

    plain_console().print(table(plans))
    return 0


def _follow(plans: list[Plan], folder: Path, world: World) -> int:
    """What every process but the first does: train, and leave writing and showing to the first."""
    from synthetic.train import Interrupted, train

    stop = StopSignals()
    for p in plans:
        with stop:
            try:
                train(p, folder, should_stop=stop.asked, world=world)
            except Interrupted:
                return INTERRUPTED
    return 0


def _train_all(plans: list[Plan], folder: Path, world: World, taken: dict[str, Path | None]) -> int:
    """taken: the runs from which finished models have been copied, by family."""
    from ssm_retrieval.terminal import plain_console
    from synthetic.display import Display
    from synthetic.results import train_recorded
    from synthetic.train import Interrupted

    console = plain_console()
    console.print(str(folder), style="bold", soft_wrap=True)
    stop = StopSignals()
    results = []
    for p in plans:
        if (folder / p.family / "result.json").exists():
            other = taken[p.family]
            said = BEFORE if other is None else f"trained before in {other}, and taken from there"
            console.print(f"{p.family}: {said}", soft_wrap=True)
        with Display(p, console) as display, stop:
            try:
                results.append(train_recorded(p, folder, display, stop.asked, world))
            except Interrupted as reason:
                console.print(
                    f"{p.family} {reason}; nothing is lost: the same command resumes", soft_wrap=True
                )
                return INTERRUPTED
    _report(results, folder, console)
    return 0


def _report(results: list[dict], folder: Path, console: Console, draw: bool = True) -> None:
    """Curve and table; draw: also the figure."""
    import pandas as pd

    from ssm_retrieval.training import records
    from synthetic.display import summary, terminal_curve

    metrics = pd.DataFrame(records.metrics(folder))
    if draw:
        import matplotlib

        matplotlib.use("Agg")
        from ssm_retrieval.style import save
        from ssm_retrieval.training.learning_curve import learning_curve

        save(learning_curve(metrics), folder / Path(CURVE).stem, ("png",))
    print(terminal_curve(metrics, width=min(100, console.width)))
    console.print(summary(results))
    console.print(f"curve: {folder / CURVE}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
