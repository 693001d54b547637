"""Train one model on one task: `train(plan, folder)`; nothing global, so sweeps call it too.

What every training does is in `ssm_retrieval.training.session`; here is the curriculum, the loss, and what is
evaluated and written.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_retrieval import models
from ssm_retrieval.models import LanguageModel
from ssm_retrieval.ops.cross_entropy import IGNORE
from ssm_retrieval.statistics import wilson
from ssm_retrieval.training import distributed, session, store
from ssm_retrieval.training.distributed import ALONE, World
from ssm_retrieval.training.loop import Diverged, Interrupted, warm_up
from ssm_retrieval.training.lora import add_adapters, merge_adapters
from ssm_retrieval.training.optimizers import make_optimizer
from ssm_retrieval.training.records import FORMAT, Count, Row, finished
from synthetic import pretrained, records, tasks
from synthetic.config import Plan
from synthetic.curricula import PASS, advance, lengths, longest_passed, next_batch, next_length, short_place
from synthetic.evaluate import Evaluation, autocast, heldout, score_together
from synthetic.tasks import Batch
from synthetic.tasks.base import Place

__all__ = ["Diverged", "Interrupted", "Session", "train"]

# Whoever changes it raises config.TRAINING_VERSION.
EMA = 0.9  # of the training accuracy that drives the curriculum
TARGET_BINS = 16  # equal parts of the context by which evaluations in training count right answers


@dataclass
class Progress(session.Progress):
    """Where training stands."""

    examples: Count = 0
    """Training sequences seen."""
    length: int = 0
    """Context length that is being trained."""
    accuracy: float = 0.0
    """Running training accuracy at this length."""
    validation: float = 0.0
    """Latest validation accuracy at seq_len."""
    stopped: bool = False
    """Whether stop_at was reached, twice."""


Listener = Callable[[str, dict[str, Any]], None]


def train(
    plan: Plan,
    folder: Path,
    listener: Listener = lambda event, row: None,
    should_stop: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> dict[str, Any]:
    """Train plan's model in `folder`, resuming what is there.

    Evaluations go to folder/metrics.jsonl, the final accuracy by position to folder/by_position.jsonl, and by
    context length, for every length of the curriculum, to folder/by_length.jsonl.

    Args:
        plan: Plan of one model.
        folder: Folder of the run.
        listener: Called as listener(event, row) at every "step" and "evaluation".
        should_stop: Asked after every step.
        world: The processes that all call this; the first one alone writes rows and hears of events.

    Returns:
        The final evaluation, as it is in folder/result.json.

    Raises:
        Interrupted: If should_stop() turned true.
        Diverged: If a loss or a weight is not finite.
        OSError: If the disk is full.

    After each of them the next call continues from the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if finished(folder):
        return records.result(folder)
    result: Row = Session(plan, folder, listener, world).run(should_stop)
    return result


