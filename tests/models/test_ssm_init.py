"""`ssm_init`: each part against its closed form in a built model, and nothing else changed by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import probes
from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.configuration import SSM_INITS

FAMILIES = {
    "mamba": ("mamba-tiny", dict(n_layer=2)),
    "mamba2": ("mamba2-tiny", dict(n_layer=2, headdim=8, ngroups=2)),
    "hybrid": ("hybrid-tiny", dict(n_layer=4, n_head=2, pattern="M M2+A", headdim=8)),
}
SHAPE = dict(vocab_size=23, d_model=16, d_state=6)
IDS = torch.randint(0, 23, (2, 12), generator=torch.Generator().manual_seed(0))
WITH = {
    part: [value for value in SSM_INITS if part in value or value == "recall"]
    for part in ("identity", "long", "tied")
}


def build(family: str, ssm_init: str, **more) -> models.LanguageModel:
    name, options = FAMILIES[family]
    return models.build(name, **{**SHAPE, **options, **more}, ssm_init=ssm_init)


@torch.no_grad()
def recorded(model: models.LanguageModel) -> dict[str, torch.Tensor]:
    with probes.record(model, "blocks.*") as found:
        model(IDS)
    return dict(found)


def each(found: dict[str, torch.Tensor], hook: str) -> list[torch.Tensor]:
    values = [value for name, value in found.items() if name.endswith(f"mixer.{hook}")]
    assert values
    return values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ssm_init", WITH["identity"])
def test_an_identity_convolution_returns_its_input(family, ssm_init):
    """u_t = silu(x_t), and in Mamba-2 the same of B and C."""
    for d_conv in (1, 2, 4):
        found = recorded(build(family, ssm_init, d_conv=d_conv))
        outputs = zip(*(each(found, f"hook_{name}") for name in ("in", "conv", "B", "C")), strict=True)
        for x, u, B, C in outputs:
            if x.shape[-1] > u.flatten(2).shape[-1]:  # Mamba-2 convolves x, B and C together
                u = torch.cat([part.flatten(2) for part in (u, B, C)], dim=-1)
            torch.testing.assert_close(u, F.silu(x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ssm_init", WITH["long"])
def test_a_long_memory_keeps_everything(family, ssm_init):
    """dt = 1 and exp(dt A) = exp(-exp(-8)) = 0.99966 at every token, however large the embedding."""
    found = recorded(build(family, ssm_init, embedding_std=10.0))
    for dt, A_bar in zip(each(found, "hook_dt"), each(found, "hook_A_bar"), strict=True):
        torch.testing.assert_close(dt, torch.ones_like(dt))
        torch.testing.assert_close(A_bar, torch.full_like(A_bar, math.exp(-math.exp(-8))))
        assert A_bar.min() > 0.999


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ssm_init", SSM_INITS)
def test_tied_projections_make_c_equal_b_at_every_token(family, ssm_init):
    found = recorded(build(family, ssm_init))
    for B, C in zip(each(found, "hook_B"), each(found, "hook_C"), strict=True):
        same = (B - C).abs().amax(-1) < 1e-6
        assert same.all() if ssm_init in WITH["tied"] else not same.any()


@torch.no_grad()
def test_recall_is_causal_linear_attention():
    """Of one Mamba layer: y_t = sum_{s <= t} lambda^(t-s) (B_t . B_s) u_s + u_t, lambda = exp(-exp(-8))."""
    model = build("mamba", "recall", n_layer=1).double()
    mixer = model.blocks[0].mixer
    hidden = torch.randn(2, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, z = (hidden @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    u = F.silu(x)
    B = (u @ mixer.x_proj.weight.T)[..., mixer.config.rank :][..., :6]
    elapsed = torch.arange(12)[:, None] - torch.arange(12)
    decay = torch.exp(-math.exp(-8) * elapsed).double().tril()
    y = (decay * (B @ B.mT)) @ u + u
    torch.testing.assert_close(mixer(hidden), (y * F.silu(z)) @ mixer.out_proj.weight.T)


@pytest.mark.parametrize("ssm_init", SSM_INITS[1:])
def test_all_other_weights_of_mamba_are_those_of_the_default(ssm_init):
    changed = {
        "identity": ("conv1d.weight", "conv1d.bias"),
        "long": ("A_log", "dt_proj.weight", "dt_proj.bias"),
        "tied": ("x_proj.weight",),
    }
    wanted = {name for part, names in changed.items() if ssm_init in WITH[part] for name in names}
    ours, theirs = (build("mamba", value).state_dict() for value in (ssm_init, "default"))
    differ = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert differ == {f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in wanted}
    rows = 1 + 6  # dt and B: x_proj makes them before C
    for i in (0, 1):
        name = f"backbone.layers.{i}.mixer.x_proj.weight"
        assert torch.equal(ours[name][:rows], theirs[name][:rows])


def mamba2_weights(ssm_init: str) -> dict[str, torch.Tensor]:
    """Of one layer, what is made of x, B, C and dt apart: in_proj's rows and the convolution's channels."""
    weights = dict(build("mamba2", ssm_init).blocks[1].mixer.state_dict())
    rows = dict(
        zip(("z", "x", "B", "C", "dt"), weights.pop("in_proj.weight").split([32, 32, 12, 12, 4]), strict=True)
    )
    taps = dict(zip(("x", "B", "C"), weights.pop("conv1d.weight").split([32, 12, 12]), strict=True))
    return weights | {f"rows {k}": v for k, v in rows.items()} | {f"taps {k}": v for k, v in taps.items()}


@pytest.mark.parametrize("ssm_init", SSM_INITS[1:])
def test_all_other_weights_of_mamba_2_are_those_of_the_default(ssm_init):
    changed = {
        "identity": ("taps x", "taps B", "taps C", "conv1d.bias"),
        "long": ("A_log", "dt_bias", "rows dt"),
        "tied": ("rows C", "taps C", "conv1d.bias"),
    }
    wanted = {name for part, names in changed.items() if ssm_init in WITH[part] for name in names}
    ours, theirs = mamba2_weights(ssm_init), mamba2_weights("default")
    assert {name for name in theirs if not torch.equal(ours[name], theirs[name])} == wanted


def test_other_names_of_parts_are_one_line():
    with pytest.raises(UserError, match=r"ssm_init='tied\+identity' is unknown; use 'default', .* 'recall'$"):
        models.build("mamba-tiny", ssm_init="tied+identity")
