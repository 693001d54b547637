"""easy-VQA: what its package says of itself, what is read of it, and the tokenizer of a run's own words."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from importlib import metadata

import pandas as pd
import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

import vlm_runs
from PIL import Image
from vlm_files import CASES, write

from ssm_retrieval.errors import MissingPackage, UserError
from ssm_retrieval.style import NAMES
from studies.easy_vqa import runs as study
from studies.easy_vqa import summary
from vlm import components, evaluate, predict
from vlm.answering import Answerer
from vlm.config import Files, Scenes, from_dict
from vlm.configs import easy_vqa as config
from vlm.data import easy_vqa, registry
from vlm.data.config import LEARNED
from vlm.data.sources import FileSource

OTHER = {("yes",): ("no",), ("no",): ("yes",)}


@pytest.fixture
def package():
    return pytest.importorskip("easy_vqa", reason="easy-vqa is not installed; .ci/run installs it")


def records(split, **options):
    return list(registry.read("easy-vqa", easy_vqa.installed(), split, **options))


# --- the package --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_records_are_the_packages_own_questions(package, split):
    found = records(split)
    texts, answers, images = getattr(package, f"get_{split}_questions")()
    said = [(r.question, r.answers, int(r.image.split("/")[-1].removesuffix(".png"))) for r in found]
    assert said == [(q, (a,), i) for q, a, i in zip(texts, answers, images, strict=True)]
    pictures = {easy_vqa.installed() / r.image for r in found}
    assert {str(path) for path in pictures} == set(getattr(package, f"get_{split}_image_paths")().values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_counts_are_those_that_the_author_states(package, split):
    """In the package's description: pictures, questions, questions of yes or no, answers."""
    stated = str(metadata.metadata("easy-vqa").get_payload())

    def number(pattern):
        return int(re.search(pattern, stated).group(1).replace(",", ""))

    found = records(split)
    assert len(found) == number(rf"([\d,]+) {split} questions") == {"train": 38575, "test": 9673}[split]
    assert len({record.image for record in found}) == number(rf"([\d,]+) {split} images")
    kinds = Counter(record.kind for record in found)
    assert kinds["yes/no"] == number(rf"([\d,]+) {split}ing questions that are yes/no")
    assert len({record.answers for record in found}) == number(r"(\d+) total possible answers")
    by_kind = {kind: {r.answers[0] for r in found if r.kind == kind} for kind in kinds}
    assert {kind: len(answers) for kind, answers in by_kind.items()} == {"yes/no": 2, "shape": 3, "color": 8}


def test_without_folders_pictures_and_questions_are_the_packages(package, monkeypatch):
    source = Files("easy-vqa", "test").build(answers=True)
    assert source.picture(source[0].image).shape == (64, 64, 3) and len(source) == 9673
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install easy-vqa") as raised:
        Files("easy-vqa", "test").build(answers=True)
    vlm_runs.one_line(raised)


def test_finding_the_package_does_not_import_it(package, monkeypatch):
    monkeypatch.delitem(sys.modules, "easy_vqa")
    assert (easy_vqa.installed() / "answers.txt").is_file() and "easy_vqa" not in sys.modules


@pytest.mark.parametrize("folders", [(None, None), ("a", None), (None, "b")])
def test_other_data_sets_need_both_folders(folders):
    with pytest.raises(UserError, match=r"Files: annotations=.* give .*folders"):
        Files("coco", "test", *folders)


# --- parts of the training pictures -------------------------------------------------------------------------


def test_an_eighth_of_the_training_pictures_is_held_out(package):
    whole, fit, val = (records("train", part=part) for part in ("all", "fit", "val"))
    assert sorted([*fit, *val], key=lambda r: int(r.id)) == whole
    pictures = [{record.image for record in part} for part in (fit, val)]
    assert not pictures[0] & pictures[1] and [len(part) for part in pictures] == [3500, 500]


@pytest.mark.parametrize(("split", "part"), [("train", "test"), ("test", "val"), ("test", "fit")])
def test_a_part_that_there_is_not_is_refused(tmp_path, split, part):
    with pytest.raises(UserError, match=f"part='{part}' of split '{split}' must be"):
        list(registry.read("easy-vqa", tmp_path, split, part=part))


def test_open_questions_are_those_that_yes_or_no_does_not_answer(package):
    found = records("test", asked="open")
    whole = records("test")
    assert found == [record for record in whole if record.answers[0] not in ("yes", "no")]
    assert len(whole) - len(found) == 7136  # as the author states
    with pytest.raises(UserError, match="asked='closed' must be 'all' or 'open'"):
        records("test", asked="closed")


