"""Adapters of lmms-eval and VLMEvalKit: the answers are those of vlm.evaluate, and the scores its scores."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

import vlm_runs
from PIL import Image
from pyarrow import parquet
from vlm_checkpoints import released
from vlm_runs import one_line
from vlm_two_stages import run

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from vlm import answering, components, evaluate, prompts, results, stages, train
from vlm.config import Scenes, Stage
from vlm.harness import export_scenes, scene_tasks
from vlm.harness.wording import answered, packed, worded
from vlm.model import VLM
from vlm.scenes import TASKS

IMAGES = 7
LMMS = importlib.util.find_spec("lmms_eval") is not None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps, its folder, its table and its answers by (task, id)."""
    out = tmp_path_factory.mktemp("vlm")
    vlm_runs.save_encoder(out)
    data = {name: Scenes(name, 40) for name in ("locate", "existence", "caption", "pointing")}
    stage = Stage(data, steps=80, batch_size=4, lr=1e-2, weights=dict.fromkeys(data, 1))
    asked = {task: Scenes(task, IMAGES, "heldout") for task in TASKS}
    wanted = dataclasses.replace(
        run(stages=(stage,), layout="query-first", max_new_tokens=9), evaluation=asked
    )
    stages.train_stage(wanted, 0, out, train.accelerate([wanted]), lambda _: None, lambda: False)
    from vlm import folders

    folders.remember(wanted, out)
    table = results.write(out, wanted.name, *evaluate.evaluate(wanted, out, device="cpu"))
    said = {(row["task"], row["id"]): row for row in store.read_rows(results.answers_path(out, wanted.name))}
    return SimpleNamespace(folder=out / wanted.stage_ids()[-1], out=out, run=wanted, table=table, said=said)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks")
    assert export_scenes.main(["--out", str(out), "--images", str(IMAGES)]) == 0
    return out


@pytest.fixture
def lmms_model(monkeypatch):
    """The adapter; where lmms-eval is missing, with what its interface says of the class it needs."""
    if not LMMS:
        base, api = ModuleType("lmms_eval"), ModuleType("lmms_eval.api.model")

        class lmms:
            def __init__(self):
                self.task_dict = {}

        api.lmms = lmms
        for name, module in (("lmms_eval", base), ("lmms_eval.api", base), ("lmms_eval.api.model", api)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "vlm.harness.lmms_model", raising=False)
    yield importlib.import_module("vlm.harness.lmms_model")
    if not LMMS:
        sys.modules.pop("vlm.harness.lmms_model", None)


def documents(folder, task):
    """The rows of a task's file, with their pictures, as `datasets` gives them."""
    rows = parquet.read_table(folder / f"{task}.parquet").to_pylist()
    return [row | {"image": Image.open(io.BytesIO(row["image"]))} for row in rows]


def request(text, task, number=0, options=None, visual=scene_tasks.scene_visual):
    return SimpleNamespace(args=(text, options or {}, visual, number, task, "test"), task_name=task)


# --- scenes: lmms-eval and vlm.evaluate agree ---------------------------------------------------------------


def test_the_adapter_answers_and_scores_as_evaluation_does(trained, tasks, lmms_model):
    model = lmms_model.RetrievalVLM(run=str(trained.folder), batch_size=64, device="cpu")
    found = {task: documents(tasks, task) for task in TASKS}
    model.task_dict = {task: {"test": rows} for task, rows in found.items()}
    options = {"max_new_tokens": 64, "until": []}
    order = [(task, i) for i in range(IMAGES) for task in TASKS]  # tasks alternate
    said = model.generate_until([request(found[t][i]["prompt"], t, i, options) for t, i in order])
    rows: dict[str, dict[str, list]] = {}
    for (task, i), text in zip(order, said, strict=True):
        document = found[task][i]
        assert text == trained.said[task, document["id"]]["said"], (task, i)
        scored = scene_tasks.scene_results({k: v for k, v in document.items() if k != "image"}, [text])
        for metric, row in scored.items():
            rows.setdefault(task, {}).setdefault(metric, []).append(row)
    assert len(set(said)) > 3  # the answers depend on what is asked
    compared = [
        (task, metric, scene_tasks.scene_score(each)) for task in rows for metric, each in rows[task].items()
    ]
    assert sorted(compared) == sorted(
        trained.table[["task", "metric", "value"]].itertuples(index=False, name=None)
    )


