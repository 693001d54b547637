"""Hybrids by pattern, their parents' options, and parallel blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from probes import ablation
from probes.patch_sites import SITES, has_site, residuals, run_from
from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.hybrid import HybridConfig
from ssm_retrieval.registry import ARCHITECTURES

IDS = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = dict(vocab_size=23, d_model=16, n_head=2, d_mlp=24, headdim=8, rotary_pct=0.5)

# What Retrievit's 12 hybrids are, and their parameters without embeddings in millions (its configs/model).
PUBLISHED = [
    ("M A", 16, 154.09),
    ("M M A", 18, 155.57),
    ("M M M A", 20, 162.98),
    ("M M M M A", 20, 157.05),
    ("M2 A", 16, 151.72),
    ("M2 M2 A", 18, 152.01),
    ("M2 M2 M2 A", 20, 158.53),
    ("M2 M2 M2 M2 A", 20, 152.31),
    ("M+A", 8, 154.09),
    ("A+M", 8, 154.09),
    ("M2+A", 8, 151.72),
    ("A+M2", 8, 151.72),
]


@pytest.mark.parametrize("pattern, n_layer, millions", PUBLISHED)
def test_published_hybrids_have_their_parameters(pattern, n_layer, millions):
    model = models.build("hybrid-150m", pattern=pattern, n_layer=n_layer, device="meta")
    assert round(model.num_parameters(embeddings=False) / 1e6, 2) == millions


@pytest.mark.parametrize(
    "pattern, letters",
    [
        ("A", "AAAAAA"),
        ("M A", "MAMAMA"),
        ("M M A", "MMAMMA"),
        ("A M M2", "AM2AM2"),
        ("mamba2 MAMBA a", "2MA2MA"),
        ("  m  m2   attention ", "M2AM2A"),
    ],
)
def test_blocks_follow_the_pattern(pattern, letters):
    model = models.build("hybrid-tiny", **SMALL, pattern=pattern, n_layer=6)
    kinds = {"MambaMixer": "M", "Mamba2Mixer": "2"}
    got = [kinds[type(b.mixer).__name__] if hasattr(b, "mixer") else "A" for b in model.blocks]
    assert "".join(got) == letters


def test_a_model_has_one_spelling():
    config = HybridConfig(pattern=" mamba2+Attention a", **SMALL)
    assert config.pattern == "M2+A A" and config == HybridConfig(pattern="M2+A A", **SMALL)


@pytest.mark.parametrize(
    "pattern, n_layer, said",
    [
        ("M M A", 4, "n_layer=4 is not a multiple of the 3 blocks of pattern='M M A'; change one"),
        (
            "M X A",
            3,
            "pattern='M X A' has the unknown block 'X'; blocks are M, M2, A (mamba, mamba2, attention)",
        ),
        ("M+", 3, "pattern='M+' has the unknown block 'M+'; blocks are"),
        ("M+M2", 3, "'M+M2' must be one SSM and attention, such as M+A or A+M2"),
        ("A+A", 3, "'A+A' must be one SSM and attention"),
        ("M+A+M2", 3, "'M+A+M2' must be one SSM and attention"),
        ("  ", 3, "pattern='  ' is empty; blocks are M, M2, A"),
        (3, 3, "pattern=3 must be a string"),
    ],
)
def test_impossible_patterns_give_one_line(pattern, n_layer, said):
    with pytest.raises(UserError) as caught:
        HybridConfig(pattern=pattern, n_layer=n_layer)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# a value unlike the default for every option that a parent has
OTHER = dict(
    ssm_init="recall",
    vocab_size=29, d_model=32, n_layer=4, d_state=8, d_conv=3, expand=3, dt_rank=5, dt_min=0.01, dt_max=0.05,
    headdim=4, ngroups=2, chunk_size=16, n_head=4, d_mlp=40, position="none", rotary_pct=0.5, rope_theta=99.0,
    max_position_embeddings=77, parallel_residual=False, norm="layer", norm_eps=1e-3, residual_in_fp32=False,
    tie_word_embeddings=False, embedding_std=0.3, init_std=0.4, window=7,
)  # fmt: skip


def test_every_option_of_the_parents_reaches_their_blocks():
    defaults = HybridConfig()
    assert all(getattr(defaults, name) != value for name, value in OTHER.items())
    model = models.from_config(HybridConfig(pattern="M M2 A M2+A", **OTHER))
    parallel = model.blocks[3]
    blocks = {"mamba": [model.blocks[0].mixer], "mamba2": [model.blocks[1].mixer, parallel.mixer]}
    blocks["transformer"] = [model.blocks[2], parallel.attention]
    for name in blocks:
        kind = ARCHITECTURES[name].config
        fields = [field.name for field in dataclasses.fields(kind)]
        assert set(fields) <= set(OTHER), f"{kind.__name__} has options that a hybrid lacks"
        for block in blocks[name]:
            assert {f: getattr(block.config, f) for f in fields} == {f: OTHER[f] for f in fields}
    assert model.blocks[0].mixer.dt_proj.in_features == 5
    assert model.blocks[1].mixer.conv1d.in_channels == 96 + 2 * 2 * 8


@pytest.mark.parametrize("pattern, alone", [("M+A", "mamba"), ("M2+A", "mamba2"), ("A+M", "transformer")])
@torch.no_grad()
def test_a_second_branch_starts_switched_off(pattern, alone):
    """beta = 0: the model is that of its first branch alone, with the same weights."""
    hybrid = models.build("hybrid", **SMALL, n_layer=3, pattern=pattern, seed=4).double()
    shared = [f.name for f in dataclasses.fields(type(models.config(alone))) if f.name in dir(HybridConfig)]
    options = {name: getattr(hybrid.config, name) for name in shared}
    options |= {} if alone == "transformer" else {"position": "none"}  # the hybrid's is attention's
    plain = models.from_config(models.config(alone, **options)).double()
    for ours, theirs in zip(hybrid.blocks, plain.blocks, strict=True):
        theirs.load_state_dict((ours.attention if alone == "transformer" else ours.ssm).state_dict())
    plain.embedding.load_state_dict(hybrid.embedding.state_dict())
    plain.norm.load_state_dict(hybrid.norm.state_dict())
    assert all(block.beta.item() == 0 for block in hybrid.blocks)
    torch.testing.assert_close(hybrid(IDS), plain(IDS))
    for block in hybrid.blocks:
        block.beta.fill_(0.5)
    assert not torch.allclose(hybrid(IDS), plain(IDS), atol=1e-3)


@pytest.mark.parametrize("pattern", ["M+A", "A+M2"])
@torch.no_grad()
def test_the_second_branch_counts_by_the_tanh_of_beta(pattern):
    """At beta = artanh(1/2) it counts half of what it does at infinity."""
    model = models.build("hybrid", **SMALL, n_layer=1, pattern=pattern, seed=4).double()
    block = model.blocks[0]

    def stream(beta):
        block.beta.fill_(beta)
        seen = []
        handle = model.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        model(IDS)
        handle.remove()
        return seen[0]

    off, half, full = stream(0.0), stream(torch.atanh(torch.tensor(0.5).double()).item()), stream(50.0)
    torch.testing.assert_close(half - off, (full - off) / 2)
    assert (full - off).abs().max() > 1e-3


def test_beta_learns_from_the_start():
    model = models.build("hybrid", **SMALL, n_layer=2, pattern="M+A", seed=4)
    loss, _ = model.loss(IDS, labels=IDS.roll(-1, 1))
    loss.backward()
    for block in model.blocks:
        assert block.beta.grad.abs().item() > 0
        assert block.mixer.in_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_probes_swap_only_what_they_know_of_a_parallel_block():
    """The residual stream at every block; states and heads where a branch is not scaled."""
    model = models.build("hybrid", **SMALL, n_layer=3, pattern="M+A M A", seed=4)
    kinds = [[site for site in SITES if has_site(block, site)] for block in model.blocks]
    assert kinds == [["residual"], ["residual", "state"], ["residual", "head"]]
    with pytest.raises(UserError, match="block 0 has SSM and attention side by side"):
        ablation.parts(model, 0)
    x = residuals(model, IDS)
    torch.testing.assert_close(run_from(model, 0, x[0][None], None, -1)[0], model(IDS)[:, -1])
