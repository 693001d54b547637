"""`python -m synthetic.sweep FILE`: train a grid of models, in parallel, here or on a cluster; resume it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ssm_retrieval.cli import Imports, guarded, parse
from ssm_retrieval.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from ssm_retrieval.training.executors import Executor, Handle
    from synthetic.config import RunConfig
    from synthetic.grid import Group, Sweep
    from synthetic.jobs import Job

FAILED = 1
STOPPED = "stopped; what ran goes on from its last checkpoint when the same command is given"
BOUNDS = {"workers": (0, 1024), "threads": (1, 1024), "retries": (0, 1000)}
POLL_SECONDS = 0.1
REFRESH_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """Train every model of a sweep and collect all evaluations in one table.

    FILE is a Python file whose get_config() returns a synthetic.grid.Sweep, such as
    studies/retrieval_cpu/config.py. Runs are named by the hash of their configuration: finished ones are
    skipped, so the same command resumes a sweep that was stopped or killed, or adds what was added to the
    file. Runs that fail are tried again, and listed at the end if that did not help.
    """

    file: Annotated[Path, tyro.conf.Positional]
    """Python file of the sweep."""
    out: str | None = None
    """Folder of runs and results. Default: the file's choice, else runs/<name of the file or its folder>."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """local: processes of this machine. ray: tasks of a Ray cluster. slurm: jobs, through submitit. The \
latter two need their extra, and --out on a file system that all machines share."""
    workers: int = 0
    """Runs at once (local, and ray without --address). 0 = as many as the cores allow."""
    threads: int = 1
    """CPU threads per run. Several runs of one thread are faster than one run of several."""
    address: str | None = None
    """Of an existing Ray cluster, for instance auto or ray://head:10001. Default: one on this machine."""
    retries: int = 1
    """How often a failed run is tried again."""
    imports: Imports = ()
    """A Python module of yours that registers models or tasks (docs/extending.md), for every run; may be \
given several times."""
    dry_run: bool = False
    """Only list the runs and whether they are finished."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if runs failed, 2 for bad input, 130 if stopped."""
    options = parse(Options, argv, "python -m synthetic.sweep")
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        return guarded(lambda: sweep(Wanted.read(options)), out=options.out or "", stopped=STOPPED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Wanted:
    """A sweep's file, read and planned: what can be refused has been refused."""

    options: Options
    sweep: Sweep
    out: Path
    tuning: dict[Group, dict[float, list[Job]]]  # validation runs of every candidate
    reported: list[Job]  # with default learning rates where these are to be chosen

    @classmethod
    def read(cls, options: Options) -> Wanted:
        """Read the file and plan its runs.

        Raises:
            UserError: For bad options, files and runs.
        """
        from ssm_retrieval import registry
        from synthetic import grid
        from synthetic.config import check

        for name, (least, most) in BOUNDS.items():
            value = getattr(options, name)
            check(value >= least, f"--{name} {value} must be at least {least}")
            check(value <= most, f"--{name} {value} is too large; use at most {most}")
        check(
            options.address is None or options.executor == "ray",
            f"--address {options.address} is for --executor ray; give both or neither",
        )
        registry.use(options.imports)
        wanted = grid.load(options.file)
        check(options.out != "", "--out is empty; give a folder, or . for this one")
        # not resolve(): it fails for a loop of links, which making the folder tells in one line
        out = Path(os.path.abspath(options.out or wanted.out or grid.default_out(options.file)))
        try:
            validation = grid.validation_runs(wanted) if wanted.learning_rates else {}
            tuning = {
                name: {
                    lr: [_job(run, out, options, "validation") for run in runs] for lr, runs in rates.items()
                }
                for name, rates in validation.items()
            }
            reported = [_job(run, out, options) for run in wanted.runs]
        except ValueError as error:
            raise UserError(f"FILE {options.file}: {error}") from error
        return cls(options, wanted, out, tuning, reported)

    def validation(self) -> list[Job]:
        return [job for rates in self.tuning.values() for jobs in rates.values() for job in jobs]


def _job(
    config: RunConfig, out: Path, options: Options, purpose: str = "report", lr: float | None = None
) -> Job:
    import dataclasses

    from synthetic.config import plan, run_id
    from synthetic.jobs import Job

    if lr is not None:
        config = dataclasses.replace(config, lr=lr)
    config = dataclasses.replace(config, imports=tuple(dict.fromkeys((*config.imports, *options.imports))))
    settled = plan(config, config.model[0], elsewhere=options.executor != "local")
    return Job(config, settled, out / run_id(settled), purpose, options.threads)


def sweep(wanted: Wanted) -> int:
    """Choose learning rates, train the reported runs, print the summary."""
    from ssm_retrieval.terminal import plain_console
    from synthetic import grid

    console, options, out, reported = plain_console(), wanted.options, wanted.out, wanted.reported
    if options.dry_run:
        return _list(wanted, console)
    out.mkdir(parents=True, exist_ok=True)
    with _Pool(wanted) as pool:
        failed = _run_all(wanted.validation(), pool, options, console)
        if wanted.tuning:
            rates = choose_rates(wanted.tuning, failed)
            _report_rates(rates, wanted.tuning, failed, out, console)
            kept = [run for run in wanted.sweep.runs if grid.group(run) in rates]
            reported = [_job(run, out, options, lr=rates[grid.group(run)]) for run in kept]
        failed += _run_all(reported, pool, options, console)
    _summary(_distinct(reported), out, console)
    return _report_failures(failed, len(wanted.reported) - len(reported), console)


def _distinct(jobs: list[Job]) -> list[Job]:
    return list({job.folder: job for job in jobs}.values())


class _Pool:
    """Makes the executor when the first job needs it: a finished sweep starts no process."""

    def __init__(self, wanted: Wanted):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.options, self.wanted = wanted.options, wanted
        jobs = [*wanted.validation(), *wanted.reported]
        self.gpu = any(job.plan.device == "cuda" for job in jobs)
        self.workers = self.options.workers or max(1, cores // self.options.threads)
        self.executor: Executor | None = None

    @property
    def words(self) -> str:
        if self.options.executor == "slurm":
            return "SLURM"
        if self.options.address:
            return f"Ray at {self.options.address}"
        return f"{self.workers} processes"

    def submit(self, job: Job) -> Handle:
        if self.executor is None:
            self.executor = self._make()
        return self.executor.submit(job)

    def _make(self) -> Executor:
        from ssm_retrieval.training import executors

        o = self.options
        if o.executor == "ray":
            return executors.Ray(self.workers, o.threads, o.address, self.gpu)
        if o.executor == "slurm":
            return executors.Slurm(self.wanted.out, o.threads, self.wanted.sweep.slurm, self.gpu)
        return executors.Local(self.workers, o.threads)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor is not None:
            self.executor.close()


Failure = tuple["Job", str]


def _run_all(jobs: list[Job], pool: _Pool, options: Options, console: Console) -> list[Failure]:
    """Run what is not finished, failures again; returns those that failed for good with one line each."""
    from synthetic.board import Board

    jobs = _distinct(jobs)
    if not jobs:
        return []
    for job in jobs:
        job.bring_up_to_date()
    failures: list[Failure] = []
    with Board(jobs, console, pool.words) as board:
        running = {pool.submit(job): (job, 0) for job in jobs if not job.finished()}
        shown = 0.0
        while running:
            for handle in [handle for handle in running if handle.done()]:
                job, tries = running.pop(handle)
                problem = _problem(handle.exception(), job)
                again = problem is not None and tries < options.retries
                board.ended(job, problem, final=not again)
                if again:
                    running[pool.submit(job)] = (job, tries + 1)
                elif problem is not None:
                    failures.append((job, problem))
            if time.monotonic() - shown > REFRESH_SECONDS:
                board.refresh()
                shown = time.monotonic()
            time.sleep(POLL_SECONDS)
    return failures


def _problem(error: BaseException | None, job: Job) -> str | None:
    """One line on why a run did not end well, or None."""
    if error is None:
        return None if job.finished() else "ended without a result"
    cause = getattr(error, "cause", None) or error  # Ray wraps the run's own exception
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[-1]}"


def choose_rates(tuning: dict[Group, dict[float, list[Job]]], failed: list[Failure]) -> dict[Group, float]:
    """The learning rate of every group all of whose validation runs ended well."""
    from synthetic import grid

    lost = {job.folder for job, _ in failed}
    return {
        name: grid.choose({lr: [_score(job) for job in jobs] for lr, jobs in candidates.items()})
        for name, candidates in tuning.items()
        if not any(job.folder in lost for jobs in candidates.values() for job in jobs)
    }


def _score(job: Job) -> float:
    from synthetic import grid, records

    rows = [r for r in records.metrics(job.folder) if r["length"] == job.plan.seq_len]
    if job.plan.steps is not None:
        return grid.score(rows, job.plan.steps)
    return grid.score(rows, job.plan.budget or 1, by="examples")


def _report_rates(
    rates: dict[Group, float],
    tuning: dict[Group, dict[float, list[Job]]],
    failed: list[Failure],
    out: Path,
    console: Console,
) -> None:
    """Keep the scores and the choice in learning_rates.json, and print the choice."""
    from ssm_retrieval.training import store

    lost = {job.folder for job, _ in failed}
    rows: list[dict[str, Any]] = []
    for name, candidates in tuning.items():
        row = {**name._asdict(), "lr": rates.get(name)}
        for lr, jobs in candidates.items():
            scores = [_score(job) for job in jobs if job.folder not in lost]
            rows.append({**row, "candidate": lr, "scores": scores, "runs": [job.folder.name for job in jobs]})
        rotated = name.position == "rope" and f"{name.rotary_pct:g} of each head"
        shape = (
            name.layers and f"{name.layers} layers",
            name.d_model and f"width {name.d_model}",
            name.d_conv and f"{name.d_conv} taps",
            name.window and f"window {name.window}",
        )
        said = (name.model, name.preset, name.position, rotated, *shape, name.ssm_init, name.growth)
        words = " ".join(str(part) for part in said if part)
        chosen = f"learning rate {rates[name]:g}" if name in rates else "no learning rate: its runs failed"
        console.print(f"{words} ({name.task}): {chosen}", soft_wrap=True)
    store.write_json(out / "learning_rates.json", rows)


def _list(wanted: Wanted, console: Console) -> int:
    for job in _distinct(wanted.validation()):
        console.print(f"{_state(job)}  validation  {job.folder.name}", soft_wrap=True)
    reported = _distinct(wanted.reported)
    if wanted.tuning:
        print(f"and {len(reported)} reported runs, named once learning rates are chosen from these")
        return 0
    for job in reported:
        console.print(f"{_state(job)}  report      {job.folder.name}", soft_wrap=True)
    return 0


def _state(job: Job) -> str:
    return "finished" if job.finished() else "open    "


def _summary(jobs: list[Job], out: Path, console: Console) -> None:
    """Mean accuracy over the seeds of every cell, from the results store."""
    from ssm_retrieval.training import tables
    from synthetic import results
    from synthetic.display import cells

    done = [job.folder.name for job in jobs if job.finished()]
    if done:
        table = tables.load(out)
        console.print(cells(table[table["run"].isin(done)]))
        console.print(f"results: {out / results.RESULTS} (Parquet)", soft_wrap=True)


def _report_failures(failed: list[Failure], blocked: int, console: Console) -> int:
    for job, problem in failed:
        console.print(f"failed: {job.folder}: {problem}", soft_wrap=True)
    if blocked > 0:
        console.print(f"not run: {blocked} runs, for want of a learning rate", soft_wrap=True)
    if failed or blocked > 0:
        console.print("error.txt in a failed run's folder says more; the same command tries them again")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
