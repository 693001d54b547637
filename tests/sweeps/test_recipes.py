"""Recipes: settings are the papers', every run can be planned, and the page's tables are the results."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from readme_commands import ROOT

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from studies.recipes import GOAL, report
from studies.recipes.recall_law_linear import PUBLISHED
from synthetic import curricula, results, tasks, trainer
from synthetic.config import plan, run_id

FOLDER = ROOT / "studies" / "recipes"
FILES = sorted(file for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "report"))


def of_a_seed(name, monkeypatch):
    """The reported runs of one of the five seeds: all of them take seconds to make."""
    module = report.recipe(name)
    assert range(5) == module.SEEDS
    monkeypatch.setattr(module, "SEEDS", range(1))
    return module.get_config().runs


@pytest.fixture(scope="module")
def law():
    with pytest.MonkeyPatch.context() as patch:
        return [plan(run, "linear") for run in of_a_seed("recall_law_linear", patch)]


def test_every_recipe_is_on_the_page_and_in_the_report():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [file.stem for file in FILES] == sorted(report.RECIPES)
    for file in FILES:
        assert f"]({file.name})" in page and f"## `{file.stem}`" in page
        assert f"python -m synthetic.sweep studies/recipes/{file.name}" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_run_can_be_planned_and_has_a_name_of_its_own(file, monkeypatch):
    runs = of_a_seed(file.stem, monkeypatch)
    names = {run_id(plan(run, run.model[0])) for run in runs}
    assert len(names) == len(runs) and {run.seed for run in runs} == {0}
    cells = {tuple(run.model[0] if c == "model" else getattr(run, c) for c in report.recipe(file.stem).CELL)
             for run in runs}  # fmt: skip
    assert len(cells) == len(runs) and cells <= set(report.recipe(file.stem).PUBLISHED)


def test_tables_of_the_page_are_its_results():
    """If not: `python -m studies.recipes.report`."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert report.filled(page) == page


def test_the_law_has_the_published_cells(law):
    """README of mamba-recall-scaling-laws: np.load(accuracy_grid__val.npy).round(2), rows D, columns N."""
    grid = [[0.24, 0.32, None, None], [0.64, 0.89, 0.94, 0.95], [0.82, 0.98, 1.0, 1.0], [0.89, 1.0, 1.0, 1.0]]
    cells = itertools.product((16, 32, 48, 64), (8, 16, 24, 32))
    wanted = {
        cell: value for cell, value in zip(cells, itertools.chain(*grid), strict=True) if value is not None
    }
    assert wanted == PUBLISHED
    configs = [models.config(p.model, **p.model_overrides) for p in law]
    assert {(c.d_model, c.d_state) for c in configs} == set(wanted) and len(law) == len(wanted)
    shapes = {(c.n_layer, c.d_conv, c.expand, c.position, c.residual) for c in configs}
    assert shapes == {(1, 2, 2, "none", False)}


def test_the_law_trains_as_published(law):
    """config/MQAR__D_N__linear_trained__example.json5: 100 steps up, 400 at the peak, 1,500 down a cosine."""
    p = law[0]
    batch = curricula.next_batch(tasks.build(p.task, **p.task_options), p, trainer.Progress(length=p.seq_len))
    assert batch.input_ids.shape == (32, 64) and batch.labels.shape == (32, 16)
    rates = {
        step: trainer.learning_rate(p, trainer.Progress(step=step)) for step in (49, 99, 300, 500, 1250, 1625)
    }
    wanted = {49: 0.5, 99: 1.0, 300: 1.0, 500: 1.0, 1250: 0.5, 1625: (1 - 2**-0.5) / 2}
    assert rates == pytest.approx(wanted, abs=0.02)
    assert (p.lr, p.betas, p.weight_decay, p.label_smoothing) == (1e-2, (0.9, 0.95), 0.0, 0.1)
    assert (p.steps, p.grad_clip, p.precision, p.curriculum) == (2000, 1.5, "float32", 0) and p.stop_at > 1
    batch = tasks.build(p.task, **p.task_options).batch(400, seed=0, index=0, split="heldout")
    gaps = np.bincount(batch.answer_at.flatten().numpy(), minlength=64)  # 16 of 16 places, so each is asked
    assert (gaps[:32] == 0).all() and (gaps[32::2] == 400).all() and (gaps[33::2] == 0).all()


