"""`python -m synthetic.run`: train models on a retrieval task, compare them, resume what was interrupted."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ssm_retrieval.cli import INTERRUPTED, fail, guarded, leave, parse, use_threads
from ssm_retrieval.registry import ARCHITECTURES
from ssm_retrieval.training.stopping import StopSignals
from synthetic.config import Plan, RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from ssm_retrieval.training.distributed import World

Runs = dict[Path, Plan]  # by their folders, in the order asked for
LOST = 1
FIGURE = "outcome.png"
BEFORE = "finished before; its numbers are reported again"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input gives one line and status 2."""
    config = parse(RunConfig, argv, "python -m synthetic.run")
    return guarded(lambda: run(config), out=config.out)


def run(config: RunConfig) -> int:
    """Train every model of the config in its runs/<id>/, or find it there, and show them together."""
    from filelock import FileLock, Timeout

    from ssm_retrieval.ops.memory import keep_freed_memory, return_freed_memory
    from ssm_retrieval.training.distributed import Lost, joined
    from synthetic import memory
    from synthetic.config import plan, run_id
    from synthetic.results import begin, complete

    save_memory = config.checkpointing or config.accumulate > 1
    return_freed_memory() if save_memory else keep_freed_memory()  # numbers are the same either way
    use_threads(config.threads)
    if not config.model:
        return fail("--model needs at least one of " + ", ".join(ARCHITECTURES))
    plans = [plan(config, family, elsewhere=config.plan) for family in config.model]
    if config.plan:
        return _show_memory(plans)
    runs = {Path(config.out) / run_id(p): p for p in plans}
    missing = {folder: p for folder, p in runs.items() if not complete(folder)}
    if not missing:  # read-only for everybody: no lock is taken, no run is written to
        if int(os.environ.get("RANK", "0")) == 0:
            _show_finished(runs)
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for p in missing.values():
            memory.require(p)
    folder = next(iter(missing))
    try:
        with joined(config.parallel, plans[0]) as world, ExitStack() as locks:
            if not world.main:
                world.barrier()  # until the folders are there
                return _follow(missing, world)
            for folder, p in missing.items():
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(FileLock(folder / ".lock", timeout=0))
                begin(folder, config, p)
            world.barrier()
            return _train_all(runs, missing, world)
    except Timeout:
        return fail(f"--out {config.out}: another process is working in {folder}; wait for it or stop it")
    except Lost as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST


def _show_finished(runs: Runs) -> None:
    from ssm_retrieval.terminal import plain_console

    console = plain_console()
    for folder, p in runs.items():
        _say_finished(folder, p, console)
    _report(runs, console)


def _say_finished(folder: Path, plan: Plan, console: Console) -> None:
    console.print(str(folder), style="bold", soft_wrap=True)
    console.print(f"{plan.family}: {BEFORE}", soft_wrap=True)


def _show_memory(plans: list[Plan]) -> int:
    from ssm_retrieval.terminal import plain_console
    from synthetic.memory import MODELS_A_TABLE, table

    for start in range(0, len(plans), MODELS_A_TABLE):
        plain_console().print(table(plans[start : start + MODELS_A_TABLE]))
    return 0


def _follow(missing: Runs, world: World) -> int:
    """What every process but the first does: train, and leave writing and showing to the first."""
    from synthetic.trainer import Interrupted, train

    stop = StopSignals()
    for folder, p in missing.items():
        with stop:
            try:
                train(p, folder, should_stop=stop.asked, world=world)
            except Interrupted:
                return INTERRUPTED
    return 0


def _train_all(runs: Runs, missing: Runs, world: World) -> int:
    from ssm_retrieval.terminal import plain_console
    from ssm_retrieval.training.records import finished
    from synthetic.display import Display
    from synthetic.results import train_recorded
    from synthetic.trainer import Interrupted

    console = plain_console()
    stop = StopSignals()
    for folder, p in runs.items():
        if folder not in missing or finished(folder):
            _say_finished(folder, p, console)
        else:
            console.print(str(folder), style="bold", soft_wrap=True)
        if folder not in missing:
            continue
        with Display(p, console) as display, stop:
            try:
                train_recorded(p, folder, display, stop.asked, world)
            except Interrupted as reason:
                console.print(
                    f"{p.family} {reason}; nothing is lost: the same command resumes", soft_wrap=True
                )
                return INTERRUPTED
    _report(runs, console, anew=True)
    return 0


def _report(runs: Runs, console: Console, anew: bool = False) -> None:
    """Curve and table, and the figure if it is not there; anew: in any case."""
    from ssm_retrieval.training import store
    from synthetic import records
    from synthetic.display import by_length, summary, terminal_curve
    from synthetic.runs import Run, lengths_of, metrics_of

    found = [Run(folder) for folder in runs]
    metrics, figure = metrics_of(found), store.view_of(list(runs)) / FIGURE
    if anew or not figure.exists():
        import matplotlib

        matplotlib.use("Agg")
        from ssm_retrieval.style import save
        from ssm_retrieval.training.learning_curve import outcome

        figure.parent.mkdir(exist_ok=True)
        save(outcome(lengths_of(found), metrics), figure.with_suffix(""), ("png",))
    print(terminal_curve(metrics, width=min(100, console.width)))
    console.print(summary([records.result(folder) for folder in runs]))
    console.print(by_length(lengths_of(found)))
    console.print(f"figure: {figure}", soft_wrap=True)


if __name__ == "__main__":
    leave(main())
