"""`python -m vlm.train CONFIG`: train the VLMs of a config file, stage by stage; resume what was interrupted.

This file shares the stages out among processes; `vlm.stages` trains one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from ssm_retrieval.cli import INTERRUPTED, Imports, guarded, leave, parse, use_threads
from ssm_retrieval.errors import MissingPackage, UserError
from ssm_retrieval.terminal import plain_console
from ssm_retrieval.training import display
from ssm_retrieval.training.stopping import StopSignals
from vlm import components
from vlm.config import Run, read_file
from vlm.folders import RESULT, remember
from vlm.stages import Interrupted, train_stage

PARENT = "VLM_TRAIN_PARENT"  # environment variable of a helper: the process that started it
WATCHED_EVERY = 1.0  # seconds
ACCELERATE_HELP = 'training VLMs needs accelerate: pip install -e ".[vlm]"'


@dataclass(frozen=True)
class Options:
    """Train every VLM of a config file.

    Finished stages are skipped, so the same command resumes what was stopped, and several processes that are
    given the same file share its runs out among them. On several GPUs: accelerate launch -m vlm.train CONFIG.
    """

    config: Annotated[Path, tyro.conf.Positional]
    """Python file whose get_config() returns vlm.config.Run's."""
    out: Path = Path("runs/vlm")
    """Folder of stages, encoders, cached features and results."""
    only: str = ""
    """Train only the runs whose name contains this."""
    threads: int = 0
    """CPU threads of a process; 0 = the cores divided by the processes."""
    jobs: int = 0
    """Processes that share the runs out among them; one thread each is faster than several. 0 = one a \
core, as far as there are runs; a single one with a GPU or under accelerate launch."""
    imports: Imports = ()
    """A Python module of yours that registers data sets or models (docs/data.md), here or on PYTHONPATH; \
may be given several times."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 if stopped."""
    options = parse(Options, argv, "python -m vlm.train")
    return guarded(lambda: train_all(options), out=options.out)


