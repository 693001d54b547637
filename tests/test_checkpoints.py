"""Checkpoints in every published form: the logits of `transformers`, the bytes back, one line for faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoint_forms import FORMS, IDS, LAYERS, PEERS, VOCAB, WIDTH, original, peer, relative_error, write
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import models

NEAR = 1e-4  # relative to the largest logit, float32
PAIRS = [(family, form) for family in PEERS for form in FORMS]


def raw(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every tensor of a folder's safetensors files: dtype and bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            found[key] = tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return found


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change(folder: Path, changed) -> None:
    """Rewrite model.safetensors by a function of its tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed(tensors)
    save_file(tensors, file)


@pytest.fixture
def small(tmp_path):
    """A function that writes a checkpoint of a family and gives its folder."""

    def made(family="mamba", form="safetensors"):
        write(family, form, tmp_path / "small")
        return tmp_path / "small"

    return made


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


@pytest.mark.parametrize("preset", ["mamba-130m", "mamba2-130m", "pythia-160m"])
def test_published_shapes_are_the_presets(preset):
    """config.json as state-spaces and EleutherAI publish it."""
    from models.hub_configs import read_config

    shared = dict(d_model=768, n_layer=24, vocab_size=50277, rms_norm=True, residual_in_fp32=True)
    neox = dict(
        model_type="gpt_neox", vocab_size=50304, hidden_size=768, num_hidden_layers=12,
        num_attention_heads=12, intermediate_size=3072, rotary_pct=0.25, rotary_emb_base=10000,
        max_position_embeddings=2048, hidden_act="gelu", use_parallel_residual=True, layer_norm_eps=1e-5, tie_word_embeddings=False,
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


def test_older_spellings_of_the_rotary_settings(small):
    folder = small("neox-sequential")
    want = models.load(folder)(IDS)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | dict(rotary_pct=0.5, rotary_emb_base=5000)))
    assert torch.equal(models.load(folder)(IDS), want)
    edit(folder, rotary_pct=0.25)
    assert not torch.equal(models.load(folder)(IDS), want)


def test_constants_among_the_weights_of_old_pythias_are_ignored(small):
    folder = small("neox", "bin")
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
    with pytest.raises(ValueError, match="norm='layer'"):
        models.save(model, tmp_path / "out")


# --- faults are one line -----------------------------------------------------------------------------


def test_all_wrong_keys_are_listed_at_once(small):
    folder = small("neox")

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


def test_long_lists_of_keys_are_counted(small):
    folder = small()
    edit(folder, num_hidden_layers=LAYERS + 2)  # 2 x 10 tensors that the file has not
    with pytest.raises(ValueError, match=r"missing: .* and 8 more$"):
        models.load(folder)


def test_tied_weights_that_differ(small):
    folder = small()
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
        ("neox", dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope: rope_type='linear'"),
        ("neox", dict(rope_parameters=None, rope_scaling={"type": "dynamic"}), "rope_type='dynamic'"),
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
def test_configs_that_our_models_cannot_be(family, fields, said, small):
    folder = small(family)
    edit(folder, **fields)
    with pytest.raises(ValueError) as error:
        models.load(folder)
    assert said in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(attn_layer_idx=[1]), "attn_layer_idx"),
        (dict(d_intermediate=64), "d_intermediate=64"),
        (dict(ssm_cfg={"layer": "Mamba3"}), "ssm_cfg: layer='Mamba3'"),
        (dict(ssm_cfg={"layer": "Mamba2", "norm_before_gate": True}), "ssm_cfg: norm_before_gate=True"),
        (dict(ssm_cfg={"conv_bias": False}), "ssm_cfg: conv_bias=False"),
        (dict(ssm_cfg={"d_stat": 8}), "ssm_cfg: d_stat is not supported"),
    ],
)
def test_original_configs_that_our_models_cannot_be(fields, said, tmp_path):
    original(peer("mamba"), tmp_path / "in", **fields)
    with pytest.raises(ValueError) as error:
        models.load(tmp_path / "in")
    assert said in str(error.value)


def test_damaged_and_incomplete_folders(small, tmp_path):
    def refused(said, path):
        with pytest.raises(ValueError, match=said) as error:
            models.load(path)
        assert "\n" not in str(error.value)

    refused("'mamba-130m' is neither a folder nor a name on the hub", "mamba-130m")
    folder = small("neox", "safetensors-sharded")
    refused("is a file; give the folder", folder / "config.json")
    with pytest.raises(ValueError, match="revision='main' is for names on the hub"):
        models.load(folder, revision="main")
    shard = next(folder.glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:100])
    refused("is damaged", folder)
    shard.unlink()
    refused(f"lacks {shard.name}", folder)
    for file in folder.glob("model*"):
        file.unlink()
    refused("has neither model.safetensors nor pytorch_model.bin", folder)
    (folder / "pytorch_model.bin").write_bytes(b"no weights at all")
    refused("cannot be read as a file of weights", folder)
    torch.save({"state": {"w": torch.ones(1)}}, folder / "pytorch_model.bin")
    refused("does not hold named tensors alone", folder)
    torch.save({"w": Path("/")}, folder / "pytorch_model.bin")  # a class: never executed
    refused("cannot be read as a file of weights", folder)
    (folder / "config.json").write_text("{")
    refused("config.json is damaged", folder)
    (folder / "config.json").unlink()
    refused("has no config.json", folder)


# --- saving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("hybrid-tiny", {}, "architecture='hybrid'"),
        ("transformer-tiny", dict(position="learned"), "position='learned'"),
        ("transformer-tiny", dict(norm="rms"), "norm='rms'"),
        ("transformer-tiny", dict(residual_in_fp32=True), "residual_in_fp32=True"),
        ("mamba2-tiny", dict(norm="layer"), "norm='layer'"),
    ],
)
def test_models_that_transformers_lacks_can_be_kept_otherwise(name, options, said, tmp_path):
    """In the way that the error says."""
    model = models.build(name, vocab_size=VOCAB, **options)
    with pytest.raises(ValueError, match=said):
        models.save(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    save_model(model, str(tmp_path / "weights.safetensors"))
    again = models.from_config(model.config, seed=1)
    load_model(again, tmp_path / "weights.safetensors", strict=False)
    assert torch.equal(again(IDS), model(IDS))


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

    monkeypatch.setattr("models.checkpoints.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        models.save(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    with safe_open(tmp_path / "empty/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# --- the hub's cache ---------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, folder: Path) -> None:
    """Put a checkpoint into a hub cache, as a download of `main` leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)


def test_cached_names_need_no_network(small, tmp_path):
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    folder = small("neox", "safetensors-sharded")
    cached(tmp_path / "cache", "EleutherAI/pythia-14m", folder)
    shutil.rmtree(folder)
    original(peer("mamba"), folder)
    cached(tmp_path / "cache", "state-spaces/mamba-130m", folder)
    code = f"""
import sys, models
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
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["TransformerForCausalLM", "MambaForCausalLM"] and len(lines) == 4
    assert "EleutherAI/pythia-31m is not (wholly) in the hub's cache" in lines[2]
    assert "EleutherAI/pythia-14m at revision 'step1000' is not" in lines[3]


def test_safetensors_are_asked_for_first_and_pickles_only_without(monkeypatch, small):
    folder, asked = small("mamba", "bin"), []

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
        ("RepositoryNotFoundError", "the hub has no model 'a/b'"),
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
    with pytest.raises(ValueError, match=said) as raised:
        models.load("a/b")
    assert "\n" not in str(raised.value)


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
    embedding, _, _, head = model.parts()
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
