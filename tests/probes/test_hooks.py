"""Recording named tensors: against equations written out here, and transformers."""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hook_models import (
    ATTENTION,
    FAMILIES,
    IDS,
    OTHER,
    SSM,
    B,
    L,
    build,
    halve,
    recorded,
    recurrence,
)
from torch import nn
from torch.nn import functional as F

import probes
from probes import cache as recording
from probes.names import layer_of, local_name, resolve
from ssm_retrieval import models
from ssm_retrieval.models.hooks import Hooked, points

# --- names and shapes --------------------------------------------------------------------------------


def test_every_name_has_the_documented_axes(model, family):
    cache, _ = recorded(model)
    assert list(cache) == model.hook_names()
    for name, point in points(model).items():
        axes, *other = probes.NAMES[local_name(name)][0].split("; Mamba-2 ")
        if other and "mamba2" in family:
            axes = other[0]
        assert " ".join(point.axes) == axes, name
        sizes = dict(B=B, L=L, S=L) | point.sizes
        assert tuple(cache[name].shape) == tuple(sizes[a] for a in point.axes), name


def test_every_documented_name_exists_in_some_model():
    assert {local_name(n) for f in FAMILIES for n in build(f).hook_names()} == set(probes.NAMES)


def test_names_in_the_order_of_the_forward_pass(family, model):
    names = model.hook_names()
    assert names[0] == "hook_embed" and names[-1] == "ln_final.hook_normalized"
    blocks = [n.removeprefix("blocks.0.") for n in names if n.startswith("blocks.0.")]
    if family in ATTENTION:
        outputs = [n for n in blocks if n.endswith("_out")]
        assert outputs == ["hook_attn_out", "hook_mlp_out"]
        assert (
            blocks.index("attn.hook_pattern") < blocks.index("hook_attn_out") < blocks.index("mlp.hook_pre")
        )
    else:
        assert blocks.index("mixer.hook_in") < blocks.index("mixer.hook_y") < blocks.index("hook_mixer_out")
    assert blocks[0] == "hook_resid_pre" and blocks[-1] == "hook_resid_post"


def test_hybrid_has_the_names_of_the_block_that_stands_there():
    names = build("hybrid-mamba").hook_names()
    kinds = [f"blocks.{i}.attn.hook_pattern" in names for i in range(3)]
    assert kinds == [False, False, True]
    assert [f"blocks.{i}.mixer.hook_ssm_state" in names for i in range(3)] == [True, True, False]


def test_what_names_patterns_and_layers_mean():
    model, blocks = build("mamba"), [f"blocks.{i}.hook_resid_pre" for i in range(4)]
    assert resolve(model, "*") == model.hook_names()
    assert resolve(model, [*blocks[::-1], "hook_embed"]) == ["hook_embed", *blocks]
    assert resolve(model, "blocks.[12].hook_resid_pre") == blocks[1:3]
    for layers in ([0, -1], [-4, 3, 3], (3, 0)):
        found = resolve(model, ["*.hook_resid_pre", "hook_embed"], layers)
        assert found == ["hook_embed", blocks[0], blocks[3]]
    assert [layer_of(n) for n in ("blocks.12.mixer.hook_B", "hook_embed")] == [12, None]
    assert [local_name(n) for n in ("blocks.12.mixer.hook_B", "hook_embed")] == ["mixer.hook_B", "hook_embed"]


class Doubler(Hooked, nn.Module):
    hook_axes: ClassVar = {"hook_twice": "B L D"}

    def __init__(self):
        super().__init__()
        self.config = models.config("mamba-tiny", d_model=16)

    def forward(self, x):
        return self.tap("hook_twice", 2 * x)


class Unnamed(Hooked, nn.Module):
    """A user's block: no names of its own, and a layer that has one."""

    def __init__(self):
        super().__init__()
        self.layer = Doubler()

    def forward(self, x, context, cache=None):
        return x + self.layer(x)


