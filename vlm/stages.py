"""One stage of training: from the weights of the stage before it to its own, in its folder; resumes.

What every training does is in `ssm_retrieval.training.session`; here is where data, model and weights come
from, the loss, and what accelerate wraps. Both families get the same batches in the same order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import session, store
from ssm_retrieval.training.distributed import World
from ssm_retrieval.training.loop import Diverged, Interrupted, half_cosine, warm_up
from ssm_retrieval.training.optimizers import trained
from ssm_retrieval.training.records import Row
from vlm import components, folders
from vlm.config import Run, Stage
from vlm.data.loader import VLMBatch, batches
from vlm.data.mixture import Mixture
from vlm.folders import CHECKPOINT, METRICS, RESULT, WEIGHTS
from vlm.model import VLM
from vlm.near import Near

__all__ = ["CHECKPOINT", "Interrupted", "Session", "train_stage"]

LOG_EVERY = 20  # steps between rows of the metrics

Listener = Callable[[dict[str, Any]], None]
MEMORY = 0.95  # of the running losses, a batch


@dataclass
class Progress(session.Progress):
    """Where a stage stands."""

    losses: dict[str, float] = field(default_factory=dict)
    """Running loss by source, in nats."""


def train_stage(
    run: Run,
    number: int,
    out: Path,
    accelerator: Any,
    listener: Listener = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train one stage in its folder, from the weights of the stage before it; resumes what is there.

    Args:
        run: Run whose stage it is.
        number: Number of the stage, from 0 on.
        out: The folder of all stages.
        accelerator: accelerate's, which says how many processes there are and what they compute with.
        listener: Called with the row of every step.
        should_stop: Asked after every step.

    Raises:
        Interrupted: If should_stop() turned true; the next call continues from there.
        Diverged: If the loss or a weight is no finite number.
        UserError: For what a config asks and cannot have, and for damaged files.
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
    text, seen = components.text_of(run), components.eyes(run.encoder, run.size(stage), out, device)
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
    folder.mkdir(parents=True, exist_ok=True)
    work = Session(run, number, stage, folder, model, accelerator, listener)
    work.batches = batches(
        mixture,
        features,
        batch_size=stage.batch_size,
        start=work.progress.step,
        stop=stage.steps,
        seed=run.seed,
        encode=text.encode,
        markers=text.markers,
        side=seen.side,
        layout=stage.layouts or (run.layout,),
        max_length=stage.max_length,
        group=stage.group,
        workers=stage.workers,
    )
    with closing(cast(Any, work.batches)):  # and its workers with it
        work.run(should_stop)


class Session(session.Session[Progress, VLMBatch]):
    """One sitting of a stage.

    Args:
        run: Run whose stage it is.
        number: Number of the stage, from 0 on.
        stage: Stage with its steps settled.
        folder: Folder of the stage; it exists.
        model: Model with the weights that the stage begins with.
        accelerator: accelerate's.
        listener: Called with the row of every step.

    Attributes:
        batches: Those of the steps to come. The caller gives them, because they begin where the folder's
            checkpoint stands.
    """

    checkpoint_seconds = 30.0
    evaluate_every = LOG_EVERY
    batches: Iterator[VLMBatch]

    def __init__(
        self,
        run: Run,
        number: int,
        stage: Stage,
        folder: Path,
        model: VLM,
        accelerator: Any,
        listener: Listener,
    ):
        self.name, self.number, self.stage = run.name, number, stage
        self.accelerator, self.listener = accelerator, listener
        model.lm.requires_grad_(stage.train == "all")
        parameters = [p for _, p in trained(model)]
        optimizer = torch.optim.AdamW(
            parameters, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay
        )
        world = World(accelerator.process_index, accelerator.num_processes)
        super().__init__(folder, model, optimizer, Progress(), world, limit=stage.steps)
        if world.main:
            store.prepare(folder, {"plans": [run.to_dict()]}, torch.get_num_threads())
        near = None
        if stage.box_spread:
            near = Near.of(components.text_of(run).encode, model.lm.config.vocab_size, stage.box_spread)
            near = near.to(accelerator.device)
        self.loss_of, self.wrapped = accelerator.prepare(Loss(model, near), optimizer)

    def done(self) -> bool:
        """Whether all steps are done, or all running losses have reached the stage's goals."""
        return self.progress.step == self.stage.steps or reached(self.progress.losses, self.stage.until)

    def rate(self) -> float:
        """The peak rate times `rate`."""
        return self.stage.lr * rate(self.progress.step, self.stage)

    def next_batch(self) -> VLMBatch:
        """The next of `batches`."""
        return next(self.batches)

    def update(self, batch: VLMBatch) -> Row:
        """One optimizer step."""
        losses = update(self.loss_of, self.wrapped, batch, self.stage, self.accelerator)
        self.progress.losses = running(self.progress.losses, batch.sources, losses)
        return {"loss": math.fsum(losses) / len(losses)}

    def stepped(self, batch: VLMBatch, numbers: Row) -> None:
        """Tell the listener."""
        self.listener(self._row(numbers))

    def evaluate(self, numbers: Row) -> None:
        """A row of the loss on the training batch."""
        if self.world.main:
            store.append_row(self.folder / METRICS, self._row(numbers))

    def finish(self) -> None:
        """Write the weights, and last the file that marks the stage as finished; its checkpoint goes."""
        self.require_finite_weights()
        if self.world.main:
            weights = dict(self.model.named_parameters())
            store.save_tensors(self.folder / WEIGHTS, weights, {"run": self.name, "stage": self.number})
            store.write_json(self.folder / RESULT, {"steps": self.progress.step, "seconds": self.seconds()})
            session.forget(self.folder)
        self.world.barrier()

    def rows(self) -> list[Row]:
        """The metrics in the folder."""
        return folders.metrics(self.folder)

    def remedy(self) -> str:
        """As for every file of a stage."""
        return folders.remedy(self.folder)

    def where(self) -> str:
        """The step and the stage."""
        return f"step {self.progress.step} of stage {self.number + 1}"

    def diverged(self, why: str) -> Diverged:
        """Names the run, the learning rate and the clipping."""
        return Diverged(
            f"run {self.name!r} has diverged: {why} at {self.where()}; lower lr={self.stage.lr:g}, or clip "
            f"gradients (grad_clip={self.stage.grad_clip:g}, 0 = not at all)"
        )

    def _row(self, numbers: Row) -> Row:
        now = dataclasses.asdict(self.progress)
        return now | dict(steps=self.stage.steps, seconds=round(self.progress.seconds, 3), **numbers)


