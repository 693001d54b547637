"""Language models that know scenes in words: made, written to the toolkit, and begun with."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed; .ci/run installs it")
pytest.importorskip("tokenizers", reason="tokenizers is not installed; .ci/run installs it")
pytest.importorskip("sklearn", reason="scikit-learn is not installed; .ci/run installs it")

from ssm_retrieval import models
from vlm import answering, components, evaluate, pretrained, stages, train
from vlm.config import Run, Scenes, Stage, read_file
from vlm.configs import cpu_tiny, words
from vlm.scenes import encoder

SMALL = {
    "mamba-tiny": {"n_layer": 1, "d_model": 32},
    "transformer-tiny": {"n_layer": 1, "d_model": 32, "n_head": 2},
}

STAGE = Stage({"vqa": Scenes("vqa", 20, turns=3)}, steps=2, batch_size=4, lr=1e-3)


def told(model="mamba-tiny", **more) -> Run:
    """A run that reads words, for a few steps."""
    given = dict(stages=(STAGE,), evaluation={"count": Scenes("count", 4, "heldout")}) | more
    return Run(
        model.partition("-")[0], model, model_overrides=SMALL[model], encoder="words", image_size=96,
        precision="no", **given,
    )  # fmt: skip


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Both families pretrained and written to a folder that stands for the toolkit's."""
    config = tmp_path / "told.py"
    config.write_text(
        "from test_vlm_pretrained import told\n"
        "def get_config():\n    return [told(model) for model in ('mamba-tiny', 'transformer-tiny')]\n"
    )
    for run in (told(), told("transformer-tiny")):
        stages.train_stage(run, 0, tmp_path / "runs", train.accelerate([run]))
    place = tmp_path / "pretrained"
    assert pretrained.main([str(config), "--out", str(tmp_path / "runs"), "--to", str(place)]) == 0
    monkeypatch.setattr(pretrained, "FOLDER", place)
    return tmp_path


@pytest.mark.parametrize("model", SMALL)
def test_a_run_begins_with_the_language_model_of_its_family(own, model):
    trained = answering.load(told(model), own / "runs").lm
    begun = components.model(Run(model, model, (STAGE,), {}, init="scenes"), 16)
    assert begun.lm.config == trained.config
    assert all(torch.equal(a, b) for a, b in zip(begun.lm.parameters(), trained.parameters(), strict=True))
    made = json.loads(
        (pretrained.folder(trained.config and model.partition("-")[0]) / pretrained.MADE).read_text()
    )
    assert made["steps"] == [2] and made["stage"] == told(model).stage_ids()[-1]
    assert made["parameters"] == sum(p.numel() for p in trained.parameters())


def test_a_model_that_has_seen_several_orders_stands_beside_the_other(own):
    """It is another model, with a name of its own in the ids of stages."""
    stage = dataclasses.replace(STAGE, layouts=("agnostic", "query-first"))
    run = told(stages=(stage,))
    stages.train_stage(run, 0, own / "runs", train.accelerate([run]))
    config = own / "orders.py"
    config.write_text(
        "import dataclasses\nfrom test_vlm_pretrained import STAGE, told\n"
        "def get_config():\n"
        "    stage = dataclasses.replace(STAGE, layouts=('agnostic', 'query-first'))\n"
        "    return [told(stages=(stage,))]\n"
    )
    assert pretrained.main([str(config), "--out", str(own / "runs"), "--to", str(own / "pretrained")]) == 0
    begun = {
        init: Run("a", "mamba-tiny", (STAGE,), {}, init=init)
        for init in (pretrained.SCENES, pretrained.ANY_ORDER)
    }
    lms = [components.model(one, 16).lm for one in begun.values()]
    wanted = [answering.load(one, own / "runs").lm for one in (told(), run)]
    for lm, trained in zip(lms, wanted, strict=True):
        assert torch.equal(lm.embedding.weight, trained.embedding.weight)
    assert not torch.equal(lms[0].embedding.weight, lms[1].embedding.weight)
    before = [one.stage_ids() for one in begun.values()]
    path = pretrained.folder("mamba", pretrained.ANY_ORDER) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    after = [one.stage_ids() for one in begun.values()]
    assert after[0] == before[0] and len({*map(tuple, before), tuple(after[1])}) == 3
    with pytest.raises(ValueError, match="of 'transformer' was pretrained, only of mamba;"):
        pretrained.folder("transformer", pretrained.ANY_ORDER)