@torch.no_grad()
def test_blocks_of_a_user_need_no_names_of_their_own():
    model = build("mamba")
    model.blocks[1] = Unnamed()
    name = "blocks.1.layer.hook_twice"
    assert [n for n in model.hook_names() if n.startswith("blocks.1.")] == [name]
    assert points(model)[name].sizes == {"D": 16}
    cache, _ = recorded(model, [name, "blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"])
    before = cache["blocks.0.hook_resid_post"]
    assert torch.equal(cache[name], 2 * before)
    assert torch.equal(cache["blocks.2.hook_resid_pre"], before + cache[name])
    with probes.intervene(model, {name: torch.zeros_like}):
        changed, _ = recorded(model, "blocks.2.hook_resid_pre")
    assert torch.equal(changed["blocks.2.hook_resid_pre"], before)


@pytest.mark.parametrize(
    "names, options, said",
    [
        (["blocks.0.mixer.hook_ssm_stat"], {}, "no hook .*did you mean blocks.0.mixer.hook_ssm_state"),
        ("*.hook_pattern", {}, r"no hook '\*.hook_pattern'"),
        ("blocks.9.*", {}, "no hook 'blocks.9"),
        ("zzzz", {}, r"no hook 'zzzz'; model.hook_names\(\) lists them$"),
        ("*", dict(layers=[0, -5]), r"layers=\[0, -5\] has -5, but the model has 4 layers"),
        ("*", dict(layers=[4]), r"layers=\[4\] has 4, but the model has 4 layers"),
        ("blocks.0.*", dict(layers=[1]), "means no hook"),
        ("*.hook_conv", dict(channels=[32]), "hook_conv has channels 0 to 31, not 32"),
        ("*.hook_conv", dict(channels=[0, -1]), "hook_conv has channels 0 to 31, not -1"),
        ("*", dict(grad=True, folder="x"), "cannot be combined with folder="),
        ("*", dict(folder=Path(__file__).parent), "is not an empty folder"),
        ("*", dict(folder=Path(__file__)), "is not an empty folder"),
        ("*", dict(positions=[]), "records nothing"),
    ],
)
def test_bad_requests_give_one_line(names, options, said):
    with pytest.raises(ValueError, match=said) as caught, probes.record(build("mamba"), names, **options):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (probes.at(13, torch.zeros(())), "intervene on blocks.0.hook_resid_pre: position 13 does not exist"),
        (lambda x: None, "returned NoneType, not a tensor"),
        (lambda x: x[:, :, :3], r"gives shape \(2, 13, 3\) where \(2, 13, 16\) is needed"),
    ],
)
def test_bad_changes_give_one_line(change, said):
    model = build("mamba")
    with pytest.raises(ValueError, match=said), probes.intervene(model, {"blocks.0.hook_resid_pre": change}):
        model(IDS)
    assert all(getattr(m, "hook", None) is None for m in model.modules())
    with pytest.raises(ValueError, match="is a int; give a function or a tensor"):
        probes.intervene(model, {"hook_embed": 3}).__enter__()
    with pytest.raises(ValueError, match="name each once"):
        probes.at([1, 1], change)


# --- what is recorded --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SSM)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_states_decay_and_output_equal_the_recurrence(name, padded):
    model = build(name)
    mask = torch.ones(B, L, dtype=torch.bool)
    if padded:
        mask[0, :3] = mask[1, -4:] = False
    cache, _ = recorded(model, attention_mask=mask)
    some, _ = recorded(model, "*hook_ssm_*", attention_mask=mask, positions=[7, 0, -1, 6])
    for i in range(model.config.n_layer):
        at = f"blocks.{i}.mixer.hook_"
        states, ys = recurrence(model, i, cache)
        torch.testing.assert_close(cache[at + "ssm_state"], states)
        torch.testing.assert_close(cache[at + "ssm_readout"], states)
        torch.testing.assert_close(some[at + "ssm_state"], states[:, [7, 0, 12, 6]])
        torch.testing.assert_close(cache[at + "y"], ys)
        A, dt = -model.backbone.layers[i].mixer.A_log.exp(), cache[at + "dt"]
        torch.testing.assert_close(cache[at + "A_bar"], (dt * A if A.dim() == 1 else dt[..., None] * A).exp())
        assert (dt[~mask] == 0).all()


