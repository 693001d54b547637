"""Checkpoints that cannot be loaded say why in one line; names on the hub and its cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_forms import (
    LAYERS,
    WIDTH,
    change,
    checkpoint,
    edit,
    original,
    peer,
)

from ssm_retrieval import models

# --- faults are one line -----------------------------------------------------------------------------


def test_all_wrong_keys_are_listed_at_once(tmp_path):
    folder = checkpoint(tmp_path, "neox")

    def changed(t):
        del t["gpt_neox.layers.0.attention.dense.bias"], t["embed_out.weight"]
        t["vision_encoder.pos_embed"] = torch.ones(2)
        t["gpt_neox.final_layer_norm.weight"] = torch.ones(WIDTH + 1)

    change(folder, changed)
    with pytest.raises(ValueError) as error:
        models.load(folder)
    said = str(error.value)
    assert "missing: gpt_neox.layers.0.attention.dense.bias, embed_out.weight;" in said
    assert "not of this model: vision_encoder.pos_embed;" in said
    assert "wrongly shaped: gpt_neox.final_layer_norm.weight [33] instead of [32]" in said
    assert "\n" not in said and str(folder) in said


def test_long_lists_of_keys_are_counted(tmp_path):
    folder = checkpoint(tmp_path)
    edit(folder, num_hidden_layers=LAYERS + 2)  # 2 x 10 tensors that the file has not
    with pytest.raises(ValueError, match=r"missing: .* and 8 more; fetch both anew$"):
        models.load(folder)


def test_tied_weights_that_differ(tmp_path):
    folder = checkpoint(tmp_path)
    change(folder, lambda t: t.update({"lm_head.weight": t["backbone.embeddings.weight"].clone()}))
    model = models.load(folder)
    assert model.lm_head.weight is model.backbone.embedding.weight
    change(folder, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from backbone\.embeddings\.weight"):
        models.load(folder)


@pytest.mark.parametrize(
    "family, fields, said",
    [
        ("neox", dict(hidden_act="gelu_new"), "hidden_act='gelu_new'"),
        ("neox", dict(attention_bias=False), "attention_bias=False"),
        ("neox", dict(rope_parameters={"rope_type": "linear"}), "rope_parameters.rope_type='linear'"),
        ("neox", dict(rope_parameters=None, rope_scaling={"type": "dynamic"}), "rope_scaling.type='dynamic'"),
        ("neox", dict(rope_parameters=None, rotary_pct=0.2), "rotary_pct=0.2 rotates an odd number"),
        ("neox", dict(num_hidden_layers=None), "num_hidden_layers=None must be a whole number"),
        ("neox", dict(quantization_config={"bits": 4}), "quantization_config="),
        ("neox", dict(model_type="llama"), "model_type='llama'"),
        ("mamba", dict(use_bias=True), "use_bias=True"),
        ("mamba", dict(use_conv_bias=False), "use_conv_bias=False"),
        ("mamba", dict(hidden_act="relu"), "hidden_act='relu'"),
        ("mamba", dict(intermediate_size=48), "intermediate_size=48"),
        ("mamba2", dict(time_step_limit=[0.0, 0.1]), "time_step_limit="),
        ("mamba2", dict(num_heads=4), "num_heads=4 times head_dim=8"),
    ],
)
def test_configs_that_our_models_cannot_be(family, fields, said, tmp_path):
    folder = checkpoint(tmp_path, family)
    edit(folder, **fields)
    with pytest.raises(ValueError) as error:
        models.load(folder)
    assert said in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(attn_layer_idx=[1]), "attn_layer_idx"),
        (dict(d_intermediate=64), "d_intermediate=64"),
        (dict(ssm_cfg={"layer": "Mamba3"}), "ssm_cfg.layer='Mamba3'"),
        (dict(ssm_cfg={"layer": "Mamba2", "norm_before_gate": True}), "ssm_cfg.norm_before_gate=True"),
        (dict(ssm_cfg={"conv_bias": False}), "ssm_cfg.conv_bias=False"),
        (dict(pad_vocab_size_multiple=0), "pad_vocab_size_multiple=0 must be at least 1"),
        (dict(ssm_cfg={"d_stat": 8}), "ssm_cfg: d_stat is not a field"),
    ],
)
def test_original_configs_that_our_models_cannot_be(fields, said, tmp_path):
    original(peer("mamba"), tmp_path / "in", **fields)
    with pytest.raises(ValueError) as error:
        models.load(tmp_path / "in")
    assert said in str(error.value)


def test_damaged_and_incomplete_folders(tmp_path):
    def refused(said, path):
        with pytest.raises(ValueError, match=said) as error:
            models.load(path)
        assert "\n" not in str(error.value)

    refused("'mamba-130m' is neither a folder nor a name on the hub", "mamba-130m")
    folder = checkpoint(tmp_path, "neox", "safetensors-sharded")
    refused("is a file; give the folder", folder / "config.json")
    with pytest.raises(ValueError, match="revision='main' is for names on the hub"):
        models.load(folder, revision="main")
    shard = next(folder.glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    refused("is cut short within its header, after 100 bytes", folder)
    shard.unlink()
    refused(f"lacks {shard.name}", folder)
    for file in folder.glob("model*"):
        file.unlink()
    refused("has neither model.safetensors nor pytorch_model.bin", folder)
    (folder / "pytorch_model.bin").write_bytes(b"no weights at all")
    refused("is text \\('no weights at all'\\), not weights", folder)
    torch.save({"state": {"w": torch.ones(1)}}, folder / "pytorch_model.bin")
    refused("its 'state' is a dict, not a tensor", folder)
    torch.save({"w": Path("/")}, folder / "pytorch_model.bin")  # a class: never executed
    refused("it asks for pathlib", folder)
    (folder / "config.json").write_text("{")
    refused("config.json is not JSON", folder)
    (folder / "config.json").unlink()
    refused("has no config.json", folder)


# --- the hub's cache ---------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, folder: Path) -> None:
    """Put a checkpoint into a hub cache, as a download of `main` leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)


