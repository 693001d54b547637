"""Released checkpoints of full layout, at tiny size: evaluated on official files by the usual command."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from vlm_checkpoints import RELEASED, released
from vlm_files import write
from vlm_runs import one_line

from ssm_retrieval.errors import UserError
from ssm_retrieval.training import store
from vlm import answering, components, evaluate, folders, predict, results
from vlm.config import Run, read_file
from vlm.layout import sequence
from vlm.scenes import encoder as scenes

POPE = [
    {"question_id": i, "image": f"{i % 2}.png", "text": f"Is there a {what} in the image?", "label": label}
    for i, (what, label) in enumerate([("dog", "no"), ("cat", "yes"), ("red star", "yes")])
]
VSR = [
    {"image": f"{i}.png", "caption": f"The {what} is red.", "label": i, "relation": "under"}
    for i, what in enumerate(("square", "star"))
]


@pytest.fixture(autouse=True)
def known_encoders():
    components.eyes.cache_clear()


def official(folder):
    """Write miniature official files of POPE and VSR, with pictures."""
    rng = np.random.default_rng(0)
    for name, rows, file in (("pope", POPE, "coco_pope_random.json"), ("vsr", VSR, "test.jsonl")):
        write(folder / name, {})
        (folder / name / "images").mkdir(parents=True)
        (folder / name / file).write_text("\n".join(map(json.dumps, rows)))
        for i in range(2):
            pixels = rng.integers(0, 256, (40 + 10 * i, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / "images" / f"{i}.png")


CONFIG = """
from vlm.config import Files, Run

def get_config():
    asked = {{
        name: Files(name, split, f"{data}/{{name}}", f"{data}/{{name}}/images")
        for name, split in (("pope", "random"), ("vsr", "test"))
    }}
    return [
        Run("released", {model!r}, (), asked, checkpoint={checkpoint!r}, tokenizer={checkpoint!r},
            precision="no", layout="instruction-first", max_new_tokens=6, cache={cache})
    ]
