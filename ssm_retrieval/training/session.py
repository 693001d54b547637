"""The one trainer: what a training does, whatever it trains.

A tool subclasses `Session` and says what is particular to it: the next batch, its loss, the learning rate,
and what is written when. Here is the rest: resuming, counting, stopping, checkpoints.

The whole state of a training is (weights, optimizer state, `Progress`), and batches are functions of the step
number. So a training that was stopped and resumed ends bit for bit with the numbers of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import distributed, records, store
from ssm_retrieval.training.distributed import ALONE, World
from ssm_retrieval.training.loop import CheckpointClock, Diverged, Interrupted, set_rate
from ssm_retrieval.training.optimizers import make_state
from ssm_retrieval.training.records import Count, Row


@dataclass
class Progress:
    """Where a training stands; saved in the checkpoint's header. Tools add fields of their own."""

    step: Count = 0
    """Optimizer steps done."""
    tokens: Count = 0
    """Tokens trained on, padding included."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Wall-clock time of all sessions together."""


class Batch(Protocol):
    """What is trained on in one step."""

    @property
    def input_ids(self) -> Tensor:
        """(B, L) int64."""
        ...


P = TypeVar("P", bound=Progress)
B = TypeVar("B", bound=Batch)


class Session(ABC, Generic[P, B]):
    """One sitting of a training; making one resumes what its folder holds.

    Args:
        folder: Folder of this training alone. Its latest checkpoint is loaded; rows of its metrics after it
            are dropped, because they will be made again.
        model: Model whose weights are saved and loaded.
        optimizer: The model's optimizer.
        progress: Where training starts if the folder has no checkpoint.
        world: The processes that train together. All call every method; the first one writes.
        limit: The most steps that there can be; None if there is no limit.

    Attributes:
        progress: Where training stands.
        kept: Step of the latest checkpoint, -1 if there is none.

    Raises:
        UserError: If the checkpoint is damaged or of another model.
    """

    checkpoint_seconds = 3.0
    """Time between checkpoints, at least."""
    evaluate_every: int
    """Steps between evaluations."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: P,
        world: World = ALONE,
        limit: int | None = None,
    ):
        self.folder, self.model, self.optimizer, self.world = folder, model, optimizer, world
        found = resume(folder, model, optimizer, type(progress), world, self.remedy(), limit)
        self.progress = progress if found is None else found
        self.kept = -1 if found is None else found.step
        if world.main:
            rows = [row for row in self.rows() if row["step"] <= self.progress.step]
            store.write_rows(folder / store.METRICS, rows)
        self.started = time.monotonic() - self.progress.seconds
        self.clock = CheckpointClock(self.checkpoint_seconds)

    # --- what is particular to a tool --------------------------------------------------------------------

    @abstractmethod
    def done(self) -> bool:
        """Whether there is no further step."""

    @abstractmethod
    def rate(self) -> float:
        """The learning rate of the next step."""

    @abstractmethod
    def next_batch(self) -> B:
        """The batch of the next step: a function of `progress` and the settings alone."""

    @abstractmethod
    def update(self, batch: B) -> Row:
        """One optimizer step. The numbers it returns have the loss as "loss"."""

    @abstractmethod
    def stepped(self, batch: B, numbers: Row) -> None:
        """Count what else there is to count, and tell who listens; `numbers` are those of `update`."""

    @abstractmethod
    def evaluate(self, numbers: Row) -> None:
        """Write rows of the metrics; after every `evaluate_every` steps and after the last one."""

    @abstractmethod
    def finish(self) -> Any:
        """After the last step: write the final files, the one that marks the training as finished last."""

    @abstractmethod
    def diverged(self, why: str) -> Diverged:
        """The one line that ends a training whose numbers would mean nothing."""

    def rows(self) -> list[Row]:
        """The metrics in the folder. Raises UserError if they are damaged."""
        return store.read_rows(self.folder / store.METRICS)

    def remedy(self) -> str:
        """What to do about a damaged checkpoint."""
        return store.anew(self.folder / store.CHECKPOINT)

    def where(self) -> str:
        """The step, in words."""
        return f"step {self.progress.step}"

    # --- what every training does ------------------------------------------------------------------------

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Any:
        """Train to the end.

        Args:
            should_stop: Asked after every step; one process that says yes stops all.

        Returns:
            What `finish` does.

        Raises:
            Interrupted: If should_stop() turned true; the next session continues from there.
            Diverged: If a loss or a weight is no finite number.
            OSError: If a file cannot be written; the next session continues from the last checkpoint.
        """
        while not self.done():
            self.step()
            if self.anyone(should_stop()):
                self.checkpoint()
                raise Interrupted(f"stopped at {self.where()}")
        return self.finish()

    def step(self) -> None:
        """One optimizer step, and the evaluation and the checkpoint if they are due."""
        now = self.progress
        set_rate(self.optimizer, self.rate())
        batch = self.next_batch()
        numbers = self.update(batch)
        self.require_finite(numbers["loss"], "the training loss")
        now.step += 1
        now.tokens += batch.input_ids.numel()
        now.seconds = self.seconds()
        self.stepped(batch, numbers)
        if now.step % self.evaluate_every == 0 or self.done():
            self.evaluate(numbers)
        if self.anyone(self.world.main and self.clock.due()):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write weights, optimizer state and progress; slow disks get longer intervals.

        Once for a step: writing shards again would first remove what may be the only whole checkpoint.
        """
        if self.kept == self.progress.step:
            return
        self.require_finite_weights()
        self.progress.seconds = self.seconds()
        header = dataclasses.asdict(self.progress)
        tensors = store.checkpoint_tensors(self.model, self.optimizer)
        with self.clock.writing():
            if self.world.size > 1:
                distributed.save(self.folder, tensors, header, self.world)
            else:
                store.save_tensors(self.folder / store.CHECKPOINT, tensors, header)
        self.kept = self.progress.step

    def seconds(self) -> float:
        """Wall-clock time of all sessions until now."""
        return time.monotonic() - self.started

    def anyone(self, says: bool) -> bool:
        """Whether one of the processes says so."""
        return any(self.world.sums(float(says)))

    def require_finite(self, value: float, what: str) -> None:
        """Raises Diverged if a number is NaN or infinite."""
        if not math.isfinite(value):
            raise self.diverged(f"{what} is {value}")

    def require_finite_weights(self) -> None:
        """Raises Diverged if a weight is NaN or infinite: a step may ruin those that its loss came from."""
        mine = (p.detach() for p in self.model.parameters())
        shards = (p.to_local() if hasattr(p, "to_local") else p for p in mine)
        if self.anyone(not all(bool(p.isfinite().all()) for p in shards)):
            raise self.diverged("a weight is no finite number")


