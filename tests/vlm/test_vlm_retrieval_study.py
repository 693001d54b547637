"""The study of looking up: what its probes change in a picture, and what its tables compare."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")

from ssm_retrieval import models
from studies.vlm_retrieval import ablation, probes, rates, runs, summary
from vlm.configs.words import MODELS
from vlm.scenes import sample_scene
from vlm.scenes.words import Told, row

SIDE = 3


def places_of(number):
    """A scene with nine places, the object asked for, and what the probes find there."""
    scene = sample_scene(0, "heldout", number)
    target = scene.shapes[number % len(scene.shapes)]
    return scene, target, probes.Places.of(scene, target.box, SIDE)


def test_changes_move_what_a_patch_shows_and_nothing_else():
    """By scenes in words, where every place says its object."""
    told, seen = Told(SIDE), 0
    for number in range(40):
        scene, target, places = places_of(number)
        if places is None:
            continue
        seen += 1
        patches = told.of(scene)
        (mine,) = [k for k in range(9) if torch.equal(patches[k], _row(told, scene, target))]
        other = next(item for item in scene.shapes if item.box == places.other_box)
        (theirs,) = [k for k in range(9) if torch.equal(patches[k], _row(told, scene, other))]
        nothing = patches[places.empty]
        assert nothing[0] == 1 and nothing[1:].abs().sum() == 0  # the word "nothing"
        wanted = {how: patches.clone() for how in probes.CHANGES}
        wanted["target empty"][mine] = wanted["other empty"][theirs] = nothing
        wanted["exchanged"][mine], wanted["exchanged"][theirs] = patches[theirs], patches[mine]
        for how in probes.CHANGES:
            assert torch.equal(places.change(patches, how), wanted[how]), how
    assert seen > 20


def _row(told, scene, item):
    """What the place of an object says, by the place of its middle."""
    x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
    return told.of(scene)[int(SIDE * y / scene.size) * SIDE + int(SIDE * x / scene.size)]


def test_objects_of_several_patches_are_left_out():
    """With six patches a side an object has one or more; its places all say the same."""
    told, kept = Told(6), []
    for number in range(60):
        scene = sample_scene(0, "heldout", number)
        patches = told.of(scene)
        for target in scene.shapes:
            wanted = row((target.colour, target.name, target.size, target.texture), _corners(scene, target))
            count = sum(torch.equal(patch, wanted) for patch in patches)
            found = probes.Places.of(scene, target.box, 6)
            assert found is None or count == 1
            kept.append(found is not None)
    assert 0 < sum(kept) < len(kept)


def _corners(scene, item):
    return tuple(round(100 * corner / scene.size) for corner in item.box)


def test_edges_are_counted_where_the_two_boxes_differ():
    target = np.array([[0.1, 0.1, 0.3, 0.3], [0.1, 0.4, 0.3, 0.6], [0.5, 0.1, 0.7, 0.3]])
    other = np.array([[0.7, 0.7, 0.9, 0.9], [0.7, 0.42, 0.9, 0.6], [0.1, 0.7, 0.3, 0.9]])
    said = np.array([[0.12, 0.69, 0.3, 0.9], [0.71, 0.4, 0.9, 0.6], [np.nan] * 4])
    # x: all three pairs differ, one follows the target, one the other; y: the second pair does not differ
    wanted = {"target_x": 1 / 3, "other_x": 1 / 3, "target_y": 0.0, "other_y": 1 / 2}
    assert probes.edges_near(said, target, other) == pytest.approx(wanted)


def test_every_run_of_the_study_has_a_cell_and_the_rate_of_its_family():
    planned = runs.get_config()
    assert len({run.name for run in planned}) == len(planned) == 8 * sum(len(c.families) for c in runs.CELLS)
    tried = {(run.family, run.stages[-1].lr) for run in rates.get_config()}
    for run in planned:
        assert (run.family, run.stages[-1].lr) in tried
        assert run.stages[0].data.keys() == runs.WEIGHTS.keys() and run.seed in runs.SEEDS
    data = {(run.seed, str(run.stages[-1].data)) for run in planned}
    assert len(data) == len(runs.SEEDS)  # all families and cells see the same pictures, and every seed others


def test_ablations_ask_as_many_questions_and_change_something():
    def questions(run):
        return [s.steps * s.batch_size * next(iter(s.data.values())).turns for s in run.stages]

    base = {(one.family, one.seed): one for one in runs.get_config() if "-base-" in one.name}
    names = [one.name for one in ablation.get_config()]
    assert len(set(names)) == len(names) == 3 * (2 * len(ablation.CHANGES) + 8)
    for one in ablation.pictures():
        like = base[one.family, one.seed]
        assert one.stage_ids() != like.stage_ids()
        assert questions(one) == questions(like)[-len(one.stages) :]
        scratch = dict(init=like.init, model_overrides={}) if one.init is None else {}
        assert dataclasses.replace(one, name=like.name, stages=like.stages, **scratch) == like
        assert not scratch or one.stages == like.stages
    for family, options in ablation.OPTIONS.items():
        sizes = [
            models.build(
                f"{family}-tiny", vocab_size=300, **MODELS[f"{family}-tiny"] | changed
            ).num_parameters()
            for changed in options.values()
        ]
        assert max(sizes) < 1.05 * min(sizes)  # a shallow model is as large


def table(gap):
    """Results in which Mamba is `gap` below the Transformer in every seed; both rise by a point a seed."""
    return pd.DataFrame(
        {
            "run": f"{family}-base-seed{seed}", "family": family, "seed": seed, "task": task,
            "metric": "iou@0.5" if "grounding" in task else "accuracy",
            "value": 0.425 + 0.01 * seed - (gap if family == "mamba" else 0),
            "chance": 0.25, "question_only": 0.1, "image_only": 0.45,
        }
        for family in runs.PAPER for seed in range(8) for task in summary.TASKS
    )  # fmt: skip


def test_results_are_of_planned_runs_and_the_page_has_their_numbers():
    results = pd.read_parquet(summary.RESULTS)
    planned = {run.name: run for run in runs.get_config()}
    assert not results.duplicated(["run", "task", "metric"]).any() and set(results["run"]) <= set(planned)
    for name, part in results.groupby("run"):
        run = planned[name]
        assert set(part["task"]) == set(run.evaluation) and set(part["stage"]) == {run.stage_ids()[-1]}
        settled = run.family, run.seed, run.layout, sum(stage.steps for stage in run.stages)
        columns = ["family", "seed", "layout", "steps"]
        assert set(part[columns].itertuples(index=False, name=None)) == {settled}
    cells = summary.scores(results).groupby(["cell", "family"])["seed"].nunique()
    assert set(cells) == {len(runs.SEEDS)}  # no cell is shown with fewer seeds
    text = (summary.HERE / "README.md").read_text(encoding="utf-8")
    assert summary.filled(text) == text, "python -m studies.vlm_retrieval.summary"


def test_the_rates_are_the_best_on_validation_pictures():
    found = pd.read_csv(rates.HERE / "rates.csv")
    best = found.loc[found.groupby("family")["mean"].idxmax()].set_index("family")["lr"]
    assert best.to_dict() == pytest.approx(runs.RATES)
    assert found.groupby("family")["lr"].apply(lambda lr: tuple(sorted(lr)) == rates.TRIED).all()


def test_scores_are_points_by_cell_with_the_best_guess():
    found = summary.scores(table(0.2))
    assert set(found["cell"]) == {"base"} and set(found["guess"]) == {45.0}
    values = summary.of(found, "base", "mamba", "grounding")
    assert np.allclose(values, 22.5 + np.arange(8)) and list(values.index) == list(range(8))
    line = next(row for row in summary.base(found).splitlines() if row.startswith("| existence "))
    assert "46.0 [44.0, 48.0]; 5 of 8 [0.24, 0.91] | 26.0 [24.0, 28.0]; 0 of 8 [0.00, 0.37]" in line


def test_differences_are_paired_and_their_intervals_hold_for_all_comparisons():
    """A gap that is the same in every seed has an interval of no width, however much the seeds differ."""
    found = summary.scores(table(0.2))
    a, b = (summary.of(found, "base", family, "grounding") for family in ("transformer", "mamba"))
    assert summary.difference(a, b) == "20.0 [20.0, 20.0]"
    noise = pd.Series([1.0, -1, 1, -1, 1, -1, 1, -1])
    wide = 3.5 + 0 * noise  # sd of the noise is sqrt(8 / 7), its mean 0: Student's quantile of 7 degrees
    from scipy import stats

    half = stats.t.ppf(1 - 0.025 / summary.COMPARISONS, 7) * np.sqrt(8 / 7 / 8)
    assert summary.difference(wide + noise, 0 * noise) == f"3.5 [{3.5 - half:.1f}, {3.5 + half:.1f}]"
