"""The one trainer, on a model of two weights: it resumes, stops, counts and refuses whatever it trains."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import distributed, loop, session, store
from ssm_retrieval.training.loop import Diverged, Interrupted
from ssm_retrieval.training.records import Count
from ssm_retrieval.training.session import Session

STEPS = 9


@dataclass
class Points:
    input_ids: torch.Tensor


@dataclass
class Progress(session.Progress):
    rows: Count = 0


class Line(Session[Progress, Points]):
    """Fits y = 2 x + 1 to the points of a step, which its number decides."""

    evaluate_every = 4

    def __init__(self, folder, **more):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        self.rates, self.evaluated = [], []
        super().__init__(folder, model, optimizer, Progress(), **more)

    def done(self):
        return self.progress.step >= STEPS

    def rate(self):
        return 0.1 / (1 + self.progress.step)

    def next_batch(self):
        return Points(torch.arange(3 + self.progress.step))

    def update(self, batch):
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        x = batch.input_ids[:, None] / 10
        loss = (self.model(x) - 2 * x - 1).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item()}

    def stepped(self, batch, numbers):
        self.progress.rows += 1

    def evaluate(self, numbers):
        self.evaluated.append(self.progress.step)
        store.append_row(self.folder / store.METRICS, {"step": self.progress.step, **numbers})

    def finish(self):
        return [p.item() for p in self.model.parameters()]

    def diverged(self, why):
        return Diverged(f"{why} at {self.where()}")


@pytest.fixture
def whole(tmp_path):
    """The weights and metrics of an uninterrupted training."""
    folder = tmp_path / "whole"
    folder.mkdir()
    return Line(folder).run(), store.read_rows(folder / store.METRICS)


@pytest.mark.parametrize("stops", [(1,), (3, 2), (4, 4), (8,), (9,)])
def test_a_training_that_was_stopped_ends_with_the_numbers_of_an_uninterrupted_one(tmp_path, whole, stops):
    step = 0
    for more in stops:
        step += more
        ticks = itertools.count(1)
        with pytest.raises(Interrupted, match=f"stopped at step {step}$"):
            Line(tmp_path).run(lambda more=more, ticks=ticks: next(ticks) == more)
        assert Line(tmp_path).progress.step == step
    last = Line(tmp_path)
    assert (last.run(), store.read_rows(tmp_path / store.METRICS)) == whole
    assert last.progress.tokens == sum(3 + k for k in range(STEPS)) and last.progress.rows == STEPS
    assert last.rates == [0.1 / (1 + k) for k in range(step, STEPS)]


def test_it_evaluates_every_few_steps_and_after_the_last(tmp_path):
    line = Line(tmp_path)
    line.run()
    assert line.evaluated == [4, 8, 9]


def test_metrics_after_the_checkpoint_are_dropped(tmp_path, whole):
    line = Line(tmp_path)
    for _ in range(3):
        line.step()
    line.checkpoint()
    for _ in range(3):  # the row of step 4, then "killed"
        line.step()
    assert [row["step"] for row in store.read_rows(tmp_path / store.METRICS)] == [4]
    assert (Line(tmp_path).run(), store.read_rows(tmp_path / store.METRICS)) == whole


def test_time_goes_on_where_it_stood(tmp_path):
    line = Line(tmp_path)
    line.started -= 1000.0
    line.step()
    line.checkpoint()
    again = Line(tmp_path)
    assert 1000 <= line.progress.seconds <= again.seconds() < 1900
    again.step()
    assert again.progress.seconds >= line.progress.seconds


def test_checkpoints_are_written_when_they_are_due(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "checkpoint_seconds", 1e9)
    line = Line(tmp_path)
    line.step()
    assert line.kept == -1 and not session.begun(tmp_path)
    line.clock = loop.CheckpointClock(-1.0)
    line.step()
    assert line.kept == 2 and session.begun(tmp_path)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_ends_it_before_anything_is_counted(tmp_path, monkeypatch, loss):
    monkeypatch.setattr(Line, "update", lambda self, batch: {"loss": loss})
    line = Line(tmp_path)
    with pytest.raises(Diverged, match=f"the training loss is {loss} at step 0"):
        line.run()
    assert line.progress == Progress() and not session.begun(tmp_path)


def test_more_steps_than_there_can_be_are_damage(tmp_path):
    line = Line(tmp_path)
    for _ in range(3):
        line.step()
    line.checkpoint()
    assert Line(tmp_path, limit=3).progress.step == 3
    with pytest.raises(UserError, match=r"checkpoint.safetensors is damaged \(step=3 of 2\); delete it"):
        Line(tmp_path, limit=2)


@pytest.mark.parametrize("several", [False, True])
def test_a_forgotten_training_starts_anew(tmp_path, several):
    line = Line(tmp_path)
    line.step()
    line.checkpoint()
    if several:  # as if two processes had written it
        (tmp_path / store.CHECKPOINT).unlink()
        place = tmp_path / "checkpoint-1"
        place.mkdir()
        store.write_json(tmp_path / distributed.POINTER, {"folder": place.name, "progress": {"step": 1}})
    assert session.begun(tmp_path)
    session.forget(tmp_path)
    assert not session.begun(tmp_path) and Line(tmp_path).progress == Progress()
    assert [path.name for path in tmp_path.iterdir()] == [store.METRICS]


def test_a_damaged_header_of_shards_is_named(tmp_path):
    store.write_json(tmp_path / distributed.POINTER, {"folder": "checkpoint-1", "progress": {"step": -1}})
    with pytest.raises(UserError, match=r"checkpoint.json: step is -1 .*; delete it"):
        Line(tmp_path)
