"""Sweep files: what a grid expands to, what is refused, how a learning rate is chosen."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthetic import grid as grids
from synthetic.config import RunConfig
from synthetic.grid import Sweep, choose, grid, group, score


def test_every_combination_once_the_last_axis_fastest():
    runs = grid(RunConfig(steps=7), model=("mamba", "mamba2"), seq_len=(8, 16), seed=range(3))
    found = [(*run.model, run.seq_len, run.seed) for run in runs]
    assert found == list(itertools.product(("mamba", "mamba2"), (8, 16), range(3)))
    assert all(run.steps == 7 for run in runs)


def test_a_single_value_is_an_axis_of_one():
    (run,) = grid(model="mamba", layout="prefix", d_state=4)
    assert (run.model, run.layout, run.d_state) == (("mamba",), "prefix", 4)


BAD = [
    (lambda: grid(sequence=8), "no option 'sequence'; valid: seq_len"),
    (lambda: grid(out="elsewhere"), "no option 'out'"),
    (lambda: grid(model="mamba", layout="infix"), "layout 'infix' is not valid; choose from suffix, prefix"),
    (lambda: grid(model="lstm"), "--model lstm: unknown model 'lstm'; valid: transformer, mamba"),
    (lambda: grid(model="mamba", position="sine"), "position 'sine' is not valid; .*rope, none, None"),
    (lambda: Sweep(runs=[]), "runs is empty"),
    (lambda: Sweep(runs=[RunConfig()]), "must be a single one"),
    (
        lambda: Sweep(runs=grid(model="mamba", seed=(0, 1)), learning_rates=(1e-3,), validation_seeds=(1, 5)),
        r"seeds \[1\] both choose learning rates and are reported",
    ),
    (lambda: Sweep(runs=grid(model="mamba"), learning_rates=(1e-3,)), "need each other"),
    (
        lambda: Sweep(runs=grid(model="mamba", lr=1e-3), learning_rates=(1e-3,), validation_seeds=(9,)),
        "contradicts learning_rates",
    ),
]


BAD += [
    (lambda: grid(model="mamba", seq_len="16"), "seq_len '16' is not valid; its type is int"),
    (lambda: grid(model="mamba", seq_len=16.0), "seq_len 16.0 is not valid"),
    (lambda: grid(model="mamba", lr=True), "lr True is not valid"),
    (lambda: Sweep(runs=[RunConfig(model=("mamba",), schedule="cosin")]), "schedule 'cosin' is not valid"),
    (
        lambda: Sweep(runs=grid(model="mamba"), learning_rates=1e-3, validation_seeds=(9,)),
        "learning_rates 0.001 must be a list or tuple",
    ),
    (
        lambda: grids.validation_runs(
            Sweep(grid(model="mamba"), (1e-3,), (9,), tune=lambda run: run.no_such_option)
        ),
        "tune: AttributeError",
    ),
    (
        lambda: grids.validation_runs(Sweep(grid(model="mamba"), (1e-3,), (9,), tune=lambda run: None)),
        "tune returns NoneType, not a RunConfig",
    ),
]


@pytest.mark.parametrize("make, message", BAD)
def test_impossible_sweeps_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_plain_numbers():
    (first, *_) = grid(model="mamba", seed=np.arange(2), lr=np.array([1e-3]), steps=np.int64(3))
    assert [type(x) for x in (first.seed, first.lr, first.steps)] == [int, float, int]


FILES = [
    ("", "defines no get_config"),
    ("def get_config(): return 3", "returns int, not a Sweep"),
    ("def get_config(): return 1 / 0", "ZeroDivisionError"),
    ("import nothing_of_this_name", "ModuleNotFoundError"),
    ("def get_config(:", "SyntaxError"),
]


@pytest.mark.parametrize("text, message", FILES)
def test_files_without_a_sweep(text, message, tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        grids.load(file)
    assert str(file) in str(error.value)


def test_files_may_have_dataclasses(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from synthetic.grid import Sweep\nfrom synthetic.config import RunConfig\n"
        "@dataclass(frozen=True)\nclass Cell:\n    steps: int\n"
        "def get_config(): return Sweep([RunConfig(steps=Cell(3).steps, model=('mamba',))])\n"
    )
    assert grids.load(file).runs[0].steps == 3


def test_missing_file_and_wrong_kind(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        grids.load(tmp_path / "no.py")
    (tmp_path / "sweep.yaml").write_text("")
    with pytest.raises(ValueError, match="no Python file"):
        grids.load(tmp_path / "sweep.yaml")


def test_folder_of_the_runs_is_named_like_the_file(tmp_path):
    assert grids.default_out(tmp_path / "first.py") == "runs/first"
    assert grids.default_out(tmp_path / "retrieval" / "config.py") == "runs/retrieval"


def test_validation_runs_are_one_per_group_rate_and_seed():
    runs = [
        *grid(model="mamba", d_state=(4, 8), seed=(0, 1)),
        *grid(model="transformer", position=("rope", "none")),
    ]
    found = grids.validation_runs(
        Sweep(runs, (1e-3, 2e-3), (7, 8), lambda run: dataclasses.replace(run, seq_len=16, steps=5))
    )
    assert [name[1] for name in found] == ["mamba", "transformer", "transformer"]  # d_state makes no group
    for rates in found.values():
        assert {lr: [run.seed for run in runs] for lr, runs in rates.items()} == {1e-3: [7, 8], 2e-3: [7, 8]}
        assert all((r.seq_len, r.steps, r.lr) == (16, 5, lr) for lr, runs in rates.items() for r in runs)


def test_score_is_the_area_under_the_accuracy_curve():
    rows = [dict(step=10, accuracy=0.2), dict(step=30, accuracy=1.0)]
    assert score(rows, total=100) == pytest.approx((10 * 0 + 20 * 0.2 + 70 * 1.0) / 100)


def test_budgets_of_sequences_count_what_was_left_unused():
    fast = [dict(examples=50, accuracy=0.5), dict(examples=100, accuracy=0.98)]
    slow = [dict(examples=n, accuracy=0.6) for n in range(50, 1001, 50)]
    assert score(fast, 1000, by="examples") > 0.9 > score(slow, 1000, by="examples")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 5))
def test_learning_the_same_earlier_never_scores_less(accuracies, shift):
    late = [dict(step=10 * (i + 1) + shift, accuracy=a) for i, a in enumerate(sorted(accuracies))]
    early = [dict(step=row["step"] - shift, accuracy=row["accuracy"]) for row in late]
    assert score(early, 100) >= score(late, 100) - 1e-12


def test_the_best_mean_wins_and_of_equals_the_smallest():
    assert choose({1e-3: [0.1, 0.9], 2e-3: [0.6, 0.6], 4e-3: [0.0, 0.9]}) == 2e-3
    assert choose({4e-3: [0.5], 2e-3: [0.5]}) == 2e-3


def test_runs_of_another_shape_have_a_learning_rate_of_their_own():
    """All but the state size, whose runs share one, as the studies' do."""
    shapes = [{}, dict(d_model=64), dict(d_conv=2), dict(ssm_init="recall"), dict(layers=2)]
    groups = {group(run) for shape in shapes for run in grid(model="mamba", d_state=(4, 64), **shape)}
    assert len(groups) == len(shapes)


@pytest.mark.parametrize(
    "changed", [dict(growth="prefix"), dict(rotary_pct=1.0), dict(position="none"), dict(d_model=64)]
)
def test_a_rate_is_chosen_for_one_recipe(changed):
    """Seeds and lengths share it; what else may ask for another rate does not."""
    run = RunConfig(model="transformer", position="rope", growth="filled")
    assert group(dataclasses.replace(run, seed=3, seq_len=16)) == group(run)
    assert group(dataclasses.replace(run, **changed)) != group(run)
