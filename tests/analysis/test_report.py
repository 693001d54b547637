"""`python -m analysis.report`: numbers are the tables'; what is missing is said; bad input is one line."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import tyro
from report_pages import lines, panels, same, table, views, wide, write
from tiny_runs import by_family, tiny_run

from analysis.report import __main__ as cli
from analysis.report.runs import read_all
from analysis.report.sections import config
from ssm_retrieval.style import family_colors
from ssm_retrieval.training import store
from synthetic.config import RunConfig, plan, run_id

N = 8  # context symbols of the run


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Another run, with another seed and layout and no probes."""
    more = ("--seq-len", str(N), "--model", "mamba", "--seed", "1", "--layout", "instruction")
    more += ("--position", "none")
    return tiny_run(tmp_path_factory.mktemp("more"), "position", *more)


def of_both(folder, name):
    return pd.DataFrame([row for run in store.runs_in(folder) for row in store.read_rows(run / name)])


def test_curves_are_the_metrics(report, probed_run):
    rows = of_both(probed_run, "metrics.jsonl")
    accuracy, loss, length = (lines(panel) for panel in panels(views(report.text)["learning"][0]))
    for name, family in (("Transformer", "transformer"), ("Mamba", "mamba")):
        mine = rows[(rows["model"] == family) & (rows["length"] == N)].sort_values("step")
        assert len(mine) == 2
        same(accuracy[name]["x"], mine["tokens"] / 1e6)
        same(accuracy[name]["y"], mine["accuracy"])
        same(accuracy[name]["customdata"][:, :2], mine[["ci_low", "ci_high"]])
        same(loss[name]["y"], mine["loss"])
        same(length[name]["y"], mine["train_length"])
        color = "#" + "".join(f"{round(255 * part):02x}" for part in family_colors()[family])
        assert accuracy[name]["line"]["color"] == color
    same(accuracy["chance"]["y"], [1 / N, 1 / N])


def test_positions_are_those_of_the_final_evaluation(report, probed_run):
    rows = of_both(probed_run, "by_position.jsonl")
    (panel,) = panels(views(report.text)["position"][0])
    for name, family in (("Transformer", "transformer"), ("Mamba", "mamba")):
        mine, trace = rows[rows["model"] == family].sort_values("position"), lines(panel)[name]
        same(trace["x"], (mine["position"] + 0.5) / N)
        same(trace["y"], mine["rate"])
        same(trace["customdata"][:, :2], mine[["ci_low", "ci_high"]])
        same(trace["customdata"][:, 2:4], mine[["position", "position"]])
        same(trace["error_y"]["array"], mine["ci_high"] - mine["rate"])


def test_update_maps_and_every_step_of_their_slider(report, probed_run):
    rows = table(probed_run, "updates", "mamba")
    shown = views(report.text)["updates"]
    assert len(shown) == 4
    for view, quantity in zip(shown, ("relative", "write", "decay", "relative"), strict=True):
        part = "sequence" if "one held-out" in view["label"] else "position"
        mine = rows[(rows["part"] == part) & (rows["quantity"] == quantity)]
        trained, untrained = (mine[mine["weights"] == w] for w in ("trained", "untrained"))
        image, profile = panels(view)
        values = wide(trained, "layer", "position")
        assert values.shape == (4, 1 + N + 2) and len(view["slider"]["texts"]) == values.shape[1]
        (heat,) = image["figure"]["data"]
        same(heat["z"], values)
        names = list(lines(profile))
        for i, weights in ((names.index("untrained"), untrained), (names.index("trained"), trained)):
            steps = {move["path"]: move["rows"] for move in profile["moves"] if move["trace"] == i}
            value, low, high = (wide(weights, "layer", "position", c).T for c in ("value", "low", "high"))
            same(steps["y"], value)
            same(steps["error_y.array"], high - value)
            same(steps["error_y.arrayminus"], value - low)
    (target,) = rows.loc[(rows["role"] == "target") & (rows["layer"] == 0) & (rows["weights"] == "trained")
                         & (rows["part"] == "sequence"), "position"]  # fmt: skip
    assert shown[3]["slider"]["start"] == target and "target" in shown[3]["slider"]["texts"][int(target)]


