"""Bad configs of VLMs: refused where they are made, in one line that names the field and its value."""

from __future__ import annotations

import pytest

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

import vlm_runs
from vlm_runs import one_line, stage
from vlm_runs import planned as run

from ssm_retrieval.errors import UserError
from vlm.config import Files, Scenes, read_file

NAN, INF = float("nan"), float("inf")


BAD_STAGES = [
    ("batch_size", "4"), ("batch_size", 0), ("batch_size", -1), ("batch_size", 4.5), ("batch_size", True),
    ("batch_size", None), ("batch_size", 10**20), ("data", {}), ("data", []), ("data", [1]),
    ("data", "locate"),
    ("data", {"locate": 5}), ("data", {"": Scenes("locate", 4)}), ("data", None), ("lr", 0), ("lr", -1e-3),
    ("lr", NAN), ("lr", INF), ("lr", "1e-3"), ("lr", 1e30), ("steps", -3), ("steps", 1.5), ("steps", 10**20),
    ("epochs", NAN), ("epochs", INF), ("train", "everything"), ("train", None), ("layouts", "agnostic"),
    ("layouts", ("sideways",)), ("layouts", {"agnostic"}), ("image_size", 8), ("image_size", -16),
    ("image_size", 10**9), ("warmup", -0.1), ("warmup", 1.5), ("warmup", NAN), ("weight_decay", -1.0),
    ("weight_decay", INF), ("betas", (0.9, 1.0)), ("betas", (0.9,)), ("betas", (-0.1, 0.9)),
    ("grad_clip", NAN),
    ("grad_clip", -1.0), ("max_length", 0), ("group", 0), ("accumulate", 0), ("workers", -1),
    ("workers", 10**6), ("weights", {"other": 1.0}), ("weights", {"locate": NAN}), ("weights", [1.0]),
]  # fmt: skip
BAD_RUNS = [
    ("name", ""), ("name", " "), ("name", ".."), ("name", "../../escaped"), ("name", "a/b"), ("name", "a\\b"),
    ("name", "/etc/x"), ("name", "a..b"), ("name", ".hidden"), ("name", "a\nb"), ("name", "a\0b"),
    ("name", "x" * 300), ("name", 5), ("name", None), ("model", "mamba-gigantic"), ("model", 5),
    ("model_overrides", {"flux": 1}), ("model_overrides", {"d_model": "wide"}), ("model_overrides", [1]),
    ("model_overrides", {"d_model": {1}}), ("model_overrides", {"norm_eps": NAN}), ("stages", ()),
    ("stages", {}), ("stages", stage()), ("stages", (stage(), None)), ("stages", ("stage",)),
    ("evaluation", []), ("evaluation", {"a": None}), ("evaluation", "grounding"), ("layout", "sideways"),
    ("layout", None), ("image_size", 8), ("image_size", 64.0), ("image_size", 10**9), ("seed", -1),
    ("seed", 2**64), ("seed", "0"), ("precision", "fp8"), ("precision", True), ("max_new_tokens", 0),
    ("max_new_tokens", 10**9), ("cache", "yes"), ("encoder", ""), ("tokenizer", None), ("init", ""),
]  # fmt: skip
BAD_DATA = [
    (Scenes, "task", ("sing", 4)), (Scenes, "task", (None, 4)), (Scenes, "images", ("locate", 0)),
    (Scenes, "images", ("locate", "40")), (Scenes, "split", ("locate", 4, "test")),
    (Scenes, "seed", ("locate", 4, "train", -1)), (Scenes, "turns", ("locate", 4, "train", 0, 0)),
    (Files, "data set", ("cocoa", "train", "a", "b")), (Files, "split", ("coco", "training", "a", "b")),
    (Files, "annotations", ("coco", "train", "", "b")), (Files, "images", ("coco", "train", "a", None)),
    (Files, "first", ("coco", "train", "a", "b", -1)), (Files, "regions",
    ("coco", "train", "a", "b", 0, "x")),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_STAGES)
