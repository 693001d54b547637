"""Every declared data set: answers are worth what its metric says, and what it declares is what is done."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from vlm_files import CASES, NOT_OF_THE_PAPER, write

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from PIL import Image

from ssm_retrieval.errors import UserError
from vlm import components, evaluate, folders, results
from vlm.config import Files, Scenes
from vlm.configs import paper
from vlm.data import registry, tasks
from vlm.data.declaration import DataSet
from vlm.data.records import (
    Captioned,
    Choice,
    Conversation,
    Grounded,
    GroundedCaption,
    Question,
    Span,
    Statement,
    Turn,
)  # fmt: skip
from vlm.data.registry import DATASETS
from vlm.data.sources import FileSource
from vlm.data.turns import Rules, samples
from vlm.metrics import Metric
from vlm.prompts import END
from vlm.scenes.declared import SCENES
from vlm.scenes.source import PACKED, SOURCES, SceneSource

ASKED, TOLD = Rules(training=False), Rules(every_slot=False)
WRONG = {
    "captioning": "zebra", "caption": "zebra", "grounding": "[0.00,0.00,0.01,0.01].", "vqa": "zebra.",
}  # fmt: skip


def asked_and_told(name, folder):
    """The one question of a data set's miniature files, and the right answer that training has."""
    if name in SCENES:
        return (SceneSource(name, 1, answers=a)[0] for a in (False, True))
    split, files, _ = CASES[name]
    write(folder, files)
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (10, 20)).save(folder / "images" / "v7w_1.jpg")
    return (FileSource(name, folder, folder / "images", split, rules=rules)[0] for rules in (ASKED, TOLD))


def value(sample, said) -> float:
    """Of the main row; of captions ROUGE-L, since CIDEr of a corpus of one image is 0."""
    found = {row["metric"]: row["value"] for row in results.score([sample], [said])}
    name = results.declared(sample).metric.name
    return found["rouge_l" if name == "cider" else name]


UNSCORED = ("grit", "llava-pretrain", "llava-instruct", *PACKED)
SCORED = [name for name in (*DATASETS, *SCENES) if name not in UNSCORED]


@pytest.mark.parametrize("name", SCORED)
def test_a_perfect_answer_scores_1_and_a_wrong_one_0(name, tmp_path):
    asked, told = asked_and_told(name, tmp_path)
    perfect = next(chunk.text for chunk in told.chunks if chunk.supervised).removesuffix(END)
    if results.declared(asked).metric.name in ("cider", "object_recall"):
        pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed; .ci/run installs it")
        assert results.right(asked, perfect) is None
    else:
        assert results.right(asked, perfect) is True
    wrong = WRONG.get(asked.task)
    if wrong is None or name == "pope":
        wrong = {"A.": "B.", "True.": "False.", "False.": "True.", "No.": "Yes."}.get(perfect, "A.")
    assert not results.right(asked, wrong)
    assert (value(asked, perfect), value(asked, wrong)) == (pytest.approx(1), 0)


COUNT_OF_RECORDS = 4


def questions_and_answers(name):
    """Several questions of a data set without their answers, and the answers that training teaches."""
    if name in SCENES:
        told = SceneSource(name, COUNT_OF_RECORDS)
        asked = SceneSource(name, COUNT_OF_RECORDS, answers=False)
        return [asked[i] for i in range(len(asked))], [answer_of(told[i]) for i in range(len(told))]
    dataset = replace(DATASETS[name], turns=1)
    records = [miniature(dataset, i) for i in range(COUNT_OF_RECORDS)]

    def made(rules):
        return samples(records, dataset, rules, lambda record: (100, 100))

    return list(made(ASKED)), [answer_of(sample) for sample in made(TOLD)]