class Session(session.Session[Progress, Batch]):
    """One sitting of a run.

    Args:
        plan: Plan of one model.
        folder: Folder of the run.
        listener: As in `train`.
        world: The processes that train together.
    """

    model: LanguageModel
    longest: bool
    """Whether the batch of this step has the length that is being trained."""

    def __init__(self, plan: Plan, folder: Path, listener: Listener, world: World = ALONE):
        self.plan, self.listener, self.evaluate_every = plan, listener, plan.eval_every
        self.task = tasks.build(plan.task, **plan.task_options)
        if plan.init is None or session.begun(folder):
            make = partial(models.build, plan.model, seed=plan.seed, **plan.model_overrides)
        else:
            make = partial(pretrained.first_model, plan)
        model = distributed.build(make, plan.device, world)
        model.checkpointing = plan.checkpointing
        if plan.lora:
            add_adapters(model, plan.lora, plan.seed)
        self.loss_of = distributed.spread(model, world)
        progress = Progress(length=lengths(plan)[0])
        super().__init__(folder, model, make_optimizer(model, plan), progress, world)

    def done(self) -> bool:
        """Whether the budget is spent, or stop_at was reached."""
        plan, now = self.plan, self.progress
        over = now.step >= plan.steps if plan.steps is not None else now.examples >= (plan.budget or 0)
        return now.stopped or over

    def rate(self) -> float:
        """The peak rate times `learning_rate`."""
        return self.plan.lr * learning_rate(self.plan, self.progress)

    def next_batch(self) -> Batch:
        """`next_batch` of the task, on the device."""
        self.longest = next_length(self.plan, self.progress) == self.progress.length
        return next_batch(self.task, self.plan, self.progress).to(self.plan.device)

    def update(self, batch: Batch) -> Row:
        """One optimizer step: its loss in nats, and the accuracy on its batch."""
        loss, accuracy = update(self.model, self.optimizer, batch, self.plan, self.loss_of, self.world)
        return {"loss": loss, "accuracy": accuracy}

    def stepped(self, batch: Batch, numbers: Row) -> None:
        """Count sequences and the running accuracy, tell the listener, and go on in the curriculum."""
        now = self.progress
        now.examples += batch.input_ids.shape[0]
        if self.longest:
            now.accuracy = EMA * now.accuracy + (1 - EMA) * numbers["accuracy"]
        if self.world.main:
            row = {**dataclasses.asdict(now), "loss": numbers["loss"], "model": self.plan.family}
            self.listener("step", row)
        advance(self.plan, now)

    def evaluate(self, numbers: Row) -> None:
        """Accuracy on unseen sequences at the length in training and at seq_len, a row each."""
        plan, now = self.plan, self.progress
        lengths = sorted({now.length, plan.seq_len})
        results = [self._unseen("validation", plan.eval_examples, n) for n in lengths]
        for result in results:
            self.require_finite(result.loss, "the validation loss")
        now.validation = results[-1].accuracy
        confirmation = self._confirmation() if now.validation >= plan.stop_at else None
        now.stopped = confirmation is not None and confirmation.accuracy >= plan.stop_at
        now.seconds = self.seconds()
        trained = dict(train_loss=numbers["loss"], train_accuracy=numbers["accuracy"])
        for result in results if self.world.main else ():
            row = self._row("validation", result, **trained)
            row["targets"] = result.by_target(TARGET_BINS)
            if confirmation is not None and result is results[-1]:
                row |= dict(
                    confirm_correct=int(confirmation.correct.sum()), confirm_count=len(confirmation.correct)
                )
            store.append_row(self.folder / store.METRICS, row)
            self.listener("evaluation", row)

    def diverged(self, why: str) -> Diverged:
        """Names the learning rate and what is kept."""
        last = "nothing before it" if self.kept < 0 else f"the checkpoint of step {self.kept}"
        return Diverged(
            f"{self.plan.family}: {why} at {self.where()}, so training has diverged with --lr "
            f"{self.plan.lr:g}; use a smaller one, or --grad-clip 1 if it is off ({last} is kept)"
        )

    def _confirmation(self) -> Evaluation:
        """A second look, at validation sequences that the first had not, as many as the final evaluation has.

        One look at 128 sequences, repeated every 100 steps, is passed by luck sooner or later: a model of
        accuracy 0.93 has 0.95 in one evaluation of five.
        """
        plan = self.plan
        examples = max(plan.eval_examples, plan.final_eval_examples)
        return self._unseen("validation", examples, plan.seq_len, start=plan.eval_examples)

    def _unseen(self, split: str, examples: int, length: int, start: int = 0) -> Evaluation:
        plan = self.plan
        where: Place = short_place(plan.growth) if length < plan.seq_len else "first"
        batches = heldout(self.task, examples, length, split, start, where)
        how = dict(device=plan.device, precision=plan.precision)
        return score_together(self.model, batches, self.world, **how)

    def _row(self, split: str, result: Evaluation, **more: Any) -> dict[str, Any]:
        now = self.progress
        scores = self._scores(result)
        return dict(
            model=scores.pop("model"),
            seed=scores.pop("seed"),
            step=now.step,
            examples=now.examples,
            tokens=now.tokens,
            seconds=round(now.seconds, 3),
            train_length=now.length,
            **more,
            split=split,
            **scores,
            parameters=self.model.num_parameters(),
            parameters_without_embeddings=self.model.num_parameters(embeddings=False),
        )

    def _scores(self, result: Evaluation) -> dict[str, Any]:
        hits, count = int(result.correct.sum()), len(result.correct)
        low, high = wilson(hits, count)
        return dict(
            model=self.plan.family,
            seed=self.plan.seed,
            length=result.length,
            loss=result.loss,
            accuracy=result.accuracy,
            correct=hits,
            count=count,
            ci_low=low,
            ci_high=high,
            chance=result.chance,
        )

    def finish(self) -> Row:
        """The final evaluation, the final files, and last the result that marks the run as finished."""
        plan, now = self.plan, self.progress
        self.checkpoint()
        if plan.lora:
            merge_adapters(self.model)
        by_length = [self._unseen("heldout", plan.final_eval_examples, n) for n in lengths(plan)]
        final = by_length[-1]
        self.require_finite(final.loss, "the held-out loss")
        weights = distributed.whole_weights(self.model, world=self.world)
        result = self._row("heldout", final)
        result |= dict(
            format=FORMAT,
            reached=now.stopped,
            heldout_reached=final.accuracy >= plan.stop_at,
            longest_length=longest_passed(plan, now),
            recalled_length=recalled(by_length),
        )
        if self.world.main:
            self._write(by_length, weights, result)
        self.world.barrier()
        return result

    def _write(self, by_length: list[Evaluation], weights: dict[str, Tensor], result: dict[str, Any]) -> None:
        plan, now, final = self.plan, self.progress, by_length[-1]
        rows = [
            dict(
                model=plan.family,
                seed=plan.seed,
                step=now.step,
                length=final.length,
                chance=final.chance,
                **row,
            )
            for row in final.by_position()
        ]
        store.write_rows(self.folder / records.BY_POSITION, rows)
        store.write_rows(self.folder / records.BY_LENGTH, [self._scores(found) for found in by_length])
        store.save_tensors(self.folder / store.WEIGHTS, weights, {"step": now.step})
        store.write_json(self.folder / store.RESULT, result)