def test_a_bad_stage_is_refused_where_it_is_made(field, value):
    with pytest.raises(UserError, match=rf"Stage: .*{field}") as raised:
        stage(**{field: value})
    one_line(raised)


@pytest.mark.parametrize(("field", "value"), BAD_RUNS)
def test_a_bad_run_is_refused_where_it_is_made(field, value):
    with pytest.raises(UserError, match=rf"Run .*: .*({field}|no stages|model )") as raised:
        run(**{field: value})
    one_line(raised)


@pytest.mark.parametrize(("kind", "field", "values"), BAD_DATA)
def test_bad_data_is_refused_where_it_is_made(kind, field, values):
    with pytest.raises(UserError, match=rf"{kind.__name__}: .*{field}") as raised:
        kind(*values)
    one_line(raised)


@pytest.mark.parametrize(
    "call", [lambda: stage(flux=1), lambda: run(flux=1), lambda: Scenes("locate", 4, flux=1)]
)
def test_a_field_that_does_not_exist_is_named(call):
    with pytest.raises(UserError, match="flux: unexpected keyword argument"):
        call()


@pytest.mark.parametrize("name", ["a", "transformer-64px-seed0", "grün [b]", "x=1,y=2", "a.b"])
def test_usual_names_are_accepted(name):
    assert run(name=name).name == name


def test_steps_or_epochs_and_not_both():
    for more in (dict(steps=3, epochs=1.0), dict(steps=0)):
        with pytest.raises(UserError, match="give one of them"):
            stage(**more)


HEAD = "from vlm.config import Run, Scenes, Stage\n"
GOOD = 'Run("a", "mamba-tiny", (Stage({"x": Scenes("locate", 4)}, 4, 1e-3, 3),), {})'
BAD_FILES = {
    "syntax": ("def get_config(:\n", "line 1: SyntaxError"),
    "name": (f"{HEAD}x = 1\ny = undefined\n", "line 3: NameError"),
    "import": ("import no_such_package_anywhere\n", "line 1: ModuleNotFoundError"),
    "divide": ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "library": ("import json\njson.loads('{')\n", "line 2: JSONDecodeError"),
    "field": (
        f'{HEAD}\n\nStage({{"x": Scenes("locate", 4)}}, "4", 1e-3, 3)\n',
        "line 4: Stage: batch_size='4'",
    ),
    "missing": (f"{HEAD}Run()\n", "line 2: Run: name: field required"),
    "empty": ("", "must have get_config"),
    "not callable": ("get_config = 5\n", "must have get_config"),
    "arguments": ("def get_config(x):\n    return []\n", "line 1: TypeError"),
    "none": ("def get_config():\n    pass\n", "must have get_config"),
    "no list": ("def get_config():\n    return 7\n", "must have get_config"),
    "text": ("def get_config():\n    return 'runs'\n", "must have get_config"),
    "no run": ("def get_config():\n    return [1]\n", "must have get_config"),
    "one run": (f"{HEAD}def get_config():\n    return {GOOD}\n", "must have get_config"),
    "twice": (f"{HEAD}def get_config():\n    return [{GOOD}] * 2\n", "names two runs 'a'"),
    "bytes": ("\0\0", "null bytes|must have"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_config_file_is_one_line_with_its_name(name, tmp_path):
    content, line = BAD_FILES[name]
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(UserError, match=line) as raised:
        read_file(path)
    assert str(path) in one_line(raised)


def test_config_files_may_have_dataclasses(tmp_path):
    path = tmp_path / "cells.py"
    path.write_text(
        f"from __future__ import annotations\n{HEAD}from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Cell:\n    name: str\n"
        f"def get_config():\n    return [{GOOD}]\n"
    )
    assert [run.name for run in read_file(path)] == ["a"]


def test_a_bug_of_ours_under_a_config_file_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(self):
        raise KeyError("a bug")

    monkeypatch.setattr(vlm_runs.Run, "to_dict", broken)
    path = tmp_path / "good.py"
    path.write_text("import vlm_runs\ndef get_config():\n    return [vlm_runs.run('mamba-tiny').to_dict()]\n")
    with pytest.raises(KeyError, match="a bug"):
        read_file(path)