def test_an_index_notices_that_questions_have_changed(tmp_path):
    def lines(question):
        rows = [[question, "yes", 3]]
        write(tmp_path, {"train/questions.json": rows, "test/questions.json": rows})
        return FileSource("easy-vqa", tmp_path, tmp_path, "train", index_folder=tmp_path / "index")

    assert "red" in lines("is there a red shape?")[0].chunks[1].text
    assert "yellow" in lines("is there a yellow shape?")[0].chunks[1].text


# --- the guess without the image ----------------------------------------------------------------------------


def test_the_guess_is_the_most_frequent_answer_to_the_same_question(package):
    """Against counting on the package's lists; all 107 questions are among the first 4,000."""
    counts = {}
    for question, answer, _ in list(zip(*package.get_train_questions(), strict=True))[:LEARNED]:
        counts.setdefault(question, Counter())[answer] += 1
    asked = list(zip(*package.get_test_questions(), strict=True))
    right = sum(counts[question].most_common(1)[0][0] == answer for question, answer, _ in asked)
    blind, sighted = evaluate.guesses(Files("easy-vqa", "test"))
    assert blind == {"accuracy": pytest.approx(right / len(asked))} and 0.6 < right / len(asked) < 0.7
    assert not sighted  # which object is asked for says nothing where there is one


def test_no_guess_is_learned_from_the_questions_that_are_asked():
    assert Files("easy-vqa", "test").training() == Files("easy-vqa", "train", first=LEARNED)
    assert Files("easy-vqa", "train", options={"part": "val"}).training() is None
    assert Scenes("count", 5).training() is None and Scenes("count", 5, "heldout").training() is not None


# --- the tokenizer of a run's own words ---------------------------------------------------------------------


@pytest.fixture
def own_words(tmp_path):
    """A function (questions) -> a small run on them, with the tokenizer made of them."""

    def made(*questions, **more):
        rows = [[question, "teal", i] for i, question in enumerate(questions)]
        write(tmp_path, {f"{split}/questions.json": rows for split in ("train", "test")})
        components._own_words.clear()
        data = {split: Files("easy-vqa", split, str(tmp_path), str(tmp_path)) for split in ("train", "test")}
        stage = vlm_runs.stage(data={"easy": data["train"]})
        run = vlm_runs.run("mamba-tiny", tokenizer="own", **more)
        return replace(run, stages=(stage,), evaluation={"easy": data["test"]})

    return made


def test_words_are_those_of_questions_and_answers_and_scenes_lacks_some(own_words):
    run = own_words("what color is the rectangle?")
    for text in ("\nQuestion: What color is the rectangle?\nAnswer: ", "Teal.<|endoftext|>"):
        ids = components.text_of(run).encode(text)
        assert components.text_of(run).tokenizer.decode(ids, skip_special_tokens=False) == text
    (unknown,) = components.text_of(run).encode(" triangle")
    assert components.text_of(run).tokenizer.id_to_token(unknown) == "<|unknown|>"
    scenes = components.text_of(replace(run, tokenizer="scenes"))
    assert scenes is components.text("scenes") and scenes.decode(scenes.encode("Teal.")) != "Teal."


def test_a_stages_name_knows_the_words(own_words):
    first = own_words("what color is it?").stage_ids()
    assert own_words("what color is it?").stage_ids() == first
    assert own_words("what color is it?", "what is it?").stage_ids() == first  # the same words
    assert own_words("what color is this?").stage_ids() != first
    before = own_words("what color is it?")
    assert replace(before, tokenizer="scenes").stage_ids() != first
    assert from_dict(json.loads(json.dumps(before.to_dict()))).stage_ids() == first


def test_every_stage_gives_words(own_words, tmp_path):
    run = own_words("what color is it?")
    both = replace(run, stages=(*run.stages, vlm_runs.stage()))
    assert both.stage_ids()[0] != run.stage_ids()[0]
    words = components.text_of(both)
    for text in (" color", " star"):
        assert words.decode(words.encode(text)) == text


def test_a_run_with_its_own_words_is_evaluated_and_asked(own_words, tmp_path):
    run = own_words("what color is it?", "what shape is it?", max_new_tokens=3)
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir()
        for i in range(2):
            Image.new("RGB", (64, 64), (0, 128, 128)).save(tmp_path / split / "images" / f"{i}.png")
    out = tmp_path / "runs"
    vlm_runs.save_encoder(out)
    folder = vlm_runs.save(run, out)
    rows, answers = evaluate.evaluate(run, out)
    assert [row["metric"] for row in rows] == ["accuracy"] and rows[0]["count"] == 2
    assert rows[0]["question_only"] == 1 and rows[0]["stage"] == folder.name
    answerer = Answerer.of(run, out)
    picture = FileSource("easy-vqa", tmp_path, tmp_path, "test").picture("test/images/0.png")
    assert predict.ask(answerer, picture, "What color is it?", "vqa") == answers[0]["said"]


