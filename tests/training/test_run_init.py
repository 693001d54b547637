"""`synthetic.run --init`: the task's tokens behind a trained model's, and the run that this makes."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import pytest
import torch
from checkpoint_forms import VOCAB, peer, write
from safetensors.torch import load_file, save_file
from small_runs import command, numbers
from task_solvers import kinds, small

from ssm_retrieval import models
from ssm_retrieval.training import store
from synthetic import grid, pretrained, results, run, tasks, trainer
from synthetic.config import PRETRAINED_LR, RunConfig, plan, run_id
from synthetic.evaluate import evaluate
from synthetic.vocab import UNKNOWN, Vocabulary

SMALL = RunConfig(
    seq_len=8, num_symbols=20, queries=4, curriculum=4, steps=3, eval_every=2, eval_examples=10,
    final_eval_examples=20, batch_tokens=128, model=("mamba",), precision="float32", device="cpu",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write("mamba", "safetensors", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def config(folder, **changed):
    return dataclasses.replace(SMALL, init=str(folder), **changed)


# --- ids behind others -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, layout", kinds())
def test_tasks_of_later_ids_are_the_same_tasks(name, layout):
    """Every id is higher by first_id, and nothing else differs."""
    task = small(name, layout)
    later = dataclasses.replace(task, first_id=1000)
    assert later.vocab_size == task.vocab_size and later.vocabulary.tokens == task.vocabulary.tokens
    a, b = (t.batch(5, seed=1, index=2) for t in (task, later))
    assert torch.equal(a.input_ids + 1000, b.input_ids) and torch.equal(a.labels + 1000, b.labels)
    assert torch.equal(a.answer_at, b.answer_at) and torch.equal(a.target_index, b.target_index)
    if a.alternatives is not None:
        assert torch.equal(a.alternatives + 1000, b.alternatives)
    assert task.render(a) == later.render(b) and a.chance == b.chance


def test_vocabulary_of_later_ids():
    vocabulary = Vocabulary(2, 1, extra=("<x>",), first_id=10)
    assert vocabulary.encode("<pad> <bos> <query> <s1> <p0> <task> <x>") == [10, 11, 12, 14, 15, 16, 17]
    assert vocabulary.decode([9, 10, 17, 18]) == [UNKNOWN, "<pad>", "<x>", UNKNOWN]
    assert (len(vocabulary), vocabulary.marker("<x>")) == (8, 17)
    with pytest.raises(ValueError, match="first_id -1 must not be negative"):
        Vocabulary(2, 1, first_id=-1)


# --- the run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, model", [("mamba", "mamba"), ("mamba2", "mamba2"), ("neox", "transformer")])
def test_run_starts_from_the_checkpoint_and_can_be_opened_without_it(family, model, tmp_path, capsys):
    theirs = write(family, "bin", tmp_path / "checkpoint")
    wish = config(tmp_path / "checkpoint", model=(model,), lr=1e-9, out=str(tmp_path / "runs"))
    assert run.main(command(wish)) == 0
    shutil.rmtree(tmp_path / "checkpoint")
    (made,) = (path.parent for path in (tmp_path / "runs").glob("*/config.json"))
    trained = store.load_model(made)
    task = tasks.build("position", seq_len=8, num_symbols=20, supervise_bos=False, first_id=VOCAB)
    assert trained.config.vocab_size == VOCAB + task.vocab_size
    ids = torch.arange(VOCAB)[None]
    want = theirs(ids).logits
    with torch.no_grad():  # a step of 1e-9 is none
        torch.testing.assert_close(trained(ids)[..., :VOCAB], want, rtol=1e-4, atol=1e-4)
    again = evaluate(trained, task, examples=20, length=8, device="cpu", precision="float32")
    result = store.read_json(made / "result.json")
    assert (again.accuracy, again.loss) == (result["accuracy"], result["loss"])
    settled = store.read_json(made / "config.json")["plan"]
    assert settled["init"]["path"] == str(tmp_path / "checkpoint")
    assert results.config_columns(settled)["preset"] == settled["init"]["path"]
    assert results.config_columns(settled)["n_layer"] == 2


def test_resumed_equals_uninterrupted_even_if_the_checkpoint_is_gone(folder, tmp_path):
    p = plan(config(folder, steps=7), "mamba")
    trainer.train(p, tmp_path / "whole")
    ticks = itertools.count(1)
    with pytest.raises(trainer.Interrupted, match="stopped at step 3"):
        trainer.train(p, tmp_path / "pieces", should_stop=lambda: next(ticks) >= 3)
    shutil.rmtree(folder)
    trainer.train(p, tmp_path / "pieces")
    assert numbers(tmp_path / "pieces") == numbers(tmp_path / "whole")


def test_first_model_is_the_checkpoint_and_seeded_rows(folder):
    p = plan(config(folder), "mamba")
    model, other = (pretrained.first_model(dataclasses.replace(p, seed=s), "cpu") for s in (0, 1))
    assert model.config.to_dict() == p.model_overrides and p.model == "mamba"
    assert models.config(p.model, **p.model_overrides) == model.config
    old = peer("mamba").backbone.embeddings.weight
    table, different = (m.backbone.embedding.weight for m in (model, other))
    assert torch.equal(table[:VOCAB], old) and torch.equal(different[:VOCAB], old)
    assert not torch.equal(table[VOCAB:], different[VOCAB:])


def test_learning_rate_of_pretrained_weights(folder):
    assert plan(config(folder), "mamba").lr == PRETRAINED_LR * (768 / 32) ** 0.5
    assert plan(config(folder, lr=3e-4), "mamba").lr == 3e-4


# --- its name ----------------------------------------------------------------------------------------


def test_run_ids_without_init_are_what_they_were():
    """Whoever changes them on purpose raises TRAINING_VERSION: these are of version 2."""

    def name(**options):
        (family,) = options["model"]
        scheme = "none" if family.startswith("mamba") else "learned"  # what was the default then
        then = dict(position=scheme, steps=3000, schedule="constant", growth="prefix")
        wish = RunConfig(device="cpu", precision="float32", **then | options)
        return run_id(plan(wish, family))

    assert name(model=("hybrid",), task="ngram", seq_len=50) == "ngram-suffix-L50-hybrid-s0-17bd9416"
    mqar = dict(task="mqar", seq_len=64, model=("mamba",), layers=3, d_state=8, seed=3)
    assert name(**mqar) == "mqar-L64-mamba-s3-78274f6c"


def test_run_id_follows_the_weights_not_their_place(folder, tmp_path):
    def name(place):
        return run_id(plan(config(place), "mamba"))

    first = name(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert name(tmp_path / "copy") == first
    assert run_id(plan(SMALL, "mamba")) != first
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.norm_f.weight"][0] += 1e-3
    p = plan(config(tmp_path / "copy"), "mamba")
    save_file(tensors, file)
    assert name(tmp_path / "copy") != first
    with pytest.raises(ValueError, match="has changed since this run was planned"):
        pretrained.first_model(p, "cpu")


def test_sweeps_tune_checkpoints_apart(folder):
    assert grid.group(SMALL) != grid.group(config(folder))


# --- one line for what cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", "transformer"], "--model transformer contradicts --init"),
        (["--model", "transformer", "mamba"], "which is a mamba; use --model mamba"),
        (["--model", "mamba", "--layers", "3"], "--layers 3 contradicts --init"),
        (["--model", "mamba", "--d-state", "8"], "--d-state 8 contradicts --init"),
        (["--model", "mamba", "--preset", "130m"], "--preset 130m contradicts --init"),
        (["--model", "mamba", "--position", "rope"], "--position rope contradicts --init"),
    ],
)
def test_contradictions(options, said, folder, tmp_path, capsys):
    assert run.main(["--init", str(folder), "--out", str(tmp_path / "runs"), *options]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_no_such_checkpoint(tmp_path, capsys):
    assert run.main(["--init", "mamba-130m", "--out", str(tmp_path)]) == 2
    assert "error: --init mamba-130m: 'mamba-130m' is neither a folder nor" in capsys.readouterr().err
