"""bfloat16 loses no more than it must: what stays float32, and errors beside the peer's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from probes import record
from ssm_retrieval import models
from ssm_retrieval.models.layers import RMSNorm
from ssm_retrieval.models.mamba2 import GatedRMSNorm

VOCAB, WIDTH = 61, 48
IDS = torch.randint(0, VOCAB, (4, 80), generator=torch.Generator().manual_seed(0))


# --- beside transformers -----------------------------------------------------------------------------


def mamba_pair(transformers, layers, **more):
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=layers, state_size=8, use_cache=False, **more
    )
    return transformers.MambaForCausalLM(config), "mamba-130m", dict(d_state=8, **more)


def mamba2_pair(transformers, layers, **more):
    config = transformers.Mamba2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=layers, state_size=8, head_dim=16, num_heads=6,
        n_groups=1, chunk_size=32, use_cache=False, tie_word_embeddings=True, **more,
    )  # fmt: skip
    shape = dict(d_state=8, headdim=16, chunk_size=32)
    return transformers.Mamba2ForCausalLM(config), "mamba2-130m", shape | more


def gpt_neox_pair(transformers, layers):
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * WIDTH, hidden_dropout=0.0, attention_dropout=0.0, use_cache=False,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config), "pythia-160m", dict(n_head=4)


@torch.no_grad()
def pair(make, layers, **more):
    """(theirs, ours) with the same random weights, which are numbers of bfloat16 held in float32."""
    torch.manual_seed(0)
    theirs, name, options = make(pytest.importorskip("transformers"), layers, **more)
    for w in theirs.parameters():
        w.copy_((w + 0.1 * torch.randn_like(w)).bfloat16())
    ours = models.build(name, vocab_size=VOCAB, d_model=WIDTH, n_layer=layers, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def error(logits: Tensor, exact: Tensor) -> float:
    """Root mean square error relative to the root mean square."""
    return float((logits.double() - exact).norm() / exact.norm())


@torch.no_grad()
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("make", [mamba_pair, mamba2_pair, gpt_neox_pair])
def test_bfloat16_costs_no_more_than_in_transformers(make, how):
    """Errors of logits against the same weights in float64: at most a tenth more than the library's own."""
    theirs, ours = pair(make, layers=4)
    exact = copy.deepcopy(ours).double()(IDS)
    if how == "weights":
        got, want = ours.bfloat16()(IDS), theirs.bfloat16()(IDS).logits
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got, want = ours(IDS), theirs(IDS).logits
    assert got.dtype == torch.bfloat16
    assert 1e-4 < error(got, exact) < 1.1 * error(want, exact) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("make", [mamba_pair, mamba2_pair])
def test_a_float32_residual_pays_off_over_many_layers(make):
    errors = {}
    for wide in (True, False):
        theirs, ours = pair(make, layers=20, residual_in_fp32=wide)
        exact = copy.deepcopy(ours).double()(IDS)
        errors[wide] = error(ours.bfloat16()(IDS), exact)
        assert errors[wide] < 1.1 * error(theirs.bfloat16()(IDS).logits, exact)
    assert errors[True] < 0.95 * errors[False]


# --- by hand -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", "transformer-tiny", "hybrid-tiny"])
def test_residual_in_fp32_decides_where_blocks_are_added_up(name, wide):
    """The last norm reads the embedding plus what every block has added, each sum rounded or not."""
    options = dict(position="none", parallel_residual=False) if name.startswith("transformer") else {}
    model = models.build(name, vocab_size=VOCAB, residual_in_fp32=wide, dtype=torch.bfloat16, **options)
    blocks, norm = model.blocks, model.norm
    added, read = [], []
    for block in blocks:
        parts = (block.mixer,) if hasattr(block, "mixer") else (block.attention, block.mlp)
        for part in parts:
            part.register_forward_hook(lambda module, args, out: added.append(out))
    norm.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    model(IDS)
    assert {out.dtype for out in added} == {torch.bfloat16}
    kind = torch.float32 if wide else torch.bfloat16
    by_hand = model.embedding.weight[IDS].to(kind)
    for out in added:
        by_hand = (by_hand.float() + out.float()).to(kind)
    assert read[0].dtype == kind and torch.equal(read[0], by_hand)


@torch.no_grad()
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_step_sizes_and_decays_stay_float32(name, how):
    """dt = softplus(projection + bias), A_bar = exp(dt A): by hand in float64 from bfloat16 projections."""
    model = models.build(name, vocab_size=VOCAB, n_layer=1, d_model=64)
    model = model.bfloat16() if how == "weights" else model
    mixer = model.blocks[0].mixer
    projected = []
    last = mixer.x_proj if name == "mamba-tiny" else mixer.in_proj
    last.register_forward_hook(lambda module, args, out: projected.append(out))
    names = ["blocks.0.mixer.hook_dt", "blocks.0.mixer.hook_A_bar"]
    context = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
    with context, record(model, names) as seen:
        model(IDS)
    assert projected[0].dtype == torch.bfloat16
    if name == "mamba-tiny":
        low = projected[0][..., : mixer.config.rank]
        raw, bias = (low @ mixer.dt_proj.weight.bfloat16().T).double(), mixer.dt_proj.bias.double()
    else:
        raw, bias = projected[0][..., -mixer.config.n_head :].double(), mixer.dt_bias.double()
    dt = F.softplus(raw + bias)
    A = -torch.exp(mixer.A_log.double())
    A_bar = torch.exp(dt.unsqueeze(-1) * A) if name == "mamba-tiny" else torch.exp(dt * A)
    got_dt, got_A_bar = (seen[hook] for hook in names)
    torch.testing.assert_close(got_dt.double(), dt, rtol=1e-5, atol=0)
    torch.testing.assert_close(got_A_bar.double(), A_bar, rtol=1e-5, atol=1e-30)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_norms_round_once(gated):
    """What leaves a norm is its float64 value rounded to the weights' bfloat16, then times the weight."""
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 50, 64, generator=generator), torch.randn(2, 50, 64, generator=generator)
    norm = (GatedRMSNorm(64, ngroups=2, eps=1e-5) if gated else RMSNorm(64)).bfloat16()
    norm.weight.copy_(1 + 0.1 * torch.randn(64, generator=generator))
    got = norm(x, F.silu(z.bfloat16().float())) if gated else norm(x)
    exact = x.double() * F.silu(z.bfloat16().double()) if gated else x.double()
    groups = exact.unflatten(-1, (2 if gated else 1, -1))
    exact = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
    assert got.dtype == torch.bfloat16
    assert (got != exact.bfloat16() * norm.weight).double().mean() < 2e-3  # float32 may round a tie