"""


@pytest.mark.parametrize(("family", "cache"), [("mamba", False), ("transformer", True)])
def test_one_command_evaluates_a_released_checkpoint_on_official_files(family, cache, tmp_path, capsys):
    """The answers are those of the whole model, encoder included, one question at a time."""
    checkpoint, data, out = tmp_path / "mini-vl", tmp_path / "data", tmp_path / "out"
    model = released(checkpoint, family)
    official(data)
    config = tmp_path / "asked.py"
    given = dict(model=RELEASED[family][0], checkpoint=str(checkpoint), data=data, cache=cache)
    config.write_text(CONFIG.format(**given))
    assert evaluate.main([str(config), "--out", str(out)]) == 0, capsys.readouterr().err
    assert "pope (random)" in capsys.readouterr().out
    assert not (out / components.ENCODERS).exists()  # none was trained: the checkpoint has one

    rows = store.read_rows(results.answers_path(out, "released"))
    (run,) = read_file(config)
    sources = {name: asked.build(answers=False) for name, asked in run.evaluation.items()}
    samples = [(name, source[i], source) for name, source in sources.items() for i in range(len(source))]
    assert [(row["task"], row["id"]) for row in rows] == [(name, sample.id) for name, sample, _ in samples]
    said = [row["text"] for row in POPE] + [row["caption"] for row in VSR]
    assert all(text in row["asked"] for text, row in zip(said, rows, strict=True))
    text = components.text("scenes")
    for row, (_, sample, source) in zip(rows, samples, strict=True):
        ids, _ = sequence(sample.chunks, text.encode, 8, "instruction-first", markers=text.markers)
        features = model.features(scenes.scaled(scenes.resized([source.picture(sample.image)], 64)))
        said = model.generate(torch.tensor([ids]), features.half() if cache else features, 6)[0].tolist()
        assert row["said"] == text.decode(said)
    assert len({row["said"] for row in rows}) > 1
    table = pd.read_parquet(results.table_path(out, "released"))
    assert set(table["task"]) == {"pope", "vsr"} and set(table["family"]) == {family}
    assert table[["steps", "seconds", "commit"]].isna().all().all()
    for task in ("pope", "vsr"):
        right = [row["right"] for row in rows if row["task"] == task]
        value = table[(table["task"] == task) & (table["metric"] == "accuracy")]["value"].item()
        assert value == np.mean(right)

    # as it is, the table is up to date; other weights under the same name are asked again
    assert evaluate.current(out, run) is not None
    shutil.rmtree(checkpoint)
    released(checkpoint, family, seed=2)
    assert evaluate.current(out, run) is None


@pytest.mark.parametrize("family", RELEASED)
def test_a_released_folder_is_asked_without_a_config(family, tmp_path, capsys):
    checkpoint = tmp_path / "mini-vl"
    model = released(checkpoint, family)
    picture = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert predict.main([str(checkpoint), str(tmp_path / "a.png"), "What is this?"]) == 0
    said = capsys.readouterr().out.removesuffix("\n")
    run, out = folders.saved_run(checkpoint)
    assert (run.name, run.family, run.image_size, run.encoder) == ("mini-vl", family, 64, "scenes")
    assert out == tmp_path and {path.name for path in tmp_path.iterdir()} == {"mini-vl", "a.png"}
    answerer = answering.Answerer.of(dataclasses.replace(run, precision="no", max_new_tokens=6), out)
    text = components.text("scenes")
    chunks = predict.wording("What is this?", "auto", 50, 30)
    ids, _ = sequence(chunks, text.encode, 8, markers=text.markers)
    features = model.features(scenes.scaled(scenes.resized([picture], 64)))
    expected = text.decode(model.generate(torch.tensor([ids]), features, 6)[0].tolist())
    assert answerer.answer(picture, chunks) == expected and said
    assert evaluate.main([str(checkpoint)]) == 2 and "has no evaluation" in capsys.readouterr().err


def test_what_does_not_fit_a_checkpoint_is_told_in_one_line(tmp_path, monkeypatch):
    checkpoint = str(tmp_path / "mini-vl")
    released(tmp_path / "mini-vl", "mamba")
    fits = dict(name="a", model="mamba-130m", stages=(), evaluation={}, checkpoint=checkpoint)

    def loaded(**more):
        return answering.load(Run(**(fits | more)), tmp_path)

    for more, line in (
        (dict(init="state-spaces/mamba-130m"), "which is a whole model; give it neither stages nor init"),
        (dict(tokenizer="own"), "tokenizer='own' of run 'a' is made of training texts, .* has none; give"),
        (dict(model="pythia-160m"), "is a mamba, but model='pythia-160m'; name a preset of mamba"),
        (dict(image_size=60), "image_size=60 must be a multiple of the 8 of encoder 'scenes'"),
        (dict(checkpoint=str(tmp_path)), "config.json|neither model.safetensors"),
        (dict(checkpoint=None), "has no stages; give at least one, or a released checkpoint"),
    ):
        with pytest.raises(UserError, match=line) as raised:
            loaded(**more)
        one_line(raised)
    assert loaded().lm.config.n_layer == 2
    monkeypatch.setattr(components, "eyes_of", lambda *_: dataclasses.make_dataclass("Wide", ["width"])(1024))
    with pytest.raises(UserError, match=r"features of width 128, but those of encoder='scenes' have 1024"):
        loaded()


def test_the_config_of_the_released_checkpoints_has_the_papers_names_and_data(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CHECKPOINTS", str(tmp_path))
    runs = read_file("vlm/configs/released.py")
    assert [run.name for run in runs] == [
        "pythiavl-1b", "mambavl-790m", "pythiavl-1.4b", "mambavl-1.4b", "pythiavl-2.8b", "mambavl-2.8b",
    ]  # fmt: skip
    assert runs[1].checkpoint == f"{tmp_path}/finetuned_mambavl_790m" and runs[1].family == "mamba"
    (asked,) = {tuple(run.evaluation) for run in runs}
    assert {"coco", "pope", "vsr", "refcoco", "textvqa"} <= set(asked)