def test_the_name_of_a_stage_knows_the_weights_it_begins_with(own):
    run = Run("a", "mamba-tiny", (STAGE,), {}, init="scenes")
    before = run.stage_ids()
    assert before != dataclasses.replace(run, init=None).stage_ids()
    path = pretrained.folder("mamba") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert run.stage_ids() != before


def test_what_cannot_be_begun_is_one_line(own, capsys):
    run = Run("a", "mamba2-tiny", (STAGE,), {}, init="scenes")
    with pytest.raises(
        ValueError, match="no language model of 'mamba2' was pretrained, only of mamba, transformer"
    ):
        components.model(run, 16)
    wrong = dataclasses.replace(run, model="mamba-tiny", init=str(pretrained.folder("transformer")))
    with pytest.raises(ValueError, match=r"is no mamba, as model='mamba-tiny' says"):
        components.model(wrong, 16)
    assert pretrained.main([str(own / "told.py"), "--out", str(own / "empty"), "--to", str(own / "x")]) == 2
    assert "is not trained in" in capsys.readouterr().err


def test_an_encoder_that_is_given_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "GIVEN", tmp_path / "given")
    monkeypatch.setattr(encoder, "IMAGES", 64)
    monkeypatch.setattr(encoder.key, "__defaults__", ("scenes", 64))
    monkeypatch.setattr(encoder.trained, "__kwdefaults__", {"images": 64, "progress": False})
    run = told()
    stages.train_stage(run, 0, tmp_path, train.accelerate([run]))
    config = tmp_path / "told.py"
    config.write_text("from test_vlm_pretrained import told\ndef get_config():\n    return [told()]\n")
    command = [
        str(config),
        "--out",
        str(tmp_path),
        "--to",
        str(tmp_path / "given"),
        "--encoder",
        "scenes-32px",
    ]
    assert pretrained.main(command) == 0
    first = encoder.trained(tmp_path / "encoders", "scenes-32px")
    (tmp_path / "encoders" / f"{encoder.key('scenes-32px')}.safetensors").unlink()
    monkeypatch.setattr(encoder, "_train", None)  # a second training would fail
    again = encoder.trained(tmp_path / "encoders", "scenes-32px")
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.half().float(), a)
    with pytest.raises(TypeError):
        encoder.trained(tmp_path / "encoders", "scenes")
    assert pretrained.main([*command[:-1], "eva"]) == 2


def test_words_are_asked_and_scored_as_pictures_are(own):
    rows, answers = evaluate.evaluate(told(), own / "runs", device="cpu")
    assert {row["metric"] for row in rows} == {"accuracy"} and len(answers) == 4
    assert {row["init"] for row in rows} == {""}
    begun = dataclasses.replace(told(), init="scenes", model_overrides={})
    stages.train_stage(begun, 0, own / "runs", train.accelerate([begun]))
    assert {row["init"] for row in evaluate.evaluate(begun, own / "runs", device="cpu")[0]} == {"scenes"}


def test_the_models_of_the_toolkit_are_those_of_the_config():
    """They load, are small, have the shape that the config names, and the tokenizer of scenes."""
    for run in read_file(pretrained.CONFIG):
        place = pretrained.folder(run.family, pretrained.kind_of(run))
        lm = models.load(place)
        wanted = models.config(
            run.model, **{"vocab_size": len(components.text("scenes")), **run.model_overrides}
        )
        assert lm.config == wanted
        assert (place / "model.safetensors").stat().st_size <= 3 * 2**20
        assert json.loads((place / pretrained.MADE).read_text())["config"] == "words.py"
    assert {run.family for run in cpu_tiny.get_config()} == {"mamba", "transformer"}
    assert [run.model for run in cpu_tiny.get_config()] == list(words.MODELS)
