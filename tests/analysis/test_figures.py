"""The paper's figures: that they show what the tables say, and that nothing is mixed or invented."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from tiny_runs import by_family

matplotlib.use("Agg")

from analysis import diagrams, entries, figures, published, vlm_plots
from analysis.plots import FIGURES, lens, patch
from analysis.plots.common import grid_of
from probes.suite import PROBES
from ssm_retrieval.style import DOUBLE, SINGLE, theme
from vlm.layout import image_ids, sequence
from vlm.prompts import LAYOUTS
from vlm.results import COLUMNS


def means(part):
    table = published.mean_gaps(published.results())
    return table[table["part"] == part]["gap"].round(2).tolist()


def test_the_published_gaps_are_those_worked_out_by_hand():
    assert means("grounding") == [4.31, 4.57, 4.91]
    assert means("grounding without RefCOCO+ A") == [7.70, 4.70, 5.14]
    assert means("all others") == [-1.44, -1.44, -1.08]
    gaps = published.gaps(published.results())
    row = gaps[gaps["suspect"]]
    assert len(row) == 1 and row["gap"].item() == pytest.approx(45.36 - 57.97)


def test_every_published_cell_is_there_once_and_one_is_suspect():
    table = published.results()
    assert len(table) == 6 * 16 and table["value"].notna().all() and table["suspect"].sum() == 1
    assert not table.duplicated(["model", "benchmark"]).any() and table["group"].notna().all()
    a, b = (table[table["benchmark"] == f"RefCOCOplus_test{x}"].set_index("model")["value"] for x in "AB")
    assert list((a - b)[a < b].index) == [published.SUSPECT[0]]  # what makes it suspect


def test_the_gap_figure_draws_the_table():
    figure = vlm_plots.gap_vs_scale(published.results())
    left, right = figure.axes
    gaps = published.gaps(published.results())
    for label, part in gaps[gaps["group"] == "grounding"].groupby("label"):
        (line,) = [line for line in left.lines if line.get_label() == label]
        assert np.allclose(line.get_ydata(), part["gap"])
    drawn = sorted(tuple(np.round(line.get_ydata(), 6)) for line in right.lines if len(line.get_ydata()) == 3)
    table = published.mean_gaps(published.results())
    assert drawn == sorted(tuple(np.round(part["gap"], 6)) for _, part in table.groupby("part"))


def test_tables_mark_the_better_of_a_pair_and_the_suspect_cell():
    text = vlm_plots.markdown(published.results())
    assert text.count("†") == 2 and "45.36†" in text and "**135.53**" in text and "**134.97**" not in text
    wide = pd.read_csv(Path(published.__file__).with_name("results.csv")).set_index("model")
    pairs = [wide.drop(columns="checkpoint").iloc[i : i + 2] for i in (0, 2, 4)]
    best = sum(int((pair == pair.max()).sum().sum()) for pair in pairs)  # of ties both
    assert text.count("**") == 2 * best
    latex = vlm_plots.latex(published.results())
    assert r"45.36$^\dagger$" in latex and latex.count(r"\textbf") == best
    rows = [line for line in latex.splitlines() if line.endswith(r"\\") and "toprule" not in line]
    assert len(rows) == 17 and {line.count("&") for line in rows} == {6}


def own(layouts=("agnostic", "query-first"), sizes=(64, 96), seeds=(0, 1, 2)):
    rng = np.random.default_rng(0)
    cells = itertools.product(("transformer", "mamba"), layouts, sizes, seeds, ("grounding", "count"))
    rows = []
    for family, layout, size, seed, task in cells:
        row = dict.fromkeys(COLUMNS) | dict(
            run=f"{family}-{layout}-{size}-{seed}", family=family, model=f"{family}-tiny", layout=layout,
            image_size=size, seed=seed, task=task, split="heldout", value=rng.uniform(0.2, 0.9), count=100,
            metric="iou@0.5" if task == "grounding" else "accuracy", question_only=0.1,
            chance=0.25 if task == "count" else None, image_tokens=len(image_ids(size // 8)),
        )  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def test_relative_differences_are_paired_by_seed():
    results = own()
    table = vlm_plots.layout_table(results)
    assert len(table) == 2 * 2 * 2 and set(table["seeds"]) == {3}
    row = table[(table["family"] == "mamba") & (table["image_size"] == 96) & (table["task"] == "count")]
    mine = results[
        (results["family"] == "mamba") & (results["image_size"] == 96) & (results["task"] == "count")
    ]
    a, b = (
        mine[mine["layout"] == name].sort_values("seed")["value"].to_numpy()
        for name in ("agnostic", "query-first")
    )
    assert row["mean"].item() == pytest.approx(np.mean((b - a) / a))
    assert vlm_plots.layout_table(own(layouts=("agnostic",))).empty
    assert vlm_plots.resolution_table(own(sizes=(64,))).empty


def test_the_dotted_line_is_the_best_of_all_guesses():
    """A guess that sees the picture stands beside the blind ones, whichever is best for a task."""
    results = own().assign(image_only=None)
    results.loc[results["task"] == "grounding", "image_only"] = 0.3  # count has a chance of 0.25

    def dotted(figure):
        names = [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]
        lines = [line for ax in figure.axes for line in ax.lines if line.get_linestyle() == ":"]
        return [(names[round(np.mean(line.get_xdata()))], *set(line.get_ydata())) for line in lines]

    figure = vlm_plots.resolution(vlm_plots.resolution_table(results))
    assert sorted(dotted(figure)) == [("count", 0.25)] * 2 + [("grounding", 0.3)] * 2  # of both families
    assert dotted(vlm_plots.layouts(vlm_plots.layout_table(results))) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_side_of_a_patch_follows_from_the_tokens_of_an_image(layout):
    for side, pixels in ((3, 32), (6, 16), (24, 14), (34, 14)):
        tokens = sequence([], list, side, layout)[0]  # an image without text
        assert vlm_plots.patch_pixels(side * pixels, len(tokens), layout) == pixels
    assert vlm_plots.patch_pixels(480, len(image_ids(34)), "agnostic") == 14  # four pixels are not seen


def test_encoders_of_other_patches_are_not_averaged():
    """By the tokens of an image; a resolution is compared among equal patches only."""
    results = own(layouts=("agnostic", "two-pass"))
    coarse = results[results["image_size"] == 96].assign(value=0.1)
    coarse["image_tokens"] = [
        len(image_ids(3)) * (2 if name == "two-pass" else 1) for name in coarse["layout"]
    ]
    fine = results.assign(
        image_tokens=[
            len(image_ids(size // 8)) * (2 if layout == "two-pass" else 1)
            for size, layout in zip(results["image_size"], results["layout"], strict=True)
        ]
    )
    both = pd.concat([fine, coarse])
    pd.testing.assert_frame_equal(vlm_plots.resolution_table(both), vlm_plots.resolution_table(fine))
    table = vlm_plots.layout_table(both)
    assert table.groupby("patch").size().to_dict() == {8: 8, 32: 4}
    assert set(table.loc[table["patch"] == 32, "mean"]) == {0.0}
    names = vlm_plots.layouts(table).axes[0].get_legend_handles_labels()[1]
    assert "patches of 32 px, two-pass, 96 px" in names


def test_models_that_began_with_other_weights_are_not_averaged():
    """Layouts are compared among equal beginnings; a table from before there were any has none."""
    results = own().assign(init="scenes-any-order")
    others = own(layouts=("agnostic",)).assign(init="scenes", value=0.1)
    both = pd.concat([results, others])
    pd.testing.assert_frame_equal(vlm_plots.layout_table(both), vlm_plots.layout_table(results))
    sizes = vlm_plots.resolution_table(both)
    assert sizes.loc[sizes["init"] == "scenes", "mean"].tolist() == pytest.approx([0.1] * 8)
    names = vlm_plots.resolution(sizes).axes[0].get_legend_handles_labels()[1]
    assert "from scenes, 64 px" in names and "from scenes-any-order, 64 px" in names
    older = vlm_plots.layout_table(own().drop(columns="init"))
    assert set(older["init"]) == {""} and older["mean"].tolist() == pytest.approx(
        vlm_plots.layout_table(results)["mean"].tolist()
    )


def test_models_of_one_family_are_not_averaged():
    """Relative differences +0.10, -0.10 and 0: nothing but their mean would be left of three presets."""
    rows = []
    for model, gain in (("mamba-790m", 0.1), ("mamba-1.4b", -0.1), ("mamba-2.8b", 0.0)):
        for layout, size in (("agnostic", 336), ("instruction-first", 336), ("agnostic", 480)):
            value = 0.5 * (1 + gain * (layout != "agnostic")) + (gain if size == 480 else 0)
            rows.append(
                dict.fromkeys(COLUMNS) | dict(run=model, family="mamba", model=model, layout=layout, seed=0,
                image_size=size, task="vqa", metric="accuracy", value=value, chance=None, question_only=0.1,
                image_tokens=len(image_ids(size // 14)))
            )  # fmt: skip
    table, sizes = vlm_plots.layout_table(pd.DataFrame(rows)), vlm_plots.resolution_table(pd.DataFrame(rows))
    assert dict(zip(table["model"], table["mean"], strict=True)) == pytest.approx(
        {"mamba-790m": 0.1, "mamba-1.4b": -0.1, "mamba-2.8b": 0.0}
    )
    assert (table["seeds"] == 1).all() and len(sizes) == 6
    (ax,) = vlm_plots.layouts(table).axes
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [f"{model}, instruction-first, 336 px" for model in table["model"]]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx(table["mean"].tolist())


def texts_of(figure):
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    found, unseen = [], set()
    for ax in figure.axes:  # labels of ticks beyond the limits exist, but are not drawn
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            unseen |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    for text in figure.findobj(matplotlib.text.Text):
        if text not in unseen and text.get_text().strip() and text.get_visible():
            box = text.get_window_extent(renderer)
            if box.width > 1 and box.height > 1:
                found.append((text.get_text(), box))
    return found


WIDE = ("architecture", "tasks", "synthetic")  # drawings, of both columns always


@pytest.mark.parametrize(
    "name, width",
    [(name, DOUBLE) for name in WIDE]
    + [(name, width) for name in ("gap", "resolution", "layouts") for width in (SINGLE, DOUBLE)],
)
def test_no_text_lies_on_another_or_leaves_the_figure(name, width):
    with theme():
        figure = {
            "architecture": diagrams.architecture,
            "tasks": lambda: diagrams.task_overview(diagrams.task_table()),
            "synthetic": lambda: diagrams.synthetic_task(diagrams.synthetic_table()),
            "gap": lambda: vlm_plots.gap_vs_scale(published.results(), width),
            "resolution": lambda: vlm_plots.resolution(vlm_plots.resolution_table(own()), width),
            "layouts": lambda: vlm_plots.layouts(vlm_plots.layout_table(own()), width),
        }[name]()
        source = entries.DRAWN if name in WIDE else published.SOURCE  # the longest there is
        found = texts_of(figures.labelled(figure, source))
    assert (source in [" ".join(text.split("\n")) for text, _ in found]) == (name not in WIDE)
    assert len(found) > 5 and figure.get_figwidth() == width
    page = figure.bbox
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1, text
    for (a, one), (b, other) in itertools.combinations(found, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        down = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across <= 1 or down <= 1, (a, b)


def test_the_drawn_task_is_the_task():
    table = diagrams.synthetic_table()
    for layout, part in table.groupby("layout"):
        tokens = part["token"].tolist()
        context = [t for t, r in zip(tokens, part["role"], strict=True) if r in ("symbol", "target")]
        query = part[part["role"] == "query"]["token"].item()
        assert tokens[-1] == f"<p{context.index(query)}>" and len(context) == 8
        assert (tokens.index(query) == 1) == (layout == "prefix")


def test_published_files_are_the_same_every_time_and_say_their_source(tmp_path, capsys):
    for folder in ("a", "b"):
        assert figures.main(["--published", "--out", str(tmp_path / folder)]) == 0
    said = capsys.readouterr().out
    assert said.count("fig3_resolution, fig4_layouts: left out") == 2  # once each time
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert {entry["source"] for entry in index} == {entries.DRAWN, published.SOURCE}
    listed = sorted(file for entry in index for file in entry["files"])
    tables = ["index.json", "mean_gaps.csv", "results.csv", "results.md", "results.tex"]
    assert sorted(listed + tables) == names
    fig1 = pd.read_csv(tmp_path / "a" / "fig1_architecture.csv").set_index("pixels")["image_tokens"]
    assert fig1.to_dict() == {224: 273, 336: 601, 480: 1191}


def test_the_committed_figures_are_up_to_date(tmp_path):
    committed = Path(__file__).parents[2] / "docs" / "images" / "figures"
    assert figures.main(["--published", "--out", str(tmp_path)]) == 0
    for path in tmp_path.iterdir():
        if path.suffix in (".csv", ".json", ".md", ".tex"):
            assert (committed / path.name).read_bytes() == path.read_bytes(), path.name


def test_own_runs_are_drawn_and_nothing_published_beside_them(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    own().to_parquet(tmp_path / "results" / "all.parquet")
    assert figures.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "synthetic curves: left out" in said
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert {entry["source"] for entry in index} == {"measured: your runs"}
    assert [entry["file"] for entry in index] == ["fig3_resolution.png", "fig4_layouts.png"]
    for entry in index:
        drawn = (tmp_path / "out" / entry["file"]).with_suffix(".svg").read_text()
        assert ">measured: your runs<" in drawn


def test_a_line_says_that_the_studies_tables_are_not_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "STUDIES", tmp_path)  # as beside an installed package
    found = list(entries.of_paper(DOUBLE))
    lines = [one for one in found if isinstance(one, str)]
    assert len(lines) == 2 and all(line.endswith(entries.ABSENT) for line in lines)
    assert {one.name for one in found if isinstance(one, entries.Entry)} >= {"gap_vs_scale", "fig2_tasks"}


def test_the_studies_figures_are_those_of_the_study():
    """Without the runs that chose learning rates, which its tables have, too."""
    committed = entries.STUDIES / entries.SYNTHETIC / "figures"
    found = [entry for entry in entries.of_paper(DOUBLE) if isinstance(entry, entries.Entry)]
    drawn = {entry.name: entry for entry in found if entry.source == f"measured: studies/{entries.SYNTHETIC}"}
    assert {"by_position", "position_step", "summary", "accuracy_curves"} <= set(drawn)
    for name, entry in drawn.items():
        assert figures.csv(entry.table) == (committed / f"{name}.csv").read_bytes(), name


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"purpose": "validation"}, "has no reported runs yet, only validation"),
        ({"length": 4}, "1 runs have no evaluation at their full length yet and are left out"),
    ],
)
def test_runs_without_numbers_to_report_are_named(change, line, tmp_path, capsys):
    table = pd.read_parquet(entries.STUDIES / entries.SYNTHETIC / "results.parquet")
    one = table[(table["run"] == table["run"].iloc[0]) & (table["model"] == table["model"].iloc[0])]
    one.assign(**change).to_parquet(tmp_path / "results.parquet")
    assert figures.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "nothing to draw" in said[0] and line in said[0]
    assert not (tmp_path / "out").exists()


def test_tasks_of_one_folder_are_told_apart_by_name(tmp_path):
    table = pd.read_parquet(entries.STUDIES / entries.SYNTHETIC / "results.parquet")
    one = table[table["run"] == table.loc[table["purpose"] == "report", "run"].iloc[0]]
    other = one.assign(task="copy", run="copy-run")
    pd.concat([one, other]).to_parquet(tmp_path / "results.parquet")
    found = [e for e in entries.of_runs(tmp_path, DOUBLE) if isinstance(e, entries.Entry)]
    assert {e.name for e in found} >= {"position-summary", "copy-summary", "copy-accuracy_curves"}
    assert all(e.table["task"].eq(e.name.split("-")[0]).all() for e in found if "task" in e.table)


# --- of the probes of a run ---------------------------------------------------------------------------------


def probe_table(probed_run, name):
    paths = sorted(probed_run.glob(f"*/probes/{name}.*.parquet"))
    return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)


def test_a_probed_run_has_a_figure_of_every_table(probed_run, tmp_path, capsys):
    runs = [str(run) for run in by_family(probed_run).values()]
    assert figures.main([*runs, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert set(FIGURES) == set(PROBES)
    drawn = {name: draws for name, draws in FIGURES.items() if name != "erasure"}  # of none of these models
    names = [f"{name}{suffix}" for name, draws in drawn.items() for suffix in draws]
    assert said == [f"{tmp_path / name}.png .pdf" for name in names]
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(2 * names)  # and no index beside them


def test_tables_anywhere_are_drawn_beside_themselves(probed_run, tmp_path):
    """As the tables that probes.run --out has left."""
    for path in probed_run.glob("position*/probes/lens.*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert figures.main([str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["lens.png"]
    for path in tmp_path.glob("*.parquet"):
        pd.read_parquet(path).drop(columns="chance").to_parquet(path)
    assert figures.main([str(tmp_path)]) == 2


def test_a_run_without_probes_says_what_to_run(probed_run, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((by_family(probed_run)["mamba"] / name).read_bytes())
    assert figures.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"python -m probes.run {tmp_path}" in line


def test_runs_are_drawn_where_what_shows_them_together_is(probed_run, tmp_path, capsys):
    shutil.copytree(probed_run, tmp_path / "runs")
    runs = by_family(tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*/probes/*.parquet"):
        if not path.name.startswith("lens."):  # one probe shows where; drawing all of them takes long
            path.unlink()
    assert figures.main([str(runs["mamba"]), str(runs["transformer"])]) == 0
    assert len(list(tmp_path.glob("runs/compare-*/probes/lens.png"))) == 1
    assert figures.main([str(runs["mamba"])]) == 0
    assert (runs["mamba"] / "probes" / "lens.png").exists()
    assert figures.main([str(runs["mamba"]), str(tmp_path)]) == 2
    assert "several must be folders of runs" in capsys.readouterr().err


def test_lens_figure_draws_the_table(probed_run):
    table = probe_table(probed_run, "lens")
    left, right = lens.draw(table).axes
    for ax, part in ((left, "accuracy"), (right, "log_prob")):
        rows = table[table["part"] == part].sort_values("layer")
        wanted = [cell["value"].tolist() for _, cell in rows.groupby(["family", "weights"])]
        drawn = [line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) > 2]
        assert sorted(drawn) == sorted(wanted) and len(drawn) == 4


def test_maps_put_together_what_the_table_took_apart(probed_run):
    rows = probe_table(probed_run, "retention")
    rows = rows[(rows["part"] == "map") & (rows["weights"] == "trained") & (rows["layer"] == 0)]
    grid = grid_of(rows)
    assert np.isnan(grid[np.triu_indices(len(grid), 1)]).all()
    assert np.allclose(np.nansum(grid, axis=1), 1, atol=1e-5)
    for row in rows.sample(5, random_state=0).itertuples():
        assert grid[int(row.query), int(row.key)] == row.value


def test_tracing_maps_have_every_patch_in_its_place(probed_run):
    table = probe_table(probed_run, "patch")
    part = table[(table["family"] == "mamba") & (table["part"] == "target") & (table["site"] == "state")]
    part = part[(part["control"] == "") & (part["role"] != "everything")]
    grid, rows, columns = patch.tracing_grid(part)
    assert np.isfinite(grid).sum() == part["value"].notna().sum()
    assert rows == sorted(rows) and columns == sorted(columns)  # tokens with a role stand first
    target = part[part["role"] == "target"].set_index("layer")["value"]
    drawn = grid[:, [label for *_, label in columns].index("target")]
    assert drawn.tolist() == target.loc[[int(label) for *_, label in rows]].tolist()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["absent"], "RUNS absent does not exist"),
        ([".", "--published"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line(argv, line, tmp_path, capsys):
    assert figures.main([*argv, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and line in said[0]


def test_commands_import_nothing_slow_before_ctrl_c_is_heard():
    """`guarded` answers Ctrl-C with one line; what is imported before it would answer with a traceback."""
    code = (
        "import sys, analysis.figures, analysis.report.__main__\n"
        "print(*({'torch', 'pandas', 'scipy', 'matplotlib', 'plotly', 'numba'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "\n"
