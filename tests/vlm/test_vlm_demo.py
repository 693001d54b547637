"""The demo: what it asks and draws, its command, and its page in a headless Chromium."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")
pytest.importorskip("PIL", reason="pillow is not installed; .ci/run installs it")

import vlm_runs
from PIL import Image

from vlm import components, demo, information_flow, predict
from vlm.answering import Answerer
from vlm.demo import __main__ as command
from vlm.demo import asking, drawing
from vlm.layout import sequence
from vlm.scenes import TASKS, render, sample_scene

ROOT = Path(__file__).parents[2]
SCENE = sample_scene(3, "heldout", 7)
BLUE, GREEN = predict.SAID, predict.RIGHT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("vlm")
    vlm_runs.save_encoder(out)
    layouts = {"transformer-tiny": "query-first", "mamba-tiny": "agnostic"}
    return [vlm_runs.save(vlm_runs.run(name, layout=layout), out) for name, layout in layouts.items()]


def test_the_models_of_the_toolkit_open_without_training():
    left, right = (Answerer.open(folder) for folder in demo.given())
    assert (left.run.family, right.run.family) == ("transformer", "mamba")
    scene = sample_scene(0, "heldout", 3)
    asked = [q for q in asking.questions(scene) if q.sample.task == "attribute"]
    assert all(asking.ask(left, render(scene), question).right for question in asked)
    assert not list(demo.MODELS.glob("encoders"))  # nothing is written into the package


# --- what is asked ------------------------------------------------------------------------------------------


def test_every_task_asks_about_a_scene_and_only_captions_have_no_right_answer(folders):
    found = asking.questions(SCENE)
    assert {q.sample.task for q in found} == set(TASKS) and found[0].sample.task == "grounding"
    several = {task: sum(q.sample.task == task for q in found) for task in TASKS}
    assert several["count"] > 1 < several["grounding"] and several["reading-word"] == 1 == several["caption"]
    assert len({q.text for q in found}) == len(found)
    for question in found:
        said = question.example.answer
        if question.example.task == "grounding":
            said = f"{said}."
        reply = asking.Reply(question, said, {}, {})
        assert reply.right is (None if question.sample.task == "caption" else True), question
        wrong = asking.Reply(question, "[0.00,0.00,0.01,0.01].", {}, {})
        assert wrong.right is (None if question.sample.task == "caption" else False), question


@pytest.mark.parametrize("which", [0, 1])
def test_the_answer_is_that_of_predict_and_the_maps_those_of_information_flow(folders, which):
    contestant = Answerer.open(folders[which])
    picture, question = render(SCENE), asking.questions(SCENE)[0]
    reply = asking.ask(contestant, picture, question)
    run, out = contestant.run, contestant.out
    assert reply.said == predict.ask(contestant, picture, question.text)
    text, eyes = components.text("scenes"), components.eyes("scenes", 32, out)
    ids, _ = sequence(question.sample.chunks, text.encode, 4, run.layout, markers=text.markers)
    words = contestant.model.generate(torch.tensor([ids]), eyes([picture]), run.max_new_tokens)[0].tolist()
    words = words[: words.index(0)] if 0 in words else words
    at = list(range(len(ids) - 1, len(ids) - 1 + max(1, len(words))))
    flows = information_flow.layer_flows(contestant.model, torch.tensor([ids + words]), eyes([picture]), at)
    assert reply.maps.keys() == flows.keys() == {0, 1}
    for layer, maps in reply.maps.items():
        assert set(maps) == ({"attention"} if which == 0 else {"attention", "write", "kept", "share"})
        expected = flows[layer].attention.mean((0, 1, 2)).reshape(4, 4)
        np.testing.assert_allclose(maps["attention"], expected, rtol=1e-5)
        target, others = information_flow.patches_of(question.example.boxes[0], 128, 4), []
        for item in SCENE.shapes:
            if item.box != question.example.boxes[0]:
                others.append(
                    maps["attention"].reshape(-1)[information_flow.patches_of(item.box, 128, 4)].mean()
                )
        ratio = maps["attention"].reshape(-1)[target].mean() / np.mean(others)
        assert reply.ratios[layer]["attention"] == pytest.approx(ratio)


def test_a_question_of_the_users_has_no_right_answer_and_may_have_words_that_the_model_lacks(folders):
    contestant, picture = Answerer.open(folders[1]), render(SCENE)
    reply = asking.ask(contestant, picture, asking.typed("Where is the striped giraffe?", picture))
    assert reply.right is None and reply.ratios == {} and reply.unknown == ("giraffe",)


@pytest.mark.parametrize("text", ["", " ", "Describe the image."])
def test_a_caption_is_what_no_question_asks_for(text):
    caption = next(q for q in asking.questions(SCENE) if q.sample.task == "caption")
    asked = asking.typed(text, render(SCENE))
    assert (asked.text, asked.sample.chunks) == (caption.text, caption.sample.chunks)


# --- what is drawn ------------------------------------------------------------------------------------------


def framed(picture, colour) -> tuple[int, int, int, int]:
    """The corners of what has this colour."""
    rows, columns = np.nonzero((np.abs(picture.astype(int) - colour) < 3).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_the_right_box_is_framed_in_green_and_the_answer_in_blue():
    picture, question = np.full((100, 200, 3), 255, np.uint8), asking.questions(SCENE)[0]
    drawn = drawing.answered(picture, asking.Reply(question, "[0.50,0.20,0.75,0.60].", {}, {}))
    assert drawn.shape == (160, 320, 3)  # scaled by 1.6
    assert framed(drawn, BLUE) == pytest.approx((160, 32, 240, 96), abs=3)
    box = [value * 1.6 for value in question.example.boxes[0]]
    assert framed(drawn, GREEN)[:3] == pytest.approx([*box[:3]], abs=3)
    plain = drawing.answered(picture, asking.Reply(asking.typed("Why?", picture), "because.", {}, {}))
    assert (plain == 255).all()


def test_the_heat_map_colours_the_patch_that_has_the_most():
    values = np.zeros((4, 4))
    values[1, 3] = 7.0
    grey = drawing.heat(np.full((64, 128, 3), 128, np.uint8), np.zeros((4, 4)))
    drawn = drawing.heat(np.full((64, 128, 3), 128, np.uint8), values)
    rows, columns = np.nonzero((drawn != grey).any(axis=2))
    assert drawn.shape == (160, 320, 3) and len(np.unique(grey)) == 1
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (40, 80, 240, 320)
    assert len(rows) == 40 * 80
    half = drawing.heat(np.full((64, 128, 3), 128, np.uint8), values + 3.5)
    assert (half[0, 0] != grey[0, 0]).any() and (half[50, 300] == drawn[50, 300]).all()


# --- the command --------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_status_2(folders, tmp_path, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed; .ci/run installs it")
    assert command.main([str(tmp_path), str(folders[0])]) == 2
    assert "holds no trained VLM" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert command.main([*map(str, folders), "--port", port]) == 2
    error = capsys.readouterr().err
    assert error == f"error: --port {port} is not free; choose another one\n"


def test_without_gradio_the_line_says_how_to_get_it(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vlm.demo.app", raising=False)
    monkeypatch.delattr("vlm.demo.app", raising=False)
    assert command.main([*map(str, folders)]) == 2
    error = capsys.readouterr().err
    assert 'pip install -e ".[demo]"' in error and error.count("\n") == 1


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(folders):
    pytest.importorskip("gradio", reason="gradio is not installed; .ci/run installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "vlm.demo", *map(str, folders), "--port", str(port), "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(folders[0].parent / "gradio")}
    with subprocess.Popen(line, stderr=subprocess.PIPE, env=environment, text=True) as process:
        try:
            for _ in range(240):
                if process.poll() is not None:
                    pytest.fail(f"the demo ended: {process.stderr.read()}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


@pytest.fixture
def browser():
    pytest.importorskip("selenium", reason="selenium is not installed; .ci/run installs it")
    from selenium import webdriver

    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)

    def wait(self, condition):
        from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        passing = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(self.driver, 60, ignored_exceptions=passing).until(lambda _: condition())

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def text(self, name):
        return self.find(f"#{name}").text

    def source(self, name):
        """Address of a picture that is there and has arrived; None as long as it has not."""
        image = self.find(f"#{name} img")
        self.driver.execute_script(
            "arguments[0].scrollIntoView()", image
        )  # those out of sight are not loaded
        width = self.driver.execute_script("return arguments[0].complete && arguments[0].naturalWidth", image)
        return image.get_attribute("src") if width else None

    def pixels(self, name):
        with urllib.request.urlopen(self.wait(lambda: self.source(name))) as answer:
            return np.asarray(Image.open(answer).convert("RGB"))

    def fill(self, selector, value):
        field = self.find(selector)
        field.send_keys("\ue009a\ue000", value)  # control + a: over what is there

    def asked(self, question):
        """Wait until both answers are about this question."""
        for number in (0, 1):
            self.wait(lambda number=number: f"asked: {question}" in self.text(f"answer-{number}"))


MAPS = {0: ("attention",), 1: ("attention", "write", "share")}


def test_both_models_answer_about_a_rendered_scene_and_show_what_they_read(address, browser):
    page, questions = Page(browser, address), asking.questions(SCENE)
    page.asked(asking.questions(sample_scene(0, "heldout", 0))[0].text)  # the page opens with an answer
    page.fill("#index input", "7")
    page.fill("#seed input", "3")
    page.find("#render").click()
    page.asked(questions[0].text)
    assert (page.pixels("picture") == render(SCENE)).all()
    for number, names in MAPS.items():
        assert "wrong" in page.text(f"answer-{number}") or "right" in page.text(f"answer-{number}")
        assert f"right: {questions[0].example.answer}" in page.text(f"answer-{number}")
        seen = page.pixels(f"picture-{number}")
        x0, y0, x1, y1 = (2.5 * value for value in questions[0].example.boxes[0])
        assert framed(seen, GREEN) == pytest.approx((x0, y0, x1, y1), abs=3)
        for name in MAPS[1]:
            shown = browser.find_elements("css selector", f"#{name}-{number} img")
            assert bool(shown and shown[0].is_displayed()) is (name in names)
        for name in names:
            assert len(np.unique(page.pixels(f"{name}-{number}").reshape(-1, 3), axis=0)) > 10

    before = {name: page.source(f"{name}-1") for name in MAPS[1]}
    other = page.source("attention-0")
    page.find("#layer-1 input[type=range]").send_keys("\ue014")  # arrow to the right: one layer up
    for name, source in before.items():
        page.wait(lambda name=name, source=source: page.source(f"{name}-1") not in (None, source))
    assert page.source("attention-0") == other

    page.fill("#question textarea, #question input", questions[2].text)
    page.find("#ask").click()
    page.asked(questions[2].text)
    assert_quiet(browser, address)


def test_an_example_question_is_asked_when_it_is_chosen(address, browser):
    page, questions = Page(browser, address), asking.questions(sample_scene(0, "heldout", 0))
    page.asked(questions[0].text)
    page.find("#example input").click()
    page.wait(lambda: len(browser.find_elements("css selector", "#example [role=option]")) == len(questions))
    browser.find_elements("css selector", "#example [role=option]")[4].click()
    page.asked(questions[4].text)
    assert f"right: {questions[4].example.answer}" in page.text("answer-1")


def test_an_uploaded_picture_is_asked_about_in_the_users_words(address, browser, tmp_path):
    path = tmp_path / "upload.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)).save(path)
    page = Page(browser, address)
    page.asked(asking.questions(sample_scene(0, "heldout", 0))[0].text)
    page.find("#picture button[aria-label='Remove Image']").click()
    page.wait(lambda: not browser.find_elements("css selector", "#picture img"))
    page.find("#ask").click()
    page.wait(lambda: "There is no picture yet" in page.find("body").text)
    page.find("#picture input[type=file]").send_keys(str(path))
    page.wait(lambda: page.source("picture"))
    page.fill("#question textarea, #question input", "Where is the giraffe?")
    page.find("#ask").click()
    page.asked("Where is the giraffe?")
    for number in (0, 1):
        assert "this model has no word for: giraffe" in page.text(f"answer-{number}")
        assert "right" not in page.text(f"answer-{number}")
        assert page.pixels(f"attention-{number}").shape == (213, 320, 3)


def test_the_page_fits_a_narrow_screen(address, browser):
    size = dict(width=390, height=900, deviceScaleFactor=1, mobile=True)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page = Page(browser, address)
    page.asked(asking.questions(sample_scene(0, "heldout", 0))[0].text)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    boxes = [page.find(f"#{name}").rect for name in ("picture", "ask", "picture-0", "share-1")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 250 for box in boxes)


def assert_quiet(browser, address):
    """No error in the console, and nothing asked of another machine."""
    import json

    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert sent and [url for url in sent if not url.startswith((address, "data:", "blob:"))] == []