def test_lmms_eval_agrees_to_the_digit(trained, tasks, tmp_path):
    """The program itself, on the files of the tasks; answers one by one, and every score."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; .ci/run installs it")
    argv = [
        "--model", "ssm_retrieval_vlm", "--model_args", f"run={trained.folder}", "--tasks", "scenes",
        "--include_path", tasks, "--batch_size", "64", "--device", "cpu", "--log_samples",
        "--output_path", tmp_path / "out",
    ]  # fmt: skip
    apart = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *map(str, argv)], env=apart, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("*_results.json")
    compared = [
        (name.removeprefix("scenes_"), key.removesuffix(",none"), value)
        for name, scores in json.loads(path.read_text())["results"].items()
        for key, value in scores.items()
        if key.endswith(",none") and "stderr" not in key
    ]
    expected = trained.table[["task", "metric", "value"]].itertuples(index=False, name=None)
    assert sorted(compared) == sorted(expected)
    said = {
        (path.stem.partition("_samples_scenes_")[2], str(row["doc_id"])): row["filtered_resps"]
        for path in (tmp_path / "out").rglob("*_samples_*.jsonl")
        for row in store.read_rows(path)
    }
    assert said == {key: row["said"] for key, row in trained.said.items()}


def test_lmms_eval_finds_the_model_by_its_entry_point():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; .ci/run installs it")
    from lmms_eval.models import get_model

    assert get_model("ssm_retrieval_vlm").__module__ == "vlm.harness.lmms_model"


def test_exported_prompts_are_those_of_evaluation(tasks):
    for task in TASKS:
        source = Scenes(task, IMAGES, "heldout").build(answers=False)
        for i, row in enumerate(documents(tasks, task)):
            assert worded(row["prompt"]) == list(source[i].chunks)
            assert (np.asarray(row["image"]) == source.picture(str(i))).all()
            assert json.loads(row["target"]) == json.loads(json.dumps(source[i].target))


# --- what a harness says is respected -----------------------------------------------------------------------


@pytest.fixture
def asked(trained, lmms_model, monkeypatch):
    """Ask one caption with the given options; the model says a long one."""
    model = lmms_model.RetrievalVLM(run=str(trained.folder), device="cpu")
    picture = Scenes("caption", 1).build(answers=False).picture("0")
    model.task_dict = {"cap": {"test": [{"image": Image.fromarray(picture)}]}}
    tokens = torch.tensor([components.text("scenes").encode("A red star, a small circle.")])
    monkeypatch.setattr(VLM, "generate", lambda self, ids, features, most, eos_token_id: tokens[:, :most])
    text = packed(prompts.captioning())
    return model, lambda **options: model.generate_until([request(text, "cap", options=options)])[0]


def test_length_and_stops_of_a_harness_are_respected(asked, capsys):
    _, ask = asked
    assert ask() == "A red star, a small circle."  # 8 tokens, of 9 that the run allows
    assert ask(max_new_tokens=3) == "A red star" and ask(max_new_tokens=99) == ask()
    assert ask(until=[","]) == ask(until=",") == ask(until=["circle", ",", ""]) == "A red star"
    assert ask(until=["red", " star"]) == "A "  # whichever comes first
    assert ask(until=None, temperature=0, do_sample=False, num_beams=1) == ask()
    assert capsys.readouterr().err == ""
    assert ask(num_beams=3) == ask(num_beams=3) == ask()
    assert capsys.readouterr().err.count("warning: num_beams=3 is ignored") == 1


def test_what_the_models_cannot_do_is_told_in_one_line(asked, trained, lmms_model, tmp_path):
    model, _ = asked
    picture = Image.new("RGB", (9, 9))
    for visual, line in (
        (lambda _: [picture, picture], "task cap, document 0 has the visuals: Image, Image; .* reads one"),
        (lambda _: None, "has the visuals: none; .* leave this task out"),
        (lambda _: ["film.mp4"], "has the visuals: str;"),
    ):
        with pytest.raises(UserError, match=line) as raised:
            model.generate_until([request("What?", "cap", visual=visual)])
        one_line(raised)
    for kind in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(UserError, match=f"task cap needs {kind}, but .* leave this task out") as raised:
            getattr(model, kind)([request("What?", "cap")])
        one_line(raised)
    for arguments, line in (
        ({}, r"give run=FOLDER, or checkpoint=FOLDER"),
        (dict(run="a", checkpoint="b"), r"give run=FOLDER, or checkpoint=FOLDER"),
        (dict(run="a", layout="agnostic"), r"give run=FOLDER, or checkpoint=FOLDER"),
        (dict(run="a", pretrained="b"), r"argument 'pretrained' is unknown; use run, checkpoint, batch_size"),
        (dict(run=str(trained.folder), batch_size="many"), "batch_size=many must be a number"),
        (dict(run=str(tmp_path)), "holds no trained VLM"),
        (dict(checkpoint=str(tmp_path)), "config.json"),
    ):
        with pytest.raises(UserError, match=line) as raised:
            lmms_model.RetrievalVLM(**arguments)
        one_line(raised)


def test_a_released_checkpoint_answers_a_harness(lmms_model, tmp_path):
    components.eyes.cache_clear()
    released(tmp_path / "mini-vl", "mamba")
    model = lmms_model.RetrievalVLM(checkpoint=str(tmp_path / "mini-vl"), layout="query-first", batch_size=2)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(5)]
    model.task_dict = {"pope": {"test": [{"image": picture} for picture in pictures]}}
    text = "Is there a red star?\nAnswer the question using a single word or phrase."
    said = model.generate_until([request(text, "pope", i, {"max_new_tokens": 5}) for i in range(5)])
    assert model.answerer.run.layout == "query-first"
    chunks = prompts.vqa([("Is there a red star?", None)])
    one = [model.answerer.answer(np.asarray(picture), chunks, 5) for picture in pictures]
    assert said == [text.strip().removesuffix(".") for text in one] and len(set(said)) > 2


# --- other harnesses' texts ---------------------------------------------------------------------------------

LETTERS = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
TEXTS = [  # task, text of the harness, prompt; as lmms-eval 0.7.3 and VLMEvalKit (August 2026) ask
    ("pope", f"Is there a dog?\n{SHORT}", prompts.vqa([("Is there a dog?", None)])),
    ("vizwiz", "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
     f"{SHORT}", prompts.vqa([("What is it?", None)])),
    ("mme", "Is it red?\nAnswer the question with Yes or No.", prompts.vqa([("Is it red?", None)])),
    ("AMBER", "Is it red?\nPlease answer yes or no.", prompts.vqa([("Is it red?", None)])),
    ("x", "Which one?", prompts.vqa([("Which one?", None)])),
    ("docvqa_val", f"What does ACME sell?\n{SHORT}",
     prompts.vqa([("What does ACME sell?", None)], keep_case=True)),
    ("gqa", f"What does ACME sell?\n{SHORT}", prompts.vqa([("What does ACME sell?", None)])),
    ("ai2d", f"Which is B?\nA. leaf\nB. the Root\n{LETTERS}",
     prompts.multiple_choice([("Which is B?", ["leaf", "the Root"], None)], keep_case=True)),
    ("MMBench", "Hint: A cat.\nQuestion: Who?\nOptions:\nA. he\nB. she\nC. it\n"
     "Please select the correct answer from the options above. \n",
     prompts.multiple_choice([("Hint: A cat. Who?", ["he", "she", "it"], None)])),
    ("x", "A. Smith wrote it?", prompts.vqa([("A. Smith wrote it?", None)])),
    ("coco", "Provide a one-sentence caption for the provided image.", prompts.captioning()),
    ("COCO_VAL", "Please describe this image in general. Directly provide the description, do not include "
     "prefix like \"This image depicts\". ", prompts.captioning()),
    ("refcoco", "Bounding box coordinates are specified in the format (top-left x, top-left y, "
     "bottom-right x, bottom-right y). All values are floating point numbers bounded between 0 and 1. "
     "Please provide the bounding box coordinate of the region this sentence describes: left dog",
     prompts.grounding([("left dog", None)], 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("task", "text", "prompt"), TEXTS)
def test_a_harness_question_is_asked_in_the_published_wording(task, text, prompt):
    assert worded(text, task) == prompt


def test_answers_lose_the_published_full_stop_unless_the_prompt_was_ours():
    assert answered("Is it?", "Yes.") == "Yes" and answered("Which?", " A.") == "A"
    assert answered(packed(prompts.captioning()), "A dog.") == "A dog."
    assert answered("Is it?", "Yes. ASSISTANT: no", ["ASSISTANT:"]) == "Yes"


# --- VLMEvalKit ---------------------------------------------------------------------------------------------


class BaseModel:
    """What VLMEvalKit's class of this name does with a message before it asks the model."""

    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)