def train_all(options: Options) -> int:
    """Share the runs of a config file out among processes, and train this one's part.

    Returns:
        The exit status.

    Raises:
        UserError: For bad options and files.
    """
    from ssm_retrieval.ops.memory import keep_freed_memory

    keep_freed_memory()
    runs = [run for run in read_file(options.config, options.imports) if options.only in run.name]
    if not runs:
        raise UserError(f"--only {options.only}: no run of {options.config} has that in its name")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(64, 4 * cores)
    if not 0 <= options.jobs <= most:
        raise UserError(
            f"--jobs {options.jobs} must lie in 0 .. {most}; {len(runs)} runs have no use for more than "
            f"{len(runs)}, and 0 takes as many as there are cores"
        )
    use_threads(options.threads)
    watch_parent()
    accelerator = accelerate(runs)
    several = accelerator.num_processes > 1 or accelerator.device.type != "cpu"
    jobs = options.jobs or (1 if several else min(cores, len(runs)))
    threads = options.threads or (max(1, cores // jobs) if jobs > 1 else 0)
    if jobs > 1:
        # the one thing that all wait for: by all cores, before they are shared out
        with Stop():
            for run in runs:
                run.stage_ids()  # what is wrong with its data is said before an encoder is trained
                components.eyes(run.encoder, run.size(run.stages[0]), options.out, str(accelerator.device))
        print(f"{jobs} processes share {len(runs)} runs; what follows is the first one's part", flush=True)
    if threads:
        torch.set_num_threads(threads)
    with helpers(options, jobs - 1, threads) as wait:
        status = train_here(options, runs, accelerator)
        if status == 0:
            wait()
        return status


class Stop(StopSignals):
    """As `StopSignals`, but at once, by KeyboardInterrupt, where there is no step to finish.

    What comes before a stage's first step keeps what it has done (features) or is short (the encoder).
    """

    training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            raise KeyboardInterrupt
        super()._handle(number, frame)


def watch_parent() -> None:
    """Stop as by SIGTERM when the process that this one helps is gone, however it ended."""
    parent = os.environ.get(PARENT, "")
    if not parent.isdigit():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(WATCHED_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def helpers(options: Options, count: int, threads: int) -> Iterator[Callable[[], None]]:
    """Processes with the same command, which take what this one has not begun; stopped when the block ends.

    They stop as well when this process is killed (`watch_parent`).

    Args:
        options: Options of the command.
        count: How many processes.
        threads: CPU threads of each.

    Yields:
        A function that waits for them. It raises UserError if one failed, whose own line says why.
    """
    command = [sys.executable, "-m", "vlm.train", str(options.config), "--out", str(options.out)]
    command += ["--only", options.only, "--jobs", "1", "--threads", str(threads)]
    command += [word for module in options.imports for word in ("--import", module)]
    known = os.environ | {PARENT: str(os.getpid())}
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=known) for _ in range(count)]

    def wait() -> None:
        failed = [status for process in started if (status := process.wait()) not in (0, INTERRUPTED)]
        if failed:
            raise UserError(f"a process that shared this training ended with status {failed[0]}")

    try:
        yield wait
    finally:
        for process in started:
            process.terminate()  # asks it to stop after its step, if it is still there
            process.wait()


def train_here(options: Options, runs: Sequence[Run], accelerator: Any) -> int:
    """What one process does of the runs.

    Args:
        options: Options of the command.
        runs: All of them.
        accelerator: accelerate's.

    Returns:
        The exit status.
    """
    console = plain_console(quiet=not accelerator.is_main_process)
    for run, number in shared_out(runs, options.out, alone=accelerator.num_processes == 1):
        stop = Stop()
        with Display(run, number, console, stop) as shown, stop:
            try:
                train_stage(run, number, options.out, accelerator, shown, stop.asked)
            except Interrupted as reason:
                console.print(f"{run.name} {reason}; nothing is lost: the same command resumes")
                return INTERRUPTED
    for run in runs:
        folder = options.out / run.stage_ids()[-1]
        if accelerator.is_main_process:
            remember(run, options.out)
        console.print(f"{run.name}: {folder}", soft_wrap=True)
    modules = "".join(f" --import {name}" for name in options.imports)
    console.print(f"next: python -m vlm.evaluate {options.config}{modules}", soft_wrap=True)
    return 0


def accelerate(runs: Sequence[Run]) -> Any:
    """accelerate's Accelerator for runs of one precision, which accumulate by themselves.

    Raises:
        MissingPackage: If accelerate is missing.
        UserError: If the runs have several precisions, or one that this machine has not.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingPackage(ACCELERATE_HELP) from error
    precisions = sorted({run.precision for run in runs})
    if len(precisions) > 1:
        raise UserError(
            f"the runs have precisions {', '.join(precisions)}; use --only, or one precision for all"
        )
    try:
        return Accelerator(mixed_precision=precisions[0])
    except ValueError as error:  # fp16 without a GPU
        raise UserError(f"precision={precisions[0]!r}: {error}; use 'bf16' or 'no'") from error


def shared_out(runs: Sequence[Run], out: Path, alone: bool = True) -> Iterator[tuple[Run, int]]:
    """Stages to be trained, each under its folder's lock while the caller works on it.

    Stages that are finished are passed over; those that another process works on are waited for, after all
    others.

    Args:
        runs: Runs whose stages they are.
        out: The folder of all stages.
        alone: False for the processes of one training, which go through all stages together, without locks.

    Yields:
        A run and the number of its stage.
    """
    from filelock import FileLock, Timeout

    todo = [(run, number) for run in runs for number in range(len(run.stages))]
    while todo:
        later = []
        for run, number in todo:
            names = run.stage_ids()
            folder = out / names[number]
            before = out / names[number - 1] / RESULT if number else None
            if before is not None and not before.exists():
                later.append((run, number))
                continue
            folder.mkdir(parents=True, exist_ok=True)
            if not alone:
                yield run, number
                continue
            try:
                with FileLock(folder / ".lock", timeout=0):
                    if not (folder / RESULT).exists():
                        yield run, number
            except Timeout:
                later.append((run, number))
        if later == todo:
            time.sleep(1)
        todo = later


class Display(display.Display):
    """Listens to `vlm.stages.train_stage`; where there is no bar, it prints a line every tenth of the stage.

    It tells `stop` when steps begin.
    """

    def __init__(self, run: Run, number: int, console: Console, stop: Stop):
        super().__init__(f"{run.name}, stage {number + 1} of {len(run.stages)}", console)
        self.stop = stop

    def __call__(self, row: dict[str, Any]) -> None:
        """Show the row of a step."""
        self.stop.training = True
        self.show(row["step"], f"{row['step']}/{row['steps']}  loss {row['loss']:.3f}", row["steps"])
        if row["step"] % max(1, row["steps"] // 10) == 0:
            self.line(
                f"{self.title}: step {row['step']} of {row['steps']}, loss {row['loss']:.3f}, "
                f"{row['seconds']:.0f} s"
            )


if __name__ == "__main__":
    leave(main())
