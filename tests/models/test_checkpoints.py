"""Checkpoints in every published form: the logits of `transformers`, the bytes back, one line for faults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from checkpoint_forms import (
    FORMS,
    IDS,
    LAYERS,
    PEERS,
    VOCAB,
    WIDTH,
    change,
    checkpoint,
    edit,
    original,
    peer,
    relative_error,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ssm_retrieval import models

NEAR = 1e-4  # relative to the largest logit, float32
PAIRS = [(family, form) for family in PEERS for form in FORMS]


def raw(folder: Path) -> dict[str, tuple]:
    """Every tensor of a folder's safetensors files: dtype, shape and bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            found[key] = (
                tensor.dtype,
                tuple(tensor.shape),
                tensor.contiguous().view(torch.uint8).numpy().tobytes(),
            )
    return found


# --- the same function, the same bytes ---------------------------------------------------------------


@pytest.mark.parametrize("family, form", PAIRS)
def test_logits_equal_transformers_and_the_bytes_come_back(family, form, tmp_path):
    theirs = write(family, form, tmp_path / "in")
    model = models.load(tmp_path / "in")
    assert not model.training and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert relative_error(model, theirs) < NEAR
    size = "20KB" if form.endswith("sharded") else "5GB"
    out = models.save(model, tmp_path / "out", max_shard_size=size)
    assert (out / "model.safetensors.index.json").exists() == form.endswith("sharded")
    FORMS["safetensors"](theirs, tmp_path / "reference")  # of one form, to compare the .bin forms too
    assert raw(out) == raw(tmp_path / "reference")
    opened = type(theirs).from_pretrained(out).eval()
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), theirs.parameters(), strict=True))
    assert relative_error(model, opened) < NEAR


@pytest.mark.parametrize("family", ["mamba", "mamba2", "mamba2-groups"])
def test_original_form_of_state_spaces(family, tmp_path):
    theirs = peer(family)
    original(theirs, tmp_path / "in")
    model = models.load(str(tmp_path / "in"))
    assert model.config.vocab_size == VOCAB and model.config.norm == "rms"
    assert relative_error(model, theirs) < NEAR
    theirs.save_pretrained(tmp_path / "reference")
    assert raw(models.save(model, tmp_path / "out")) == raw(tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["mamba-130m", "mamba2-130m", "pythia-160m"])
def test_logits_at_full_size(preset, tmp_path):
    """With weights of our initialisation, mamba_ssm's: those that transformers gives a Mamba are so large
    that float32 is 7e-4 from float64 in either implementation."""
    model = models.build(preset)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    models.save(model, tmp_path / "model", max_shard_size="200MB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(0, 50277, (1, 64), generator=torch.Generator().manual_seed(0))
    assert relative_error(models.load(tmp_path / "model"), theirs, ids) < NEAR


@pytest.mark.parametrize("preset", ["mamba-130m", "mamba2-130m", "pythia-160m"])
def test_published_shapes_are_the_presets(preset):
    """config.json as state-spaces and EleutherAI publish it."""
    from ssm_retrieval.models.hub_configs import read_config

    shared = dict(d_model=768, n_layer=24, vocab_size=50277, rms_norm=True, residual_in_fp32=True)
    neox = dict(
        model_type="gpt_neox", vocab_size=50304, hidden_size=768, num_hidden_layers=12,
        num_attention_heads=12, intermediate_size=3072, rotary_pct=0.25, rotary_emb_base=10000,
        max_position_embeddings=2048, hidden_act="gelu", use_parallel_residual=True,
        layer_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    published = {
        "mamba-130m": dict(shared, ssm_cfg={}, fused_add_norm=True, pad_vocab_size_multiple=8),
        "mamba2-130m": dict(
            shared, ssm_cfg={"layer": "Mamba2"}, pad_vocab_size_multiple=16, d_intermediate=0,
            attn_layer_idx=[], attn_cfg={}, tie_embeddings=True,
        ),
        "pythia-160m": neox,
    }  # fmt: skip
    assert read_config(published[preset], [], "here") == models.config(preset)


def test_dtype_is_the_files_unless_asked_for(tmp_path):
    theirs = peer("mamba2").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in")
    change(tmp_path / "in", lambda t: t.update({k: v.float() for k, v in t.items() if "A_log" in k}))
    model = models.load(tmp_path / "in")
    want = {n: torch.float32 if "A_log" in n else torch.bfloat16 for n, _ in model.named_parameters()}
    assert {n: p.dtype for n, p in model.named_parameters()} == want
    assert raw(models.save(model, tmp_path / "out")) == raw(tmp_path / "in")
    assert torch.isfinite(model(IDS)).all()
    wide = models.load(tmp_path / "in", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.backbone.norm_f.weight, model.backbone.norm_f.weight.float())


def test_older_spellings_of_the_rotary_settings(tmp_path):
    folder = checkpoint(tmp_path, "neox-sequential")
    want = models.load(folder)(IDS)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | dict(rotary_pct=0.5, rotary_emb_base=5000)))
    assert torch.equal(models.load(folder)(IDS), want)
    edit(folder, rotary_pct=0.25)
    assert not torch.equal(models.load(folder)(IDS), want)


