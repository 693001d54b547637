"""One stage of training: from the weights of the stage before it to its own, in its folder; resumes.

A stage's whole state is (weights, optimiser, step): batch number k is a function of the seed and k, so a
stage that was stopped ends with the numbers of an uninterrupted one. Both families get the same batches in
the same order.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from ssm_retrieval.training.loop import (
    CheckpointClock,
    Diverged,
    Interrupted,
    half_cosine,
    set_rate,
    warm_up,
)  # fmt: skip
from ssm_retrieval.training.optimizers import trained
from vlm import components, folders, schema
from vlm.config import Run, Stage
from vlm.data.loader import VLMBatch, batches
from vlm.data.mixture import Mixture
from vlm.folders import CHECKPOINT, METRICS, RESULT, WEIGHTS
from vlm.model import VLM
from vlm.schema import Natural, NonNegative, checked

CHECKPOINT_SECONDS = 30.0
LOG_EVERY = 20  # steps between rows of the metrics

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """Where a stage stands; saved in the checkpoint's header."""

    step: int = 0
    seconds: float = 0.0  # over all sessions
    tokens: int = 0


@checked
class _Header:
    """`Progress` as the checkpoint's header has it."""

    step: Natural
    seconds: NonNegative
    tokens: Natural


def train_stage(
    run: Run,
    number: int,
    out: Path,
    accelerator: Any,
    listener: Listener = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train one stage in its folder below `out`, from the weights of the stage before it; resumes.

    Raises Interrupted when should_stop() turned true, UserError for what a config asks and cannot have, for
    damaged files, and where training diverges.
    """
    stage, names = run.stages[number], run.stage_ids()
    folder = out / names[number]
    if (folder / RESULT).exists():
        return
    world = accelerator.num_processes
    if stage.batch_size % (world * stage.accumulate):
        raise UserError(
            f"batch_size={stage.batch_size} of run {run.name!r} cannot be cut into {world} processes x "
            f"{stage.accumulate} parts; use a multiple of {world * stage.accumulate}"
        )
    device = str(accelerator.device)
    text, seen = components.text(run.tokenizer), components.eyes(run.encoder, run.size(stage), out, device)
    features = components.features(run, run.size(stage), out, device)
    sources = {name: data.build(answers=True) for name, data in stage.data.items()}
    mixture = Mixture(sources, stage.weights)
    if stage.epochs:
        steps = math.ceil(stage.epochs * len(mixture) / stage.batch_size)
        stage = dataclasses.replace(stage, steps=steps, epochs=0.0)
    for source in sources.values():
        features.fill(source, progress=accelerator.is_main_process)
    model = components.model(run, seen.width).to(accelerator.device)
    if number:
        folders.load_weights(out / names[number - 1], model)
    model.lm.requires_grad_(stage.train == "all")
    parameters = [p for _, p in trained(model)]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay)
    now = resume(folder, model, optimizer, stage.steps)
    if accelerator.is_main_process:
        store.prepare(folder, {"plans": [run.to_dict()]}, torch.get_num_threads())
        rows = [row for row in folders.metrics(folder) if row["step"] <= now.step]
        store.write_rows(folder / METRICS, rows)
    loss_of, optimizer = accelerator.prepare(Loss(model), optimizer)
    clock = CheckpointClock(CHECKPOINT_SECONDS)
    started = time.monotonic() - now.seconds
    for batch in batches(
        mixture,
        features,
        batch_size=stage.batch_size,
        start=now.step,
        stop=stage.steps,
        seed=run.seed,
        encode=text.encode,
        markers=text.markers,
        side=seen.side,
        layout=stage.layouts or (run.layout,),
        max_length=stage.max_length,
        group=stage.group,
        workers=stage.workers,
    ):
        set_rate(optimizer, stage.lr * rate(now.step, stage))
        loss = update(loss_of, optimizer, batch, stage, accelerator)
        if not math.isfinite(loss):
            raise diverged(run, number, f"its loss is {loss} at step {now.step + 1} of {stage.steps}")
        now.step += 1
        now.tokens += batch.input_ids.numel()
        now.seconds = time.monotonic() - started
        row = dataclasses.asdict(now) | dict(steps=stage.steps, loss=loss, seconds=round(now.seconds, 3))
        listener(row)
        done = now.step == stage.steps
        if accelerator.is_main_process and (now.step % LOG_EVERY == 0 or done):
            store.append_row(folder / METRICS, row)
        stopped = any_process(should_stop(), accelerator) and not done
        if accelerator.is_main_process and (stopped or clock.due()):
            with clock.writing():
                tensors = store.checkpoint_tensors(model, plain(optimizer))
                store.save_tensors(folder / CHECKPOINT, tensors, dataclasses.asdict(now))
        if stopped:
            raise Interrupted(f"stopped at step {now.step} of stage {number + 1}")
    if not all(p.isfinite().all() for p in parameters):
        raise diverged(run, number, "its weights are no finite numbers after the last step")
    if accelerator.is_main_process:
        store.save_tensors(
            folder / WEIGHTS, dict(model.named_parameters()), {"run": run.name, "stage": number}
        )
        store.write_json(folder / RESULT, {"steps": stage.steps, "seconds": time.monotonic() - started})
        (folder / CHECKPOINT).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def diverged(run: Run, number: int, why: str) -> Diverged:
    """The one line that stops a training whose numbers would mean nothing."""
    stage = run.stages[number]
    return Diverged(
        f"run {run.name!r}, stage {number + 1} has diverged: {why}; lower lr={stage.lr:g}, or clip gradients "
        f"(grad_clip={stage.grad_clip:g}, 0 = not at all)"
    )


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
    return warm_up(step, warm) if step < warm else half_cosine(step - warm, stage.steps - warm)


def any_process(said: bool, accelerator: Any) -> bool:
    """Whether one of the processes said so."""
    if accelerator.num_processes == 1:
        return said
    return bool(accelerator.reduce(torch.tensor(float(said), device=accelerator.device), "sum"))


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def resume(folder: Path, model: VLM, optimizer: torch.optim.Optimizer, steps: int) -> Progress:
    """Go on from the folder's checkpoint, if it has one. Raises UserError for a damaged one."""
    path, remedy = folder / CHECKPOINT, folders.remedy(folder)
    if not path.exists():
        return Progress()
    tensors, header = schema.tensors(path, remedy)
    said = schema.parsed(_Header, json.dumps(header).encode(), path, remedy)
    if said.step > steps:
        raise UserError(f"{path} is damaged (step={said.step} of {steps}); {remedy}")
    check = partial(schema.check_tensors, path, remedy=remedy)
    store.restore(model, optimizer, tensors, said.step, check)
    return Progress(said.step, said.seconds, said.tokens)
