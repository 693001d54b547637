"""`python -m analysis.report`: its numbers are the tables'; in a browser it opens, moves, stays offline."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tyro
from tiny_runs import tiny_run

from analysis.report import __main__ as cli
from analysis.report.runs import read, read_all
from analysis.report.sections import config
from analysis.style import family_colors
from synthetic import store
from synthetic.config import RunConfig, plan, run_id

N = 8  # context symbols of the run
FIGURES = ("learning", "position", "updates", "retention", "attention", "patch", "linear", "lens")
MEBIBYTE = 2**20


def write(path, *folders):
    assert cli.main([*map(str, folders), "--out", str(path)]) == 0
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Another run, with another seed and layout and no probes."""
    more = ("--seq-len", str(N), "--model", "mamba", "--seed", "1", "--layout", "instruction")
    return tiny_run(tmp_path_factory.mktemp("more"), "position", *more)


@pytest.fixture(scope="module")
def report(probed_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return SimpleNamespace(path=path, text=write(path, probed_run))


# --- the numbers --------------------------------------------------------------------------------------------


def decoded(value):
    """plotly's arrays as numpy's, in whatever is nested in lists and dictionaries."""
    if isinstance(value, dict) and "bdata" in value:
        numbers = np.frombuffer(base64.b64decode(value["bdata"]), dtype="<" + value["dtype"])
        return numbers.reshape([int(n) for n in value["shape"].split(",")] if "shape" in value else -1)
    if isinstance(value, dict):
        return {name: decoded(part) for name, part in value.items()}
    return [decoded(part) for part in value] if isinstance(value, list) else value


def views(text):
    """Name of a figure -> its views, as the page holds them."""
    pattern = r'<figure data-figure="(\w+)">.*?<script type="application/json">(.*?)</script>'
    return {name: decoded(placed(**json.loads(data))) for name, data in re.findall(pattern, text, re.DOTALL)}


def placed(views, arrays):
    """The page holds every array once: put them back where they are meant."""
    if isinstance(views, dict) and isinstance(views.get("array"), int):
        return arrays[views["array"]]
    if isinstance(views, dict):
        return {name: placed(part, arrays) for name, part in views.items()}
    return [placed(part, arrays) for part in views] if isinstance(views, list) else views


def panels(view):
    return [panel for block in view["blocks"] for panel in block["panels"]]


def lines(panel):
    """Name -> trace of the lines of a panel, without the bands behind them."""
    return {t["name"]: t for t in panel["figure"]["data"] if t["type"] == "scatter" and "name" in t}


def table(folder, probe, family):
    return pd.read_parquet(folder / "probes" / f"{probe}.{family}.parquet")


def same(found, wanted):
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=1e-5, atol=1e-7)


def wide(rows, index, column, value="value"):
    return rows.pivot(index=index, columns=column, values=value).to_numpy(float)


def test_curves_are_the_metrics(report, probed_run):
    rows = pd.DataFrame(store.read_rows(probed_run / "metrics.jsonl"))
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
    rows = pd.DataFrame(store.read_rows(probed_run / "by_position.jsonl"))
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
                for column in ("low", "high", "shuffled", "selectivity", "chance"):
                    same(found[column], part[column])
                same(found["control task"], part["control"])
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


def test_commands_lead_to_the_same_runs(probed_run, bare):
    for folder in (probed_run, bare):
        words = read(folder).train_command().removeprefix("python -m synthetic.run ").split()
        again = tyro.cli(RunConfig, args=words)
        assert run_id([plan(again, family) for family in again.model]) == folder.name


def test_what_was_not_made_is_said_with_its_command(probed_run, bare, tmp_path):
    text = write(tmp_path / "report.html", bare)
    assert set(views(text)) == {"learning", "position"}
    for probe in ("updates", "retention", "attention", "patch", "linear", "lens"):
        assert f"python -m probes.run {bare} --probe {probe}" in text
    unfinished = tmp_path / "unfinished"
    shutil.copytree(probed_run, unfinished)
    for name in ("by_position.jsonl", "metrics.jsonl", "transformer/result.json", "mamba/result.json"):
        (unfinished / name).unlink()
    shutil.rmtree(unfinished / "probes")
    text = write(tmp_path / "report.html", unfinished)
    assert views(text) == {} and text.count(read(probed_run).train_command()) > 3
    assert "left out by the probe, it has no SSM layers" in write(tmp_path / "report.html", probed_run)


