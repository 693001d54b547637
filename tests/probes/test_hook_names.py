"""Names of hook points: axes, order, patterns, blocks of a user; bad requests give one line."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hook_models import (
    ATTENTION,
    FAMILIES,
    IDS,
    B,
    L,
    build,
    recorded,
)
from torch import nn

import probes
from probes.names import layer_of, local_name, resolve
from ssm_retrieval import models
from ssm_retrieval.models.hooks import Hooked, points


def test_every_name_has_the_documented_axes(model, family):
    cache, _ = recorded(model)
    assert list(cache) == model.hook_names()
    for name, point in points(model).items():
        axes, *others = probes.NAMES[local_name(name)][0].split("; ")
        kinds = {"mamba2": ["Mamba-2 "], "hybrid-mamba2": ["Mamba-2 "]}
        kinds |= {name: ["delta rule "] for name in ("mamba3", "deltanet", "gated-deltanet")}
        kinds |= {name: ["KDA and GLA ", "delta rule "] for name in ("kda", "gla")}
        found = (o.removeprefix(kind) for kind in kinds.get(family, ()) for o in others if o.startswith(kind))
        axes = next(found, axes)
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
        first = "mixer.hook_q" if family == "mamba3" else "mixer.hook_in"
        assert blocks.index(first) < blocks.index("mixer.hook_y") < blocks.index("hook_mixer_out")
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