def test_cached_names_need_no_network(tmp_path):
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    folder = checkpoint(tmp_path, "neox", "safetensors-sharded")
    cached(tmp_path / "cache", "EleutherAI/pythia-14m", folder)
    shutil.rmtree(folder)
    original(peer("mamba"), folder)
    cached(tmp_path / "cache", "state-spaces/mamba-130m", folder)
    code = f"""
import sys
from ssm_retrieval import models
assert "huggingface_hub" not in sys.modules
print(type(models.load("EleutherAI/pythia-14m")).__name__)
print(type(models.load("state-spaces/mamba-130m", revision="{COMMIT}")).__name__)
for name, revision in (("EleutherAI/pythia-31m", None), ("EleutherAI/pythia-14m", "step1000")):
    try:
        models.load(name, revision=revision)
    except ValueError as error:
        print(error)
"""
    environment = dict(os.environ, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["TransformerForCausalLM", "MambaForCausalLM"] and len(lines) == 4
    assert "EleutherAI/pythia-31m is no folder here, not (wholly) in the hub's cache" in lines[2]
    assert "EleutherAI/pythia-14m at revision 'step1000' is no folder" in lines[3]


def test_safetensors_are_asked_for_first_and_pickles_only_without(monkeypatch, tmp_path):
    folder, asked = checkpoint(tmp_path, "mamba", "bin"), []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    models.load("state-spaces/mamba-130m", revision=COMMIT)
    assert [(name, revision) for name, revision, _ in asked] == [("state-spaces/mamba-130m", COMMIT)] * 2
    assert not any(".bin" in pattern for pattern in asked[0][2])
    assert {"pytorch_model.bin", "pytorch_model-*-of-*.bin"} <= set(asked[1][2])


@pytest.mark.parametrize(
    "kind, said",
    [
        ("RepositoryNotFoundError", "a/b is no folder here, and no (public) model"),
        ("RevisionNotFoundError", "a/b on the hub has no revision None"),
        ("GatedRepoError", "asks for its licence to be accepted"),
        ("LocalEntryNotFoundError", "mend the network"),
    ],
)
def test_errors_of_the_hub_are_one_line(kind, said, monkeypatch):
    error = getattr(huggingface_hub.errors, kind)

    def download(*_, **__):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError) as raised:
        models.load("a/b")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
