"""Where the jobs of a sweep run: processes of this machine, a Ray cluster, or SLURM.

An executor has `submit(job) -> Handle` and `close()`. It knows nothing of what a job trains. Jobs write into
their own folders, so on a cluster these must be on a file system that all machines share.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Protocol

from ssm_retrieval.errors import UserError

PROBLEM = "error.txt"  # in a job's folder: the traceback of its latest failure


class Unavailable(UserError):
    """What executes the jobs is not installed or cannot be reached; one line with the remedy."""


class Job(Protocol):
    """One training in its folder. It must be picklable, because it is sent to other processes."""

    @property
    def folder(self) -> Path:
        """Where it writes."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads that it may use."""
        ...

    def train(self) -> None:
        """Train, or resume what is there. The caller holds the folder's lock."""
        ...


class Handle(Protocol):
    """What `concurrent.futures.Future` and submitit's jobs have in common."""

    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        ...

    def exception(self) -> BaseException | None:
        """What the job raised, if anything."""
        ...


class Executor(Protocol):
    """What runs jobs."""

    def submit(self, job: Job) -> Handle:
        """Start the job as soon as there is room for it."""
        ...

    def close(self) -> None:
        """End everything that is still running; jobs continue from their checkpoints another time."""
        ...


def execute(job: Job) -> None:
    """Train a job in this process.

    It waits while another process works in the folder: a worker of a killed sweep, or another sweep's. What
    training raises is raised again, after its traceback was left in the folder (`PROBLEM`).
    """
    import torch
    from filelock import FileLock

    from ssm_retrieval.files import write_bytes
    from ssm_retrieval.ops.memory import keep_freed_memory

    torch.set_num_threads(job.threads)
    keep_freed_memory()
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.folder / ".lock"):
            job.train()
            (job.folder / PROBLEM).unlink(missing_ok=True)
    except Exception:
        write_bytes(job.folder / PROBLEM, traceback.format_exc().encode())
        raise


class Local:
    """A pool of processes here; one that dies takes only its own job with it. GPUs are dealt out in turn.

    Args:
        workers: Processes.
        threads: CPU threads of each.
    """

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
        """Start the job as soon as a process is free."""
        return self.pool.submit(execute, None, job)

    def close(self) -> None:
        """Stop all processes."""
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
    """A killed sweep must not leave workers behind that go on with jobs which its successor resumes."""
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class Ray:
    """Tasks on a Ray cluster.

    Args:
        workers: Tasks at once, if a cluster is made here.
        threads: CPU threads of a task.
        address: Address of an existing cluster; None makes one on this machine.
        gpu: Whether every task needs a GPU.

    Raises:
        Unavailable: If Ray is not installed, or there is no cluster at the address.
    """

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
        """Start the job as soon as the cluster has room for it."""
        self.references.append(self.run.remote(job))
        return self.references[-1].future()

    def close(self) -> None:
        """Cancel what is left and leave the cluster."""
        for reference in self.references:
            with contextlib.suppress(Exception):  # it may be finished, or its machine gone
                self.ray.cancel(reference, force=True)
        self.ray.shutdown()


class Slurm:
    """A SLURM job for each job, through submitit.

    Args:
        folder: submitit's own files go to a subfolder of it.
        threads: CPU threads of a job.
        parameters: submitit's (slurm_partition, timeout_min, ...); cluster="local" tries it without SLURM.
        gpu: Whether every job needs a GPU.

    Raises:
        Unavailable: If submitit is not installed, there is no SLURM, or it does not know a parameter.
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
        """Queue the job."""
        self.jobs.append(self.executor.submit(execute, job))
        return self.jobs[-1]

    def close(self) -> None:
        """Cancel what has not ended."""
        for job in self.jobs:
            if not job.done():
                job.cancel(check=False)