@pytest.fixture
def vlmevalkit(monkeypatch):
    module = ModuleType("vlmeval.vlm.base")
    module.BaseModel = BaseModel
    for name in ("vlmeval", "vlmeval.vlm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", module)
    monkeypatch.delitem(sys.modules, "vlm.harness.vlmevalkit", raising=False)
    yield importlib.import_module("vlm.harness.vlmevalkit")
    sys.modules.pop("vlm.harness.vlmevalkit")


def test_vlmevalkit_gets_the_answers_of_evaluation(trained, vlmevalkit, tmp_path):
    model = vlmevalkit.RetrievalVLM(run=str(trained.folder), device="cpu")
    assert isinstance(model, BaseModel) and not model.INTERLEAVE
    source = Scenes("count", IMAGES, "heldout").build(answers=False)
    for i in range(IMAGES):
        Image.fromarray(source.picture(str(i))).save(tmp_path / f"{i}.png")
        question = source[i].chunks[-1].text.removeprefix("\nQuestion: ").removesuffix("\nAnswer: ")
        message = [dict(type="image", value=str(tmp_path / f"{i}.png")), dict(type="text", value=question)]
        said = trained.said["count", str(i)]["said"]
        assert model.generate(message, dataset="POPE") == said.strip().removesuffix(".")
    two = [dict(type="image", value="a.png")] * 2 + [dict(type="text", value="Which?")]
    with pytest.raises(
        UserError, match=r"data set BLINK asks about 2 pictures at once; .* leave this data"
    ) as raised:
        model.generate(two, dataset="BLINK")
    one_line(raised)
    short = vlmevalkit.RetrievalVLM(run=str(trained.folder), device="cpu", max_new_tokens=1)
    caption = [message[0], dict(type="text", value="Please describe this image.")]
    assert len(components.text("scenes").encode(short.generate(caption))) <= 1


def test_without_vlmevalkit_its_class_can_be_imported():
    if importlib.util.find_spec("vlmeval") is None:
        assert importlib.import_module("vlm.harness.vlmevalkit").RetrievalVLM.__mro__[1] is object


def test_the_command_says_what_it_cannot_export(tmp_path, capsys):
    assert export_scenes.main(["--out", str(tmp_path), "--tasks", "locate"]) == 2
    assert "--tasks locate: no kind of question" in capsys.readouterr().err


def test_features_are_as_precise_as_evaluation_reads_them(trained):
    source = Scenes("count", 3, "heldout").build(answers=False)
    cache = components.features(trained.run, 32, trained.out)
    cache.fill(source, progress=False)
    answerer = answering.Answerer.of(trained.run, trained.out)
    seen = answerer.features([source.picture(str(i)) for i in range(3)])
    assert seen.dtype == cache.get(source, ["0"]).dtype and seen.equal(cache.get(source, ["0", "1", "2"]))
