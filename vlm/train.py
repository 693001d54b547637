"""`python -m vlm.train CONFIG`: train the VLMs of a config file, stage by stage; resume what was interrupted.

A stage's whole state is (weights, optimiser, step): batch number k is a function of the seed and k, so a
stage that was stopped ends with the numbers of an uninterrupted one. Both families get the same batches in
the same order.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from synthetic import store
from synthetic.run import INTERRUPTED, StopSignals, explain, fail, write_anything
from vlm import parts
from vlm.config import Run, Stage, read_file
from vlm.data.loader import VLMBatch, batches
from vlm.data.mixture import Mixture
from vlm.model import VLM

CHECKPOINT, WEIGHTS, RESULT, METRICS = (
    "checkpoint.safetensors",
    "model.safetensors",
    "stage.json",
    "metrics.jsonl",
)
CHECKPOINT_SECONDS = 30.0
LOG_EVERY = 20  # steps between rows of the metrics
ACCELERATE_HELP = 'training VLMs needs accelerate: pip install -e ".[vlm]"'

Listener = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """Raised after a checkpoint was written because `should_stop` said so."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 if stopped."""
    write_anything()
    options = tyro.cli(Options, args=argv, prog="python -m vlm.train")
    try:
        return train_all(options)
    except (ValueError, ImportError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(explain(error, str(options.out)))
    except KeyboardInterrupt:
        return INTERRUPTED


def train_all(options: Options) -> int:
    from models.ops.memory import keep_freed_memory

    keep_freed_memory()
    runs = [run for run in read_file(options.config) if options.only in run.name]
    if not runs:
        raise ValueError(f"--only {options.only}: no run of {options.config} has that in its name")
    for name in ("jobs", "threads"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1, or 0 for the default")
    accelerator = accelerate(runs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    several = accelerator.num_processes > 1 or accelerator.device.type != "cpu"
    jobs = options.jobs or (1 if several else min(cores, len(runs)))
    threads = options.threads or (max(1, cores // jobs) if jobs > 1 else 0)
    if threads:
        torch.set_num_threads(threads)
    if jobs > 1:
        print(f"{jobs} processes share {len(runs)} runs; what follows is the first one's part", flush=True)
    with helpers(options, jobs - 1, threads):
        return train_here(options, runs, accelerator)


@contextmanager
def helpers(options: Options, count: int, threads: int) -> Iterator[None]:
    """Processes with the same command, which take what this one has not begun; waits for them at the end.

    Raises ValueError if one failed: its own line says why.
    """
    command = [sys.executable, "-m", "vlm.train", str(options.config), "--out", str(options.out)]
    command += ["--only", options.only, "--jobs", "1", "--threads", str(threads)]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield
        failed = [process.wait() for process in started if process.wait() not in (0, INTERRUPTED)]
        if failed:
            raise ValueError(f"a process that shared this training ended with status {failed[0]}")
    finally:
        for process in started:
            process.terminate()  # asks it to stop after its step, if it is still there
            process.wait()


def train_here(options: Options, runs: Sequence[Run], accelerator: Any) -> int:
    """What one process does of the runs; returns the exit status."""
    from rich.console import Console

    console = Console(quiet=not accelerator.is_main_process)
    stop = StopSignals()
    for run, number in shared_out(runs, options.out, alone=accelerator.num_processes == 1):
        with Display(run, number, console) as display, stop:
            try:
                train_stage(run, number, options.out, accelerator, display, stop.asked)
            except Interrupted as reason:
                console.print(
                    f"{run.name} {reason}; nothing is lost: the same command resumes", highlight=False
                )
                return INTERRUPTED
    for run in runs:
        folder = options.out / run.stage_ids()[-1]
        console.print(f"{run.name}: {folder}", highlight=False, soft_wrap=True)
    console.print(f"next: python -m vlm.evaluate {options.config}", highlight=False, soft_wrap=True)
    return 0


def accelerate(runs: Sequence[Run]) -> Any:
    """accelerate's Accelerator for these runs, which must have one precision and accumulate by themselves."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(ACCELERATE_HELP) from error
    precisions = sorted({run.precision for run in runs})
    if len(precisions) > 1:
        raise ValueError(
            f"the runs have precisions {', '.join(precisions)}; use --only, or one precision for all"
        )
    return Accelerator(mixed_precision=precisions[0])


def shared_out(runs: Sequence[Run], out: Path, alone: bool = True) -> Iterator[tuple[Run, int]]:
    """Stages to be trained, (run, number), each under its folder's lock while the caller works on it.

    Stages that are finished are passed over, those that another process works on are waited for, after all
    others. alone=False: the processes of one training go through all stages together, without locks.
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


def train_stage(
    run: Run,
    number: int,
    out: Path,
    accelerator: Any,
    listener: Listener = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train one stage in its folder below `out`, from the weights of the stage before it; resumes.

    Raises Interrupted when should_stop() turned true, ValueError for what a config asks and cannot have.
    """
    stage, names = run.stages[number], run.stage_ids()
    folder = out / names[number]
    if (folder / RESULT).exists():
        return
    world = accelerator.num_processes
    if stage.batch_size % (world * stage.accumulate):
        raise ValueError(
            f"batch_size={stage.batch_size} of run {run.name!r} cannot be cut into {world} processes x "
            f"{stage.accumulate} parts; use a multiple of {world * stage.accumulate}"
        )
    device = str(accelerator.device)
    text, seen = parts.text(run.tokenizer), parts.eyes(run.encoder, run.size(stage), out, device)
    features = parts.features(run, run.size(stage), out, device)
    sources = {name: data.build(answers=True) for name, data in stage.data.items()}
    mixture = Mixture(sources, stage.weights)
    if stage.epochs:
        stage = dataclasses.replace(stage, steps=math.ceil(stage.epochs * len(mixture) / stage.batch_size))
    for source in sources.values():
        features.fill(source, progress=accelerator.is_main_process)
    model = parts.model(run, seen.width).to(accelerator.device)
    if number:
        fill(model, out / names[number - 1] / WEIGHTS)
    model.lm.requires_grad_(stage.train == "all")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.lr, betas=(0.9, 0.95), weight_decay=stage.weight_decay)
    step, seconds = resume(folder, model, optimizer)
    if accelerator.is_main_process:
        store.prepare(folder, {}, [run.to_dict()], torch.get_num_threads())
        rows = [row for row in store.read_rows(folder / METRICS) if row["step"] <= step]
        store.write_rows(folder / METRICS, rows)
    loss_of, optimizer = accelerator.prepare(Loss(model), optimizer)
    tokens = 0
    started = saved = time.monotonic()
    for k, batch in enumerate(
        batches(
            mixture,
            features,
            batch_size=stage.batch_size,
            start=step,
            stop=stage.steps,
            seed=run.seed,
            encode=text.encode,
            markers=text.markers,
            side=seen.side,
            layout=stage.layouts or (run.layout,),
            max_length=stage.max_length,
            group=stage.group,
            workers=stage.workers,
        ),
        start=step,
    ):
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * rate(k, stage)
        loss = update(loss_of, optimizer, batch, stage, accelerator)
        tokens += batch.input_ids.numel()
        now = time.monotonic()
        row = dict(
            step=k + 1, steps=stage.steps, loss=loss, seconds=round(seconds + now - started, 3), tokens=tokens
        )
        listener(row)
        if accelerator.is_main_process and ((k + 1) % LOG_EVERY == 0 or k + 1 == stage.steps):
            store.append_row(folder / METRICS, row)
        stopped = any_process(should_stop(), accelerator)
        if stopped or any_process(now - saved > CHECKPOINT_SECONDS, accelerator):
            if accelerator.is_main_process:
                header = {"step": k + 1, "seconds": seconds + now - started}
                store.save_tensors(
                    folder / CHECKPOINT, store.checkpoint_tensors(model, plain(optimizer)), header
                )
            saved = now
        if stopped and k + 1 < stage.steps:
            raise Interrupted(f"stopped at step {k + 1} of stage {number + 1}")
    if accelerator.is_main_process:
        weights = dict(model.named_parameters())
        store.save_tensors(folder / WEIGHTS, weights, {"run": run.name, "stage": number})
        result = {"steps": stage.steps, "seconds": seconds + time.monotonic() - started}
        store.write_json(folder / RESULT, result)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


class Loss(nn.Module):
    """`VLM.loss` as a forward pass, which is what accelerate wraps."""

    def __init__(self, model: VLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(input_ids, features, labels)


def update(loss_of: nn.Module, optimizer: Any, batch: VLMBatch, stage: Stage, accelerator: Any) -> float:
    """One optimiser step on the mean loss of the batch's examples; returns it, in nats.

    Each process takes its rows, in `stage.accumulate` parts of one size, so that means of parts are the mean.
    """
    rows = len(batch.samples) // accelerator.num_processes
    first, size = accelerator.process_index * rows, rows // stage.accumulate
    total = torch.zeros((), device=accelerator.device)
    for part in range(stage.accumulate):
        chosen = slice(first + part * size, first + (part + 1) * size)
        last = part == stage.accumulate - 1
        with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(loss_of):
            ids, features, labels = (
                x[chosen].to(accelerator.device) for x in (batch.input_ids, batch.features, batch.labels)
            )
            loss = loss_of(ids, features, labels) / stage.accumulate
            accelerator.backward(loss)
        total += loss.detach()
    if stage.grad_clip > 0:
        accelerator.clip_grad_norm_(loss_of.parameters(), stage.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(total, "mean"))


def rate(step: int, stage: Stage) -> float:
    """Factor on the peak rate: linear warm-up over a share of the steps, then half a cosine to 0."""
    warm = max(1, round(stage.warmup * stage.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, stage.steps - warm)))


def any_process(said: bool, accelerator: Any) -> bool:
    """Whether one of the processes said so."""
    if accelerator.num_processes == 1:
        return said
    return bool(accelerator.reduce(torch.tensor(float(said), device=accelerator.device), "sum"))


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def resume(folder: Path, model: VLM, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Go on from the folder's checkpoint: steps done and seconds spent, 0 without one."""
    if not (folder / CHECKPOINT).exists():
        return 0, 0.0
    tensors, header = store.load_tensors(folder / CHECKPOINT)
    store.restore(model, optimizer, tensors, header["step"])
    return header["step"], header["seconds"]


def fill(model: VLM, path: Path) -> None:
    """Copy the weights that a stage has written into the model."""
    tensors, _ = store.load_tensors(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


class Display:
    """A live bar on a terminal; a line at the end of every tenth of a stage elsewhere."""

    def __init__(self, run: Run, number: int, console: Any):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.title = f"{run.name}, stage {number + 1} of {len(run.stages)}"
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(self.title, total=None, loss="-")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        self.bar.update(self.task, completed=row["step"], total=row["steps"], loss=f"{row['loss']:.3f}")
        if not self.console.is_terminal and row["step"] % max(1, row["steps"] // 10) == 0:
            self.console.print(
                f"{self.title}: step {row['step']} of {row['steps']}, loss {row['loss']:.3f}, "
                f"{row['seconds']:.0f} s",
                highlight=False,
                soft_wrap=True,
            )


if __name__ == "__main__":
    sys.exit(main())