@pytest.mark.parametrize("family, layers", [("transformer", 2), ("mamba", 4)])
def test_attention_maps_and_rows(report, probed_run, family, layers):
    rows = table(probed_run, "attention", family)
    for view, weights in zip(views(report.text)["attention"], ("trained", "untrained"), strict=True):
        (block,) = (b for b in view["blocks"] if b["title"].lower() == family)
        *maps, row, scores = block["panels"]
        mine = rows[(rows["part"] == "map") & (rows["weights"] == weights)]
        assert len(maps) == layers == mine["layer"].nunique()
        for layer, panel in enumerate(maps):
            grid = wide(mine[mine["layer"] == layer], "query", "key")
            same(panel["figure"]["data"][0]["z"], grid)
            same(row["moves"][layer]["rows"], grid)
        best = rows[(rows["part"] == "score") & (rows["quantity"] == "retrieval")]
        for name in ("trained", "untrained"):
            part = best[best["weights"] == name].sort_values(["layer", "head"])
            same(lines(scores)[name]["y"], part["value"])
        same(lines(scores)["uniform attention"]["y"], part["baseline"])


@pytest.mark.parametrize("family", ["transformer", "mamba"])
def test_patching_maps(report, probed_run, family):
    rows = table(probed_run, "patch", family)
    sites = dict(residual="residual stream", state="SSM state", head="attention heads")
    for view, kind in zip(views(report.text)["patch"], ("query", "target"), strict=True):
        (block,) = (b for b in view["blocks"] if b["title"].lower() == family)
        mine = rows[(rows["part"] == kind) & (rows["role"] != "everything")]
        assert len(block["panels"]) == 2 * mine["site"].nunique()
        for panel in block["panels"]:
            control = "unrelated" if "control" in panel["title"] else ""
            (site,) = (site for site, words in sites.items() if words in panel["title"])
            part = mine[(mine["site"] == site) & (mine["control"] == control)]
            (heat,) = panel["figure"]["data"]
            found = {
                (layer, token): value
                for layer, values in zip(heat["y"], heat["z"], strict=True)
                for token, value in zip(heat["text"][0], values, strict=True)
            }
            assert len(found) == len(part)
            for row in part.itertuples():
                head = "" if pd.isna(row.head) else f".{row.head}"
                token = str(row.start) if row.role == "distractor" else row.role.replace("query_", "")
                same(found[f"{row.layer}{head}", token], row.value)
        assert ("mean nothing" in block["note"]) == (mine["accuracy_clean"].iloc[0] < 0.5)


@pytest.mark.parametrize("family", ["transformer", "mamba"])
def test_linear_probes_with_their_controls(report, probed_run, family):
    rows = table(probed_run, "linear", family)
    (view,) = views(report.text)["linear"]
    (block,) = (b for b in view["blocks"] if b["title"].lower() == family)
    sites = {"residual stream": "residual", "SSM state": "state"}
    assert [sites[panel["title"]] for panel in block["panels"]] == list(dict.fromkeys(rows["site"]))
    for panel in block["panels"]:
        mine = rows[(rows["part"] == "token") & (rows["site"] == sites[panel["title"]])]
        drawn = lines(panel)
        for (weights, layer), part in mine.groupby(["weights", "layer"]):
            part, trace = part.sort_values("lag"), drawn[f"{weights}, layer {layer}"]
            same(trace["x"], part["lag"] + 1)
            same(trace["y"], part["value"])
            if weights == "trained":
                assert trace["meta"]["columns"][:2] == ["low", "high"]
                found = dict(zip(trace["meta"]["columns"], trace["customdata"].T, strict=True))
                for column in ("low", "high", "shuffled", "chance"):
                    same(found[column], part[column])
    answer, capacity = (lines(panel) for panel in view["blocks"][-1]["panels"])
    name = {"transformer": "Transformer", "mamba": "Mamba"}[family]
    for drawn, part in ((answer, "answer"), (capacity, "capacity")):
        mine = rows[(rows["part"] == part) & (rows["site"] == "residual")].sort_values("layer")
        same(drawn[f"{name}, residual stream"]["y"], mine.loc[mine["weights"] == "trained", "value"])
        untrained = mine.loc[mine["weights"] == "untrained", "value"]
        same(drawn[f"{name}, residual stream, untrained"]["y"], untrained)


