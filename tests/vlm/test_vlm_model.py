"""The VLM against its parts, and checkpoints with the released names (facts 2.11)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ssm_retrieval import models
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from vlm import layout
from vlm import model as vlm_model
from vlm.layout import IGNORE
from vlm.model import VLM, load

WIDTH, FEATURES, SIDE = 32, 24, 2
SHAPES = {
    "mamba": dict(name="mamba-130m", d_model=WIDTH, n_layer=2, vocab_size=10496),
    "mamba-layernorm": dict(
        name="mamba-130m", d_model=WIDTH, n_layer=2, vocab_size=10496, norm="layer", residual_in_fp32=False
    ),
    "pythia": dict(name="pythia-14m", d_model=WIDTH, n_layer=2, n_head=4, vocab_size=10496),
}


class Encoder(nn.Module):
    """A stand-in for EVA-02: patches as numbers, a class token before them, one parameter of its names."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, pixels):
        patches = F.unfold(pixels, 14, stride=14).transpose(1, 2)[..., :FEATURES]
        return self.norm(torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1))


def make(family, encoder=None):
    options = dict(SHAPES[family])
    torch.manual_seed(0)
    model = VLM(models.build(options.pop("name"), seed=1, **options), FEATURES, encoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def example():
    generator = torch.Generator().manual_seed(2)
    image = torch.tensor(layout.image_ids(SIDE)).expand(2, -1)
    text = torch.randint(1, 100, (2, 9), generator=generator)
    ids = torch.cat([text[:, :4], image, text[:, 4:]], dim=1)
    labels = torch.full_like(ids, IGNORE)
    labels[0, -3:], labels[1, -1:] = ids[0, -3:], ids[1, -1:]
    return ids, labels, torch.randn(2, SIDE * SIDE, FEATURES, generator=generator)


@pytest.mark.parametrize("family", SHAPES)
def test_loss_is_the_mean_of_each_examples_mean(family):
    model, (ids, labels, features) = make(family), example()
    logits = model(ids, features)
    each = [
        F.cross_entropy(
            logits[row, :-1][labels[row, 1:] != IGNORE], labels[row, 1:][labels[row, 1:] != IGNORE]
        )
        for row in range(2)
    ]
    loss = model.loss(ids, features, labels)
    assert torch.allclose(loss, torch.stack(each).mean(), rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.vision_embed_tokens.parameters())
    padded = F.pad(ids, (0, 5)), F.pad(labels, (0, 5), value=IGNORE)
    assert torch.allclose(model.loss(padded[0], features, padded[1]), loss, rtol=1e-5)
    labels[1] = IGNORE
    with pytest.raises(ValueError, match="example 1 of the batch has no supervised token"):
        model.loss(ids, features, labels)


def test_the_head_meets_labelled_rows_alone_and_gradients_are_those_of_all_logits(monkeypatch):
    model, (ids, labels, features) = make("mamba"), example()
    met = []

    def watched(x, weight, y):
        met.append(y.tolist())
        return linear_cross_entropy(x, weight, y)

    monkeypatch.setattr(vlm_model, "linear_cross_entropy", watched)
    model.loss(ids, features, labels).backward()
    assert met == [[y for y in row if y != IGNORE] for row in labels[:, 1:].tolist()]
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids, features)[:, :-1]
    each = [F.cross_entropy(x, y, ignore_index=IGNORE) for x, y in zip(logits, labels[:, 1:], strict=True)]
    torch.stack(each).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", SHAPES)
def test_generation_is_that_of_whole_sequences(family):
    model, (ids, _, features) = make(family), example()
    found = model.generate(ids, features, 5, eos_token_id=None)
    with torch.no_grad():
        for step in range(5):
            token = model(ids, features, logits_at=torch.tensor([ids.shape[1] - 1]))[:, -1].argmax(-1)
            assert torch.equal(token, found[:, step])
            ids = torch.cat([ids, token[:, None]], dim=1)


def test_features_of_pixels_are_the_patches_without_the_class_token():
    model = make("pythia", Encoder())
    features = model.features(torch.rand(2, 3, 28, 28))
    assert features.shape == (2, 4, FEATURES) and not features.requires_grad
    assert not any(p.requires_grad for p in model.vision_encoder.parameters())
    with pytest.raises(ValueError, match="has no vision encoder"):
        make("pythia").features(torch.rand(1, 3, 28, 28))


def released(model, family, folder):
    """The files of a released checkpoint: the language model's names at the root, an untrue `rms_norm`."""
    state = {key.removeprefix("lm."): value for key, value in model.state_dict().items()}
    config = model.lm.config
    vision = dict(
        hidden_size=WIDTH, vision_encoder_name="x", select_layer=-2, select_feature="patch", image_size=336
    )
    if family == "pythia":
        for i in range(config.n_layer):  # constants of old releases
            state[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(1)
            state[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
        fields = models.hub_configs.write_config(config, None) | vision
        fields["architectures"] = ["VLCLIPGPTNeoXForCausalLM"]
    else:
        state.pop("lm_head.weight")  # tied, may be absent
        fields = vision | dict(
            architectures=["VLMambaCLIPLMHeadModel"], d_model=WIDTH, n_layer=config.n_layer, vocab_size=10496,
            ssm_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8,
        )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({key: value.clone().contiguous() for key, value in state.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("family", SHAPES)
def test_released_checkpoints_load(family, tmp_path):
    model, (ids, _, features) = make(family, Encoder()), example()
    released(model, family, tmp_path / "released")
    with torch.no_grad():
        expected = model(ids, features)
        for encoder in (None, Encoder()):
            loaded = load(tmp_path / "released", encoder)
            assert type(loaded.lm) is type(model.lm) and loaded.lm.config.n_layer == 2
            assert torch.equal(loaded(ids, features), expected)
        pixels = torch.rand(1, 3, 28, 28)
        assert torch.equal(loaded.features(pixels), model.features(pixels))


def test_what_is_no_vlm_says_so(tmp_path):
    models.save(models.build("mamba-tiny", vocab_size=16), tmp_path / "lm")
    with pytest.raises(ValueError, match=r"no vision_embed_tokens\.0\.weight, so it is no VLM"):
        load(tmp_path / "lm")


def test_the_snippet_of_the_documentation_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "vlm.md").read_text(encoding="utf-8")
    snippet = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    names: dict = {}
    exec(snippet, names)
    assert names["loss"].item() > 0 and names["answer"].shape == (1, 5)
    assert capsys.readouterr().out.startswith("(10.0")