def recalled(by_length: list[Evaluation]) -> int:
    """The longest context up to which accuracy is `PASS` or more at every length; 0 if there is none."""
    good = itertools.takewhile(lambda found: found.accuracy >= PASS, by_length)
    return max((found.length for found in good), default=0)


def learning_rate(plan: Plan, now: Progress) -> float:
    """Factor on the peak rate: linear warm-up, and the schedule over the whole budget or after `flat`."""
    warm = warm_up(now.step, plan.warmup)
    if plan.steps is None:
        part = now.examples / (plan.budget or 1)
    else:
        first = 0 if plan.flat is None else plan.warmup + plan.flat  # step of the decay
        part = max(0.0, (now.step - first) / (plan.steps - first))
    if plan.schedule == "constant":
        return warm
    if plan.schedule == "linear":
        return warm * max(0.0, 1.0 - part)
    return warm * 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * min(1.0, part)))))


def update(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    plan: Plan,
    loss_of: distributed.Loss | None = None,
    world: World = ALONE,
) -> tuple[float, float]:
    """One optimizer step on the mean cross-entropy of all answers, with the plan's label smoothing.

    With plan.accumulate the rows are taken in that many parts one after the other. Each part's mean counts by
    its share of the labels, so that gradients add up to those of the whole batch; with several processes,
    each takes its rows and gradients are averaged.

    Args:
        model: Model whose weights move.
        optimizer: The model's optimizer.
        batch: Batch of all processes.
        plan: Says how the batch is cut, the smoothing, the precision and the clipping.
        loss_of: The model's loss, as `distributed.spread` gives it.
        world: The processes that train together.

    Returns:
        The loss in nats and the accuracy of the queries, the same in all processes.
    """
    loss_of = model.loss if loss_of is None else loss_of
    labels = int((batch.labels != IGNORE).sum()) / world.size  # of a process, on average
    least = batch.input_ids.shape[0] // world.size  # rows of a process
    batch = distributed.share(batch, world)
    parts = batch.split(min(plan.accumulate, least))
    total, predictions = 0.0, []
    for part in parts:
        with autocast(plan.device, plan.precision):
            loss, predicted = loss_of(
                part.input_ids,
                labels=part.labels,
                logits_at=part.answer_at,
                label_smoothing=plan.label_smoothing,
                **part.places(),
            )
        if len(parts) > 1 or world.size > 1:
            loss = loss * (int((part.labels != IGNORE).sum()) / labels)
        loss.backward()
        total += loss.item() / world.size
        predictions.append(predicted)
    if plan.grad_clip > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.grad_clip)
    optimizer.step()
    optimizer.zero_grad()  # now: neither evaluation nor the next forward pass has to hold them beside its own
    right = batch.right(torch.cat(predictions))
    if world.size == 1:
        return total, right.float().mean().item()
    total, hits, count = world.sums(total, float(right.sum()), right.numel())
    return total, hits / count