def reached(losses: Mapping[str, float], goals: Mapping[str, float]) -> bool:
    """Return whether all goals are reached; never if there are none."""
    return bool(goals) and all(losses.get(name, math.inf) < goal for name, goal in goals.items())


def running(known: Mapping[str, float], sources: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    """Return running losses by source after a batch; the first batch of a source begins its mean.

    Args:
        known: Running losses before it.
        sources: Sources of the batch's examples.
        losses: Losses of the batch's examples.

    Returns:
        Running losses.
    """
    found: dict[str, list[float]] = {}
    for name, loss in zip(sources, losses, strict=True):
        found.setdefault(name, []).append(loss)
    means = {name: math.fsum(each) / len(each) for name, each in found.items()}
    return dict(known) | {
        name: MEMORY * known[name] + (1 - MEMORY) * mean if name in known else mean
        for name, mean in means.items()
    }


class Loss(nn.Module):
    """`VLM.losses` as a forward pass, which is what accelerate wraps."""

    def __init__(self, model: VLM, near: Near | None = None):
        super().__init__()
        self.model, self.near = model, near

    def forward(self, input_ids: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        return self.model.losses(input_ids, features, labels, self.near)


def update(
    loss_of: nn.Module, optimizer: Any, batch: VLMBatch, stage: Stage, accelerator: Any
) -> list[float]:
    """One optimizer step on the mean loss of the batch's examples.

    Each process takes its rows, in `stage.accumulate` parts of one size, so that means of parts are the mean.

    Args:
        loss_of: `Loss`, as accelerate wraps it.
        optimizer: As accelerate wraps it.
        batch: Batch of all processes.
        stage: Stage whose parts and clipping count.
        accelerator: accelerate's.

    Returns:
        The losses of all examples in nats, the same in all processes.
    """
    rows = len(batch.samples) // accelerator.num_processes
    first, size = accelerator.process_index * rows, rows // stage.accumulate
    each = []
    for part in range(stage.accumulate):
        chosen = slice(first + part * size, first + (part + 1) * size)
        last = part == stage.accumulate - 1
        with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(loss_of):
            ids, features, labels = (
                x[chosen].to(accelerator.device) for x in (batch.input_ids, batch.features, batch.labels)
            )
            losses = loss_of(ids, features, labels)
            accelerator.backward(losses.mean() / stage.accumulate)
        each.append(losses.detach())
    if stage.grad_clip > 0:
        accelerator.clip_grad_norm_(loss_of.parameters(), stage.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.gather(torch.cat(each)).tolist()


def rate(step: int, stage: Stage) -> float:
    """Factor on the peak rate: linear warm-up over a share of the steps, then half a cosine to 0.

    A stage that ends by its losses keeps the peak rate after the warm-up, as its last step is not known.
    """
    warm = max(1, round(stage.warmup * stage.steps))
    if step < warm:
        return warm_up(step, warm)
    return 1.0 if stage.until else half_cosine(step - warm, stage.steps - warm)
