"""The small trained models of the repository: they load, and answer as their records say."""

from __future__ import annotations

import pytest
from readme_commands import ROOT

from ssm_retrieval.training import store
from synthetic.evaluate import evaluate
from synthetic.runs import Run

FOLDERS = store.runs_in(ROOT / "studies" / "retrieval_cpu" / "models")


def test_there_is_one_of_each_family_and_none_is_large():
    runs = [Run(folder) for folder in FOLDERS]
    assert sorted(run.plan.family for run in runs) == ["hybrid", "mamba", "mamba2", "transformer"]
    assert {(run.plan.seq_len, run.plan.model_overrides["position"]) for run in runs} == {(64, "learned")}
    for folder in FOLDERS:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
        assert not any(
            b"/work" in p.read_bytes() or b"/tmp" in p.read_bytes() for p in folder.glob("*.json*")
        )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name.split("-")[3])
def test_a_model_answers_as_its_record_says(folder):
    """On the held-out sequences of every run, wherever they are computed."""
    run = Run(folder)
    found = evaluate(run.model(), run.task, examples=512, length=64, device="cpu", precision="float32")
    right = float(found.correct.mean())
    assert right > 0.95 and run.result["ci_low"] <= right <= run.result["ci_high"]