def miniature(dataset, i):
    """A record of the data set's kind; even ones are no and false, odd ones yes and true."""
    record = replace(record_of(dataset.task.record, i, dataset.name), image=f"{i}.jpg")
    if isinstance(record, Captioned):
        domain = ("in-domain", "out-domain")[i // 2] if dataset.name == "nocaps" else None
        return replace(record, captions=(f"Dog {i} runs after ball {i} in park {i}.",), domain=domain)
    if isinstance(record, Question):
        said = ("no", "yes")[i % 2] if dataset.name == "pope" else f"answer {i}"
        return replace(record, answers=(said,) * (10 if dataset.metric.name == "vqa_accuracy" else 1))
    if isinstance(record, Choice):
        boxes = record.boxes if dataset.task == tasks.POINTING else ()
        return replace(record, answer=i % 2, boxes=boxes)
    return replace(record, label=i % 2 == 1) if isinstance(record, Statement) else record


def answer_of(sample):
    return next(chunk.text for chunk in sample.chunks if chunk.supervised).removesuffix(END)


# of perfect answers; other rows are 1. The released evaluator of POPE takes every "No." for yes.
BEST = {"cider": 10, "yes_rate": 0.5, ("pope", "accuracy_published"): 0.5}


@pytest.mark.parametrize("name", SCORED)
def test_perfect_answers_get_the_best_score_in_every_row(name):
    if results.declared(questions_and_answers(name)[0][0]).metric.name in ("cider", "object_recall"):
        pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed; .ci/run installs it")
    asked, perfect = questions_and_answers(name)
    rows = results.score(asked, perfect)
    assert len(rows) == len({row["metric"] for row in rows}) > 0
    assert results.declared(asked[0]).metric.name in {row["metric"] for row in rows}
    for row in rows:
        metric = row["metric"].partition("/")[0]
        best = BEST.get((name, metric), BEST.get(metric, 1))
        rounded = 0.1 if (name, metric) == ("grounding", "mean_iou") else 1e-6  # boxes have two decimals
        assert row["value"] == pytest.approx(best, abs=rounded), row["metric"]
        assert row["count"] == COUNT_OF_RECORDS
    if name == "pope":
        rows = results.score(asked, [said.removesuffix(".").lower() for said in perfect])
        assert {row["value"] for row in rows} == {1, 0.5}
    if name == "nocaps":
        assert {row["metric"].partition("/")[2] for row in rows} == {"", "in-domain", "out-domain"}


@pytest.mark.parametrize("name", UNSCORED)
def test_what_has_no_metric_has_no_rows(name, tmp_path):
    asked, told = asked_and_told(name, tmp_path)
    for sample in (asked, told):
        assert results.score([sample], ["a dog"]) == [] and results.right(sample, "a dog") is None


def test_scenes_declare_every_source_and_official_files_have_no_name_of_theirs():
    assert SCENES.keys() == set(SOURCES) and not SCENES.keys() & DATASETS.keys()


# --- the evaluator reads the declaration --------------------------------------------------------------------


def length_of(samples, answers):
    return [dict(metric="length", value=float(sum(map(len, answers))), count=len(answers))]


LENGTH = Metric("length", "it is long", lambda target, said: len(said) > 3, length_of)


@pytest.mark.parametrize("name", [*DATASETS, *SCENES])
def test_the_declared_metric_is_the_evaluators(name, tmp_path, monkeypatch):
    asked, _ = asked_and_told(name, tmp_path)
    table = DATASETS if name in DATASETS else SCENES
    monkeypatch.setitem(table, name, replace(table[name], metric=LENGTH))
    if asked.target:
        assert results.score([asked, asked], ["four", "12"])[0]["value"] == 6
        assert (results.right(asked, "four"), results.right(asked, "12")) == (True, False)
    else:  # packed turns are never asked
        assert name in PACKED


def my_reader(folder, split):
    for i in range(3 if split == "test" else 14):
        yield Question(
            id=str(i), source="mine", split=split, image=f"{i}.png", question="Is there a red star?",
            answers=("yes",),
        )  # fmt: skip


def test_a_data_set_of_ones_own_is_read_asked_and_scored_as_it_declares(vlm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "DATASETS", dict(DATASETS))
    mine = registry.register(
        DataSet(
            name="mine", reader=my_reader, splits=("train", "test"), files=(), task=tasks.questions(),
            metric=LENGTH, max_new_tokens=2, chance=0.25,
            blind=lambda known, test: [f"{len(known)} {known[0].id}"] * len(test),
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="'mine' is registered already"):
        registry.register(mine)
    for i in range(3):
        Image.new("RGB", (64, 64), (200, 10, 30)).save(tmp_path / f"{i}.png")
    run, out = folders.saved_run(vlm_folder)
    asked = {
        "mine": Files("mine", "test", str(tmp_path), str(tmp_path)),
        "count": Scenes("count", 3, "heldout"),
    }
    rows, answers = evaluate.evaluate(dataclasses.replace(run, evaluation=asked, cache=False), out)
    (row,) = [row for row in rows if row["task"] == "mine"]
    said = [answer["said"] for answer in answers if answer["task"] == "mine"]
    assert row["metric"] == "length" and row["value"] == sum(map(len, said)) and row["chance"] == 0.25
    words = components.text(run.tokenizer)
    assert len(said) == 3 and all(len(words.encode(text)) <= 2 for text in said)
    assert run.max_new_tokens > 2
    assert row["question_only"] == 3 * len("14 0")  # what it learned from the training split
    assert rows[-1]["task"] == "count" and rows[-1]["question_only"] is not None


@pytest.mark.parametrize("name", SCENES)
def test_every_right_answer_has_room_in_the_declared_length(name):
    words, source = components.text("scenes"), SceneSource(name, 40)
    for i in range(40):
        answers = [chunk.text for chunk in source[i].chunks if chunk.supervised]
        assert max(len(words.encode(text)) for text in answers) <= SCENES[name].max_new_tokens


# --- turns --------------------------------------------------------------------------------------------------

# Published numbers of turns of a training sample (None: all there are about an image).
TURNS = {
    "vqav2": 20, "gqa": 20, "visual-genome-regions": 10, "visual-genome-qa": 10, "visual7w-telling": 3,
    "visual7w-pointing": 3, "refcoco": None, "refcoco+": None, "refcocog": None, "docvqa": None,
    "infographicvqa": None, "textvqa": None, "ocr-vqa": None,
}  # fmt: skip
COUNT = 47


def record_of(kind, i, source):
    """A record of an image, different from the others of it."""
    head = dict(id=f"q{i}", source=source, split="train", image="a.jpg", width=100, height=100)
    box = (i, 0, i + 1, 10)
    more = {
        Captioned: dict(captions=(f"c{i}",)),
        Question: dict(question=f"q{i}?", answers=(f"a{i}",)),
        Choice: dict(question=f"q{i}?", choices=("a", "b"), answer=0, boxes=(box, box)),
        Statement: dict(statement=f"s{i}", label=True, relation="on"),
        Grounded: dict(phrase=f"p{i}", box=box),
        GroundedCaption: dict(caption=f"c{i}", spans=(Span(start=0, end=1, boxes=(box,), score=1.0),)),
        Conversation: dict(turns=(Turn("human", "Say."), Turn("assistant", f"c{i}"))),
    }[kind]
    return kind(**head, **more)


@pytest.mark.parametrize("name", DATASETS)
def test_samples_have_the_declared_number_of_turns(name):
    dataset = DATASETS[name]
    records = [record_of(dataset.task.record, i, name) for i in range(COUNT)]
    if dataset.task == tasks.POINTING or dataset.task.record is not Choice:
        shown = records
    else:
        shown = [replace(record, boxes=()) for record in records]
    told = list(samples(shown, dataset, TOLD, lambda record: (100, 100)))
    turns = [sum(chunk.supervised for chunk in sample.chunks) for sample in told]
    most = TURNS.get(name, 1) or COUNT
    assert turns == [most] * (COUNT // most) + ([COUNT % most] if COUNT % most else [])
    assert len(list(samples(shown, dataset, ASKED, lambda record: (100, 100)))) == COUNT


# --- the paper ----------------------------------------------------------------------------------------------


def test_the_papers_config_asks_the_papers_splits():
    """README of the released code: its splits, two of RefCOCO and RefCOCO+, three kinds of POPE."""
    run = paper.get_config()[0]
    found = {(name, data.dataset, data.split) for name, data in run.evaluation.items()}
    main = {
        "coco": "test", "nocaps": "val", "vqav2": "val", "gqa": "testdev", "visual7w-telling": "test",
        "vsr": "test", "pope": "adversarial", "refcoco": "testA", "refcoco+": "testA", "refcocog": "test",
        "visual7w-pointing": "test", "textcaps": "val", "textvqa": "val", "ai2d": "test",
    }  # fmt: skip
    more = [("pope", "random"), ("pope", "popular"), ("refcoco", "testB"), ("refcoco+", "testB")]
    assert found == {(n, n, s) for n, s in main.items()} | {(f"{n}-{s}", n, s) for n, s in more}
    for stage in run.stages:
        assert all(data.split == "train" for data in stage.data.values())
    every = [data for stage in run.stages for data in stage.data.values()] + list(run.evaluation.values())
    for data in every:
        assert data.images == f"{data.annotations}/{DATASETS[data.dataset].images}"
    assert {data.dataset for data in every} == DATASETS.keys() - NOT_OF_THE_PAPER