def test_constants_among_the_weights_of_old_pythias_are_ignored(tmp_path):
    folder = checkpoint(tmp_path, "neox", "bin")
    want, file = models.load(folder)(IDS), folder / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    for i in range(LAYERS):
        at = f"gpt_neox.layers.{i}.attention."
        state |= {at + "bias": torch.ones(1, 1, 8, 8).bool(), at + "masked_bias": torch.tensor(-1e9)}
        state[at + "rotary_emb.inv_freq"] = torch.ones(2)
    torch.save(state, file)
    assert torch.equal(models.load(folder)(IDS), want)


def test_norm_is_decided_by_the_keys_not_by_the_config(tmp_path):
    """As in Mamba-VL: a config that says rms_norm, weights with biases. Against transformers' blocks."""
    theirs = peer("mamba")
    for block in (*theirs.backbone.layers, theirs.backbone):
        name = "norm_f" if block is theirs.backbone else "norm"
        norm = nn.LayerNorm(WIDTH, eps=1e-5)
        nn.init.normal_(norm.weight, mean=1.0, std=0.3)
        nn.init.normal_(norm.bias, std=0.3)
        setattr(block, name, norm)
    original(theirs, tmp_path / "in", rms_norm=True)
    model = models.load(tmp_path / "in")
    assert (model.config.norm, model.config.residual_in_fp32) == ("layer", False)
    assert relative_error(model, theirs) < NEAR
    again = models.load(models.save(model, tmp_path / "out"))
    assert again.config == model.config and torch.equal(again(IDS), model(IDS))


# --- saving ------------------------------------------------------------------------------------------


def test_save_leaves_a_whole_folder_or_none(tmp_path, monkeypatch):
    model = models.build("mamba-tiny", vocab_size=VOCAB, n_layer=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="full exists and is not empty"):
        models.save(model, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    models.save(model, tmp_path / "empty")

    def disk_full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("ssm_retrieval.models.checkpoints.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        models.save(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    with safe_open(tmp_path / "empty/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# --- new tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, tied", [("mamba", True), ("mamba-untied", False), ("neox", False)])
def test_grown_vocabulary(family, tied, tmp_path):
    theirs = peer(family)
    theirs.save_pretrained(tmp_path / "in")
    model, again = (models.load(tmp_path / "in", dtype=torch.bfloat16) for _ in range(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model(IDS)
    assert models.grow_vocabulary(model, 4000, seed=3) is model and model.config.vocab_size == VOCAB + 4000
    models.grow_vocabulary(again, 4000, seed=3)
    embedding, head = model.embedding, model.head
    assert (embedding.num_embeddings, head.out_features) == (VOCAB + 4000,) * 2
    assert (head.weight is embedding.weight) == tied
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[: len(before[name])], before[name])
        assert torch.equal(parameter, again.get_parameter(name)) and parameter.requires_grad
    torch.testing.assert_close(model(IDS)[..., :VOCAB], logits)
    std = theirs.config.initializer_range
    for table in {id(t): t for t in (embedding.weight, head.weight)}.values():
        new = table[VOCAB:].detach().float()
        assert float(new.std()) == pytest.approx(std, rel=0.02)
        assert float(new.mean().abs()) < 0.02 * std
    if not tied:
        assert not torch.equal(embedding.weight[VOCAB:], head.weight[VOCAB:])
    models.save(model, tmp_path / "out")
    opened = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert relative_error(models.load(tmp_path / "out", dtype=torch.float32), opened, IDS + VOCAB) < NEAR
    with pytest.raises(ValueError, match="new_tokens=0 must be at least 1"):
        models.grow_vocabulary(model, 0)


def test_snippet_of_the_checkpoints_page(tmp_path, monkeypatch):
    """With a small model of the original form in place of the hub's."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    original(peer("mamba"), tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    assert names["half"].config.vocab_size == VOCAB + 600
    assert {p.dtype for p in names["half"].parameters()} == {torch.bfloat16}
