"""The study of the quick start: its table is of its runs, and the pages have the table's numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from studies.scores import collect
from studies.vlm_pretrained import summary
from vlm import pretrained
from vlm.config import read_file
from vlm.results import COLUMNS, table_path


@pytest.fixture(scope="module")
def results() -> pd.DataFrame:
    return pd.read_parquet(summary.RESULTS)


def test_results_are_of_all_runs_and_no_others(results):
    assert list(results.columns) == list(COLUMNS) and not results.duplicated(["run", "task", "metric"]).any()
    wanted = {run.name: run for run in read_file(summary.HERE / "runs.py")}
    assert set(results["run"]) == set(wanted)
    for name, part in results.groupby("run"):
        run = wanted[name]
        assert set(part["task"]) == set(run.evaluation)
        assert set(part["stage"]) == {run.stage_ids()[-1]}
        settled = run.family, run.seed, sum(stage.steps for stage in run.stages)
        assert set(part[["family", "seed", "steps"]].itertuples(index=False, name=None)) == {settled}


def test_pages_have_the_numbers_of_the_table(results):
    for path, text in summary.filled(results).items():
        assert path.read_text(encoding="utf-8") == text, f"python -m studies.vlm_pretrained.summary: {path}"


def test_scores_in_words_are_of_the_models_of_the_toolkit():
    found = pd.read_parquet(summary.WORDS)
    wanted = {run.family: run for run in read_file(pretrained.CONFIG)}
    assert set(found["family"]) == set(wanted)
    for family, part in found.groupby("family"):
        made = json.loads((pretrained.FOLDER / family / pretrained.MADE).read_text())
        assert set(part["stage"]) == {made["stage"]} and set(part["steps"]) == {sum(made["steps"])}
        assert set(part["task"]) == set(wanted[family].evaluation)
        assert part["parameters"].min() > made["parameters"]  # and a connector


def test_goals_are_counted_by_seed():
    def row(family, seed, task, metric, value):
        return dict(family=family, seed=seed, task=task, metric=metric, value=value, chance=0.5,
                    question_only=0.4, image_only=float("nan"))  # fmt: skip

    found = [
        row(family, seed, task, metric, 0.9 if (family, seed) != ("mamba", 1) else 0.1)
        for family in summary.FAMILIES
        for seed in range(3)
        for task, metric in summary.GOALS
    ]
    lines = summary.scores(pd.DataFrame(found)).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "existence", "50.0", "85", "90.0 (90.0, 90.0, 90.0)", "3 of 3 [0.29, 1.00]",
        "63.3 (90.0, 10.0, 90.0)", "2 of 3 [0.09, 0.99]",
    ]  # fmt: skip
    assert len(lines) == 2 + len(summary.GOALS)


def test_the_demo_has_the_first_seed_of_the_study(results):
    shown = {path.name for path in (Path(summary.HERE).parents[1] / "vlm" / "demo" / "models").iterdir()}
    assert shown == set(results.loc[results["seed"] == 0, "stage"])


def test_scores_of_earlier_runs_stay(results, tmp_path):
    """A study that is measured in parts: new runs are added, those measured again are replaced."""
    known = results[results["run"].isin(sorted(set(results["run"]))[:3])]
    first, again, other = (part for _, part in known.groupby("run"))
    runs = [run for run in read_file(summary.HERE / "runs.py") if run.name in set(known["run"])]
    by_name = {run.name: run for run in runs}
    to = tmp_path / "results.parquet"
    pd.concat([first, again.assign(value=0.0)]).to_parquet(to)
    for part in (again, other):
        path = table_path(tmp_path, part["run"].iloc[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        part.to_parquet(path)
    collect([by_name[part["run"].iloc[0]] for part in (again, other)], tmp_path, to)
    found = pd.read_parquet(to)
    assert list(found.columns) == list(COLUMNS) and len(found) == len(known)
    both = found.merge(known, on=["run", "task", "metric"], suffixes=("", "_known"))
    assert len(both) == len(known) and (both["value"] == both["value_known"]).all()
    assert both["image_only"].isna().tolist() == both["image_only_known"].isna().tolist()