def test_training_texts_that_are_missing_are_one_line(own_words, tmp_path):
    run = own_words("what color is it?")
    (tmp_path / "train" / "questions.json").unlink()
    components._own_words.clear()
    with pytest.raises(UserError, match=r"train/questions.json is missing") as raised:
        run.stage_ids()
    vlm_runs.one_line(raised)


# --- the config ---------------------------------------------------------------------------------------------


def test_the_config_treats_both_families_alike_and_never_asks_what_it_trained_on():
    """All but the model, its size and its learning rate is the same; the test split chooses no rate."""
    runs = config.get_config()
    assert {run.family for run in runs} == {"transformer", "mamba"}
    alike = [
        replace(run, name="a", model="mamba-tiny", model_overrides={},
                stages=tuple(replace(stage, lr=1.0) for stage in run.stages))
        for run in runs
    ]  # fmt: skip
    assert alike[0] == alike[1]
    for run in runs:
        assert {data.split for data in run.evaluation.values()} == {"test"}
        assert {data.split for stage in run.stages for data in stage.data.values()} == {"train"}


def test_rates_are_chosen_on_pictures_that_the_runs_have_not_seen():
    tried = [run for run in study.get_config() if "-lr" in run.name]
    assert len({(run.family, run.stages[0].lr) for run in tried}) == len(tried) == 2 * len(study.TRIED)
    for run in tried:
        assert {(data.split, data.options["part"]) for data in run.evaluation.values()} == {("train", "val")}
        seen = [data for stage in run.stages for data in stage.data.values()]
        assert {(data.split, data.options["part"]) for data in seen} == {("train", "fit")}


def test_the_studys_page_has_its_tables_and_the_guess_that_its_models_did_not_beat(package):
    """Kinds of questions against counting words of the package's own lists."""
    page = (summary.HERE / "README.md").read_text()
    assert summary.filled(page) == page
    held_out = records("train", part="val")
    fit = Counter((record.question, record.answers) for record in records("train", part="fit"))
    asked = {"color": 0, "shape": 0}
    right = 0
    for record in held_out:
        if record.kind == "yes/no":
            named = {"circle", "rectangle", "triangle"} & set(record.question.rstrip("?").split())
            asked["shape" if named else "color"] += 1
            right += fit[record.question, record.answers] > fit[record.question, OTHER[record.answers]]
    table = pd.read_csv(summary.MIXED).set_index(["family", "kind"])
    for family in summary.FAMILIES:
        closed = [table.loc[(family, f"is there a {what}")] for what in asked]
        assert [row["count"] for row in closed] == list(asked.values())
        assert sum(row["right"] for row in closed) == right == 2950


def test_right_answers_are_counted_by_kind():
    told = [
        ("\nQuestion: Is there no circle?\nAnswer: ", "yes/no", True, "is there a shape"),
        ("\nQuestion: Is there a red shape?\nAnswer: ", "yes/no", False, "is there a color"),
        ("\nQuestion: What is the red shape?\nAnswer: ", "shape", True, "what shape"),
    ]
    rows = [dict(asked=asked, target={"kind": kind}, right=right) for asked, kind, right, _ in told]
    found = summary.by_kind(rows)
    assert {row["kind"]: (row["right"], row["count"]) for row in found} == {
        kind: (int(right), 1) for _, _, right, kind in told
    }


def test_the_case_of_miniature_files_has_the_packages_structure(package):
    (mine,) = CASES["easy-vqa"][1].values()
    theirs = json.loads((easy_vqa.installed() / "train/questions.json").read_text())
    assert {tuple(map(type, row)) for row in theirs} == {tuple(map(type, row)) for row in mine}


def test_the_page_on_vlms_has_the_scores_of_the_study():
    results = pd.read_parquet(summary.RESULTS)
    assert set(results["run"]) == {run.name for run in study.get_config()}
    page = (summary.HERE.parents[1] / "docs" / "vlm.md").read_text(encoding="utf-8")
    for family in summary.FAMILIES:
        mine = summary.test_split(results, family)
        assert set(mine["steps"]) == {sum(config.STEPS.values())}
        assert f"{NAMES[family]}-VL, mean of three seeds (each) | {summary.percent(mine['value'])} |" in page
