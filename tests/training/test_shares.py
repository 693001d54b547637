"""What several processes share, seen from a single one: rows, gradients, checkpoints that either can read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sessions import session, small

from ssm_retrieval import models
from ssm_retrieval.training import distributed, loop, store
from ssm_retrieval.training.distributed import World
from synthetic import tasks, trainer
from synthetic.config import RunConfig, plan


def test_shares_of_a_batch_are_the_batch():
    task = tasks.build("ngram", seq_len=20)
    batch = task.batch(7, seed=0, index=0)
    parts = [distributed.share(batch, World(rank, 3)) for rank in range(3)]
    for field in dataclasses.fields(batch):
        whole = getattr(batch, field.name)
        if isinstance(whole, torch.Tensor) and whole.shape[0] == 7:
            assert torch.equal(torch.cat([getattr(part, field.name) for part in parts]), whole)
    with pytest.raises(ValueError, match=r"batches of 7 sequences are too few for 8 processes; raise --"):
        distributed.share(batch, World(0, 8))


# torch says so where no processes are joined
lonely = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Doubled(World):
    """One of two processes, where the other one has the same sums."""

    def sums(self, *numbers):
        return [2 * number for number in numbers]


class Kept:
    """An optimizer that keeps the gradients it is asked to apply."""

    def __init__(self, model):
        self.model = model

    def step(self):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def zero_grad(self):
        self.model.zero_grad()


@pytest.mark.parametrize("accumulate, smoothing", [(1, 0.0), (2, 0.0), (2, 0.3)])
def test_gradients_of_uneven_shares_average_to_those_of_the_batch(accumulate, smoothing):
    cut = dict(grad_clip=0.0, accumulate=accumulate, label_smoothing=smoothing)
    settled = plan(RunConfig(seq_len=6, device="cpu", precision="float32", **cut), "mamba")
    batch = tasks.build(settled.task, **settled.task_options).batch(7, seed=0, index=0, queries=3)

    def gradients(world):
        model = models.build("mamba-tiny", vocab_size=settled.model_overrides["vocab_size"], n_layer=1)
        kept = Kept(model)
        trainer.update(model, kept, batch, settled, world=world)
        return kept.gradients

    whole, first, second = gradients(World()), gradients(Doubled(0, 2)), gradients(Doubled(1, 2))
    for name, wanted in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 2, wanted, rtol=1e-4, atol=1e-6)


def test_a_step_is_written_once(tmp_path, monkeypatch):
    """Shards of a step that are written again would first be removed: for a moment there would be none."""
    written, save_tensors = [], store.save_tensors

    def noted(path, tensors, header):
        written.append((path.name, header["step"]))
        save_tensors(path, tensors, header)

    monkeypatch.setattr(store, "save_tensors", noted)
    monkeypatch.setattr(trainer.Session, "checkpoint_seconds", 0.0)  # due after every step
    monkeypatch.setattr(loop, "SHARE", 1e9)
    settled = plan(RunConfig(seq_len=6, layers=1, device="cpu", precision="float32", steps=3), "mamba")
    steps = iter([False, True])
    with pytest.raises(trainer.Interrupted, match="step 2"):
        trainer.train(settled, tmp_path, should_stop=lambda: next(steps))
    trainer.train(settled, tmp_path)
    expected = [(store.CHECKPOINT, step) for step in (1, 2, 3)]
    assert written == [*expected, ("model.safetensors", 3)]
    (tmp_path / "result.json").unlink()  # as if it had been killed in its final evaluation
    trainer.train(settled, tmp_path)
    assert written == [*expected, *[("model.safetensors", 3)] * 2]


def several(work: trainer.Session) -> None:
    """Write the checkpoint of a session as several processes do, here with all shards in one."""
    alone, work.world = work.world, Doubled(0, 2)
    work.checkpoint()
    work.world = alone


def state_of(work: trainer.Session) -> dict[str, torch.Tensor]:
    found = store.checkpoint_tensors(work.model, work.optimizer)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@lonely
def test_one_process_goes_on_from_the_shards_of_several(tmp_path):
    work = session(small("mamba"), tmp_path)
    work.step()
    work.step()
    several(work)
    assert not (work.folder / store.CHECKPOINT).exists() and (work.folder / "checkpoint-2").is_dir()
    want, progress = state_of(work), work.progress
    assert any(name.startswith("exp_avg_sq.") for name in want)
    events = []
    again = session(work.plan, tmp_path, events)
    assert again.progress == progress and again.progress is not progress
    found = state_of(again)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    work.step()
    again.step()
    want, found = state_of(work), state_of(again)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert events[0]["step"] == 3


@lonely
@pytest.mark.parametrize("last", ["one", "several"])
def test_the_later_of_two_checkpoints_counts(tmp_path, last):
    """Of a run that went on in another number of processes; the older files are still there."""
    work = session(small("mamba"), tmp_path)
    writers = {"one": work.checkpoint, "several": lambda: several(work)}
    order = sorted(writers, key=lambda who: who == last)
    for who in order:
        work.step()
        writers[who]()
    assert (work.folder / store.CHECKPOINT).exists() and distributed.saved(work.folder) is not None
    again = session(work.plan, tmp_path)
    assert again.progress.step == 2
    want, found = state_of(work), state_of(again)
    assert all(torch.equal(found[name], want[name]) for name in want)