@pytest.mark.parametrize("name", SSM)
@torch.no_grad()
def test_mixer_parts_give_its_output(name):
    """From the layer's input to its output, through the recorded parts."""
    model = build(name)
    cache, _ = recorded(model)
    block, at = model.backbone.layers[1], "blocks.1.mixer.hook_"
    mixer = block.mixer
    projected = mixer.in_proj(block.norm(cache["blocks.1.hook_resid_pre"]))
    taps = mixer.conv1d(cache[at + "in"].transpose(1, 2))[..., :L].transpose(1, 2)
    if name == "mamba":
        x, z = projected.chunk(2, dim=-1)
        torch.testing.assert_close(cache[at + "in"], x)
        torch.testing.assert_close(cache[at + "conv"], F.silu(taps))
        r, Bt, Ct = mixer.x_proj(cache[at + "conv"]).split([1, 5, 5], dim=-1)
        torch.testing.assert_close(cache[at + "dt"], F.softplus(mixer.dt_proj(r)))
        out = mixer.out_proj(cache[at + "y"] * cache[at + "gate"])
    else:
        z, x, dt = projected.split([32, 32 + 24, 4], dim=-1)
        torch.testing.assert_close(cache[at + "in"], x)
        u, Bt, Ct = F.silu(taps).split([32, 12, 12], dim=-1)
        torch.testing.assert_close(cache[at + "conv"].flatten(2), u)
        torch.testing.assert_close(cache[at + "dt"], F.softplus(dt + mixer.dt_bias))
        gated = (cache[at + "y"] * cache[at + "gate"]).flatten(2).unflatten(2, (2, 16))
        normed = gated / (gated.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
        out = mixer.out_proj(normed.flatten(2) * mixer.norm.weight)
    torch.testing.assert_close(cache[at + "gate"].flatten(2), F.silu(z))
    torch.testing.assert_close(cache[at + "B"].flatten(2), Bt)
    torch.testing.assert_close(cache[at + "C"].flatten(2), Ct)
    torch.testing.assert_close(cache["blocks.1.hook_mixer_out"], out)


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_attention_parts(name):
    model = build(name)
    cache, _ = recorded(model)
    at, block = "blocks.1.attn.hook_", model.gpt_neox.layers[1]
    pattern, scores = cache[at + "pattern"], cache[at + "attn_scores"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(B, 2, L).double())
    torch.testing.assert_close(pattern, scores.softmax(-1))
    assert (pattern.triu(1) == 0).all() and (scores.isneginf() == torch.ones(L, L).triu(1).bool()).all()
    q, k = (cache.get(at + f"rot_{n}", cache[at + n]) for n in "qk")
    dots = torch.einsum("blhp,bshp->bhls", q, k) / 8**0.5
    torch.testing.assert_close(scores.tril(), dots.tril())
    torch.testing.assert_close(cache[at + "z"], torch.einsum("bhls,bshp->blhp", pattern, cache[at + "v"]))
    out = block.attention.dense(cache[at + "z"].flatten(2))
    torch.testing.assert_close(cache["blocks.1.hook_attn_out"], out)
    torch.testing.assert_close(cache["blocks.1.mlp.hook_post"], F.gelu(cache["blocks.1.mlp.hook_pre"]))
    some, _ = recorded(model, "*attn.hook_*", positions=[5, -1])
    torch.testing.assert_close(some[at + "pattern"], pattern[:, :, [5, 12]])
    assert some[at + "k"].shape == (B, 2, 2, 8)


@torch.no_grad()
def test_residual_stream_is_a_sum(model):
    cache, logits = recorded(model)
    pieces = ("hook_mixer_out", "hook_attn_out", "hook_mlp_out")
    for i in range(model.config.n_layer):
        at = f"blocks.{i}."
        parts = {p: cache[at + p] for p in pieces if at + p in cache}
        if hasattr(model.blocks[i], "beta"):  # of the second branch: attention in "M+A", Mamba in "A+M"
            second = pieces[1:] if i == 0 else pieces[:1]
            parts |= {p: model.blocks[i].beta.tanh() * parts[p] for p in second}
        added = sum(parts.values())
        torch.testing.assert_close(cache[at + "hook_resid_post"], cache[at + "hook_resid_pre"] + added)
        after = f"blocks.{i + 1}.hook_resid_pre" if i + 1 < model.config.n_layer else None
        assert after is None or torch.equal(cache[after], cache[at + "hook_resid_post"])
        if at + "hook_resid_mid" in cache:
            mid = cache[at + "hook_resid_pre"] + cache[at + "hook_attn_out"]
            torch.testing.assert_close(cache[at + "hook_resid_mid"], mid)
    assert torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])
    assert torch.equal(model.head(cache["ln_final.hook_normalized"]), logits)