def test_lens_and_retention(report, probed_run):
    for panel, part in zip(panels(views(report.text)["lens"][0]), ("accuracy", "log_prob"), strict=True):
        for name, family in (("Transformer", "transformer"), ("Mamba", "mamba")):
            rows = table(probed_run, "lens", family)
            mine = rows[(rows["part"] == part) & (rows["weights"] == "trained")]
            same(lines(panel)[name]["y"], mine["value"])
            same(lines(panel)[name]["customdata"][:, :2], mine[["low", "high"]])
    rows = table(probed_run, "retention", "mamba")
    rows = rows[rows["part"] == "curve"]
    for panel, quantity in zip(panels(views(report.text)["retention"][0]), ("kept", "share"), strict=True):
        for (role, weights, layer), part in rows[rows["quantity"] == quantity].groupby(
            ["role", "weights", "layer"]
        ):
            trace = lines(panel).get(f"{role}, {weights}, layer {layer}")
            if trace is not None:
                part = part[part["value"] > 1e-8].sort_values("distance")
                same(trace["x"], part["distance"])
                same(trace["y"], part["value"])
        assert len(lines(panel)) == 3 * 4  # target and distractors, and the target untrained, by layer


@pytest.mark.parametrize("family, name", [("transformer", "Transformer"), ("mamba", "Mamba")])
def test_what_can_still_be_asked_at_every_step_of_its_slider(report, probed_run, family, name):
    rows = table(probed_run, "capacity", family)
    (view,) = views(report.text)["capacity"]
    assert view["slider"]["texts"] == [f"{n} of {N} symbols read" for n in (2, 4, N)]
    assert view["slider"]["start"] == 2
    block = next(block for block in view["blocks"] if name in block["panels"][0]["title"])
    by_place, counted = block["panels"]
    assert [trace["name"] for trace in by_place["figure"]["data"] if "name" in trace][-1] == "chance"
    drawn = [trace for trace in by_place["figure"]["data"]]
    for weights in ("trained", "untrained"):
        mine = rows[(rows["part"] == "place") & (rows["weights"] == weights)]
        (i,) = (k for k, trace in enumerate(drawn) if trace.get("name") == f"{name}, {weights}")
        steps = {move["path"]: move["rows"] for move in by_place["moves"] if move["trace"] == i}
        for k, n in enumerate((2, 4, N)):
            part = mine[mine["shown"] == n].sort_values("place")
            assert len(part) == n
            same(steps["x"][k][:n], part["place"] + 1)
            same(steps["y"][k][:n], part["value"])
            same(steps["error_y.array"][k][:n], part["high"] - part["value"])
            assert pd.isna(steps["y"][k][n:]).all()
        facts = rows[(rows["part"] == "facts") & (rows["weights"] == weights)].sort_values("shown")
        same(lines(counted)[f"{name}, {weights}"]["y"], facts["value"])
    chance = next(
        move for move in by_place["moves"] if move["path"] == "y" and move["trace"] == len(drawn) - 1
    )
    same([row[0] for row in chance["rows"]], [1 / 2, 1 / 4, 1 / N])
    same(lines(counted)["all of them"]["y"], [2, 4, N])
    (mark,) = counted["marks"]
    same(mark["low"], [-0.4, 0.6, 1.6])


# --- what is compared, and what is not there ----------------------------------------------------------------


def test_differences_between_runs_are_marked(probed_run, bare):
    runs = read_all([probed_run, bare, probed_run])
    assert [run.letter for run in runs] == ["A", "B"]
    (differing,) = (t for t in config.section(runs).tables if "not the same" in t.caption)
    assert list(differing.headers) == ["option", "Transformer, run A", "Mamba, run A", "Mamba, run B"]
    marked = {differing.rows[i][0].removeprefix("≠ "): list(differing.rows[i][1:]) for i in differing.marked}
    assert marked == {"seed": ["0", "0", "1"], "task_options.layout": ["suffix", "suffix", "instruction"]}
    plain = [row[0] for i, row in enumerate(differing.rows) if i not in differing.marked]
    assert "model" in plain and not any(name.startswith("≠") for name in plain)


def test_runs_that_differ_in_the_seed_alone_are_summed_up(probed_run):
    """Two Mambas of one seed more, and one whose learning rate differs, too."""
    (run,) = read_all([probed_run])
    runs = []
    for letter, seed, lr, accuracy in (("A", 2, 1e-3, 0.97), ("B", 0, 1e-3, 0.25), ("C", 1, 2e-3, 0.5)):
        plans = {"mamba": run.plans["mamba"] | dict(seed=seed, lr=lr)}
        results = {"mamba": run.results["mamba"] | dict(accuracy=accuracy)}
        runs.append(dataclasses.replace(run, letter=letter, plans=plans, results=results))
    (found,) = (t for t in config.section(runs).tables if t.caption.startswith("Over seeds"))
    # by seed: 0 and 2; Clopper and Pearson of 1 of 2: 1 - 0.975^(1/2), and one minus that
    words = "1 of 2 [0.01, 0.99]; 0.610 (0.250 to 0.970)"
    assert found.rows == [["Mamba", "B, A", words, "0.250, 0.970"]]
    unfinished = [runs[0], dataclasses.replace(runs[1], results={}), runs[2]]
    assert not any(t.caption.startswith("Over seeds") for t in config.section(unfinished).tables)


