"""A run is one model: comparisons find what is there, and Python sees what the command line sees."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import pandas as pd
import pytest
import torch
from rich.console import Console
from tiny_runs import by_family
from torch.nn import functional as F

import synthetic
from ssm_retrieval.errors import UserError
from ssm_retrieval.style import NAMES
from ssm_retrieval.training import store
from synthetic import evaluate, run, trainer
from synthetic.config import RunConfig, plan
from synthetic.display import Display, by_length

SMALL = RunConfig(
    seq_len=8, layers=1, queries=4, steps=4, eval_every=2, eval_examples=8, final_eval_examples=16,
    batch_tokens=64, device="cpu", precision="float32", model=("mamba",),
)  # fmt: skip


def command(out, *models, seed=0):
    """SMALL on the command line."""
    words = ["--model", *models, "--out", str(out), "--seed", str(seed)]
    for field in dataclasses.fields(SMALL):
        value = getattr(SMALL, field.name)
        if value not in (field.default, {}) and field.name != "model":
            words += ["--" + field.name.replace("_", "-"), str(value)]
    return words


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """--out of a finished run of Mamba."""
    folder = tmp_path_factory.mktemp("runs")
    assert run.main(command(folder, "mamba")) == 0
    return folder


def state(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }


def test_adding_a_model_trains_that_model_only(out, capsys, monkeypatch):
    seen, real = [], trainer.Session.step
    monkeypatch.setattr(trainer.Session, "step", lambda self: (seen.append(self.plan.family), real(self))[1])
    first = by_family(out)["mamba"]
    before = state(first)
    assert run.main(command(out, "mamba2", "mamba")) == 0
    assert set(seen) == {"mamba2"} and state(first) == before
    said = capsys.readouterr().out
    assert "mamba: finished before" in said and all(NAMES[f] in said for f in ("mamba", "mamba2"))
    runs = by_family(out)
    assert runs.keys() == {"mamba", "mamba2"}
    assert (store.view_of([*runs.values()]) / "outcome.png").exists()
    assert (first / "outcome.png").exists() and not (runs["mamba2"] / "learning_curve.png").exists()
    table = pd.read_parquet(out / "results")
    assert table.groupby(["run", "model"]).size().to_dict() == {
        (folder.name, family): 5 for family, folder in runs.items()
    }
    seen.clear()
    assert run.main(command(out, "mamba2")) == 0 and not seen  # and one is left out


def test_a_run_keeps_the_options_that_its_architecture_has():
    both = dataclasses.replace(
        SMALL, model=("transformer", "mamba"), position="rope", rotary_pct=0.5, d_state=4
    )
    for family in both.model:
        assert plan(both.of(family), family) == plan(both, family)
    assert both.of("mamba") == dataclasses.replace(SMALL, d_state=4, position="none")
    assert (both.of("transformer").position, both.of("transformer").d_state) == ("rope", None)


def test_python_finds_what_the_command_line_trained(out, monkeypatch):
    monkeypatch.setattr(trainer.Session, "step", lambda self: pytest.fail("trained again"))
    found = synthetic.train(dataclasses.replace(SMALL, out=str(out)))
    assert found.folder == by_family(out)["mamba"]
    rows = store.read_rows(found.folder / "metrics.jsonl")
    assert found.metrics.to_dict("records") == rows and len(rows) == 4
    assert found.by_position.to_dict("records") == store.read_rows(found.folder / "by_position.jsonl")
    assert found.result == store.read_json(found.folder / "result.json")
    assert found.plan == plan(SMALL, "mamba") and found.task.seq_len == 8
    weights, _ = store.load_tensors(found.folder / "model.safetensors")
    assert all(weights[name].equal(p) for name, p in found.model().named_parameters())


def test_python_trains_what_the_command_line_trains(tmp_path, out, capsys):
    """The same numbers, and a model by its name alone."""
    config = dataclasses.replace(SMALL, out=str(tmp_path))
    assert RunConfig(model="mamba").model == ("mamba",)
    made, other = synthetic.train(config), synthetic.Run(by_family(out)["mamba"])
    assert "validation accuracy at 8" in capsys.readouterr().out
    assert made.folder == tmp_path / other.folder.name
    assert made.result | {"seconds": 0} == other.result | {"seconds": 0}
    assert synthetic.train(dataclasses.replace(config, seed=1), progress=False).plan.seed == 1
    assert capsys.readouterr().out == ""
    assert (tmp_path / "results").exists()


def test_what_is_not_one_model_or_not_there(tmp_path):
    with pytest.raises(UserError, match="model transformer mamba is not one; train them one by one"):
        synthetic.train(RunConfig(out=str(tmp_path)))
    with pytest.raises(UserError, match="has not finished"):
        _ = synthetic.Run(tmp_path).result
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = synthetic.trian


def test_every_length_is_scored_with_queries_where_they_are_at_full_length(out):
    """By hand: `<bos>` and n symbols at 0 .. n, `<query>` and the symbol asked for behind 8 symbols."""
    one = synthetic.Run(by_family(out)["mamba"])
    model, task = one.model(), one.task
    rows = one.by_length.set_index("length")
    assert list(rows.index) == [3, 6, 8] and one.plan.growth == "gap"
    for n, row in rows.iterrows():
        batches = list(task.examples(16, seed=evaluate.EVAL_SEED, split="heldout", length=n))
        ids, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("input_ids", "labels"))
        places = torch.tensor([*range(n + 1), 9, 10])
        with torch.no_grad():
            logits = model(ids, position_ids=places)[:, -1]
        assert int((logits.argmax(-1) == labels[:, 0]).sum()) == row["correct"] and len(ids) == row["count"]
        assert F.cross_entropy(logits, labels[:, 0]).item() == pytest.approx(row["loss"], rel=1e-5)


def test_what_is_recalled_ends_with_the_first_length_that_fails():
    def found(*accuracies):
        return trainer.recalled([SimpleNamespace(length=2**i, accuracy=a) for i, a in enumerate(accuracies)])

    assert found(1.0, 0.95, 0.96) == 4 and found(1.0, 0.94, 1.0) == 1 and found(0.9, 1.0) == 0


def test_the_table_of_lengths_has_every_model_and_says_what_is_missing():
    scores = pd.DataFrame(
        dict(model=["mamba", "mamba", "hybrid"], length=[8, 2, 8], accuracy=[0.256, 1, 0.5])
    )
    console = Console(file=io.StringIO(), width=60)
    console.print(by_length(scores))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    for wanted in (["model", "2", "8"], ["Mamba", "1.00", "0.26"], ["Hybrid", "-", "0.50"]):
        assert wanted in lines


def test_compare_draws_every_run(out):
    assert run.main(command(out, "mamba", "transformer")) == 0
    runs = [synthetic.Run(by_family(out)[family]) for family in ("mamba", "transformer")]
    by_length, learning, _ = synthetic.compare(runs).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in learning.get_lines()}
    found = {line.get_label(): line.get_xydata().tolist() for line in by_length.get_lines()}
    for one in runs:
        full = one.metrics[one.metrics["length"] == 8]
        assert drawn[NAMES[one.plan.family]] == full["accuracy"].tolist()
        lengths = one.by_length[["length", "accuracy"]].astype(float)
        assert found[NAMES[one.plan.family]] == lengths.to_numpy().tolist()
        assert lengths["accuracy"].iloc[-1] == one.result["accuracy"]
    with pytest.raises(UserError, match="compare one of each architecture"):
        synthetic.compare([runs[0], runs[0]])
    with pytest.raises(UserError, match="lengths"):
        synthetic.compare([])


def test_a_notebook_shows_one_line_that_is_kept_up_to_date(monkeypatch):
    shown = []

    class Handle:
        def update(self, text, **how):
            shown.append(text["text/plain"])

    monkeypatch.setattr("IPython.display.display", lambda *a, **k: Handle())
    console = Console(file=io.StringIO(), force_jupyter=True)
    row = dict(step=2, length=4, accuracy=0.5, loss=1.25, seconds=1.0, model="mamba", examples=8)
    with Display(plan(SMALL, "mamba"), console) as display:
        display("step", row)
        display("evaluation", row | dict(length=8, accuracy=0.375, train_length=4, train_loss=1.2))
    assert console.file.getvalue() == ""
    assert "Mamba" in shown[0] and "2/4" in shown[0] and "loss 1.250" in shown[0]
    assert "validation at 8: 0.375" in shown[-1]


def test_importing_the_package_imports_no_torch():
    code = "import sys, synthetic; assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