# --- what a recording holds --------------------------------------------------------------------------


@torch.no_grad()
def test_layers_channels_positions_and_calls(model):
    whole, _ = recorded(model)
    with probes.record(model, "*", layers=[0, -1], positions=[3, -2], channels=[1, 0]) as cache:
        model(IDS[:1])
        model(IDS[1:])
    last = model.config.n_layer - 1
    assert {
        n for n in model.hook_names() if not n.startswith("blocks.") or int(n.split(".")[1]) in (0, last)
    } == set(cache)
    for name, point in points(model).items():
        if name not in cache:
            continue
        want = whole[name].index_select(point.axes.index("L"), torch.tensor([3, L - 2]))
        for axis, letter in enumerate(point.axes):
            if letter in "DEHMJ":
                want = want.index_select(axis, torch.tensor([1, 0]))
        torch.testing.assert_close(cache[name], want)
        assert [len(x) for x in cache.calls(name)] == [1, 1]
    assert cache.num_bytes() == sum(cache[n].numel() * 8 for n in cache)


@torch.no_grad()
def test_calls_of_different_lengths():
    model = build("mamba")
    with probes.record(model, "hook_embed") as cache:
        with pytest.raises(KeyError, match="no forward pass"):
            cache["hook_embed"]
        model(IDS)
        model(IDS[:, :4])
    assert [x.shape[1] for x in cache.calls("hook_embed")] == [L, 4]
    with pytest.raises(ValueError, match=r"differs in shape between calls .*use cache.calls\(name\)"):
        cache["hook_embed"]


@torch.no_grad()
def test_budget_refuses_before_computing_or_streams(model, tmp_path):
    whole, _ = recorded(model)
    again = torch.cat([IDS, OTHER])
    with probes.record(model, "*", budget=whole.num_bytes()) as cache:
        model(IDS)  # just fits
        with pytest.raises(ValueError, match=r"recording needs .* GiB for this call .*positions=.*budget="):
            model(IDS)
    assert cache.num_bytes() == whole.num_bytes()
    largest = max(whole[n].numel() * 8 for n in whole)
    with probes.record(model, "*", budget=largest, folder=tmp_path / "states") as cache:
        assert torch.equal(model(IDS), model(IDS)) and cache.num_bytes() == 0
    for name in whole:
        assert torch.equal(cache[name], torch.cat([whole[name]] * 2))
    assert len(list((tmp_path / "states" / "00001").glob("*.safetensors"))) == len(whole)
    assert not list((tmp_path / "states").rglob("*.part"))
    again_read = probes.Recording.read(tmp_path / "states")  # as a later session does
    assert set(again_read) == set(whole) and all(torch.equal(again_read[n], cache[n]) for n in whole)
    with pytest.raises(ValueError, match=r"folder='.*none' holds no recordings"):
        probes.Recording.read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"alone needs .*choose positions= or raise budget="):
        recorded(model, ids=again, budget=largest, folder=tmp_path / "more")


@torch.no_grad()
def test_recordings_may_fill_half_of_the_memory(monkeypatch):
    model = build("mamba")
    size = IDS.numel() * 16 * 8
    for spare, fits in ((0, True), (-2, False)):
        monkeypatch.setattr(recording, "available_memory", lambda device, spare=spare: 2 * size + spare)
        with probes.record(model, "hook_embed") as cache:
            if fits:
                model(IDS)
                assert cache.num_bytes() == size
            else:
                with pytest.raises(ValueError, match="more than the budget"):
                    model(IDS)


