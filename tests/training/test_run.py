"""The command line: what a run leaves behind, resuming bit for bit, and one clear line for bad input."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from small_runs import SMALL, command, numbers
from tiny_runs import by_family

from ssm_retrieval.training import store
from ssm_retrieval.training.optimizers import make_optimizer
from synthetic import curricula, run, tasks, trainer
from synthetic.config import RunConfig, plan, run_id
from synthetic.evaluate import evaluate
from synthetic.runs import Run, metrics_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of small runs of both default models, made through the command line."""
    out = tmp_path_factory.mktemp("runs")
    assert run.main(command(dataclasses.replace(SMALL, out=str(out)))) == 0
    return out


# --- what a run leaves behind ------------------------------------------------------------------------


def test_folder_holds_what_the_readme_promises(finished):
    names = {"config.json", "environment.json", "metrics.jsonl", "by_position.jsonl", "result.json"}
    names |= {"by_length.jsonl"}
    names |= {"checkpoint.safetensors", "model.safetensors", ".lock"}
    runs = by_family(finished)
    assert runs.keys() == set(SMALL.model)
    for family, folder in runs.items():
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == names
        environment = store.read_json(folder / "environment.json")
        assert environment["packages"]["torch"] == torch.__version__
        asked = store.read_json(folder / "config.json")["run"]
        assert (asked["seq_len"], asked["seed"], asked["model"]) == (16, 0, [family])
    (view,) = finished.glob("compare-*")
    assert [path.name for path in view.iterdir()] == ["outcome.png"]
    assert (view / "outcome.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert view == store.view_of(list(runs.values())) == store.view_of(list(runs.values())[::-1])


def test_metrics_are_tidy(finished):
    table = metrics_of(map(Run, by_family(finished).values()))
    assert not table.isna().any().any()
    assert not table.duplicated(["model", "seed", "step", "length"]).any()
    full = table[table.length == 16]
    for family in SMALL.model:
        assert full[full.model == family].step.tolist() == [5, 10, 15, 20, 24]
    assert (table.accuracy == table.correct / table["count"]).all()
    assert (table.chance == 1 / table.length).all()
    assert ((table.ci_low <= table.accuracy) & (table.accuracy <= table.ci_high)).all()


def test_positions_add_up_to_the_result(finished):
    for family, folder in by_family(finished).items():
        rows = pd.DataFrame(store.read_rows(folder / "by_position.jsonl"))
        result = store.read_json(folder / "result.json")
        assert set(rows.model) == {family}
        assert rows["count"].sum() == result["count"] == SMALL.final_eval_examples
        assert rows.correct.sum() == result["correct"]
        assert rows.position.is_monotonic_increasing and rows.position.between(0, 15).all()


def test_saved_model_reproduces_the_reported_accuracy(finished):
    for folder in by_family(finished).values():
        p = store.read_json(folder / "config.json")["plan"]
        model = store.load_model(folder)
        task = tasks.build(p["task"], **p["task_options"])
        again = evaluate(model, task, examples=50, length=16, device="cpu", precision="float32")
        result = store.read_json(folder / "result.json")
        assert (again.accuracy, again.loss) == (result["accuracy"], result["loss"])
        assert result["parameters"] == model.num_parameters()


def test_both_models_train_on_the_same_batches(finished, monkeypatch):
    """Batch number i at a length is one and the same for every family."""
    seen: dict[str, list[torch.Tensor]] = {}
    for family in SMALL.model:
        p = plan(SMALL, family)
        task = tasks.build(p.task, **p.task_options)
        now = trainer.Progress(step=3, length=8)
        seen[family] = [curricula.next_batch(task, p, now).input_ids]
    first, second = seen.values()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_finished_run_is_reported_again_not_repeated(finished, capsys, monkeypatch):
    before = [numbers(folder) for folder in by_family(finished).values()]
    monkeypatch.setattr(trainer.Session, "step", lambda self: pytest.fail("trained again"))
    assert run.main(command(dataclasses.replace(SMALL, out=str(finished)))) == 0
    assert "finished before" in capsys.readouterr().out
    assert [numbers(folder) for folder in by_family(finished).values()] == before


def test_run_id_follows_what_decides_the_numbers():
    def name(**changed):
        config = dataclasses.replace(SMALL, **changed)
        return run_id(plan(config, config.model[0]))

    assert name() == name(threads=1) == name(out="elsewhere")
    changes = [dict(seed=1), dict(lr=3e-3), dict(steps=25), dict(layout="prefix"), dict(model=("mamba",))]
    assert len({name(), *(name(**change) for change in changes)}) == len(changes) + 1


# --- nothing is lost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["transformer", "mamba", "mamba2", "hybrid"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, family):
    p = plan(SMALL, family)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    trainer.train(p, whole)
    for after in (1, 4, 1, 7):  # steps done before each interruption: on and off the evaluations
        ticks = itertools.count(1)
        with pytest.raises(trainer.Interrupted):
            trainer.train(p, pieces, should_stop=lambda a=after, t=ticks: next(t) >= a)
    trainer.train(p, pieces)
    assert numbers(pieces) == numbers(whole)


def test_work_since_the_last_checkpoint_is_redone_not_duplicated(tmp_path, monkeypatch):
    """A crash leaves evaluations behind that are newer than the checkpoint, and a torn last line."""
    p = plan(SMALL, "transformer")
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    trainer.train(p, whole)
    ticks = itertools.count(1)
    with pytest.raises(trainer.Interrupted):
        trainer.train(p, crashed, should_stop=lambda: next(ticks) >= 7)
    monkeypatch.setattr(trainer.Session, "checkpoint_seconds", 1e9)
    session = trainer.Session(p, crashed, lambda event, row: None)
    for _ in range(6):  # steps 8 to 13, with the evaluation at 10, then "killed"
        session.step()
    with open(crashed / "metrics.jsonl", "a") as file:
        file.write('{"model": "transformer", "st')
    trainer.train(p, crashed)
    assert numbers(crashed) == numbers(whole)


def test_full_disk_gives_one_line_and_the_run_resumes(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(SMALL, model=("transformer",), d_state=None, out=str(tmp_path / "small"))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    assert run.main(command(whole)) == 0
    capsys.readouterr()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Session, "checkpoint_seconds", 0.0)
        calls = itertools.count()
        real = os.replace
        patch.setattr(os, "replace", lambda *a: full() if next(calls) >= 9 else real(*a))
        assert run.main(command(config)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "disk is full" in error[0] and str(tmp_path / "small") in error[0]
    assert not list((tmp_path / "small").rglob(".*.tmp"))
    assert run.main(command(config)) == 0
    folders = [next(Path(c.out).glob("*/config.json")).parent for c in (config, whole)]
    assert numbers(folders[0]) == numbers(folders[1])


def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, capsys):
    config = dataclasses.replace(SMALL, model=("transformer",), d_state=None, out=str(tmp_path))
    assert run.main(command(config)) == 0
    (own,) = (path.parent for path in tmp_path.rglob("checkpoint.safetensors"))
    (own / "result.json").unlink()
    (own / "checkpoint.safetensors").write_bytes((own / "checkpoint.safetensors").read_bytes()[:1000])
    capsys.readouterr()
    assert run.main(command(config)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoint.safetensors is damaged" in error and "delete it" in error


def test_terminals_without_our_characters_get_something_else(finished):
    config = dataclasses.replace(SMALL, out=str(finished))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "synthetic.run", *command(config)]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "held-out" in result.stdout


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    """The script that the full check runs with --kills 20; two moments here."""
    script = Path(__file__).with_name("kill_resume.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "2", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same numbers" in done.stdout


def test_two_processes_do_not_work_in_one_folder(tmp_path, capsys):
    from filelock import FileLock

    config = dataclasses.replace(SMALL, out=str(tmp_path))
    folder = tmp_path / run_id(plan(config, config.model[1]))  # before the first is trained, too
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert run.main(command(config)) == 2
    assert f"another process is working in {folder}" in capsys.readouterr().err
    assert not list(tmp_path.rglob("checkpoint.safetensors"))


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--preset", "huge"], "--preset huge"),
        (["--seq-len", "0"], "--seq-len 0 must be at least 1"),
        (["--d-state", "300"], "d_state=300 is not supported; use 1 to 256"),
        (["--d-state", "0"], "--d-state 0 must be at least 1"),
        (["--queries", "17", "--seq-len", "16"], "--queries 17"),
        (["--num-symbols", "3", "--seq-len", "16"], "num_symbols 3"),
        (["--seq-len", "16", "--curriculum", "1"], "--curriculum 1 leaves too few"),
        (["--model"], "--model needs at least one of"),
        (["--seed", str(2**64)], "--seed"),
        (["--lr", "0"], "--lr 0"),
        (["--steps", "5", "--budget", "6"], "exclude each other"),
        (["--protocol", "paper", "--queries", "2"], "contradicts --protocol paper"),
        (["--protocol", "paper", "--schedule", "linear"], "--schedule linear contradicts"),
        (["--model", "mamba", "mamba"], "names one twice"),
        (["--position", "rope", "--rotary-pct", "2"], "--rotary-pct 2"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(words, said, tmp_path, capsys):
    assert run.main([*words, "--out", str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert said in captured.err and not (tmp_path / "runs").exists()


def test_unknown_option_has_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--sequence-length", "8"])
    assert stop.value.code == 2 and "sequence-length" in capsys.readouterr().err


def test_unwritable_out(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run.main([*command(SMALL), "--out", str(blocked)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(blocked) in error


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(RunConfig):
        option = "import" if field.name == "imports" else field.name  # a word of Python's own
        assert "--" + option.replace("_", "-") in text


def test_default_curriculum_starts_where_contexts_suffice():
    """Two symbols of eight have 56 orders, too few to hold some out; three have 336."""
    starts = {n: plan(RunConfig(seq_len=n), "mamba").curriculum for n in (5, 8, 9, 1024)}
    assert starts == {5: 4, 8: 3, 9: 2, 1024: 2}


def test_evaluation_is_on_heldout_sequences():
    from synthetic.evaluate import heldout
    from synthetic.tasks.sampling import is_heldout

    task = tasks.build("position", seq_len=16, num_symbols=40)
    batches = list(heldout(task, 100, 16))
    assert sum(len(b.input_ids) for b in batches) == 100
    for batch in batches:
        assert is_heldout(batch.input_ids[:, 1:17].numpy() - task.vocabulary.first_symbol).all()
    trained = curricula.next_batch(task, plan(SMALL, "mamba"), trainer.Progress(length=16)).input_ids
    assert not is_heldout(trained[:, 1:17].numpy() - task.vocabulary.first_symbol).any()


def test_curriculum_doubles_when_training_accuracy_passes():
    p, now = plan(SMALL, "mamba"), trainer.Progress(length=4, accuracy=0.95)
    lengths = []
    for accuracy in (0.95, 0.96, 0.5, 0.99, 0.99):
        now.accuracy = accuracy
        curricula.advance(p, now)
        lengths.append(now.length)
    assert lengths == [4, 8, 8, 16, 16]
    assert curricula.longest_passed(p, trainer.Progress(length=4, accuracy=0.9)) == 0
    assert curricula.longest_passed(p, trainer.Progress(length=16, accuracy=0.9)) == 8
    assert curricula.longest_passed(p, trainer.Progress(length=16, accuracy=0.99)) == 16


def test_learning_rate_follows_the_schedule():
    for schedule, middle, end in (("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.000247)):
        p = plan(dataclasses.replace(SMALL, steps=100, warmup=10, schedule=schedule), "mamba")
        rates = [trainer.learning_rate(p, trainer.Progress(step=s)) for s in (50, 99)]
        assert rates == pytest.approx([middle, end], rel=0.01)
        first = trainer.learning_rate(p, trainer.Progress(step=0))
        assert first == pytest.approx(0.1)


def test_training_stops_at_the_accuracy_asked_for(tmp_path):
    p = plan(dataclasses.replace(SMALL, stop_at=0.01, steps=100), "transformer")
    result = trainer.train(p, tmp_path)
    assert result["step"] < 100 and result["reached"]


def test_weight_decay_spares_norms_biases_embeddings_and_ssm_parameters():
    from ssm_retrieval import models

    p = plan(dataclasses.replace(SMALL, weight_decay=0.1), "hybrid")
    model = models.build(p.model, **p.model_overrides)
    decay = {id(w): g["weight_decay"] for g in make_optimizer(model, p).param_groups for w in g["params"]}
    decayed = {name.split(".", 3)[-1] for name, w in model.named_parameters() if decay[id(w)] > 0}
    assert decayed == {
        "mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.out_proj.weight",
        "attention.query_key_value.weight", "attention.dense.weight",
        "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight",
    }  # fmt: skip


def test_weight_decay_spares_biases_that_have_axes():
    """Those of B and C in Mamba-3, (H, 1, N)."""
    from ssm_retrieval import models

    p = plan(dataclasses.replace(SMALL, weight_decay=0.1), "mamba3")
    model = models.build(p.model, **p.model_overrides)
    decay = {id(w): g["weight_decay"] for g in make_optimizer(model, p).param_groups for w in g["params"]}
    decayed = {name.split(".", 3)[-1] for name, w in model.named_parameters() if decay[id(w)] > 0}
    assert decayed == {"mixer.in_proj.weight", "mixer.out_proj.weight"}


def test_default_number_of_queries():
    """64, or all symbols of a shorter context; with repeated symbols few enough to leave distractors."""

    def queries(**options):
        return plan(RunConfig(**options), "mamba").queries

    assert (queries(), queries(seq_len=20)) == (64, 20)
    assert queries(task="position-varlen", seq_len=200, num_symbols=30) == 7
    assert queries(task="position-varlen", seq_len=1024) == 64


def test_paper_protocol_is_the_papers(tmp_path):
    """Facts 1.4 to 1.9: one query, fixed length, cosine schedule, answer and final <bos> in the loss."""
    p = plan(RunConfig(protocol="paper"), "mamba")
    assert (p.queries, p.curriculum, p.schedule, p.lr, p.batch_size) == (1, 0, "cosine", 5e-5, 128)
    assert p.task_options["supervise_bos"] and (p.steps, p.budget) == (None, 20_000_000)
    assert (p.warmup, p.eval_every, p.stop_at, p.betas) == (15_625, 1562, 0.95, (0.9, 0.999))
    transformer = plan(RunConfig(protocol="paper"), "transformer").model_overrides
    assert (transformer["position"], transformer["rotary_pct"]) == ("rope", 0.25)
    assert "init_std" not in transformer and "embedding_std" not in transformer  # the presets' own, 0.02
    assert plan(RunConfig(protocol="paper", warmup=7, stop_at=0.5), "mamba").warmup == 7
    short = dataclasses.replace(SMALL, protocol="paper", queries=None, curriculum=None, steps=None)
    p = plan(dataclasses.replace(short, budget=128 * 3), "mamba")
    assert trainer.train(p, tmp_path)["step"] == 3


def test_safetensors_header_is_plain_json(finished):
    with safe_open(by_family(finished)["mamba"] / "checkpoint.safetensors", framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state["step"] == 24 and state["tokens"] > 0
