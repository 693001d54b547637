"""Figures of a sweep show what its tables say, and the command writes all of them."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from result_tables import run_rows, tables

import analysis
from analysis import curves, plots, settings
from analysis.comparisons import comparisons
from synthetic import results, store


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def sweep():
    """Transformers need 1000 * (length / 8) sequences; Mamba gets there at 8 only, with states 4 and 16."""
    runs = []
    for seed in (0, 1, 2):
        for length, step in ((8, 1), (16, 2), (32, 4)):
            runs.append(run_rows("transformer", length, seed, [0.1] * (step - 1) + [0.99]))
        for length, last in ((8, 0.96), (16, 0.4)):
            runs.append(run_rows("mamba", length, seed, [0.2, 0.3, last, last]))
        runs.append(run_rows("mamba", 8, seed, [0.2, 0.3, 0.5, 0.6], d_state=4))
        runs.append(run_rows("mamba", 16, seed, [0.97], layout="prefix", queries=1))
        runs.append(run_rows("mamba", 16, seed, [0.1, 0.2, 0.96], queries=1))
    return tables(runs)


def test_labels(sweep):
    table = settings.label(sweep[0])
    assert settings.variants(table) == ["Transformer", "Mamba"]
    assert set(table["setting"]) == {"suffix, dense queries", "suffix, single query", "prefix, single query"}
    assert set(table.loc[~table["usual_state"], "d_state"]) == {4}  # 16 states were run at more lengths


def test_position_schemes_and_whatever_else_differs_are_named():
    runs = [
        run_rows("transformer", 8, 0, [0.5], position="rope", rotary_pct=0.25),
        run_rows("transformer", 8, 1, [0.5], position="rope", rotary_pct=1.0),
        run_rows("transformer", 8, 2, [0.5], position="none"),
        run_rows("transformer", 8, 3, [0.5], lr=1e-3),
        run_rows("transformer", 8, 3, [0.5], lr=2e-3),
    ]
    table = settings.label(tables(runs)[0])
    assert set(table["variant"]) == {
        "Transformer, RoPE 25 %", "Transformer, RoPE", "Transformer, no positions",
        "Transformer, lr 0.001", "Transformer, lr 0.002",
    }  # fmt: skip
    looks = settings.looks(table)
    assert len({look["color"] for look in looks.values()}) == 1  # colour is the family's
    assert looks["Transformer, RoPE"]["linestyle"] != looks["Transformer, no positions"]["linestyle"]


def test_a_table_without_the_columns_is_refused():
    with pytest.raises(ValueError, match="must be one of the results store"):
        settings.label(pd.DataFrame({"model": ["mamba"]}))


def test_runs_keep_their_last_accuracy_after_an_early_stop():
    cell = pd.DataFrame(
        [("a", 10, 0.5), ("a", 20, 1.0), ("b", 15, 0.25), ("b", 40, 0.75)],
        columns=["run", "examples", "accuracy"],
    )
    wide = plots.carried(cell, "examples")
    assert wide.index.tolist() == [10, 15, 20, 40]
    assert wide["a"].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert wide["b"].tolist() == [0.0, 0.25, 0.25, 0.75]


def test_accuracy_curves_have_a_panel_per_setting_and_length(sweep):
    table = plots.accuracy_table(sweep[0])
    assert not table["run"].str.contains("None-4").any()  # the unusual state is not among them
    axes = plots.accuracy_curves(table).axes
    assert len(axes) == 3 * 3
    assert axes[0].get_title() == "length 8" and "suffix, dense" in axes[0].get_ylabel()
    thick = [line for line in axes[0].get_lines() if line.get_linewidth() == 2]
    # mean of three equal runs: the last point of Mamba's curve at length 8
    assert sorted(line.get_ydata()[-1] for line in thick) == pytest.approx([0.96, 0.99])
    assert [t.get_text() for t in axes[3].texts] == ["not run"]


def test_cost_vs_length_shows_every_run_and_the_fit(sweep):
    table = plots.threshold_table(sweep[0], "examples")
    dense = table[table["setting"] == "suffix, dense queries"]
    transformer = dense[dense["variant"] == "Transformer"]
    assert (transformer["value"] == 1000 * transformer["seq_len"] / 8).all() and transformer["reached"].all()
    mamba = dense[(dense["variant"] == "Mamba") & (dense["seq_len"] == 16)]
    assert not mamba["reached"].any() and (mamba["value"] == 4000).all()
    ax = plots.cost_vs_length(table).axes[0]
    hollow = [line for line in ax.get_lines() if line.get_marker() == "^"]
    assert sum(len(line.get_xdata()) for line in hollow) == 3
    fits = [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    (fit,) = fits  # Mamba got there at one length only, which gives no slope
    np.testing.assert_allclose(np.diff(np.log(fit.get_ydata())) / np.diff(np.log(fit.get_xdata())), 1.0)
    assert any("Transformer: 1.00 [1.00, 1.00]" in text.get_text() for text in ax.texts)


def test_scaling_and_comparisons(sweep):
    laws = plots.scaling_table(sweep[0]).set_index(["unit", "variant", "setting"])
    for unit in ("examples", "tokens"):  # in proportion in these runs
        assert laws.loc[(unit, "Transformer", "suffix, dense queries"), "exponent"] == pytest.approx(1.0)
    table = comparisons(plots.threshold_table(sweep[0], "tokens"))
    pair = table[table["kind"] == "variant"].iloc[0]
    assert (pair["a"], pair["b"], pair["n"]) == ("Mamba", "Transformer", 6)
    assert pair["b_first"] == 6 and pair["p"] == pytest.approx(2 / 2**6)
    (single,) = table[table["kind"] == "layout"].to_dict("records")  # dense against single is no question
    assert (single["within"], single["a"], single["b"]) == ("Mamba, single query", "prefix", "suffix")
    assert (single["n"], single["a_first"], single["p_holm"]) == (3, 3, single["p"])


def test_state_size(sweep):
    table = plots.state_table(sweep[0])
    assert set(table["d_state"]) == {4, 16} and set(table["seq_len"]) == {8}
    assert table.groupby("d_state")["longest"].first().tolist() == [0, 8]
    left, right = plots.state_size(table).axes
    assert "longest length" in left.get_ylabel() and "0.95" in right.get_ylabel()
    assert "d_state" in left.get_xlabel()


def test_heat_map_adds_seeds_and_keeps_the_last_value(sweep):
    table = plots.heat_table(sweep[1])
    assert set(zip(table["variant"], table["seq_len"], strict=True)) == {("Transformer", 32), ("Mamba", 16)}
    cell = table[(table["variant"] == "Transformer") & (table["target_low"] == 0)]
    assert cell["step"].tolist() == [100, 200, 300, 400]
    assert cell["count"].tolist() == [3 * 60] * 4
    np.testing.assert_allclose(cell["accuracy"], [6 / 60] * 3 + [60 / 60])
    # a single step of the prefix runs is carried on to the last step that Mamba was evaluated at
    prefix = table[(table["setting"] == "prefix, single query") & (table["target_low"] == 0)]
    assert prefix["accuracy"].nunique() == 1 and prefix["step"].max() == 400
    figure = plots.position_step(table)
    assert any("Transformer, 32" in ax.get_title() for ax in figure.axes)


def test_accuracy_by_position(sweep):
    table = plots.position_table(sweep[1])
    cell = table[(table["variant"] == "Transformer") & (table["setting"] == "suffix, dense queries")]
    np.testing.assert_allclose(cell["accuracy"], [60 / 60, 59 / 60])
    assert (cell["count"] == 180).all()
    figure = plots.by_position(table)
    assert len(figure.axes) == 3 and figure.axes[0].get_ylabel() == "final held-out accuracy"


def test_runs_that_would_stand_in_one_cell_are_told_apart():
    runs = [run_rows("mamba", 8, 0, [0.5], steps=steps) for steps in (300, 600)]
    table = settings.label(tables(runs)[0])
    assert settings.variants(table) == ["Mamba, steps 300", "Mamba, steps 600"]
    assert "steps" in settings.cell_of(tables(runs)[0])


def test_the_usual_state_is_the_presets():
    """Mamba-2 has 64 states at `tiny` and 128 at the published sizes."""
    sizes = (("tiny", 64), ("tiny", 16), ("130m", 128), ("130m", 64))
    runs = [run_rows("mamba2", 8, 0, [0.5], preset=preset, d_state=state) for preset, state in sizes]
    table = settings.label(tables(runs)[0])
    usual = table[table["usual_state"]]
    assert set(zip(usual["preset"], usual["d_state"], strict=True)) == {("tiny", 64), ("130m", 128)}
    assert settings.variants(table) == ["Mamba-2, preset 130m", "Mamba-2, preset tiny"]


def test_other_tasks_have_no_dense_queries():
    table = settings.label(tables([run_rows("mamba", 8, 0, [0.5], task="mqar", layout=None)])[0])
    assert set(table["setting"]) == {"its own layout"}


def test_two_models_of_one_folder_and_an_unfinished_run(tmp_path, capsys):
    """As `synthetic.run --model mamba mamba2` leaves them; a third run has only begun."""
    runs = []
    for model in ("mamba", "mamba2"):
        for state in (4, 16):
            rows, targets = run_rows(model, 8, 0, [0.5, 0.97], d_state=state)
            renamed = [[row | {"run": f"both-{state}"} for row in part] for part in (rows, targets)]
            runs.append(tuple(renamed))
    rows, targets = run_rows("mamba", 16, 1, [0.2])
    runs.append(([row | {"length": 4, "kind": "during"} for row in rows[:1]], []))
    for name, table, columns in zip(
        ("results", "targets"), tables(runs), (results.EVALUATION, results.TARGET), strict=True
    ):
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        store.write_bytes(tmp_path / f"{name}.parquet", results.to_parquet(rows, columns))
    assert curves.main([str(tmp_path / "results.parquet"), "--out", str(tmp_path / "out")]) == 0
    assert "1 runs have no evaluation at their full length yet" in capsys.readouterr().out
    states = pd.read_csv(tmp_path / "out" / "state_size.csv")
    assert sorted(zip(states["model"], states["d_state"], states["longest"], strict=True)) == [
        ("mamba", 4, 8), ("mamba", 16, 8), ("mamba2", 4, 8), ("mamba2", 16, 8),
    ]  # fmt: skip
    (tmp_path / "targets.parquet").unlink()
    assert curves.main([str(tmp_path / "results.parquet"), "--out", str(tmp_path / "less")]) == 0
    assert not (tmp_path / "less" / "by_position.csv").exists()


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(sweep, tmp_path_factory):
    """results.parquet and targets.parquet, as a study commits them."""
    folder = tmp_path_factory.mktemp("study")
    for name, table, columns in zip(
        ("results", "targets"), sweep, (results.EVALUATION, results.TARGET), strict=True
    ):
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        store.write_bytes(folder / f"{name}.parquet", results.to_parquet(rows, columns))
    return folder


def test_the_command_writes_every_figure_with_its_table(study, tmp_path, capsys):
    assert curves.main([str(study / "results.parquet"), "--out", str(tmp_path)]) == 0
    drawn = (
        "accuracy_curves",
        "examples_vs_length",
        "tokens_vs_length",
        "state_size",
        "position_step",
        "by_position",
    )
    tabled = ("summary", "scaling", "comparisons")
    names = {f"{name}.{kind}" for name in drawn for kind in ("png", "pdf", "csv")}
    assert {path.name for path in tmp_path.iterdir()} == names | {f"{name}.csv" for name in tabled}
    assert len(capsys.readouterr().out.splitlines()) == len(drawn) + len(tabled)
    summary = pd.read_csv(tmp_path / "summary.csv")
    one = summary[(summary["model"] == "transformer") & (summary["seq_len"] == 8)].iloc[0]
    assert (one["seeds"], one["reached"], one["accuracy"], one["examples"]) == (3, 3, 0.99, 1000)


def test_the_same_table_gives_the_same_bytes(study, tmp_path):
    for name in ("a", "b"):
        assert curves.main([str(study / "results.parquet"), "--out", str(tmp_path / name)]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_loading_a_study_gives_its_rows_in_order(study, sweep):
    table = analysis.load(study / "results.parquet")
    assert len(table) == len(sweep[0]) and table["run"].is_monotonic_increasing
    assert len(analysis.load(study / "results.parquet", "targets")) == len(sweep[1])
    assert len(analysis.load([study, study])) == 2 * len(table)


BAD = [
    (["nowhere"], "nowhere does not exist"),
    (["."], "no results in"),
    (["other.parquet"], "it is not a file of the results store"),
]


@pytest.mark.parametrize("words, message", BAD)
def test_bad_input_gives_one_line_and_status_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet("other.parquet")
    assert curves.main([*words, "--out", str(tmp_path / "figures")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