def test_commands_lead_to_the_same_runs(probed_run, bare):
    for comparison in read_all([probed_run, bare]):
        words = comparison.train_command().removeprefix("python -m synthetic.run ").split()
        again = tyro.cli(RunConfig, args=words)
        names = {family: folder.name for family, folder in comparison.folders.items()}
        assert {family: run_id(plan(again, family)) for family in again.model} == names


def test_what_was_not_made_is_said_with_its_command(probed_run, bare, tmp_path):
    text = write(tmp_path / "report.html", bare)
    assert set(views(text)) == {"learning", "position"}
    for probe in ("updates", "retention", "attention", "patch", "linear", "lens"):
        assert f"python -m probes.run {bare} --probe {probe}" in text
    unfinished = tmp_path / "unfinished"
    shutil.copytree(probed_run, unfinished)
    for folder in store.runs_in(unfinished):
        for name in ("by_position.jsonl", "metrics.jsonl", "result.json"):
            (folder / name).unlink()
        shutil.rmtree(folder / "probes")
    text = write(tmp_path / "report.html", unfinished)
    (comparison,) = read_all([probed_run])
    assert views(text) == {} and text.count(comparison.train_command()) > 3
    assert "left out by the probe, it has no layers with the recurrence of Mamba or Mamba-2" in write(
        tmp_path / "report.html", probed_run
    )


def test_nothing_in_a_run_can_leave_its_place(bare, tmp_path):
    folder = tmp_path / "<b onclick=x>"
    shutil.copytree(bare, folder)
    text = write(tmp_path / "report.html", folder)
    assert "<b onclick" not in text and "&lt;b onclick=x&gt;" in text
    assert text.count("</script") == len(views(text)) + 2  # plotly's and the page's own


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; give the folder of a run"),
        (lambda folder: (folder / "config.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "probes" / "lens.mamba.parquet").write_bytes(b"PAR1"), "cannot be read"),
    ],
)
def test_bad_folders_are_one_line(probed_run, tmp_path, capsys, spoil, words):
    folder, out = tmp_path / "run", tmp_path / "report.html"
    shutil.copytree(by_family(probed_run)["mamba"], folder)
    spoil(folder)
    assert cli.main([str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1 and str(folder) in error
    assert not out.exists()


def test_bad_calls_are_one_line(bare, tmp_path, capsys, monkeypatch):
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("error: RUNS is missing; give one or several")
    assert cli.main([str(bare), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a regular file")
    assert not list(tmp_path.parent.glob(".*.tmp"))
    for package in ("plotly", "jinja2"):
        with monkeypatch.context() as without:
            for name in [
                m for m in sys.modules if m.startswith(("analysis.report.", package)) and m != cli.__name__
            ]:
                without.delitem(sys.modules, name)
            without.setitem(sys.modules, package, None)
            assert cli.main([str(bare), "--out", str(tmp_path / "x.html")]) == 2
        error = capsys.readouterr().err
        assert error == f'error: the report needs {package}: pip install -e ".[report]"\n'


@pytest.mark.parametrize("limit", [1_000_000, 10_000_000])
def test_a_large_file_is_said_to_be_large(bare, tmp_path, capsys, monkeypatch, limit):
    monkeypatch.setattr(cli, "LARGE", limit)
    out = tmp_path / "report.html"
    assert cli.main([str(bare), "--out", str(out)]) == 0
    size = out.stat().st_size
    shown = capsys.readouterr()
    assert shown.out == f"{out}  {size / 1e6:.1f} MB\n"
    warning = f"warning: {out} is larger than {limit / 1e6:.0f} MB and slow to open; give fewer RUNS\n"
    assert shown.err == (warning if size > limit else "")
    assert 1_000_000 < size < 10_000_000


def test_commands_of_the_documents_parse():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    lines = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    found = set(re.findall(r"^python -m analysis\.report ([^#\n]*)", lines, re.MULTILINE))
    assert len(found) >= 2
    for command in found:
        assert len(tyro.cli(cli.Options, args=command.split()).runs) >= 1
