"""The report in a headless Chromium: it opens offline, its sliders move it, keyboards reach everything."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
from report_pages import panels, same, table, views

FIGURES = ("learning", "position", "updates", "retention", "capacity", "attention", "patch", "linear", "lens")
MEBIBYTE = 2**20


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