def test_available_memory_is_what_the_system_says(monkeypatch):
    told = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   1234 kB\nMemAvailableToo: 5 kB\n"
    files = {"/proc/meminfo": told}
    monkeypatch.setattr(recording, "open", lambda path: io.StringIO(files[path]), raising=False)
    assert recording.available_memory(torch.device("cpu")) == 1234 * 1024

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(recording, "open", missing, raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1001}.__getitem__)
    assert recording.available_memory(torch.device("cpu")) == 4096 * 1001 // 2
    assert recording.gib(3 * 2**29) == "1.5 GiB"


@torch.no_grad()
def test_recordings_and_edits_stay_where_the_model_is(model):
    """What is made without naming a device would be on another one here, and not fit."""
    edits = {"blocks.*.hook_resid_post": probes.at([2, 5], halve), "hook_embed": lambda x: x + 1}

    def results():
        with probes.intervene(model, edits):
            return recorded(model, "*", positions=[7, 1, -1], channels=[1, 0])

    cache, logits = results()
    with torch.device("meta"):
        found, again = results()
    assert torch.equal(again, logits) and list(found) == list(cache)
    assert all(torch.equal(found[name], x) for name, x in cache.items())


@torch.no_grad()
def test_recordings_keep_no_larger_tensor_alive():
    for options in ({}, dict(positions=[1]), dict(channels=[1])):
        cache, _ = recorded(build("mamba"), "*.mixer.*", **options)
        assert all(x.untyped_storage().nbytes() == x.numel() * 8 for x in cache.values())


# --- models of the hub -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "mamba2", "neox"])
@torch.no_grad()
def test_hub_models_once_loaded(name):
    """Hidden states, patterns and the last SSM state that transformers reports for the same weights."""
    pytest.importorskip("transformers")
    from peer_models import IDS, LAYERS, PAIRS, VOCAB, WIDTH

    preset, make = PAIRS[name]
    torch.manual_seed(0)
    theirs, options = make()
    ours = models.build(preset, vocab_size=VOCAB, d_model=WIDTH, n_layer=LAYERS, **options)
    ours.load_state_dict(theirs.state_dict())
    if name == "neox":
        theirs.set_attn_implementation("eager")
    more = dict(output_attentions=True) if name == "neox" else dict(use_cache=True)
    result = theirs.eval()(IDS, output_hidden_states=True, **more)
    cache, _ = recorded(ours, ids=IDS)
    # the library lists what goes into each NeoX block, and what comes out of each Mamba block
    side = "pre" if name == "neox" else "post"
    got = [cache[f"blocks.{i}.hook_resid_{side}"] for i in range(LAYERS)] + [
        cache["ln_final.hook_normalized"]
    ]
    torch.testing.assert_close(got, [*result.hidden_states], rtol=1e-4, atol=1e-5)
    for i in range(LAYERS):
        if name == "neox":
            pattern = cache[f"blocks.{i}.attn.hook_pattern"]
            torch.testing.assert_close(pattern, result.attentions[i], rtol=1e-4, atol=1e-5)
        else:
            state = cache[f"blocks.{i}.mixer.hook_ssm_state"][:, -1]
            (theirs_last,) = result.cache_params.layers[i].recurrent_states.values()
            torch.testing.assert_close(state, theirs_last.view_as(state), rtol=1e-4, atol=1e-5)


# --- copies -------------------------------------------------------------------------------------------


def test_a_copy_made_while_recording_is_not_recorded(model):
    """Neither a deep copy, as for an average of weights, nor a pickled model, as in a checkpoint."""
    with probes.record(model, "*") as cache:
        model(IDS)
        seen = {name: tensor.clone() for name, tensor in cache.items()}
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(point.module.hook is None for point in points(copied).values())
            assert torch.equal(copied(OTHER), copied(OTHER))
        assert all(torch.equal(cache[name], tensor) for name, tensor in seen.items())
        model(OTHER)  # the model itself still is
    with probes.record(copied, "hook_embed") as own:
        copied(OTHER)
    assert torch.equal(torch.cat([seen["hook_embed"], own["hook_embed"]]), cache["hook_embed"])
