"""Where the runs of a sweep are executed: processes of this machine, a Ray cluster, or SLURM.

An executor has `submit(job) -> Handle` and `close()`. Whatever it is, jobs write into the sweep's folder,
which on a cluster must therefore be on a file system that all machines share.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Protocol

from ssm_retrieval.errors import UserError
from synthetic.config import Plan, RunConfig

HEARTBEAT = 1.0  # seconds between the notes a run leaves for the live table


class Unavailable(UserError):
    """What executes the runs is not installed or cannot be reached; one line with the remedy."""


@dataclass(frozen=True)
class Job:
    """One model to be trained in its folder."""

    config: RunConfig
    plan: Plan
    folder: Path
    purpose: str = "report"
    threads: int = 1

    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def bring_up_to_date(self) -> None:
        """Mend what a kill after a run's last word, or another sweep's purpose for the run, left behind."""
        from ssm_retrieval.training import records, store
        from synthetic import results

        if not self.finished():
            return
        saved = records.config(self.folder)
        if saved.get("purpose") != self.purpose:
            store.write_json(self.folder / "config.json", saved | {"purpose": self.purpose})
        elif not results.behind(self.folder, self.purpose):
            return
        results.record(self.folder)


class Handle(Protocol):
    """What `concurrent.futures.Future` and submitit's jobs have in common."""

    def done(self) -> bool: ...
    def exception(self) -> BaseException | None: ...


class Executor(Protocol):
    def submit(self, job: Job) -> Handle: ...

    def close(self) -> None:
        """End everything that is still running; runs continue from their checkpoints another time."""


def execute(job: Job) -> None:
    """Train a job's model, resuming what is there, and keep its part of the results store up to date.

    Waits while another process is at work in the folder: a worker of a killed sweep, or another sweep's.
    Raises whatever training raises, after leaving its traceback in <folder>/error.txt.
    """
    import torch
    from filelock import FileLock

    from ssm_retrieval import registry
    from ssm_retrieval.ops.memory import keep_freed_memory
    from ssm_retrieval.training import store
    from synthetic import memory
    from synthetic.results import begin, train_recorded

    registry.use(job.config.imports)
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    told = 0.0

    def listener(event: str, row: dict[str, Any]) -> None:
        nonlocal told
        if event == "step" and time.monotonic() - told > HEARTBEAT:
            told = time.monotonic()
            note = {key: row[key] for key in ("step", "length", "accuracy", "validation", "seconds")}
            store.write_json(job.folder / "progress.json", note)

    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        memory.require(job.plan)
        with FileLock(job.folder / ".lock"):
            begin(job.folder, job.config, job.plan, job.purpose)
            train_recorded(job.plan, job.folder, listener)
            (job.folder / "error.txt").unlink(missing_ok=True)
    except Exception:
        store.write_bytes(job.folder / "error.txt", traceback.format_exc().encode())
        raise


class Local:
    """A pool of processes here; one that dies takes only its own run with it. GPUs are dealt out in turn."""

    def __init__(self, workers: int, threads: int):
        import torch
        from pebble import ProcessPool

        context = multiprocessing.get_context("spawn")  # a forked copy of a threaded process may hang
        self.pool = ProcessPool(
            max_workers=workers,
            context=context,
            initializer=_start_worker,
            initargs=(context.Value("i", 0), torch.cuda.device_count(), threads),
        )

    def submit(self, job: Job) -> Handle:
        return self.pool.submit(execute, None, job)

    def close(self) -> None:
        self.pool.stop()
        self.pool.join()


def _start_worker(counter: Synchronized[int], gpus: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its workers
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus:
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = allowed.split(",") if allowed else [str(i) for i in range(gpus)]
        with counter.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = names[counter.value % len(names)]
            counter.value += 1
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed sweep must not leave workers behind that go on with runs which its successor resumes."""
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class Ray:
    """Tasks on a Ray cluster: an existing one (address), or one of `workers` processes made here."""

    def __init__(self, workers: int, threads: int, address: str | None, gpu: bool):
        try:
            import ray
        except ImportError as error:
            raise Unavailable('--executor ray needs Ray: pip install -e ".[ray]"') from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # This driver asks for no GPU, which shall not hide them from a local cluster's tasks.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        here: dict[str, Any] = {} if address else dict(num_cpus=workers * threads, include_dashboard=False)
        try:
            ray.init(address=address, log_to_driver=False, **here)
        except ConnectionError as error:
            raise Unavailable(f"--address {address}: no Ray cluster there ({error})") from error
        self.ray = ray
        options = dict(
            num_cpus=threads,
            num_gpus=1 if gpu else 0,
            max_retries=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        self.run = ray.remote(**options)(execute)
        self.references: list[Any] = []

    def submit(self, job: Job) -> Handle:
        self.references.append(self.run.remote(job))
        return self.references[-1].future()

    def close(self) -> None:
        for reference in self.references:
            with contextlib.suppress(Exception):  # it may be finished, or its machine gone
                self.ray.cancel(reference, force=True)
        self.ray.shutdown()


class Slurm:
    """A SLURM job per run, through submitit; the sweep waits for them and shows how they do.

    parameters: submitit's (slurm_partition, timeout_min, ...); cluster="local" tries it without SLURM.
    """

    def __init__(self, folder: Path, threads: int, parameters: Mapping[str, Any], gpu: bool):
        try:
            import submitit
        except ImportError as error:
            raise Unavailable('--executor slurm needs submitit: pip install -e ".[slurm]"') from error
        given = dict(parameters)
        cluster = given.pop("cluster", "slurm")
        defaults = dict(cpus_per_task=threads, name="sweep", timeout_min=24 * 60, gpus_per_node=int(gpu))
        try:
            self.executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
            self.executor.update_parameters(**(defaults | given))
        except (RuntimeError, NameError) as error:  # no sbatch here; a parameter that it does not know
            raise Unavailable(f"--executor slurm: {error}") from error
        self.jobs: list[Any] = []

    def submit(self, job: Job) -> Handle:
        self.jobs.append(self.executor.submit(execute, job))
        return self.jobs[-1]

    def close(self) -> None:
        for job in self.jobs:
            if not job.done():
                job.cancel(check=False)
