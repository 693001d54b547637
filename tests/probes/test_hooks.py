"""Recording named tensors: against equations written out here, and transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hook_models import (
    ATTENTION,
    IDS,
    OTHER,
    SSM,
    STATES,
    B,
    L,
    build,
    recorded,
    recurrence,
)
from torch.nn import functional as F

import probes
from ssm_retrieval import models
from ssm_retrieval.models.hooks import points

# --- what is recorded --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATES)
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
        if name == "gated-deltanet":
            mixer, normed = model.blocks[i].mixer, model.blocks[i].norm(cache[f"blocks.{i}.hook_resid_pre"])
            dt = F.softplus(mixer.a_proj(normed) + mixer.dt_bias) * mask[..., None]
            torch.testing.assert_close(cache[at + "A_bar"], (-mixer.A_log.exp() * dt).exp())
            assert (cache[at + "beta"][~mask] == 0).all()
            continue
        if name in ("kda", "gla"):
            mixer, normed = model.blocks[i].mixer, model.blocks[i].norm(cache[f"blocks.{i}.hook_resid_pre"])
            if name == "kda":
                dt = F.softplus(mixer.f_proj(normed) + mixer.dt_bias).unflatten(-1, (4, 6))
                log = -mixer.A_log.exp()[:, None] * dt
            else:
                log = F.logsigmoid(mixer.gk_proj(normed)).unflatten(-1, (4, 6)) / 16
            torch.testing.assert_close(cache[at + "A_bar"], (log * mask[..., None, None]).exp())
            continue
        if name == "mamba3":
            mixer, normed = model.blocks[i].mixer, model.blocks[i].norm(cache[f"blocks.{i}.hook_resid_pre"])
            dt, A, lam = mixer.in_proj(normed).split(mixer.sizes, dim=-1)[4:7]
            dt = F.softplus(dt + mixer.dt_bias) * mask[..., None]
            decay = torch.exp(-dt * F.softplus(A).clamp(min=1e-4))
            torch.testing.assert_close(cache[at + "A_bar"], decay)
            torch.testing.assert_close(cache[at + "now"], lam.sigmoid() * dt)
            torch.testing.assert_close(cache[at + "before"], dt - lam.sigmoid() * dt)
            continue
        A, dt = -model.blocks[i].mixer.A_log.exp(), cache[at + "dt"]
        torch.testing.assert_close(cache[at + "A_bar"], (dt * A if A.dim() == 1 else dt[..., None] * A).exp())
        assert (dt[~mask] == 0).all()


@pytest.mark.parametrize("name", SSM)
@torch.no_grad()
def test_mixer_parts_give_its_output(name):
    """From the layer's input to its output, through the recorded parts."""
    model = build(name)
    cache, _ = recorded(model)
    block, at = model.blocks[1], "blocks.1.mixer.hook_"
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
    elif name == "linear":
        torch.testing.assert_close(cache[at + "in"], projected)
        torch.testing.assert_close(cache[at + "conv"], taps)
        Bt, Ct = mixer.x_proj(taps).split([5, 5], dim=-1)
        assert (cache[at + "dt"] == 1).all()
        out = mixer.out_proj(cache[at + "y"])
    else:
        z, x, dt = projected.split([32, 32 + 24, 4], dim=-1)
        torch.testing.assert_close(cache[at + "in"], x)
        u, Bt, Ct = F.silu(taps).split([32, 12, 12], dim=-1)
        torch.testing.assert_close(cache[at + "conv"].flatten(2), u)
        torch.testing.assert_close(cache[at + "dt"], F.softplus(dt + mixer.dt_bias))
        gated = (cache[at + "y"] * cache[at + "gate"]).flatten(2).unflatten(2, (2, 16))
        normed = gated / (gated.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
        out = mixer.out_proj(normed.flatten(2) * mixer.norm.weight)
    if name != "linear":
        torch.testing.assert_close(cache[at + "gate"].flatten(2), F.silu(z))
    torch.testing.assert_close(cache[at + "B"].flatten(2), Bt)
    torch.testing.assert_close(cache[at + "C"].flatten(2), Ct)
    torch.testing.assert_close(cache["blocks.1.hook_mixer_out"], out)


@pytest.mark.parametrize("name", ["deltanet", "gated-deltanet"])
@torch.no_grad()
def test_parts_of_the_delta_rule_give_its_output(name):
    model = build(name)
    cache, _ = recorded(model)
    block, at = model.blocks[1], "blocks.1.mixer.hook_"
    mixer, hidden = block.mixer, block.norm(cache["blocks.1.hook_resid_pre"])
    for letter, conv, scale in (
        ("q", mixer.q_conv1d, 6**-0.5),
        ("k", mixer.k_conv1d, 1),
        ("v", mixer.v_conv1d, 0),
    ):
        projected = mixer.get_submodule(f"{letter}_proj")(hidden)
        taps = F.silu(conv(F.pad(projected.transpose(1, 2), (3, 0)))).transpose(1, 2).unflatten(-1, (4, -1))
        want = scale * taps / (taps.square().sum(-1, keepdim=True) + 1e-6).sqrt() if scale else taps
        torch.testing.assert_close(cache[at + letter], want)
    torch.testing.assert_close(cache[at + "beta"], mixer.b_proj(hidden).sigmoid())
    y = cache[at + "y"]
    y = y / (y.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * mixer.o_norm.weight
    if name == "gated-deltanet":
        torch.testing.assert_close(cache[at + "gate"].flatten(2), F.silu(mixer.g_proj(hidden)))
        y = y * cache[at + "gate"]
    torch.testing.assert_close(cache["blocks.1.hook_mixer_out"], mixer.o_proj(y.flatten(2)))
    pre, r = cache["blocks.1.mlp.hook_pre"], block.mlp_norm(cache["blocks.1.hook_resid_mid"])
    torch.testing.assert_close(cache["blocks.1.mlp.hook_post"], F.silu(pre) * block.mlp.up_proj(r))


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
            mid = cache[at + "hook_resid_pre"] + next(iter(parts.values()))
            torch.testing.assert_close(cache[at + "hook_resid_mid"], mid)
    assert torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])
    assert torch.equal(model.head(cache["ln_final.hook_normalized"]), logits)


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
