"""Bad values of every field of every config: one line, where it is made, that names field and value."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ssm_retrieval import models
from ssm_retrieval.errors import UserError
from ssm_retrieval.models.registry import ARCHITECTURES

CONFIGS = {name: record.config for name, record in ARCHITECTURES.items()}
ZERO_MEANS_DEFAULT = ("dt_rank", "d_mlp", "window")
MAY_BE_ZERO = (*ZERO_MEANS_DEFAULT, "norm_eps", "embedding_std", "init_std")
FIELDS = [(name, field) for name, kind in CONFIGS.items() for field in dataclasses.fields(kind)]


def wrong(field):
    """Values that no field of this name and kind can have."""
    if field.type == "bool":
        return [None, 1, "yes"]
    if field.type == "str":
        return [None, "", "other", 3, ["rms"]]
    both = [None, "3", [1], True, -1, math.nan, math.inf, -math.inf, 10**400, 3j]
    both += [] if field.name in MAY_BE_ZERO or field.name == "rotary_pct" else [0]
    return both + ([2.0, 2.5, np.float32(2)] if field.type == "int" else [])


@pytest.mark.parametrize("name, field", FIELDS, ids=[f"{name}-{field.name}" for name, field in FIELDS])
def test_every_field_refuses_what_it_cannot_be(name, field):
    for value in wrong(field):
        with pytest.raises(UserError) as caught:
            CONFIGS[name](**{field.name: value})
        said = str(caught.value)
        assert f"{field.name}={value!r}"[:20] in said and "\n" not in said and len(said) < 250, said


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("mamba", dict(dt_min=0.2), "dt_min=0.2 is above dt_max=0.1; exchange them or change one"),
        ("mamba2", dict(dt_min=0.1, dt_max=0.01), "dt_min=0.1 is above dt_max=0.01"),
        ("mamba", dict(dt_min=1e-6, dt_max=1e-5), "dt_max=1e-05 is not supported; use 0.0001 or more"),
        ("mamba", dict(dt_min=0.0), "dt_min=0.0 is not supported; use a number above 0"),
        ("mamba", dict(dt_rank=-1), "dt_rank=-1 is not supported; use 0 or more"),
        ("transformer", dict(d_mlp=-4), "d_mlp=-4 is not supported; use 0 or more"),
        ("hybrid", dict(d_mlp=-4), "d_mlp=-4 is not supported; use 0 or more"),
        ("mamba", dict(norm="batch"), "norm='batch' is unknown; use 'rms', 'layer'"),
        ("hybrid", dict(norm="batch"), "norm='batch' is unknown"),
        ("mamba", dict(n_layer=10**9), "n_layer=1000000000 is not supported; use 1 to 100000"),
        ("hybrid", dict(n_layer=10**9), "n_layer=1000000000 is not supported"),
        ("hybrid", dict(pattern="M2 A", headdim=100), "headdim=100 does not divide d_inner=2048"),
        ("hybrid", dict(d_state=300), "d_state=300 is not supported; use 1 to 256"),
        (
            "transformer",
            dict(d_model=16, n_head=4),
            "rotary_pct=0.25 of heads with 4 dimensions rotates none",
        ),
        ("transformer", dict(rotary_pct=0), "rotary_pct=0 of heads with 64 dimensions rotates none"),
        ("hybrid", dict(d_model=32, n_head=8), "rotary_pct=0.25 of heads with 4 dimensions rotates none"),
    ],
)
def test_values_that_do_not_fit_each_other(name, options, said):
    with pytest.raises(UserError) as caught:
        models.config(name, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError):
        dataclasses.replace(models.config(name), **options)


def test_ends_of_the_ranges_are_allowed_and_build():
    """Nothing that works is refused: the smallest model of each family, zeros that mean a default."""
    for name, options in (
        ("transformer", dict(n_head=1, position="none", rotary_pct=0, max_position_embeddings=1, init_std=0)),
        ("transformer", dict(d_model=2, n_head=1, rotary_pct=1, d_mlp=1, rope_theta=10000)),
        ("transformer", dict(d_model=8, n_head=1, rotary_pct=0.25)),
        ("mamba", dict(d_state=1, d_conv=1, expand=1, dt_rank=1, dt_min=0.1, dt_max=0.1, norm_eps=0)),
        ("mamba", dict(d_state=np.int64(256), dt_max=1e-4, dt_min=1e-9, embedding_std=0)),
        ("mamba2", dict(d_state=1, headdim=1, expand=1, chunk_size=1)),
        ("hybrid", dict(n_head=1, pattern="A", position="learned")),
    ):
        model = models.build(name, **(dict(vocab_size=1, d_model=1, n_layer=1) | options))
        assert model(torch.zeros(1, 1, dtype=torch.int64)).isfinite().all(), options


def test_rope_that_is_accepted_rotates():
    """The last token of one layer sees the order of those before it, which it does not without positions."""
    for d_head, share in ((2, 1.0), (8, 0.25), (5, 0.4)):
        model = models.build(
            "transformer",
            vocab_size=9,
            d_model=2 * d_head,
            n_head=2,
            n_layer=1,
            rotary_pct=share,
            init_std=1.0,
        ).double()
        a, b = model(torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]))[:, -1]
        assert not torch.allclose(a, b, rtol=1e-3)


def test_from_config_refuses_anything_else_in_one_line():
    class Other(CONFIGS["mamba"]):
        pass

    for thing in ({"d_model": 16}, "mamba-tiny", None, CONFIGS["mamba"], Other()):
        with pytest.raises(
            UserError, match="a model's config is one of TransformerConfig, MambaConfig, Mamba2Config"
        ):
            models.from_config(thing)
