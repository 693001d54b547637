"""Adding a model to a command, or leaving one out, trains no model again."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest
from test_run_files import SMALL, command, folder_of, made  # noqa: F401  one finished run of Mamba

from ssm_retrieval.training import records, store
from synthetic import config, identity, reuse, run, train
from synthetic.config import plan


def both(out, *models, **more):
    words = command(out, **more)
    at = words.index("--model")
    return [*words[:at], *words[at + 2 :], "--model", *models]


@pytest.fixture
def out(made, tmp_path):  # noqa: F811
    return shutil.copytree(made, tmp_path / "runs")


def trained(monkeypatch):
    """Which families training steps are made of."""
    seen, real = [], train.Session.step
    monkeypatch.setattr(train.Session, "step", lambda self: (seen.append(self.plan.family), real(self))[1])
    return seen


def test_a_model_is_added_to_a_command(out, capsys, monkeypatch):
    first, seen = folder_of(out), trained(monkeypatch)
    assert run.main(both(out, "mamba2", "mamba")) == 0
    assert set(seen) == {"mamba2"}
    assert f"mamba: trained before in {first}, and taken from there" in capsys.readouterr().out
    (second,) = (path.parent for path in out.glob("*/config.json") if path.parent != first)
    assert records.result(second / "mamba") == records.result(first / "mamba")
    for name in reuse.FILES:
        assert (second / "mamba" / name).read_bytes() == (first / "mamba" / name).read_bytes()
    for read in (records.metrics, records.by_position):
        assert [row for row in read(second) if row["model"] == "mamba"] == read(first)
        assert {row["model"] for row in read(second)} == {"mamba", "mamba2"}
    table = pd.read_parquet(out / "results")
    assert table.groupby(["run", "model"]).size().to_dict() == {
        (first.name, "mamba"): 5, (second.name, "mamba"): 5, (second.name, "mamba2"): 5,
    }  # fmt: skip
    seen.clear()
    assert run.main(both(out, "mamba2")) == 0 and not seen  # and one is left out
    (third,) = (path.parent for path in out.glob("*/config.json") if path.parent not in (first, second))
    assert {row["model"] for row in records.metrics(third)} == {"mamba2"}
    assert {row["model"] for row in records.by_position(third)} == {"mamba2"}


def test_every_session_of_a_taken_model_is_kept(out):
    first = folder_of(out)
    path = first / "environment.json"
    store.write_json(path, records.environment(first)["sessions"][0] | {"commit": "earlier"})
    assert run.main(both(out, "mamba2", "mamba")) == 0
    (second,) = (path.parent for path in out.glob("*/config.json") if path.parent != first)
    commits = [session["commit"] for session in records.environment(second)["sessions"]]
    assert "earlier" in commits and commits[-1] == store.environment(1)["commit"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda first, patch: (first / "mamba" / "result.json").unlink(),
        lambda first, patch: (first / "mamba" / "model.safetensors").unlink(),
        lambda first, patch: (first / "config.json").write_text("{"),
        lambda first, patch: patch.setattr(identity, "TRAINING_VERSION", 10**6),
        lambda first, patch: first.rename(first.with_name("renamed")),
    ],
    ids=["unfinished", "without weights", "damaged", "of another version", "renamed"],
)
def test_what_is_not_taken(out, monkeypatch, spoil):
    wish = config.RunConfig(**SMALL, model=("mamba",))
    settled, first = plan(wish, "mamba"), folder_of(out)
    assert reuse.find(settled, out / "elsewhere") == first
    spoil(first, monkeypatch)
    assert reuse.find(settled, out / "elsewhere") is None


def test_another_plan_is_not_taken(out):
    for changed in (dict(seed=1), dict(lr=1e-3), dict(steps=5), dict(eval_examples=9), dict(layers=2)):
        wish = config.RunConfig(**(SMALL | changed), model=("mamba",))
        assert reuse.find(plan(wish, "mamba"), out / "elsewhere") is None


def test_a_model_that_has_begun_goes_on(out, tmp_path):
    wish = config.RunConfig(**SMALL, model=("mamba",))
    folder = out / "begun"
    (folder / "mamba").mkdir(parents=True)
    shutil.copy(folder_of(out) / "mamba" / train.SINGLE, folder / "mamba")
    assert reuse.take(plan(wish, "mamba"), folder) is None
    assert [path.name for path in (folder / "mamba").iterdir()] == [train.SINGLE]