def test_a_table_has_every_cell_and_its_seeds_in_order():
    runs = pd.DataFrame(
        [(32, 8, 1, 0.6, 9.0), (32, 8, 0, 0.7, 11.0), (64, 8, 0, 0.875, 30.0)],
        columns=["d_model", "d_state", "seed", "accuracy", "seconds"],
    )
    lines = report.cells(
        {(32, 8): 0.64, (64, 8): 0.89, (64, 16): None, (64, 24): 1.0}, runs, ["d_model", "d_state"]
    ).splitlines()[2:]
    assert lines == [
        "| 32 | 8 | 0.64 | 0.650 [0.600, 0.700] | 0.700, 0.600 | +0.010 | 10 |",
        "| 64 | 8 | 0.89 | 0.875 | 0.875 | -0.015 | 30 |",
        "| 64 | 16 | – | not run yet | – | – | – |",
        "| 64 | 24 | 1.00 | not run yet | – | – | – |",
    ]


def test_a_cell_is_told_by_the_recipe_s_columns():
    """Families by their label; of a cell without a published number there is no difference."""
    runs = pd.DataFrame(
        [("mamba", 64, 0, 0.5, 7.0), ("hybrid", 64, 0, 0.75, 8.0)],
        columns=["model", "seq_len", "seed", "accuracy", "seconds"],
    )
    published = {("mamba", 64): None, ("mamba2", 64): 0.9, ("hybrid", 64): GOAL}
    lines = report.cells(published, runs, ["model", "seq_len"]).splitlines()
    assert lines[0].startswith("| model | context | published, or goal |")
    assert lines[2:] == [
        "| Mamba | 64 | – | 0.500 | 0.500 | – | 7 |",
        "| Mamba-2 | 64 | 0.90 | not run yet | – | – | – |",
        "| Hybrid | 64 | goal: ≥ 0.99 | 0.750 | 0.750 | – | 8 |",
    ]


def test_rows_are_the_last_evaluations_of_reported_runs():
    cell = ["d_model", "d_state"]
    assert {*cell, *report.COLUMNS} < set(results.EVALUATION)
    numbers = dict.fromkeys([*cell, *report.COLUMNS], 0)
    rows = [
        dict(numbers, d_model=64, seed=1, accuracy=0.9, kind="final", purpose="report"),
        dict(numbers, d_model=64, seed=0, accuracy=0.8, kind="final", purpose="report"),
        dict(numbers, d_model=64, seed=0, accuracy=0.1, kind="during", purpose="report"),
        dict(numbers, d_model=64, seed=9, accuracy=0.2, kind="final", purpose="validation"),
        dict(numbers, d_model=32, seed=5, accuracy=0.7, kind="final", purpose="report"),
    ]
    found = report.finished(pd.DataFrame(rows), cell)
    assert list(found) == [*cell, *report.COLUMNS] and found["accuracy"].tolist() == [0.7, 0.8, 0.9]


def test_the_law_s_full_mamba_is_the_published_configuration(monkeypatch):
    """config/MQAR__D_N__full_trained__regime_0.json5, with the widths and states of its example."""
    runs = of_a_seed("recall_law_mamba", monkeypatch)
    p = plan(runs[0], "mamba")
    assert (p.steps, p.batch_size, p.warmup, p.flat, p.schedule) == (20000, 128, 100, 5900, "cosine")
    assert (p.lr, p.betas, p.weight_decay, p.label_smoothing) == (1e-2, (0.9, 0.95), 0.0, 0.1)
    assert (p.grad_clip, p.stop_at, p.precision, p.eval_every) == (0.75, 0.999, "float32", 1000)
    shape = models.config(p.model, **p.model_overrides)
    assert (shape.n_layer, shape.d_conv, shape.expand, shape.norm, shape.ssm_init) == (
        1,
        2,
        2,
        "rms",
        "default",
    )
    assert {(run.d_model, run.d_state) for run in runs} == set(PUBLISHED)
    small = of_a_seed("recall_law_mamba_long", monkeypatch)
    assert {(r.d_model, r.d_state) for r in small} == {(r.d_model, r.d_state) for r in runs}


def test_a_folder_of_another_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="is of no recipe; its name must be one of recall_law_linear"):
        report.main(str(tmp_path))