def test_nothing_in_a_run_can_leave_its_place(bare, tmp_path):
    folder = tmp_path / "<b onclick=x>"
    shutil.copytree(bare, folder)
    text = write(tmp_path / "report.html", folder)
    assert "<b onclick" not in text and "&lt;b onclick=x&gt;" in text
    assert text.count("</script") == len(views(text)) + 2  # plotly's and the page's own


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; give folders of runs"),
        (lambda folder: (folder / "config.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "probes" / "lens.mamba.parquet").write_bytes(b"PAR1"), "cannot be read"),
    ],
)
def test_bad_folders_are_one_line(probed_run, tmp_path, capsys, spoil, words):
    folder, out = tmp_path / "run", tmp_path / "report.html"
    shutil.copytree(probed_run, folder)
    spoil(folder)
    assert cli.main([str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1 and str(folder) in error
    assert not out.exists()


def test_bad_calls_are_one_line(bare, tmp_path, capsys, monkeypatch):
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("error: RUNS is missing; give one or several")
    assert cli.main([str(bare), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {tmp_path}: ")
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


def test_commands_of_the_documents_parse():
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    lines = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    found = set(re.findall(r"^python -m analysis\.report ([^#\n]*)", lines, re.MULTILINE))
    assert len(found) >= 2
    for command in found:
        assert len(tyro.cli(cli.Options, args=command.split()).runs) >= 1


# --- in a browser -------------------------------------------------------------------------------------------


def browser():
    """Paths of Chromium and its driver; without them the test is skipped, or failed where CI asks for it."""
    paths = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if all(paths) and importlib.util.find_spec("selenium"):
        return paths
    reason = "no browser: apt-get install chromium chromium-driver; pip install selenium"
    if os.environ.get("NEED_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def driver():
    """A headless Chromium that finds no host."""
    chromium, chromedriver = browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                     "--host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def page(driver, report):
    """The report, opened once at a desktop's width in the light theme; tests set what they need of it."""
    size(driver, 1280)
    prefer(driver, "light")
    driver.get(report.path.as_uri())
    return driver


def size(driver, width):
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver, scheme):
    features = [dict(name="prefers-color-scheme", value=scheme)]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=features))


def eventually(condition, seconds=5.0):
    """Whether it becomes true: browsers draw when they see fit."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met


def press(driver, key):
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(key).perform()


# marks drawn for every plot: lines and points, or the image of a map
DRAWN = """
return [...document.querySelectorAll("figure[data-figure]")].map((figure) => [figure.dataset.figure,
  [...figure.querySelectorAll(".plot")].map((plot) =>
    plot.querySelectorAll(".scatterlayer path[d], .heatmaplayer image").length)]);
"""


def test_opens_offline_without_a_complaint(page, report):
    drawn = dict(page.execute_script(DRAWN))
    assert tuple(drawn) == FIGURES
    assert {name: len(plots) for name, plots in drawn.items()} == {
        name: len(panels(shown[0])) for name, shown in views(report.text).items()
    }
    assert min(min(plots) for plots in drawn.values()) > 0
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith(("data:", "blob:"))} == {report.path.as_uri()}
    assert report.path.stat().st_size < 10 * MEBIBYTE


@pytest.mark.parametrize("name", ["updates", "attention"])
def test_slider_changes_the_picture(page, report, name):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    view = views(report.text)[name][0]
    figure = page.find_element(By.CSS_SELECTOR, f"figure[data-figure={name}]")
    Select(figure.find_element(By.TAG_NAME, "select")).select_by_index(0)
    slider = figure.find_element(By.CSS_SELECTOR, "input[type=range]")
    moved = next(i for i, panel in enumerate(panels(view)) if panel["moves"])
    plots = figure.find_elements(By.CSS_SELECTOR, ".plot")
    move, at = panels(view)[moved]["moves"][0], view["slider"]["start"]

    def drawn():
        script = "return Array.from(arguments[0].data[arguments[1]].y)"
        return [np.nan if y is None else y for y in page.execute_script(script, plots[moved], move["trace"])]

    page.execute_script("arguments[0].focus()", slider)
    same(drawn(), move["rows"][at])
    for plot in (plots[moved], plots[0]):  # the lines that are exchanged, and the frame on the first map
        slider.send_keys(*[Keys.HOME, *[Keys.ARROW_RIGHT] * at])
        before = plot.screenshot_as_png
        press(page, Keys.ARROW_LEFT)
        same(drawn(), move["rows"][at - 1])
        assert eventually(lambda plot=plot, before=before: plot.screenshot_as_png != before)
    words = view["slider"]["texts"][at - 1]
    assert slider.get_attribute("aria-valuetext") == figure.find_element(By.TAG_NAME, "output").text == words
    press(page, Keys.HOME)
    same(drawn(), move["rows"][0])
    assert page.get_log("browser") == []


def test_themes(page):
    from selenium.webdriver.common.by import By

    def colors():
        return page.execute_script(
            """return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
            getComputedStyle(document.querySelector(".plot .xtick text")).fill]"""
        )

    light, button = colors(), page.find_element(By.ID, "theme")
    assert light[0] == "rgb(255, 255, 255)" and light[1] == light[2] and button.text == "Dark theme"
    prefer(page, "dark")
    assert eventually(lambda: button.text == "Light theme")
    dark = colors()
    assert all(old != new for old, new in zip(light, dark, strict=True)) and dark[1] == dark[2]
    for text, wanted in (("Dark theme", light), ("Light theme", dark)):
        button.click()
        assert button.text == text and colors() == wanted
    prefer(page, "light")
    assert colors() == dark  # what was chosen stays
    button.click()
    assert colors() == light


def test_everything_is_reached_with_tab_and_seen(page):
    from selenium.webdriver.common.keys import Keys

    wanted = page.execute_script(
        """const stops = 'a[href], button, select, input, summary, [tabindex="0"]';
        const found = [...document.querySelectorAll(stops)].filter((e) => e.checkVisibility());
        found.forEach((e, i) => { e.dataset.stop = i; });
        return found.length"""
    )
    assert wanted > 25
    stops = []
    for _ in range(3 * wanted):
        press(page, Keys.TAB)
        stop, outline = page.execute_script(
            """const e = document.activeElement;
            return [e.dataset.stop, getComputedStyle(e).outlineStyle]"""
        )
        if stop is not None and int(stop) in stops:
            break
        if stop is not None:
            stops.append(int(stop))
            assert outline == "solid"
    first = stops.index(0)
    assert stops[first:] + stops[:first] == list(range(wanted))  # in the order of the page


def test_names_for_those_who_do_not_see(page):
    nameless = page.execute_script(
        """return [...document.querySelectorAll(".plot, input, select, figure, section, .scroll")]
        .filter((e) => !(e.getAttribute("aria-label") || e.labels?.[0]?.textContent.trim() ||
          e.querySelector("figcaption")?.textContent ||
          document.getElementById(e.getAttribute("aria-labelledby"))))
        .filter((e) => e.checkVisibility()).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_fits_the_window(page):
    widths = "return [...document.querySelectorAll('.plot svg.main-svg')].map((p) => p.clientWidth)"
    wide = page.execute_script(widths)
    for width in (400, 1280):
        size(page, width)
        assert eventually(lambda width=width: page.execute_script("return innerWidth") == width)
        overflow = "return document.documentElement.scrollWidth - innerWidth"
        assert eventually(lambda overflow=overflow: page.execute_script(overflow) <= 0)
        assert min(page.execute_script(widths)) >= 240
    assert eventually(lambda: page.execute_script(widths) == wide)


def test_numbers_are_listed_on_demand(page, probed_run):
    """What hovering shows, for keyboards: the list of the lens is its table."""
    from selenium.webdriver.common.by import By

    numbers = page.find_element(By.CSS_SELECTOR, "figure[data-figure=lens] .numbers")
    pre = numbers.find_element(By.TAG_NAME, "pre")
    assert pre.get_attribute("textContent") == ""
    page.execute_script("arguments[0].open = true", numbers)
    text = eventually(lambda: pre.get_attribute("textContent"))
    found = [line.split(",") for line in text.splitlines() if line.startswith("Mamba,")]
    rows = table(probed_run, "lens", "mamba")
    rows = rows[rows["weights"] == "trained"]
    same([[float(word) for word in line[1:]] for line in found], rows[["layer", "value", "low", "high", "n"]])


def test_every_view_can_be_chosen_by_keyboard(page, report):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    for name, shown in views(report.text).items():
        figure = page.find_element(By.CSS_SELECTOR, f"figure[data-figure={name}]")
        for select in figure.find_elements(By.TAG_NAME, "select"):
            page.execute_script("arguments[0].focus()", select)
            press(page, Keys.HOME)
            for view in shown[1:]:
                press(page, Keys.ARROW_DOWN)
                assert (
                    page.execute_script("return arguments[0].selectedOptions[0].text", select)
                    == view["label"]
                )
                drawn = dict(page.execute_script(DRAWN))[name]
                assert len(drawn) == len(panels(view)) and min(drawn) > 0
    assert page.get_log("browser") == []
