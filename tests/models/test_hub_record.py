"""A user's architecture with a class in `transformers`: its record decides how it is saved and loaded."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.mixer import MixerForCausalLM
from ssm_retrieval.registry import ARCHITECTURES


class Shift(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, d_model))

    def forward(self, x):
        return self.scale * x.roll(1, dims=1) * (torch.arange(x.shape[1]) > 0).unsqueeze(-1)


class Toy(MixerForCausalLM):
    def accept_hub_spellings(self, named, prefix=""):
        if prefix + "wte.weight" in named:
            named[prefix + "embedding.weight"] = named.pop(prefix + "wte.weight")


def read(raw, keys, where, beside):
    if raw["depth"] > 9:
        raise UserError(f"{where}: depth={raw['depth']} is too deep")
    return dict(d_model=raw["width"], n_layer=raw["depth"], vocab_size=raw["words"])


HUB = models.Hub(
    model_type="toy",
    model_class="ToyForCausalLM",
    read=read,
    write=lambda config: dict(width=config.d_model, depth=config.n_layer, words=config.vocab_size),
    lacks=lambda config: None if config.norm == "rms" else f"norm={config.norm!r}",
    published=lambda name: name.replace("embedding.", "wte."),
    extras=("norm_eps",),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(ARCHITECTURES, "_theirs", {})
    record = models.from_mixer("toy", Shift, hub=HUB)
    made = dataclasses.replace(
        record, model=lambda config, dtype: Toy(config, dtype, lambda c: Shift(c.d_model))
    )
    models.register(made)
    return lambda **options: models.build("toy-tiny", vocab_size=11, d_model=8, n_layer=2, **options)


def test_it_is_stored_as_its_class_stores_it(toy, tmp_path):
    model, ids = toy(norm_eps=0.25), torch.tensor([[1, 5, 2, 10]])
    place = models.save(model, tmp_path / "kept")
    assert json.loads((place / "config.json").read_text()) == dict(
        architectures=["ToyForCausalLM"], model_type="toy", width=8, depth=2, words=11, bos_token_id=0,
        eos_token_id=0, dtype="float32", torch_dtype="float32", ssm_retrieval=dict(norm_eps=0.25),
    )  # fmt: skip
    names = set(load_file(place / "model.safetensors"))
    assert "wte.weight" in names and "embedding.weight" not in names
    loaded = models.load(place)
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(ids), model(ids))


def test_what_its_class_cannot_be_has_our_own_form(toy, tmp_path):
    place = models.save(toy(norm="layer"), tmp_path / "kept")
    raw = json.loads((place / "config.json").read_text())
    assert (raw["model_type"], raw["family"]) == ("ssm-retrieval", "toy")
    assert "embedding.weight" in load_file(place / "model.safetensors")
    assert models.load(place).config.norm == "layer"


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(depth=10), "config.json: depth=10 is too deep"),
        (dict(ssm_retrieval=dict(d_model=8)), "is not supported, its options are norm_eps; remove it"),
        (
            dict(model_type="toys"),
            "model_type='toys' is not supported; only gpt_neox, mamba, mamba2, mamba3, delta_net, ",
        ),
    ],
)
def test_what_it_refuses_is_one_line(toy, tmp_path, fields, said):
    place = models.save(toy(), tmp_path / "kept")
    raw = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(raw | fields))
    with pytest.raises(UserError) as caught:
        models.load(place)
    assert said in str(caught.value) and "\n" not in str(caught.value)