def resume(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kind: type[P],
    world: World = ALONE,
    remedy: str = "",
    limit: int | None = None,
) -> P | None:
    """Load the latest checkpoint of a folder, whether one process or several have written it.

    Args:
        folder: Folder of the training.
        model: Model whose weights are replaced.
        optimizer: The model's optimizer; its state is replaced.
        kind: Kind of the checkpoint's `Progress`.
        world: The processes that load it together.
        remedy: What to do about a damaged checkpoint.
        limit: The most steps that there can be.

    Returns:
        Where the checkpoint stands; None if there is none.

    Raises:
        UserError: If the checkpoint is damaged or of another model.
    """
    path, sharded = folder / store.CHECKPOINT, distributed.saved(folder)
    tensors: Mapping[str, Tensor] = {}
    header: Row = {"step": -1}
    remedy = remedy or store.anew(path)
    fields: Any = kind

    def check(header: Row, where: Path) -> None:
        records.checked(header, records.record_of(fields), str(where), remedy)
        if limit is not None and header["step"] > limit:
            raise UserError(f"{where} is damaged (step={header['step']} of {limit}); {remedy}")

    if path.exists():
        tensors, header = store.stored_tensors(path, remedy)
        check(header, path)
    if sharded is not None:
        check(sharded[1], folder / distributed.POINTER)
    if sharded is not None and sharded[1]["step"] >= header["step"]:
        place, header = sharded
        make_state(model, optimizer, header["step"])
        distributed.load(place, store.checkpoint_tensors(model, optimizer), world)
    elif tensors:
        try:
            store.restore(model, optimizer, tensors, header["step"])
        except UserError as error:
            raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    else:
        return None
    return kind(**header)


def begun(folder: Path) -> bool:
    """Whether a folder has a checkpoint."""
    return (folder / store.CHECKPOINT).exists() or distributed.saved(folder) is not None


def forget(folder: Path) -> None:
    """Remove the checkpoints of a training that is finished."""
    (folder / store.CHECKPOINT).unlink(missing_ok=True)
    distributed.forget(folder)
